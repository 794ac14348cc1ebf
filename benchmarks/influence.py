"""Scoring training texts by their gradients: cost against a plain forward pass, and memory, beside other ways.

At the size of 8B parameters on an accelerator: ``python -m benchmarks._influence_8b``.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from benchmarks._gradients import PROBES, TOKENS, WAYS, perturbed, plain

SENTENCES, REPEATS = 128, 3


@dataclass(frozen=True)
class Cost:
    """Seconds of processor time, in multiples of a plain forward pass, and bytes above the weights."""

    ratios: list[float]
    plain: float
    peak: int
    scores: list[float]


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """Each way in a process of its own on one thread, taking turns with a plain forward pass of the same batches.

    Processor time instead of time on the wall, so that other work on the machine does not count.
    """
    (spec,) = arguments
    print(f"{SENTENCES} sentences, LoRA rank 16 on q_proj and v_proj, float32, one thread, batches of {TOKENS} tokens")
    scores: dict[str, Tensor] = {}
    first = next(iter(WAYS))
    for way in WAYS:
        if way == "bergson" and find_spec("bergson") is None:
            print(f"{way:24} not run: it is not installed here (pip install bergson)")
            continue
        command = [sys.executable, "-m", "benchmarks.influence", spec, way]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if done.returncode:
            print(f"{way:24} failed (exit code {done.returncode}); its message is above")
            continue
        cost = Cost(**json.loads(done.stdout.splitlines()[-1]))
        scores[way] = torch.tensor(cost.scores)
        low, high = min(cost.ratios), max(cost.ratios)
        error = ""
        if "Adam" not in way and way != first:
            error = f"   largest difference from {first} {(scores[way] - scores[first]).abs().max():.0e}"
        print(
            f"{way:24} {statistics.median(cost.ratios):5.2f} x forward ({low:.2f} to {high:.2f}; forward "
            f"{cost.plain:.1f} s)   peak {cost.peak / 1e6:6.0f} MB above the weights{error}",
            flush=True,
        )


def worker(spec: str, way: str) -> None:
    """One way: memory in its first call, then turns with the plain pass."""
    import surgery
    from surgery.data import genbias, neutral
    from surgery.edits.supervised import Lora, adapters

    torch.set_num_threads(1)
    model, tokenizer = surgery.load(spec, device="cpu", dtype="float32")
    half = SENTENCES // 2
    texts = neutral.sentences()[:half] + [row.text for row in genbias.records()][:half]
    given = neutral.sentences()[half : half + PROBES]
    ids = [list(tokenizer(text)["input_ids"]) for text in texts]
    with adapters(model, Lora(rank=16, targets=("q_proj", "v_proj")), 0):
        perturbed(model)
        run = WAYS[way](model, [list(tokenizer(text)["input_ids"]) for text in given], ids)
        with peak_memory() as peak:
            scores = run()
        ratios, plains = [], []
        for _ in range(REPEATS if "loop" not in way else 1):
            start = time.process_time()
            plain(model, ids)
            middle = time.process_time()
            run()
            plains.append(middle - start)
            ratios.append((time.process_time() - middle) / (middle - start))
    print(json.dumps(asdict(Cost(ratios, statistics.median(plains), peak[0], scores.tolist()))))


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Inside, what the process holds at most above what it held before."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    base, peak, stop = resident(), [0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.005):
            peak[0] = max(peak[0], resident() - base)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()


if __name__ == "__main__":
    worker(sys.argv[1], sys.argv[2])
