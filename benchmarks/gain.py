"""A location from gradients: the natural gain against plain forward passes over the same texts, time and memory.

python -m benchmarks gain                          # the checkpoint, in float32 on the CPU
python -m benchmarks gain --shape 8b --sketch      # a shape of benchmarks.scale, random bf16 weights, accelerator
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import AutoTokenizer

import surgery
from benchmarks.scale import SHAPES, drawn
from surgery.data import genbias, neutral
from surgery.forward.batching import by_length, pad
from surgery.forward.tokens import encode, word_ids
from surgery.locate.gain import GAIN_LIMIT, RETAIN, rank_by_gain
from surgery.locate.objectives import words_objective


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """As many prompts and neutral sentences as ``surgery locate --by gain`` takes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gain")
    parser.add_argument("model", help="a checkpoint; with --shape only its tokenizer is taken")
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--sketch", action="store_true", help="as of surgery locate")
    chosen = parser.parse_args(arguments)
    if chosen.shape:
        tokenizer: Any = AutoTokenizer.from_pretrained(chosen.model)
        model: Any = drawn(chosen.shape).eval()
    else:
        model, tokenizer = surgery.load(chosen.model, device="cpu", dtype=torch.float32)
    device = model.device
    prompts = [row.text for row in genbias.records("profession", "train")[:GAIN_LIMIT]]
    texts = neutral.sentences()[:RETAIN]
    ids, retained = encode(tokenizer, prompts), encode(tokenizer, texts)

    @torch.no_grad()
    def plain() -> None:
        for given in (ids, retained):
            for rows in by_length(given):
                model(**pad(given, rows, device).inputs(), use_cache=False)

    def gain() -> None:
        losses = words_objective(model, ids, word_ids(tokenizer, ("he", "she")))
        found = rank_by_gain(model, tokenizer, losses, len(ids), retain=texts, factored=chosen.sketch)
        found.ranking("natural")

    plain()
    once = min(_seconds(plain) for _ in range(2))
    on_device = device.type != "cpu"
    if on_device:
        torch.accelerator.reset_peak_memory_stats()
    held = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    taken = _seconds(gain)
    peak = f", peak {torch.accelerator.max_memory_allocated() / 1e9:.1f} GB" if on_device else ""
    print(
        f"gain            {len(ids)} prompts, {len(texts)} texts   {taken:6.1f} s  "
        f"{taken / once:5.2f} x a plain forward pass ({once:.2f} s); weights {held:.2f} GB{peak}"
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - start
