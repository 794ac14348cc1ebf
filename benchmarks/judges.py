"""Judges of many questions: what begins alike is run once, against every option and every text by itself.

    python -m benchmarks judges --data DIR --limit 200

Both ways see the same questions, and their answers are compared; ratios are what counts.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

import surgery
from surgery.data import bbq, capability
from surgery.metrics import gas
from surgery.metrics.bbq import questions
from surgery.metrics.multiple_choice import score


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """A line for each judge: seconds of both ways, their ratio, how far the numbers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks judges")
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="the data folder")
    parser.add_argument("--limit", type=int, default=200, help="questions of each judge; 0 for all")
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args(arguments)
    model, tokenizer = surgery.load(chosen.model, dtype=chosen.dtype)
    most = chosen.limit or None
    talks = bool(tokenizer.chat_template)
    asked = {"bbq": questions(bbq.load(chosen.data)[:most], chat=talks)}
    asked |= {name: capability.load(name, chosen.data)[:most] for name in ("boolq", "mmlu", "hellaswag")}
    score(model, tokenizer, asked["mmlu"][:2])  # what is set up at the first call belongs to no way
    for name, rows in asked.items():
        chat = talks and name == "bbq"
        one, quick = timed(lambda: score(model, tokenizer, rows, chat=chat).sums)  # noqa: B023
        two, plain = timed(lambda: score(model, tokenizer, rows, chat=chat, share=False).sums)  # noqa: B023
        apart = max(float(np.abs(a - b).max()) for a, b in zip(one, two, strict=True))
        times = f"{quick:8.1f} s  apart {plain:8.1f} s  {plain / quick:5.2f} x"
        print(f"{name:10} {len(rows):6} questions {times}  largest difference {apart:.1e}", flush=True)
    prompts = gas.prompts(chosen.data)[:most]
    plan = gas.Sampling()
    one, quick = timed(lambda: gas.generate(model, tokenizer, prompts, plan))
    few = prompts[:: max(1, len(prompts) // 10)]
    two, plain = timed(lambda: [gas.generate(model, tokenizer, [prompt], plan) for prompt in few])
    plain *= len(prompts) / len(few)
    same = gas.generate(model, tokenizer, few[:1], plan) == two[0]
    print(f"gas        {len(prompts):6} prompts   {quick:8.1f} s  apart {plain:8.1f} s  {plain / quick:5.2f} x  {same}")


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What ``work`` gives, and the seconds that it took."""
    began = time.perf_counter()
    found = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, time.perf_counter() - began
