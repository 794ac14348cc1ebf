"""Ten children of a checkpoint and its noisy relatives: how far each lies, and how much of an edit works there.

    python -m benchmarks children --delta runs/demo/delta.safetensors --data DATA [--limit 0] [--steps 1.0]

The table of docs/delta.md. A child is the checkpoint fine-tuned, all parameters, in batches of 8 texts; its distance is
the largest over the edit's matrices, ||child - base|| / ||base||. All on the test prompts, in memory. Last, how well a
line through the logarithm of the distance, or through the child's own gap, foretells the child that is left out.
"""

import argparse
import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import surgery
from surgery.data import neutral
from surgery.data.prompts import load_prompt_set
from surgery.data.texts import Example
from surgery.delta import Delta
from surgery.delta.live import touched
from surgery.edits.supervised import encode_rows, fine_tune
from surgery.metrics.metric import Metric
from surgery.survive import share, words_question
from surgery.training import Plan

CHILDREN = (
    ("neutral", 30, 1e-5), ("wiki", 50, 2e-5), ("bios", 60, 2e-5), ("news", 60, 2e-5), ("piqa", 60, 5e-5),
    ("neutral", 80, 5e-5), ("wiki", 80, 1e-4), ("bios", 80, 1e-4), ("piqa", 80, 2e-4), ("news", 80, 2e-4),
)  # fmt: skip
NOISE = (0.01, 0.03, 0.1)  # of a matrix's norm
BATCH, LENGTH = 8, 64


def texts(kind: str, data: Path) -> list[str]:
    """What a child reads; ``data`` is the folder of data sets."""
    if kind == "neutral":
        return list(neutral.sentences())
    if kind == "news":
        return [" ".join(row[1:]) for row in csv.reader((data / "factual/ag_news_test.csv").open())]
    if kind == "bios":
        rows = list(csv.DictReader((data / "bias_in_bios/bios_28_professions.csv").open()))
        longest = max(rows[0], key=lambda column: len(rows[0][column] or ""))
        return [row[longest] for row in rows]
    name = {"piqa": "capability/piqa_validation.jsonl", "wiki": "factual/wikitext_sentences_1000.jsonl"}[kind]
    found = [json.loads(line) for line in (data / name).open()]
    if kind == "piqa":
        return [f"{row['question']} {row['answer'][3:]}" for row in found]
    return [row if isinstance(row, str) else next(v for v in row.values() if isinstance(v, str)) for row in found]


def left_out(sign: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """By how much a line drawn through the others misses each child."""
    others = [np.arange(len(kept)) != place for place in range(len(kept))]
    lines = [np.polyfit(sign[chosen], kept[chosen], 1) for chosen in others]
    return kept - np.array([np.polyval(line, value) for line, value in zip(lines, sign, strict=True)])


class Bench:
    """The checkpoint, its edit, and their gaps."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.delta = given, Delta.load(given.delta)
        self.model, self.tokenizer = surgery.load(given.model)
        self.parameters = dict(self.model.named_parameters())
        self.base = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.names = [name for name in touched(self.delta, self.model).parameters if self.base[name].ndim > 1]
        prompts = load_prompt_set("genbias")
        self.measure = words_question(self.model, self.tokenizer, prompts, limit=given.limit).measure
        self.known = self.gaps(self.base)

    def gaps(self, state: Mapping[str, Tensor]) -> tuple[Metric, Metric]:
        """Of ``state`` and of the edit on it."""
        with torch.no_grad():
            for name, value in state.items():
                self.parameters[name].copy_(value)
        before = self.measure("")
        with self.delta.applied(self.model, force=True):
            return before, self.measure("")

    def states(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        for kind, steps, rate in CHILDREN:
            self.gaps(self.base)
            lines = [text for text in texts(kind, self.given.data) if text.strip()]
            count = max(1, round(steps * self.given.steps)) * BATCH
            chosen = [Example("", lines[number % len(lines)]) for number in range(count)]
            rows = encode_rows(self.tokenizer, chosen, max_length=LENGTH).rows
            found = fine_tune(self.model, rows, Plan(rate, 1, BATCH, optimizer="adamw"), seed=0).differences
            yield (
                f"{kind}, {steps}, {rate:g}",
                {n: v + found[n].to(v) if n in found else v for n, v in self.base.items()},
            )
        for size in NOISE:
            generator = torch.Generator(self.model.device).manual_seed(0)
            state = dict(self.base)
            for name, value in self.base.items():
                if value.ndim > 1:
                    drawn = torch.randn(value.shape, generator=generator, device=value.device)
                    state[name] = value + size * value.norm() / math.sqrt(value.numel()) * drawn
            yield f"noise {size}", state

    def run(self) -> None:
        print(f"base | {self.known[0]} | {self.known[1]}", flush=True)
        rows = []
        for name, state in self.states():
            far = max(float((state[n] - self.base[n]).norm() / self.base[n].norm()) for n in self.names)
            gaps = self.gaps(state)
            kept = share(self.known, gaps, relative=True)
            rows.append((far, gaps[0].value, kept.value))
            print(f"{name} | {far:.4f} | {gaps[0]} | {gaps[1]} | {kept}", flush=True)
        far, own, left = np.array(rows[: len(CHILDREN)]).T
        for sign, values in (("log distance", np.log(far)), ("own gap", own)):
            missed = 100 * left_out(values, left)
            print(f"{sign}: misses by {np.sqrt(np.mean(missed**2)):.0f} points, at most {np.abs(missed).max():.0f}")


def main(arguments: Sequence[str]) -> None:
    """A line a relative."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks children")
    asked.add_argument("model")
    asked.add_argument("--delta", type=Path, required=True)
    asked.add_argument("--data", type=Path, required=True)
    asked.add_argument("--limit", type=int, default=0)
    asked.add_argument("--steps", type=float, default=1.0, help="a part of each child's steps, for a trial")
    Bench(asked.parse_args(arguments)).run()
