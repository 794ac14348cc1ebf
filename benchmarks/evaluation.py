"""How much quicker several processes evaluate than one: the same suites by all and by the first alone, in turn.

    accelerate launch --num_processes 4 -m benchmarks evaluation --shape 8b --data DIR

Each process draws the model, of a Llama shape with random weights, on a device of its own. A first pass by all, in
which everything is found out once, is not counted. What is measured must be the same numbers, bit for bit.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from benchmarks.scale import SHAPES, drawn
from surgery import processes
from surgery.metrics.metric import flat
from surgery.metrics.suite import evaluate_suites
from surgery.progress import Advance, Progress

SUITES = ("stereoset", "bbq", "capability")


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """A line for each suite and for all together, each turn: rows, seconds of one process and of all, their ratio."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks evaluation")
    parser.add_argument("tokenizer", help="a checkpoint directory whose tokenizer is taken")
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--suite", action="append", help=f"default {', '.join(SUITES)}")
    parser.add_argument("--limit", type=int, default=0, help="rows of each suite; 0 for all")
    parser.add_argument("--turns", type=int, default=2)
    chosen = parser.parse_args(arguments)
    with processes.started():
        from transformers import AutoTokenizer

        opened = drawn(chosen.shape).eval(), AutoTokenizer.from_pretrained(chosen.tokenizer)
        suites = chosen.suite or SUITES
        evaluated(*opened, suites, chosen)
        for _ in range(chosen.turns):
            shared, quick = evaluated(*opened, suites, chosen)
            if processes.first():
                with patch.object(processes, "_distributed", lambda: None):  # this process works alone
                    own, plain = evaluated(*opened, suites, chosen)
                if flat(own) != flat(shared):
                    raise SystemExit("one process and several measured different numbers")
                for suite, (rows, one) in plain.items():
                    many = quick[suite][1]
                    times = f"one {one:7.2f} s  {processes.count()} {many:7.2f} s  {one / many:5.2f} x"
                    print(f"{chosen.shape} {suite:20} {rows:6} {times}", flush=True)
                print(f"{len(flat(own))} numbers, all equal", flush=True)
            processes.wait()


@dataclass(frozen=True)
class Clock(Progress):
    """What took how long: for each piece of work how many things were finished, and its seconds."""

    took: dict[str, tuple[int, float]] = field(default_factory=dict)

    @contextmanager
    def work(self, label: str, total: int | None) -> Iterator[Advance]:
        """Inside, what is yielded counts."""
        done: list[int] = []
        began = time.perf_counter()
        yield done.append
        self.took[label] = sum(done), time.perf_counter() - began


def evaluated(model: Any, tokenizer: Any, suites: Sequence[str], chosen: argparse.Namespace) -> tuple[Any, Any]:
    """The metrics of all suites, and what each took in this process, and all together until the last process had it."""
    clock = Clock(quiet=True)
    processes.wait()
    with clock.work("together", None) as step:
        found = evaluate_suites(model, tokenizer, suites, chosen.data, limit=chosen.limit, progress=clock)
        step(sum(rows for rows, _ in clock.took.values()))
        processes.wait()
    return found, clock.took
