"""CrAWD's module: what a token costs more than in the plain model, decoding with a KV cache and reading a prompt."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from transformers import DynamicCache

import surgery
from surgery.modules import cross_attention

PROMPT, TOKENS, ROUNDS, REFERENCE = 128, 24, 5, ["he", "she"]


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Medians over rounds in which the variants take turns; ratios are what counts."""
    (spec,) = arguments
    device = os.environ.get("BENCH_DEVICE", "cpu")
    model, tokenizer = surgery.load(spec, device=device)
    ids = torch.randint(5, 1000, (1, PROMPT), generator=torch.Generator().manual_seed(0)).to(device)
    with cross_attention.attached(model, tokenizer, reference=REFERENCE) as module:
        weights = cross_attention.weights_of(module)
    size = sum(tensor.numel() for name, tensor in weights.tensors.items() if name != "reference")
    share = size / sum(p.numel() for p in model.parameters())
    print(f"{spec}, {model.dtype}, {device}, {torch.get_num_threads()} threads, {platform.processor() or 'cpu'}")
    print(f"module: {size:,} parameters, {100 * share:.1f} % of the model's; reference words {', '.join(REFERENCE)}")
    variants: dict[str, Callable[[], Any]] = {
        "plain": nullcontext,
        "module, stored reference states": lambda: cross_attention.reattached(model, weights),
        "module, states checked against the weights": lambda: cross_attention.attached(
            model, tokenizer, reference=REFERENCE, live=True
        ),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, variant in variants.items():
            with variant():
                times[name].append(once(model, ids))
    plain: tuple[float, float] | None = None
    for name, found in times.items():
        decode, prefill = (statistics.median(column) for column in zip(*found[1:], strict=True))
        plain = plain or (decode, prefill)
        print(
            f"{name:44} decode {decode * 1e3:7.2f} ms/token {decode / plain[0]:5.2f} x   "
            f"prompt of {PROMPT} {prefill * 1e3:8.1f} ms {prefill / plain[1]:5.2f} x"
        )


@torch.no_grad()
def once(model: Any, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of one decoded token (the median of some) behind the prompt, and of the prompt itself."""
    cache = DynamicCache(config=model.config)
    start = now(model)
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefill = now(model) - start
    steps = []
    for _ in range(TOKENS):
        start = now(model)
        logits = model(logits[:, -1].argmax(-1, keepdim=True), past_key_values=cache, use_cache=True).logits
        steps.append(now(model) - start)
    return statistics.median(steps), prefill


def now(model: torch.nn.Module) -> float:
    """The time, once the accelerator, whose work is asynchronous, is done."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
