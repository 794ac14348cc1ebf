"""A location from gradients: the natural gain against plain forward passes over the same texts, time and memory."""

import time
from collections.abc import Callable, Sequence

import torch

import surgery
from hooks.natural_gain import GainConfig
from surgery.data import genbias, neutral
from surgery.forward.batching import by_length, pad
from surgery.forward.tokens import encode, word_ids
from surgery.locate.gain import GAIN_LIMIT, RETAIN, rank_by_gain
from surgery.locate.objectives import words_objective


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """128 prompts and 64 neutral sentences, in float32 on the CPU."""
    (spec,) = arguments
    model, tokenizer = surgery.load(spec, device="cpu")
    prompts = [row.text for row in genbias.records("profession", "train")[:GAIN_LIMIT]]
    texts = neutral.sentences()[:RETAIN]
    ids = encode(tokenizer, prompts)

    @torch.no_grad()
    def plain() -> None:
        for given in (ids, encode(tokenizer, texts)):
            for rows in by_length(given):
                model(**pad(given, rows, "cpu").inputs(), use_cache=False)

    def gain() -> None:
        losses = words_objective(model, ids, word_ids(tokenizer, ("he", "she")))
        rank_by_gain(model, tokenizer, losses, len(ids), retain=texts).ranking("natural")

    plain()
    once = min(_seconds(plain) for _ in range(2))
    taken = _seconds(gain)
    held = sum(p.numel() for p in model.parameters()) * 4 / 1e6
    print(
        f"gain            {len(ids)} prompts, {len(texts)} texts, {GainConfig.groups} groups   {taken:6.1f} s  "
        f"{taken / once:5.2f} x a plain forward pass ({once:.1f} s); weights {held:.0f} MB"
    )


def _seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
