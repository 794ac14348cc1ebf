"""How much quicker several processes evaluate than one: the same suites by all and by the first alone, in turn.

    accelerate launch --num_processes 4 -m benchmarks evaluation --shape 8b --data DIR

Each process draws the model, of a Llama shape with random weights, on a device of its own. A first pass by all, in
which everything is found out once, is not counted. What is measured must be the same numbers, bit for bit.
"""

import argparse
import time
from collections.abc import Sequence
from typing import Any
from unittest.mock import patch

from benchmarks.scale import SHAPES, drawn
from surgery import processes
from surgery.metrics.metric import flat
from surgery.metrics.suite import evaluate_suites

SUITES = ("stereoset", "bbq", "capability")


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """A line for each suite and for all together, each turn: seconds of one process and of all, and their ratio."""
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
        suites = chosen.suite or list(SUITES)
        evaluated(*opened, suites, chosen)
        for _ in range(chosen.turns):
            shared, quick = evaluated(*opened, suites, chosen)
            if processes.first():
                with patch.object(processes, "_distributed", lambda: None):  # this process works alone
                    own, plain = evaluated(*opened, suites, chosen)
                if flat(own) != flat(shared):
                    raise SystemExit("one process and several measured different numbers")
                for suite, one, all_of_them in zip([*suites, "together"], plain, quick, strict=True):
                    times = f"one {one:7.2f} s  {processes.count()} {all_of_them:7.2f} s  {one / all_of_them:5.2f} x"
                    print(f"{chosen.shape} {suite:12} {times}", flush=True)
                print(f"{len(flat(own))} numbers, all equal", flush=True)
            processes.wait()


def evaluated(model: Any, tokenizer: Any, suites: Sequence[str], chosen: argparse.Namespace) -> tuple[Any, list[float]]:
    """The metrics of all suites; the seconds that each took until the last process had it, and their sum."""
    found: dict[str, Any] = {}
    seconds = []
    for suite in suites:
        processes.wait()
        began = time.perf_counter()
        found |= evaluate_suites(model, tokenizer, [suite], chosen.data, limit=chosen.limit)
        processes.wait()
        seconds.append(time.perf_counter() - began)
    return found, [*seconds, sum(seconds)]
