"""Where the time of a whole operation goes, by stage, for models of the size that is used: 1B, 8B, 40B, 70B shapes.

    python -m benchmarks scale --shape 8b --recipe lftf --recipe equalize

The checkpoint has a Llama shape and random weights in bf16; its tokenizer is that of the model given (the demo model),
under the shape's own vocabulary. Each recipe runs as the command does, in a process of its own; its stages are read
from ``run.json``, and what they do not hold (starting Python, importing) is the difference to the command's own time.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks._shapes import Shape, normal, write

STAGES = ("start", "open", "ranking", "before", "train", "write", "apply", "after", "control", "report")
# Llama 3.2 1B, Llama 3 8B, a 40B between, Llama 3 70B.
SHAPES = {
    "tiny": Shape(64, 128, 4, 4, 2, 50_000),
    "1b": Shape(2048, 8192, 16, 32, 8, 128_256),
    "8b": Shape(4096, 14_336, 32, 32, 8, 128_256),
    "40b": Shape(8192, 28_672, 44, 64, 8, 128_256),
    "70b": Shape(8192, 28_672, 80, 64, 8, 128_256),
}


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """A table for each recipe: the seconds of each stage, and the most memory on the device."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks scale")
    parser.add_argument("tokenizer", help="a checkpoint directory whose tokenizer is taken")
    parser.add_argument("--shape", choices=SHAPES, default="1b")
    parser.add_argument("--recipe", action="append", help="what is run; default lftf")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of every recipe")
    parser.add_argument("--processes", type=int, default=1, help="started by accelerate launch, where more than one")
    parser.add_argument("--device", help="as of surgery run")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is made, or stands; default a temporary one")
    chosen = parser.parse_args(arguments)
    with TemporaryDirectory() as scratch:
        base = (chosen.folder or Path(scratch)) / chosen.shape
        if not base.is_dir():
            began = time.perf_counter()
            make(chosen.shape, Path(chosen.tokenizer), base)
            print(f"{base}: {size(base) / 1e9:.1f} GB in {time.perf_counter() - began:.1f} s", flush=True)
        for recipe in chosen.recipe or ["lftf"]:
            table(recipe, base, Path(scratch) / recipe, chosen)


def make(shape: str, tokenizer: Path, out: Path) -> None:
    """Write a checkpoint of that shape with random bf16 weights."""
    from transformers import AutoTokenizer

    write(out, SHAPES[shape], normal, max(1, SHAPES[shape].bytes // 4_000_000_000))
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)


def drawn(shape: str) -> Any:
    """A model of that shape with random bf16 weights, drawn where there is room for them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    room = own is not None and own.type == "cuda" and torch.cuda.mem_get_info()[0] > 1.25 * SHAPES[shape].bytes
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(own if room and own else "cpu"):
            return LlamaForCausalLM(LlamaConfig.from_dict(SHAPES[shape].config()))
    finally:
        torch.set_default_dtype(torch.float32)


def size(folder: Path) -> int:
    """The bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(recipe: str, base: Path, out: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Run a recipe as the command does, and print where its time went."""
    launch = [sys.executable]
    if chosen.processes > 1:
        launch = ["accelerate", "launch", "--num_processes", f"{chosen.processes}"]
    settings = [part for each in ["dtype=bfloat16", *chosen.set] for part in ("--set", each)]
    device = ["--device", chosen.device] if chosen.device else []
    command = [*launch, "-m", "surgery", "run", recipe, "--model", str(base), "--out", str(out), *settings, *device]
    began = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "8"})
    whole = time.perf_counter() - began
    found: dict[str, Any] = json.loads((out / "run.json").read_text())
    stages = {"start": whole - sum(found["seconds"].values())} | found["seconds"]
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{recipe}, {base.name} shape, {chosen.processes} x {where}: {whole:.1f} s", flush=True)
    for name in sorted(stages, key=lambda name: STAGES.index(name) if name in STAGES else len(STAGES)):
        print(f"  {name:10} {stages[name]:7.1f} s", flush=True)
    opened = whole - stages["start"] - stages["open"]
    peak = f", peak {found['peak_bytes'] / 1e9:.1f} GB" if "peak_bytes" in found else ""
    print(f"  after the weights are open: {opened:.1f} s{peak}", flush=True)
    return found
