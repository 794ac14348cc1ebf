"""What rounding to 8 and 4 bits takes from the demo's edit, and what is left of an edit of the rounded weights.

    python -m benchmarks served_formats [--format NF4] [--delta FILE] [--limit 0] [--set KEY=VALUE]

For each format, two lines of docs/survive.md. Edit first: the edit of recipe demo (or --delta) on the checkpoint, then
all matrices of the blocks rounded, those that it changes alone, or the others alone. Round first: the same training on
the weights that the format gives back, and its difference put into the format's codes as `surgery apply` does it, by
chance and to the nearest. Everything is measured on the test prompts, in memory; shares as in `surgery survive`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import surgery
from surgery.data import genbias
from surgery.data.prompts import load_prompt_set
from surgery.delta import Delta
from surgery.files.gguf_codes import quantise, requantise
from surgery.files.k_quants import recode
from surgery.files.quantised import Layer, signed
from surgery.files.rounding import random16
from surgery.forward.next_token import next_words
from surgery.forward.tokens import encode, word_ids
from surgery.metrics.metric import Metric
from surgery.survive import share, words_question
from surgery.survive.formats import NF4, NF4_BLOCK, Matrix, matrices

KINDS = ("int8", "NF4", "Q4_0", "Q4_K")


def in_codes(kind: str, own: np.ndarray, now: np.ndarray, moved: np.ndarray, draw: np.ndarray | None) -> np.ndarray:
    """``now`` (what the format gives back of ``own``) plus ``moved``, in its codes; with ``draw`` by chance."""
    if kind in ("NF4", "int8"):
        if kind == "NF4":
            layer = Layer("", kind, own.shape, "", 4, NF4, "", (NF4_BLOCK,), high_first=True)
            scales = layer.scales(np.abs(own.reshape(-1, NF4_BLOCK)).max(1), 0, own.shape[0])
        else:
            layer = Layer("", kind, own.shape, "", 8, signed(8, -127), "", (1, 0))
            scales = np.broadcast_to(np.abs(own).max(1, keepdims=True) / np.float32(127), own.shape)
        return np.array(layer.table, np.float32)[layer.encode(now + moved, scales, draw)] * scales
    if kind == "Q4_K" and own.shape[1] % 256 == 0:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        blocks = quantise(own, kind).reshape(-1, 144)
        stored, _ = recode(kind, blocks, moved.reshape(-1, 256), None if draw is None else draw.reshape(-1, 256))
        return dequantize(stored, GGMLQuantizationType.Q4_K).reshape(own.shape)
    if own.shape[1] % 32:  # as llama.cpp: left in 16 bits
        return now + moved
    return requantise(now + moved, "Q5_0" if kind == "Q4_K" else kind, draw)[1]


def trained(model: str | Path, work: Path, options: Sequence[str]) -> Delta:
    """The delta of recipe demo on ``model``."""
    command = [sys.executable, "-m", "surgery.cli", "run", "demo", "--model", str(model), "--set", "controls=[]"]
    out = Path(tempfile.mkdtemp(dir=work)) / "run"
    quietly = ["--ledger", "none", "--quiet", "--out", str(out)]
    subprocess.run([*command, *options, *quietly], check=True, stdout=subprocess.DEVNULL)
    return Delta.load(out / "delta.safetensors")


class Bench:
    """A model whose weights change, and what is asked of it."""

    def __init__(self, spec: str, limit: int) -> None:
        self.model, self.tokenizer = surgery.load(spec)
        self.found: dict[str, Matrix] = matrices(self.model)
        self.parameters = dict(self.model.named_parameters())
        self.own = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        prompts = load_prompt_set("genbias")
        self.measure: Callable[[str], Metric] = words_question(self.model, self.tokenizer, prompts, limit=limit).measure
        self.ids = encode(self.tokenizer, [row.text for row in genbias.records("profession", "test")[: limit or None]])

    def put(self, values: Mapping[str, Tensor], kind: str = "", only: Sequence[str] = ()) -> None:
        """``values`` into the model, those matrices ``only`` of them as ``kind`` gives them back."""
        for name, value in values.items():
            if name in only:
                self.found[name].write(kind, value)
            else:
                with torch.no_grad():
                    self.parameters[name].copy_(value)

    def odds(self) -> np.ndarray:
        chances = next_words(self.model, self.ids, word_ids(self.tokenizer, ("he", "she"))).probabilities
        return np.log(chances[:, 0] / chances[:, 1])

    def edit_first(self, delta: Delta, kind: str) -> str:
        """What rounding the matrices of the edited model takes, and of which matrices."""
        self.put(self.own)
        with delta.applied(self.model):
            edited = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        changed = [name for name in self.found if not torch.equal(edited[name], self.own[name])]
        others = [name for name in self.found if name not in changed]
        reference, shares = [], []
        for state in (self.own, edited):
            self.put(state)
            reference.append(self.measure(""))
        for only in (list(self.found), changed, others):
            after = []
            for state in (self.own, edited):
                self.put(state, kind, only)
                after.append(self.measure(""))
            shares.append(str(share((reference[0], reference[1]), (after[0], after[1]), relative=True)))
        self.put(edited, kind, list(self.found))
        rounded, odds = {name: self.parameters[name].detach().clone() for name in changed}, self.odds()
        self.put(self.own, kind, changed)
        error = dot = square = 0.0
        for name in changed:
            difference = edited[name] - self.own[name]
            error += float((self.parameters[name].detach() - self.own[name]).square().sum())
            dot += float((difference * (rounded[name] - self.parameters[name].detach())).sum())
            square += float(difference.square().sum())
        size = (square / error) ** 0.5
        without = np.tanh(np.abs(odds - odds.mean()) / 2).mean()
        return (
            f"{kind} | edit / rounding {size:.2f} | slope {dot / square:.2f} | left: all {shares[0]}, "
            f"the changed {shares[1]}, the others {shares[2]}"
            f" | mean log-odds {odds.mean():.2f}, gap without it {without:.3f}"
        )

    def round_first(self, kind: str, work: Path, options: Sequence[str]) -> str:
        """An edit of the rounded weights, in their own codes."""
        self.put(self.own, kind, list(self.found))
        held = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.model.save_pretrained(work / kind)
        self.tokenizer.save_pretrained(work / kind)
        before = self.measure("")
        delta = trained(work / kind, work, options)
        with delta.applied(self.model):
            edited = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
            whole = (before, self.measure(""))
        shares, gap = [], ""
        for by_chance in (True, False):
            self.put(edited)
            for name in self.found.keys() & delta.shapes.keys():
                shape, moved = tuple(held[name].shape), (edited[name] - held[name]).float().cpu().numpy()
                draw = random16(0, name, 0, moved.size).reshape(shape) / np.float32(65536) if by_chance else None
                given = (self.own[name].float().cpu().numpy(), held[name].float().cpu().numpy(), moved)
                self.put({name: torch.from_numpy(np.array(in_codes(kind, *given, draw)))})
            after = self.measure("")
            gap = gap or f"{after}"
            shares.append(str(share(whole, (before, after), relative=True)))
        return f"{kind} | untouched {before} | by chance {gap} | left {shares[0]}, nearest codes {shares[1]}"


def main(arguments: Sequence[str]) -> None:
    """Two lines a format."""
    asked = argparse.ArgumentParser(prog="python -m benchmarks served_formats")
    asked.add_argument("model")
    asked.add_argument("--format", action="append", choices=KINDS)
    asked.add_argument("--delta", type=Path)
    asked.add_argument("--limit", type=int, default=0)
    asked.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = asked.parse_args(arguments)
    options = [word for each in given.set for word in ("--set", each)]
    with tempfile.TemporaryDirectory() as folder:
        delta = Delta.load(given.delta) if given.delta else trained(given.model, Path(folder), options)
        bench = Bench(given.model, given.limit)
        for kind in given.format or KINDS:
            print("edit first:", bench.edit_first(delta, kind), flush=True)
            print("round first:", bench.round_first(kind, Path(folder), options), flush=True)
