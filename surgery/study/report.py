"""The page of a study: the recommendation first, then a table, a picture per pair of axes, and what got worse."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.plots import BLUE, GREY, ORANGE, new_figure
from surgery.files.atomic import write_json
from surgery.runs.compare import front, loss
from surgery.runs.report import Table, cell, page, save
from surgery.study.cells import Judged
from surgery.study.settings import Study
from surgery.study.verdict import Row, axes, recommend, removed, rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PICTURES = 4


def write_report(out: Path, study: Study, judged: Sequence[Judged]) -> Path:
    """Write ``study.json`` and ``study.html`` into ``out``; the page's path."""
    found = rows(judged)
    lines = recommend(found, study)
    tables = [_numbers(found, study), _methods(found), *_ledgers(found)]
    text, pictures = page(
        title="Which edit to ship, and what it breaks",
        lines=[*lines, *_commands(found, judged, lines)],
        tables=tables,
        figures=_pictures(found, study),
    )
    summary = {
        "verdict": lines,
        "cells": [
            {
                "model": one.cell.model,
                "method": one.cell.name,
                "seed": one.cell.seed,
                "refused": one.refused,
                "scores": {place: metric.to_dict() for place, metric in one.scores.items()},
            }
            for one in judged
        ],
    }
    write_json(out / "study.json", summary)
    save(out / "study.html", text, pictures)
    return out / "study.html"


def _numbers(found: Sequence[Row], study: Study) -> Table:
    bias, cost = axes(study, {place for row in found for place in row.scores})
    places = [*bias, *cost]
    table = []
    for row in found:
        untouched = next(one for one in found if one.model == row.model and one.method is None)
        share = "" if row.method is None else f"{100 * removed(row, untouched, bias):.0f} %"
        cells = (
            [cell(row.scores.get(place)) for place in places]
            if not row.refused
            else [row.refused] + [""] * (len(places) - 1)
        )
        table.append([f"{row.model}: {row.name}", share, *cells])
    head = ["method", "bias removed", *(place.replace("_", " ").replace(".", " ") for place in places)]
    ideals = {place: row.scores[place] for row in found for place in places if place in row.scores}
    said = "; ".join(f"{place}: {one['scorer']}, on {one['data']}, n {one['n']}" for place, one in ideals.items())
    note = (
        f"{said}. Brackets are 95 % intervals: over the seeds where there are several, else bootstrap intervals. "
        "The bias removed is 1 - distance from the ideal after / before, mean over the bias numbers."
    )
    return Table("The numbers that decide", head, table, note)


def _methods(found: Sequence[Row]) -> Table:
    methods = {row.name: row.method for row in found if row.method is not None}
    kind = {
        name: f"recipe {one.recipe}" if one.recipe else f"delta {one.delta}" if one.delta else "a prompt"
        for name, one in methods.items()
    }
    return Table("The methods", ["method", "what", "about"], [[n, kind[n], one.about] for n, one in methods.items()])


def _ledgers(found: Sequence[Row]) -> list[Table]:
    """For every method all that changed beyond noise, what got worse first."""
    tables = []
    for row in (row for row in found if row.differences):
        worse = row.worse()
        better = [p for p in row.differences[0] if all(p in d and d[p].verdict == "better" for d in row.differences)]
        cells = []
        for verdict, places in (("worse", worse), ("better", better)):
            for place in places:
                one = row.differences[0][place]
                cells.append([
                    place.replace("_", " ").replace(".", " "), verdict, f"{100 * row.change(place):+.1f} %",
                    f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]", f"{one.n}", one.scorer,
                ])  # fmt: skip
        count = len(row.differences[0])
        note = (
            f"Of {count} numbers {len(worse)} got worse and {len(better)} better with every seed; the rest is within "
            "noise. Intervals of the first seed, paired row by row with the model as it is, widened so that all "
            f"{count} hold together at 95 %."
        )
        head = ["number", "verdict", "change", "difference", "rows", "scorer"]
        tables.append(Table(f"What {row.name} changed on {row.model}", head, cells, note))
    return tables


def _pictures(found: Sequence[Row], study: Study) -> dict[str, "Figure"]:
    """Bias against cost for each pair of axes; methods that another one beats on both are grey."""
    figures: dict[str, Figure] = {}
    for model in dict.fromkeys(row.model for row in found):
        own = [row for row in found if row.model == model]
        bias, cost = axes(study, own[0].scores)
        for x, y in list(product(cost, bias))[:PICTURES]:
            shown = [row for row in own if x in row.scores and y in row.scores]
            if len(shown) > 1:
                figures[f"{Path(model).name}_{y}_{x}".replace(".", "_")] = _picture(model, shown, x, y)
    return figures


def _picture(model: str, shown: Sequence[Row], x: str, y: str) -> "Figure":
    figure = new_figure(7, 4.2)
    plot = figure.subplots()
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(row.scores[x], row.scores[y]) for row in shown]
    best = front([(loss(a), loss(b)) for a, b in pairs])
    for number, (row, (a, b)) in enumerate(zip(shown, pairs, strict=True)):
        colour = ORANGE if row.method is None else BLUE if number in best else GREY
        error: Any = [[abs(b["value"] - b["low"])], [abs(b["high"] - b["value"])]]
        plot.errorbar(
            a["value"], b["value"], yerr=error, color=colour, marker="s" if row.method is None else "o", lw=0.8
        )
        plot.annotate(row.name, (a["value"], b["value"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    for name, place, metric in (("x", x, pairs[0][0]), ("y", y, pairs[0][1])):
        way = f"ideal {metric['ideal']:g}" if metric["direction"] == "nearer" else f"{metric['direction']} is better"
        getattr(plot, f"set_{name}label")(f"{place.replace('_', ' ').replace('.', ' ')} ({way})")
    plot.set_title(f"{model}. Orange: untouched; grey: another method is better on both axes.", fontsize=9)
    plot.spines[["top", "right"]].set_visible(False)
    return figure


def _commands(found: Sequence[Row], judged: Sequence[Judged], lines: Sequence[str]) -> list[str]:
    """The command that ships each recommended delta."""
    said = []
    for row in found:
        if row.method is None or not any(line.startswith(f"{row.model}: ship {row.name}.") for line in lines):
            continue
        if row.method.preamble:
            said.append(f"To ship it: put {row.method.preamble!r} before every prompt.")
            continue
        first = next(one.cell for one in judged if one.cell.model == row.model and one.cell.name == row.name)
        file = row.method.delta or str(first.folder / "run" / "delta.safetensors")
        scale = f" --scale {row.method.scale:g}" if row.method.scale != 1 else ""
        said.append(f"To ship it: surgery apply {file} {row.model} --out EDITED{scale}")
    return said
