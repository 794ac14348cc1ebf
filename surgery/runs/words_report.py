"""What the reports on a gap between words share: their rows, their sentences, their two pictures."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.plots import BLUE, GREY, ORANGE, new_figure
from surgery.data import locality
from surgery.runs.caveats import caveats
from surgery.runs.report import AGAIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]
# What stands in the small tables: label, path inside the scores.
ROWS = (
    ("relative gap, word", ("genbias", "relative_gap", "word")),
    ("relative gap, phrase", ("genbias", "relative_gap", "phrase")),
    ("relative gap, sentence", ("genbias", "relative_gap", "sentence")),
    ("relative gap, all", ("genbias", "relative_gap", "all")),
    ("AFGB, word", ("genbias", "afgb", "word")),
    ("AFGB, phrase", ("genbias", "afgb", "phrase")),
    ("AFGB, sentence", ("genbias", "afgb", "sentence")),
    ("AFGB, all", ("genbias", "afgb", "all")),
    ("word mass, all", ("genbias", "mass", "all")),
    ("UB-Score", ("genhint", "ub")),
    ("word mass on hints", ("genhint", "mass")),
    *((f"word mass, {kind}", ("locality", kind, "mass")) for kind in locality.SETS),
    *((f"wrong pronoun, {kind}", ("locality", kind, "wrong")) for kind in locality.SETS),
    *((f"KL to untouched, {kind}", ("locality", kind, "kl")) for kind in locality.SETS),
    ("facts of gender, P(right)", ("facts_of_gender", "right", "all")),
    ("facts of gender, accuracy", ("facts_of_gender", "accuracy", "all")),
    ("arithmetic, exact", ("arithmetic", "exact", "all")),
    ("arithmetic, log P(right)", ("arithmetic", "logp", "all")),
    ("relative gap, three sentences before", ("far", "relative_gap")),
    *(
        (f"relative gap, {kind}", ("other_biases", kind, "relative_gap"))
        for kind in ("race", "religion", "nationality", "age")
    ),
    ("perplexity", ("perplexity",)),
    ("perplexity, pronouns", ("perplexity_pronouns",)),
)
# Of a run whose delta fits a plain checkpoint.
COMMANDS = (*AGAIN, "surgery apply delta.safetensors CHECKPOINT --out EDITED", "surgery eval EDITED")
FEW = 5  # random blocks, with fewer of which a place says little
SHORT = ("relative gap, all", "AFGB, all", "word mass, all", "UB-Score", "perplexity")


def find(scores: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, Any] | None:
    """The metric at ``path``, or None where this run has none (a prompt set without hints, say)."""
    value: Any = scores
    for key in path:
        if not isinstance(value, Mapping) or key not in value:
            return None
        value = value[key]
    return value


def rows(summary: Summary) -> list[dict[str, Any]]:
    """The before and after table: label, both metrics, the change in percent."""
    found = []
    for label, path in ROWS:
        before, after = find(summary["before"], path), find(summary["after"], path)
        if after and path[-1] == "kl":
            before = after | {"value": 0.0, "low": 0.0, "high": 0.0}  # of the untouched model to itself
        if before and after:
            change = 100 * (after["value"] / before["value"] - 1) if before["value"] else float("nan")
            found.append({"label": label, "before": before, "after": after, "change": change})
    return found


def comparison(summary: Summary) -> list[dict[str, Any]]:
    """One row for the model before, the edit, and each control: name, what was edited, the short metrics."""
    paths = dict(ROWS)
    cases = [
        ("before", {}, summary["before"]),
        (f"{summary['recipe']} (as saved)", summary["edit"], summary["after"]),
        *((name, control["edit"], control["after"]) for name, control in summary["controls"].items()),
    ]
    return [
        {"name": name, "edit": edit, "cells": [find(scores, paths[label]) for label in SHORT]}
        for name, edit, scores in cases
    ]


def verdict(summary: Summary) -> list[str]:
    """What happened in a few plain sentences, warnings included; a recipe may have written its own."""
    if "verdict" in summary:
        return list(summary["verdict"])
    lines = []
    by = {row["label"]: row for row in rows(summary)}
    gap, mass = by.get("relative gap, all"), by.get("word mass, all")
    if gap:
        lines.append(
            f"The relative gap between {' and '.join(summary['words'])} went from {gap['before']['value']:.3f} to "
            f"{gap['after']['value']:.3f} ({gap['change']:+.0f} %) on {gap['after']['n']} prompts of "
            f"{gap['after']['data'].removesuffix(', all')}."
        )
    if (afgb := by.get("AFGB, all")) and mass:
        lines.append(
            f"AFGB went from {afgb['before']['value']:.3f} to {afgb['after']['value']:.3f} ({afgb['change']:+.0f} %), "
            f"while the words' mass went from {mass['before']['value']:.3f} to {mass['after']['value']:.3f}."
        )
    if hint := by.get("UB-Score"):
        kept = "kept" if hint["after"]["value"] >= hint["before"]["value"] else "lost"
        lines.append(
            f"Following a hint such as his or her was {kept}: UB-Score {hint['before']['value']:.3f} to "
            f"{hint['after']['value']:.3f}."
        )
    if cost := by.get("perplexity"):
        lines.append(
            f"Perplexity on neutral text went from {cost['before']['value']:.2f} to {cost['after']['value']:.2f} "
            f"({cost['change']:+.1f} %)."
        )
    lines += caveats(summary["before"], summary["after"])
    lines += _random_blocks(summary)
    if "ranking" not in summary:  # a recipe that locates nothing
        return lines
    ranking = summary["ranking"]
    raw, normed = ranking["order"]["raw"][0], ranking["order"]["final_norm"][0]
    if raw != normed:
        place = ranking["order"]["raw"].index(normed) + 1
        lines.append(
            f"The rankings disagree: block {normed} is first only when the last stream is taken after the final norm; "
            f"in the stream itself it is number {place}, behind block {raw}."
        )
    return lines


def _random_blocks(summary: Summary) -> list[str]:
    """The edited block beside random ones: the relative gaps' differences, paired by prompt, one for each block."""
    found = {
        name: pairs["genbias.relative_gap.all"]
        for name, pairs in summary.get("differences", {}).items()
        if name.partition("_")[0] == "random" and "genbias.relative_gap.all" in pairs
    }
    if not found:
        return []
    parts = [
        f"block {', '.join(map(str, summary['controls'][name]['edit']['blocks']))} {pair['value']:+.3f} "
        f"[{pair['low']:+.3f}, {pair['high']:+.3f}] ({pair['verdict']})"
        for name, pair in found.items()
    ]
    better = sum(pair["verdict"] == "better" for pair in found.values())
    line = (
        f"Control: the same training on {len(found)} random block{'s' * (len(found) > 1)}; the edit's relative gap "
        f"minus theirs, paired: {'; '.join(parts)}. The edited block is better than {better} of {len(found)}"
    )
    values = np.array([pair["value"] for pair in found.values()])
    if len(values) < FEW:
        return [f"{line}; blocks differ, so set random_blocks to {FEW} or more before calling it the right one."]
    error = values.std(ddof=1) / len(values) ** 0.5
    return [f"{line}; mean difference {values.mean():+.3f}, standard error over blocks {error:.3f}."]


def before_after(summary: Summary) -> "Figure":
    """Bars with 95 % intervals: relative gap, AFGB and mass by scale, UB-Score and perplexity."""
    panels = [
        ("relative gap (ideal 0)", "relative_gap"),
        ("AFGB (ideal 0)", "afgb"),
        ("word mass", "mass"),
    ]
    wanted: dict[str, tuple[str, ...]] = {"UB-Score (ideal 1)": ("genhint", "ub"), "perplexity": ("perplexity",)}
    single = [(label, path) for label, path in wanted.items() if find(summary["before"], path)]
    count = len(panels) + len(single)
    figure = new_figure(5.6, 0.5 + 2.1 * ((count + 1) // 2))  # narrow, so that it can be read on a telephone
    figure.set_label("Bars of each metric before and after the edit, with 95 % intervals")
    figure.set_layout_engine("constrained", h_pad=0.1)
    axes = figure.subplots((count + 1) // 2, 2, squeeze=False).flatten()
    for place, (label, name) in enumerate(panels):
        scales = [
            scale for scale in ("word", "phrase", "sentence", "all") if scale in summary["before"]["genbias"][name]
        ]
        _pair(axes[place], label, scales, [[s["genbias"][name][k] for k in scales] for s in _both(summary)])
    for place, (label, path) in enumerate(single, len(panels)):
        _pair(axes[place], label, [""], [[find(scores, path)] for scores in _both(summary)])
    for empty in axes[count:]:
        empty.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=8)
    return figure


def _both(summary: Summary) -> tuple[Any, Any]:
    return summary["before"], summary["after"]


def _pair(axes: Any, label: str, names: list[str], series: list[list[Any]]) -> None:
    places = np.arange(len(names))
    for offset, metrics, name, colour, hatch in zip(
        (-0.2, 0.2), series, ("before", "after, as saved"), (GREY, BLUE), ("", "///"), strict=True
    ):
        values = [m["value"] for m in metrics]
        spread = [[m["value"] - m["low"] for m in metrics], [m["high"] - m["value"] for m in metrics]]
        axes.bar(
            places + offset,
            values,
            0.4,
            yerr=np.abs(spread),
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name,
            capsize=2,
        )
    axes.set_xticks(places, names, fontsize=8)
    axes.set_title(label, fontsize=9)
    axes.tick_params(axis="y", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def controls(summary: Summary) -> "Figure":
    """One line for each case, three columns: what is left of the bias, hint following, and what it cost."""
    table = comparison(summary)
    columns = [("relative gap (ideal 0)", 0), ("UB-Score (ideal 1)", 3), ("perplexity (lower is better)", 4)]
    columns = [(label, place) for label, place in columns if any(row["cells"][place] for row in table)]
    figure = new_figure(1.4 * len(columns) + 1.4, 1.1 + 0.27 * len(table))
    figure.set_label("Relative gap, UB-Score and perplexity of the edit and its controls")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for axis, (label, place) in zip(axes, columns, strict=True):
        before = table[0]["cells"][place]
        if before:
            axis.axvline(before["value"], color=GREY, lw=1, ls=":")
        for line, row in enumerate(table):
            if cell := row["cells"][place]:
                main = row["name"].endswith("(as saved)")
                axis.errorbar(
                    cell["value"],
                    line,
                    xerr=[[cell["value"] - cell["low"]], [cell["high"] - cell["value"]]],
                    fmt="o" if main else "s" if line == 0 else "^",
                    color=BLUE if main else GREY if line == 0 else ORANGE,
                    capsize=2,
                )
        axis.set_title(label.replace(" (", "\n("), fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(table)), [row["name"].replace("_", " ") for row in table])
    axes[0].invert_yaxis()
    return figure
