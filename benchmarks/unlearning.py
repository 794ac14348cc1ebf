"""Unlearning: one training step with the kept reference against a loop with a second model, in time and memory."""

import copy
import multiprocessing
import os
import resource
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import surgery
from benchmarks.block import synchronize
from surgery.data import genbias
from surgery.data.stereoset import Triple
from surgery.edits.supervised import Lora, Row, adapters
from surgery.edits.unlearning import (
    BatchSampler,
    Objective,
    batch_losses,
    batch_weights,
    encode_triples,
    reference,
)
from surgery.training import trainable

STEPS, WEIGHTS = 4, {"forget": 0.4, "retain": 0.4, "unrelated": 0.2}
SIZES = {"forget": 4, "retain": 28, "unrelated": 4}
BETA = 0.1


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Medians of the same chunks of sentences about the shipped professions, each way in a process of its own."""
    (spec,) = arguments
    context = multiprocessing.get_context("spawn")
    found = {}
    for way in ("kept reference", "second model"):
        with context.Pool(1) as pool:
            found[way] = pool.apply(measure, (spec, way))
        seconds, peak, base, extra = found[way]
        print(
            f"{way:15} {seconds:6.2f} s/step   peak {peak / 2**20:6.0f} MB, {(peak - base) / 2**20:6.0f} MB above the "
            f"opened model; the reference itself holds {extra / 2**20:6.1f} MB",
            flush=True,
        )
    (ours, peak, base, _), (theirs, their_peak, their_base, _) = found.values()
    less = (their_peak - their_base) / (peak - base)
    print(f"{theirs / ours:.2f} x the speed, {less:.2f} x less memory above the opened model")


def triples() -> list[Triple]:
    """Sentences like StereoSet's about the shipped professions; the benchmark needs no data."""
    rows = []
    for number, prompt in enumerate(genbias.records("profession", "train")[::6]):
        he, she, stone = (f"{prompt.text} {word} was in a hurry." for word in ("he", "she", "stone"))
        context = f"{prompt.text} BLANK was in a hurry."
        rows.append(
            Triple(prompt.profession, "gender", context, he, she, stone, id=str(number), kind="intrasentence", where="")
        )
    return rows


def measure(spec: str, way: str) -> tuple[float, int, int, int]:
    """Median seconds a step, peak and starting memory in bytes, and the bytes that hold the reference."""
    device = os.environ.get("BENCH_DEVICE", "cpu")
    model, tokenizer = surgery.load(spec, device=device)
    given = triples()
    rows = encode_triples(tokenizer, given, max_length=256).rows
    chunks = BatchSampler(("gender",) * len(rows), SIZES, seed=0)
    base = _memory(device)
    objective = Objective(WEIGHTS, "npo", BETA)
    if way == "second model":
        frozen = copy.deepcopy(model)
        extra = sum(p.numel() * p.element_size() for p in frozen.parameters())
    else:
        kept = reference(model, rows, *chunks.referenced(STEPS + 1))
        extra = 8 * len(kept.logp) + sum(s.numel() * s.element_size() for s in kept.stream.values())
    factors = batch_weights(SIZES, WEIGHTS)

    def ours(step: int) -> Tensor:
        items = chunks.items(step)
        each, _ = batch_losses(model, model, items, rows, kept, objective)
        return (each * each.new_tensor([factors[item.role] for item in items])).mean()

    def usual(step: int) -> Tensor:
        """As it is written first: a padded pass for each part, all positions through the head, a second model."""
        items = chunks.items(step)
        part = {role: [rows[item.triple][item.side] for item in items if item.role == role] for role in SIZES}
        forget, retain = (_logp(model, part[role], device) for role in ("forget", "retain"))
        with torch.no_grad():
            frozen_forget = _logp(frozen, part["forget"], device)
        ids, mask = _padded(part["unrelated"], device)
        new = model(ids, attention_mask=mask).logits.log_softmax(-1)
        with torch.no_grad():
            old = frozen(ids, attention_mask=mask).logits.log_softmax(-1)
        kl = ((old.exp() * (old - new)).sum(-1) * mask).sum(1) / mask.sum(1)
        npo = 2 / BETA * softplus(BETA * (forget - frozen_forget))
        return 0.4 * npo.mean() + 0.4 * -retain.mean() + 0.2 * kl.mean()

    loss = usual if way == "second model" else ours
    times = []
    with adapters(model, Lora(8, 16), 0):
        names = [name for name, _ in model.named_parameters() if ".lora_" in name]
        with trainable(model, names) as parameters:
            optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4, fused=True)
            for step in range(STEPS + 1):
                synchronize(model)
                start = time.perf_counter()
                optimizer.zero_grad()
                loss(step).backward()
                optimizer.step()
                synchronize(model)
                times.append(time.perf_counter() - start)
    return statistics.median(times[1:]), _memory(device, peak=True), base, extra


def _padded(rows: Sequence[Row], device: str) -> tuple[Tensor, Tensor]:
    width = max(len(row.ids) for row in rows)
    ids = torch.tensor([[*row.ids, *[0] * (width - len(row.ids))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in rows], device=device)
    return ids, mask


def _logp(net: nn.Module, rows: Sequence[Row], device: str) -> Tensor:
    ids, mask = _padded(rows, device)
    logs = net(ids, attention_mask=mask).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    starts = torch.tensor([[row.start] for row in rows], device=device)
    at = torch.arange(1, ids.shape[1], device=device)[None]
    return (logs * mask[:, 1:] * (at >= starts)).sum(1)


def _memory(device: str, *, peak: bool = False) -> int:
    """Bytes held now, or at the most; on a CPU the resident memory of this process."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    if peak:
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
