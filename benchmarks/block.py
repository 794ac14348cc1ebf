"""Block fine-tuning: the cached step against the plain one, and the whole operation against one forward pass."""

import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import surgery
from hooks import anatomy
from recipes import lftf
from surgery.data import genbias
from surgery.devices import keep_freed_memory
from surgery.edits.block import loss_of, names_of, word_loss
from surgery.forward.batching import Batch, pad
from surgery.forward.next_token import next_words
from surgery.forward.residual_cache import shortcut
from surgery.forward.tokens import encode, word_ids
from surgery.training import trainable

BATCH, PLAIN, CACHED = 32, 5, 25
Loss = Callable[[list[int]], Tensor]  # of each of some prompts


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Medians of steps on the same batches of 32 training prompts; ratios are what counts."""
    (spec,) = arguments
    device = os.environ.get("BENCH_DEVICE", "cpu")
    keep_freed_memory()  # as every command that trains does
    model, tokenizer = surgery.load(spec, device=device)
    train = encode(tokenizer, [row.text for row in genbias.records("profession", "train")])
    test = encode(tokenizer, [row.text for row in genbias.records("profession", "test")])
    words = word_ids(tokenizer, ["he", "she"])
    count = len(anatomy.find(model).blocks)
    print(f"{spec}, {model.dtype}, {device}, {torch.get_num_threads()} threads, {platform.processor() or 'cpu'}")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)).tolist()
    batches = [order[i * BATCH : (i + 1) * BATCH] for i in range(max(PLAIN, CACHED) + 1)]
    prefixes = next_words(model, train, words, keep=[count // 2, count - 1]).prefixes
    for label, block in (("last block", count - 1), ("middle block", count // 2)):
        prefix = prefixes[block]

        def plain(rows: list[int]) -> Tensor:
            batch: Batch = pad(train, rows, model.device)
            return word_loss(batch.at_last(model(**batch.inputs(), use_cache=False).logits), words)

        with trainable(model, names_of(model, [block])) as parameters:
            taken = prefix.steps(model)
            slow = step_time(model, parameters, plain, batches[: PLAIN + 1])
            with shortcut(model, start=block, words=words) as run:  # entered once a training

                def cached(rows: list[int]) -> Tensor:
                    return loss_of(run(taken(rows)))  # noqa: B023

                fast = step_time(model, parameters, cached, batches)
                bare = least_time(model, parameters, cached, batches)
        print(f"{label:13} plain {slow * 1e3:8.1f} ms/step   cached {fast * 1e3:7.1f} ms/step   {slow / fast:5.1f} x")
        print(
            f"{'':13} limit {bare * 1e3:8.1f} ms/step, its matrix products and Adam's pass alone: {slow / bare:.1f} x; "
            f"the cached step takes {fast / bare:.2f} times as long"
        )
    both = (*train, *test)
    forward = median_of(lambda: next_words(model, both, words, shortcuts=False), 2, model)
    with tempfile.TemporaryDirectory() as folder:
        settings = lftf.Settings(model=spec, lr=1e-4, controls=[], block="last")
        whole = median_of(lambda: lftf.run(model, tokenizer, settings, out=Path(folder) / "run"), 1, model)
    print(f"one plain forward pass over {len(both)} train and test prompts: {forward:.1f} s")
    print(
        "whole operation (rank, measure before, train, delta, apply on disk, measure after on test, hints and neutral "
        f"text, report): {whole:.1f} s   {whole / forward:.2f} x"
    )


def step_time(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], loss: Loss, batches: Sequence[list[int]]
) -> float:
    """Median seconds of an optimiser step on the parameters, the only ones that train; the first is not counted."""
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-5, fused=True)
    left = iter(batches)

    def step() -> None:
        optimizer.zero_grad()
        loss(next(left)).mean().backward()
        optimizer.step()

    step()
    return median_of(step, len(batches) - 1, model)


def least_time(
    model: torch.nn.Module, parameters: Mapping[str, torch.nn.Parameter], loss: Loss, batches: Sequence[list[int]]
) -> float:
    """Median seconds of what no design of that step can leave out: its matrix products, and Adam's pass over memory.

    They run one after the other, as in a step.
    """
    optimizer = torch.optim.Adam(parameters.values(), lr=1e-5, fused=True)
    todo = [*products(model, lambda: loss(batches[0]).mean().backward()), optimizer.step]
    with torch.no_grad():
        return median_of(lambda: [work() for work in todo], len(batches) - 1, model)


def products(model: torch.nn.Module, step: Callable[[], object]) -> list[Callable[[], object]]:
    """The matrix products of each linear layer that ``step`` calls, each in the way round that is quicker here.

    With the layer's own weights and as many rows as it gets: forward, and where they are asked for the gradients of the
    weights and of the rows.
    """
    found: list[Callable[[], object]] = []

    def note(layer: torch.nn.Linear, given: tuple[Tensor, ...], _: object) -> None:
        weight, rows = layer.weight.detach(), given[0].detach().flatten(0, -2)
        out = torch.ones(len(rows), len(weight), device=rows.device, dtype=rows.dtype)
        found.append(quicker(lambda: rows @ weight.T, lambda: weight @ rows.T.contiguous(), model))
        if layer.weight.requires_grad:
            found.append(quicker(lambda: out.T @ rows, lambda: rows.T @ out, model))
        if given[0].requires_grad:
            found.append(quicker(lambda: out @ weight, lambda: weight.T @ out.T.contiguous(), model))

    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        step()
    finally:
        for hook in hooks:
            hook.remove()
    return found


def quicker(one: Callable[[], object], other: Callable[[], object], model: torch.nn.Module) -> Callable[[], object]:
    """That of two ways to the same product which takes less time."""
    with torch.no_grad():
        return min((one, other), key=lambda way: median_of(way, 3, model))


def median_of(work: Callable[[], object], repeats: int, model: torch.nn.Module) -> float:
    """Median seconds of ``work``."""
    times = []
    for _ in range(repeats):
        synchronize(model)
        start = time.perf_counter()
        work()
        synchronize(model)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def synchronize(model: torch.nn.Module) -> None:
    """Wait for the accelerator, whose work is asynchronous."""
    if next(model.parameters()).device.type == "cuda":
        torch.cuda.synchronize()
