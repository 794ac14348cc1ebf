"""What rankings predict of the outcome of editing each block: the study of docs/which_block.md, from its numbers.

python -m benchmarks which_block                             # its tables, from docs/which_block.json
python -m benchmarks which_block --picture which_block_gain.png
python -m benchmarks which_block --measure race              # a case anew: every block edited twice (BENCH_MODEL)
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hooks.rank_correlation import ranks, spearman

FILE = Path(__file__).parents[1] / "docs" / "which_block.json"
TITLES = {
    "natural": "natural gain (primary)",
    "natural attention": "natural gain, attention",
    "depth + natural attention": "gain and depth (successor)",
    "depth + ratio attention": "ratio and depth",
    "depth x natural attention": "attention's gain x number",
    "depth + natural": "whole gain and depth",
    "ratio": "gradient ratio",
    "ratio attention": "gradient ratio, attention",
    "agreement": "agreement of halves",
    "inner": "inner products",
    "snr": "signal to noise",
    "rgn": "relative norm (RGN)",
    "bmi raw": "BMI, raw",
    "bmi final_norm": "BMI, after final norm",
    "depth": "depth (block number)",
}
DRAWS = 1000
Scores = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Case:
    """One model and one bias: by block, the reduction of two seeds and the scores of each ranking."""

    model: str
    bias: str
    reduction: Scores
    """(seed block)"""
    scores: Mapping[str, Scores]

    @property
    def outcome(self) -> Scores:
        return self.reduction.mean(0)

    @property
    def unseen(self) -> bool:
        """Whether no rule was chosen on it."""
        return self.bias != "he_she"

    def score(self, name: str) -> Scores | None:
        """Of a ranking by its name in ``TITLES``: measured, the block's number, or both together."""
        depth = np.arange(self.reduction.shape[1], dtype=float)
        if name == "depth":
            return depth
        how, _, rest = name.partition(" ")[2].partition(" ") if name.startswith("depth ") else ("", "", name)
        found = self.scores.get(rest)
        if found is None or not how:
            return found
        return ranks(found) - 1 + depth if how == "+" else found * (depth + 1)


@dataclass(frozen=True)
class Row:
    """What one ranking predicts over some cases: mean correlation and less depth, with 95 % intervals."""

    cases: int
    mean: tuple[float, float, float]
    less_depth: tuple[float, float, float]
    best: int
    """In how many cases the block it names is among the best tenth."""
    share: float
    """Mean reduction of the named block over that of the best one."""


def read(file: Path = FILE) -> list[Case]:
    """The cases that were measured."""
    rows = json.loads(file.read_text())["cases"]
    return [
        Case(r["model"], r["bias"], np.array(r["reduction"]), {k: np.array(v) for k, v in r["scores"].items()})
        for r in rows
    ]


@cache
def drawn(case: Case) -> dict[str, Scores]:
    """Of each ranking, its correlations with the outcome over DRAWS samples of the blocks, the same for all."""
    size = case.outcome.size
    times = np.random.default_rng(1).multinomial(size, np.full(size, 1 / size), size=DRAWS).astype(float)

    def centred(x: Scores) -> Scores:  # (draw block): mid-rank among those drawn, less the mean rank
        return times @ ((x[:, None] < x) + 0.5 * (x[:, None] == x)) - size / 2

    outcome, found = centred(case.outcome), {}
    for name in TITLES:
        scores = case.score(name)
        if scores is not None:
            own = centred(scores)
            products = [(times * a * b).sum(1) for a, b in ((own, outcome), (own, own), (outcome, outcome))]
            length = np.sqrt(products[1] * products[2])  # 0 where all drawn are alike: they have no order
            found[name] = np.divide(products[0], length, out=np.full(DRAWS, np.nan), where=length > 0)
    return found


def judge(name: str, cases: Sequence[Case]) -> Row:
    """``name`` over ``cases``; the bootstrap draws cases and, within them, blocks, the same ones for every ranking."""
    having = [(case, found, drawn(case)) for case in cases if (found := case.score(name)) is not None]
    draw = np.random.default_rng(0)
    which, pick = (draw.integers(high, size=(DRAWS, len(having))) for high in (len(having), DRAWS))
    own, depth = (np.stack([each[key] for _, _, each in having])[which, pick] for key in (name, "depth"))
    values = np.array([spearman(found, case.outcome) for case, found, _ in having])
    less = values - [spearman(np.arange(found.size, dtype=float), case.outcome) for case, found, _ in having]
    named = [(case.outcome, int(np.argmax(found))) for case, found, _ in having]
    return Row(
        len(having),
        (float(values.mean()), *_ends(np.nanmean(own, axis=1))),
        (float(less.mean()), *_ends(np.nanmean(own - depth, axis=1))),
        sum(place(outcome, at) <= max(1, round(outcome.size / 10)) for outcome, at in named),
        float(np.mean([outcome[at] / outcome.max() for outcome, at in named])),
    )


def place(outcome: Scores, block: int) -> int:
    """1 for the block with the largest reduction."""
    return 1 + int((outcome > outcome[block]).sum())


def _ends(draws: Scores) -> tuple[float, float]:
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return float(low), float(high)


def tables(cases: Sequence[Case]) -> str:
    """Both tables of the study as Markdown: of the rankings, and of the cases."""
    unseen = [case for case in cases if case.unseen] or cases
    lines = [
        "| ranking | mean of the unseen | less depth | mean of all | less depth "
        "| names one of the best 10 %, unseen; all | share of the best, unseen; all |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in TITLES.items():
        if all(case.score(name) is None for case in unseen):
            continue
        few, every = judge(name, unseen), judge(name, cases)
        star = "" if every.cases == len(cases) else f" ({every.cases} cases)"
        lines.append(
            f"| {title}{star} | {_said(few.mean)} | {_said(few.less_depth)} | {_said(every.mean)} | "
            f"{_said(every.less_depth)} | {few.best} of {few.cases}; {every.best} of {every.cases} | "
            f"{few.share:.2f}; {every.share:.2f} |"
        )
    chance = [np.mean([case.outcome.mean() / case.outcome.max() for case in some]) for some in (unseen, cases)]
    lines += [f"| a random block | | | | | 1 of 10 | {chance[0]:.2f}; {chance[1]:.2f} |", ""]
    shown = ("natural", "natural attention", "depth + natural attention", "depth")
    lines += [
        "| case | seeds agree | best block, its reduction | " + " | ".join(TITLES[name] for name in shown) + " |",
        "|---|---|---|" + "---|" * len(shown),
    ]
    for case in cases:
        best = int(case.outcome.argmax())
        cells = []
        for name in shown:
            row, found = judge(name, [case]), case.score(name)
            at = int(np.argmax(found)) if found is not None else 0
            cells.append(f"{_said(row.mean)}; {at}: {place(case.outcome, at)}")
        agree = f"{spearman(*case.reduction):+.2f}"
        lines.append(
            f"| {case.model}, {case.bias.replace('_', ' / ')} | {agree} | {best}: {case.outcome[best]:.2f} | "
            + " | ".join(cells)
            + " |"
        )
    return re.sub(r"-(?=\d)", "\u2212", "\n".join(lines))


def _said(value: tuple[float, float, float]) -> str:
    return "{:+.2f} [{:+.2f}, {:+.2f}]".format(*value)


def picture(cases: Sequence[Case], file: Path) -> None:
    """Every case's correlation by ranking, and their mean with its interval."""
    from hooks.drawing import new_figure

    figure = new_figure(9.6, 5.6)
    axes = figure.subplots()
    models, biases = (list(dict.fromkeys(getattr(case, key) for case in cases)) for key in ("model", "bias"))
    colours = dict(zip(models, ("#1b4965", "#5fa8d3", "#b5651d", "#e6a15c", "0.4"), strict=False))
    marks = dict(zip(biases, "os^Dv", strict=False))
    for row, name in enumerate(TITLES):
        for turn, case in enumerate(cases):
            found = case.score(name)
            if found is not None:
                height = -row + 0.3 * (turn / max(1, len(cases) - 1) - 0.5)
                at = spearman(found, case.outcome)
                axes.plot(at, height, marks[case.bias], color=colours[case.model], ms=4, alpha=0.85)
        value, low, high = judge(name, cases).mean
        axes.plot([low, high], [-row - 0.33] * 2, color="k", lw=2)
        axes.plot(value, -row - 0.33, "k|", ms=9, mew=2)
    axes.axvline(0, color="0.6", lw=0.8)
    axes.set_yticks([-row - 0.1 for row in range(len(TITLES))], list(TITLES.values()))
    axes.set_xlim(-1, 1)
    axes.set_xlabel("Spearman with each block's reduction (lr 1e-4); bar: mean of all cases, 95 %")
    for model, colour in colours.items():
        axes.plot([], [], "o", color=colour, label=model)
    for bias, mark in marks.items():
        axes.plot([], [], mark, color="0.4", label=bias.replace("_", " / "))
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=110)


def main(arguments: Sequence[str] = ("demo",)) -> None:
    """The stored tables, their picture, or one case measured anew."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks which_block")
    parser.add_argument("model", help="the checkpoint that is measured")
    parser.add_argument("--picture", type=Path, help="where to draw the correlations")
    parser.add_argument("--measure", metavar="SET", help="he_she, or a prompt set: measure this case")
    chosen = parser.parse_args(arguments)
    if chosen.measure:
        from benchmarks._case import measured

        cases = [measured(chosen.model, chosen.measure)]
    else:
        cases = read()
    print(tables(cases))
    if chosen.picture:
        picture(cases, chosen.picture)
