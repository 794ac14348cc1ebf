"""Time `surgery apply` against copying the files, against transformers and against mergekit, with peak
memory.

    python -m benchmarks.apply CHECKPOINT [CHECKPOINT ...] [--synthetic GB] [--repeat 5] [--mergekit PYTHON]

Each round runs every way once, in rotating order, and divides its time by that round's `cp -r` + sync;
printed are the medians of the seconds and of the ratios. Every way ends durable on disk (ours calls fsync;
the others are followed by sync). The delta changes matrices of the last block, at most
--delta-mb of them. The synthetic checkpoint has an 8B-like shape in bf16, four shards, and random weights.
"""

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks._shapes import Shape, write
from surgery.apply import apply
from surgery.delta import make
from surgery.files.checkpoint_files import open_checkpoint

IN_PROCESS = """
import resource, sys, time
from surgery.apply import apply
delta, base = sys.argv[1:]
print("ready", flush=True)
for line in sys.stdin:
    start = time.perf_counter()
    apply(delta, base, line.rstrip("\\n"), rounding="auto")
    seconds = time.perf_counter() - start
    print(seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""
TRANSFORMERS = """
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype="auto")
state = model.state_dict()
with torch.no_grad():
    for name, change in load_file(sys.argv[1]).items():
        state[name].copy_((state[name].float() + change).to(state[name].dtype))
model.save_pretrained(sys.argv[3])
"""
COMMAND = "import sys; from surgery.cli import main; sys.exit(main())"


def run(command: Sequence[str], **options: object) -> tuple[float, int]:
    """(seconds, peak resident bytes) of a command that must succeed, followed by sync."""
    start = time.perf_counter()
    pid = os.posix_spawnp(command[0], list(command), os.environ, **options)  # type: ignore[arg-type]
    _, status, usage = os.wait4(pid, 0)
    os.sync()
    seconds = time.perf_counter() - start
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)[:200]}: exit code {os.waitstatus_to_exitcode(status)}")
    return seconds, usage.ru_maxrss * 1024


class InProcess:
    """A process that has imported everything and applies when told to: what a program that calls `apply` pays."""

    def __init__(self, delta: Path, base: Path) -> None:
        command = [sys.executable, "-c", IN_PROCESS, str(delta), str(base)]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def _answer(self) -> str:
        assert self._child.stdout
        line = self._child.stdout.readline()
        if not line:
            raise SystemExit("the in-process apply failed; its message is above")
        return line

    def __call__(self, out: Path) -> tuple[float, int]:
        assert self._child.stdin
        self._child.stdin.write(f"{out}\n")
        self._child.stdin.flush()
        seconds, peak = self._answer().split()
        return float(seconds), int(peak) * 1024


def last_block_delta(base: Path, path: Path, megabytes: float) -> None:
    """A delta file that changes matrices of the last block by about 0.1 % of their norm.

    The smallest matrices first, as many as fit into `megabytes` of fp32 differences, at least one.
    """
    stored = open_checkpoint(base)
    layers = [int(found.group(1)) for name in stored.places if (found := re.search(r"\.(\d+)\.", name))]
    generator = np.random.default_rng(0)
    names = [name for name in stored.places if f".{max(layers)}." in name and len(stored.entry(name).shape) == 2]
    differences: dict[str, np.ndarray] = {}
    for name in sorted(names, key=lambda name: (stored.entry(name).elements, name)):
        taken = sum(array.nbytes for array in differences.values())
        if differences and taken + 4 * stored.entry(name).elements > megabytes * 1e6:
            break
        noise = generator.standard_normal(stored.entry(name).shape, dtype=np.float32)
        differences[name] = noise * np.float32(3e-5)
    make(differences, base, base=base.name, recipe="", seed=0).save(path)


def synthetic(folder: Path, gigabytes: float, shards: int = 4) -> Path:
    """A bf16 checkpoint of an 8B's width and about so many GB, of one pattern again and again."""
    empty = Shape(4096, 14336, 0, 32, 8, 32000)
    one = replace(empty, blocks=1).bytes - empty.bytes
    noise = np.random.default_rng(0).standard_normal(2**20, dtype=np.float32) * np.float32(0.02)
    pattern = (noise.view(np.uint32) >> 16).astype("<u2").tobytes()

    def draw(_: str, shape: tuple[int, ...]) -> Iterator[bytes]:
        for left in range(2 * math.prod(shape), 0, -len(pattern)):
            yield pattern[: min(left, len(pattern))]

    blocks = max(1, round((gigabytes * 1e9 - empty.bytes) / one))
    return write(folder, replace(empty, blocks=blocks), draw, shards)


def ways(
    base: Path, delta: Path, work: Path, mergekit: str | None, full: bool
) -> dict[str, Callable[[Path], tuple[float, int]]]:
    """Each way to get an edited copy, by name; the first is the yardstick."""
    python = sys.executable
    found: dict[str, Callable[[Path], tuple[float, int]]] = {
        "cp -r; sync": lambda out: run(["cp", "-r", str(base), str(out)]),
        "surgery.apply in process": InProcess(delta, base),
    }
    if importlib.util.find_spec("surgery.cli"):
        arguments = ["--rounding", "stochastic", "--quiet"]
        found["surgery apply, the command"] = lambda out: run(
            [python, "-c", COMMAND, "apply", str(delta), str(base), "--out", str(out), *arguments]
        )
    if full:
        found["transformers: load, add, save"] = lambda out: run(
            [python, "-c", TRANSFORMERS, str(delta), str(base), str(out)]
        )
    if full and mergekit:
        edited = work / "edited"
        apply(delta, base, edited, undo="none")
        recipe = work / "mergekit.yaml"
        models = [{"model": str(edited), "parameters": {"weight": 1.0}}]
        content = {
            "merge_method": "task_arithmetic",
            "base_model": str(base),
            "models": models,
            "dtype": "bfloat16",
        }
        recipe.write_text(json.dumps(content))  # JSON is YAML
        command = [mergekit, "-m", "mergekit.scripts.run_yaml", str(recipe)]
        found["mergekit task_arithmetic"] = lambda out: run([*command, str(out)])
    return found


def compare(
    base: Path, work: Path, repeat: int, megabytes: float, mergekit: str | None, full: bool
) -> list[dict[str, object]]:
    """Run all ways on one checkpoint and print the table. Returns one row per way."""
    delta = work / "delta.safetensors"
    # In a process of its own: a child's peak, as the kernel counts it, starts at its parent's size.
    maker = multiprocessing.get_context("spawn").Process(target=last_block_delta, args=(base, delta, megabytes))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"no delta could be made for {base}")
    contenders = ways(base, delta, work, mergekit, full)
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0)
    for round_number in range(repeat + 1):  # the first round warms the page cache and does not count
        for name in names[round_number % len(names) :] + names[: round_number % len(names)]:
            os.sync()
            out = work / "out"
            taken, peak = contenders[name](out)
            shutil.rmtree(out)
            if round_number:
                seconds[name].append(taken)
                peaks[name] = max(peaks[name], peak)
    size = sum(path.stat().st_size for path in base.rglob("*") if path.is_file())
    print(f"\n{base.name}: {size / 1e9:.2f} GB, delta {delta.stat().st_size / 1e6:.0f} MB, medians of {repeat}")
    print(f"{'way':32} {'seconds':>8} {'x cp':>6} {'(range)':>13} {'peak MB':>8}")
    rows: list[dict[str, object]] = []
    for name in names:
        ratios = [taken / copy for taken, copy in zip(seconds[name], seconds[names[0]], strict=True)]
        middle, ratio = statistics.median(seconds[name]), statistics.median(ratios)
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(f"{name:32} {middle:8.2f} {ratio:6.2f} {spread:>13} {peaks[name] / 1e6:8.0f}", flush=True)
        rows.append({"checkpoint": base.name, "way": name, "seconds": middle, "ratio": ratio, "peak": peaks[name]})
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line, run the comparisons, and write the rows as JSON when asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="*", type=Path)
    parser.add_argument("--synthetic", type=float, default=0.0, metavar="GB", help="also a made-up checkpoint")
    parser.add_argument("--delta-mb", type=float, default=34.0, metavar="MB", help="size of the delta at most")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--mergekit", metavar="PYTHON", help="an interpreter that has mergekit, to compare with it")
    parser.add_argument("--work", type=Path, default=None, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, default=None, help="write the rows to this file, too")
    options = parser.parse_args(arguments)
    mergekit = options.mergekit or (sys.executable if importlib.util.find_spec("mergekit") else None)
    if mergekit is None:
        print("mergekit is not installed here; --mergekit PYTHON names an interpreter that has it")
    rows = []
    for checkpoint in options.checkpoint:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            rows += compare(checkpoint, Path(folder), options.repeat, options.delta_mb, mergekit, full=True)
    if options.synthetic:
        with tempfile.TemporaryDirectory(dir=options.work) as folder:
            base = synthetic(Path(folder) / f"synthetic-{options.synthetic:g}GB", options.synthetic)
            rows += compare(base, Path(folder), options.repeat, options.delta_mb, None, full=False)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
