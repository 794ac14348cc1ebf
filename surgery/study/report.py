"""The page of a study: the recommendation first, then a table, a picture per pair of axes, and what got worse."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote

from surgery.files.atomic import write_json
from surgery.runs.recipe_files import read_toml
from surgery.runs.report import Table, cell, page, save
from surgery.study.agreement import TEMPLATES, over_methods, over_professions
from surgery.study.cells import TAKEN, Judged
from surgery.study.judging import details_of
from surgery.study.pictures import drawn
from surgery.study.recommendation import answer, broken, recommend
from surgery.study.settings import KINDS, Study
from surgery.study.showing import shown
from surgery.study.verdict import (
    Row,
    axes,
    chosen,
    objections,
    paired_with,
    plain_words,
    removed,
    removed_between,
    rows,
    unbeaten,
)

DELTA = "delta.safetensors"


def write_report(out: Path, study: Study, judged: Sequence[Judged], missing: Mapping[str, str]) -> Path:
    """Write ``study.json`` and ``study.html`` into ``out``; the page's path. ``missing``: judges without their data."""
    found = rows(judged)
    lines = recommend(found, study, _commands(found, judged, study))
    if missing:
        lines.append(f"Not measured, for want of data: {', '.join(missing)}.")
    if taken := sum(one.differences is not None for one in judged):
        lines.append(
            f"Taken from other folders: {taken} of {len(judged)} cells, each paired with the untouched model as it was "
            "measured beside it."
        )
    pictures = drawn(found, study)
    agreement = _agreement(found, judged)
    tables = [
        answer(found, study),
        _numbers(found, study),
        *(
            Table(str(figure.get_label()), [], [], picture=name, folded=n > 0)
            for n, (name, figure) in enumerate(pictures.items())
        ),
        *_shown(found, judged, study),
        *([agreement] if agreement else []),
        _methods(found),
        *_ledgers(found),
    ]
    text, files = page(title="Which edit to ship, and what it breaks", lines=lines, tables=tables, figures=pictures)
    summary = {
        "verdict": lines,
        "missing": dict(missing),
        "agreement": [list(row) for row in agreement.rows] if agreement else [],
        "cells": [
            {
                "model": one.cell.model,
                "method": one.cell.name,
                "seed": one.cell.seed,
                "refused": one.refused,
                "scores": {place: metric.to_dict() for place, metric in one.scores.items()},
                "differences": {place: asdict(found) for place, found in paired_with(one, judged).items()},
            }
            for one in judged
        ],
    }
    write_json(out / "study.json", summary)
    save(out / "study.html", text, files)
    return out / "study.html"


def _numbers(found: Sequence[Row], study: Study) -> Table:
    bias, cost = axes(study, {place for row in found for place in row.scores})
    places = [*bias, *cost]
    table, hints, alone = [], [], len({row.model for row in found}) == 1
    fronts = {row.model: unbeaten(found, row.model, bias, cost) for row in found}
    for row in found:
        untouched = next(one for one in found if one.model == row.model and one.method is None)
        share, spoilt = "", ""
        if row.method is not None and not row.refused:
            share = f"{100 * removed(row, untouched, bias):.0f} %"
            if (between := removed_between(row, untouched, bias)) is not None:
                share += f" [{100 * between[0]:.0f}, {100 * between[1]:.0f}]"
            spoilt = ", ".join(plain_words(place) for place in objections(row, cost, study.tolerance)) or "nothing"
        table.append(
            [
                row.name if alone else f"{row.model}: {row.name}",
                share,
                row.refused or spoilt,
                "{} of {}".format(*fronts[row.model][row.name]) if row.name in fronts[row.model] else "",
                *(cell(row.scores.get(p)) for p in places),
            ]
        )
        hints.append(row.method.about if row.method else "the model as it is")
    head = ["method", "bias removed", "spoils", "unbeaten", *(plain_words(place) for place in places)]
    measured = {place: row.scores[place] for row in found for place in places if place in row.scores}
    said = "; ".join(
        f"{plain_words(p)}: {one['scorer']}, on {one['data']}, n {one['n']}" for p, one in measured.items()
    )
    note = (
        "The bias removed is 1 - distance from the ideal after / before, mean over the bias numbers "
        f"({', '.join(map(plain_words, bias))}); one that was not measured counts as nothing removed. "
        "Spoils: numbers of cost that are worse with every seed, by more than "
        f"{study.tolerance:g} points. Unbeaten: on so many pairs of bias and cost no other is better on both. "
        "Brackets are 95 % intervals: over the seeds where there are several, else "
        f"bootstrap intervals. {said}."
    )
    return Table("The numbers that decide", head, table, note, hints=hints)


def _shown(found: Sequence[Row], judged: Sequence[Judged], study: Study) -> list[Table]:
    """Texts, prompts and groups before and after the method that is recommended, or that takes most of the bias."""
    tables = []
    for row in chosen(found, study):
        cells = {
            name: next(
                one.cell for one in judged if (one.cell.model, one.cell.name) == (row.model, name) and not one.refused
            )
            for name in ("untouched", row.name)
        }
        before, after = (details_of(cell.folder) for cell in cells.values())
        tables += shown(before, after, row.model, row.name)
    return tables


def _agreement(found: Sequence[Row], judged: Sequence[Judged]) -> Table | None:
    """Whether templates rank methods, and professions, as what is written does; None where nothing was written."""
    table = []
    for model in dict.fromkeys(row.model for row in found):
        own = [one for one in judged if one.cell.model == model and not one.refused]
        firsts = [next(one for one in own if one.cell.name == name) for name in dict.fromkeys(o.cell.name for o in own)]
        for place in TEMPLATES:
            if (pair := over_methods(firsts, place)) is not None:
                table.append([model, f"{plain_words(place)}, over methods", str(pair[0]), f"{pair[1]}"])
        for one in firsts[:1]:
            if (pair := over_professions(details_of(one.cell.folder))) is not None:
                table.append(
                    [model, "he or she after prompts, over professions, untouched", str(pair[0]), f"{pair[1]}"]
                )
    if not table:
        return None
    note = (
        "Spearman's rank correlation of each number's distance from its ideal with that of the stereotype in free text "
        "(who is he or she, by profession); first seeds. Brackets: 95 % bootstrap intervals over the rows measured, or "
        "over professions. Few methods give wide ones."
    )
    return Table(
        "Do template scores say what the model writes?", ["model", "templates", "rank agreement", "of"], table, note
    )


def _methods(found: Sequence[Row]) -> Table:
    methods = {row.name: row.method for row in found if row.method is not None}
    kind = {name: f"{key} {getattr(one, key)}" for name, one in methods.items() for key in KINDS if getattr(one, key)}
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
                    plain_words(place), verdict, f"{100 * row.change(place):+.1f} %",
                    f"{one.value:+.4f} [{one.low:+.4f}, {one.high:+.4f}]", f"{one.n}", one.scorer,
                ])  # fmt: skip
        count = len(row.differences[0])
        note = (
            f"Of {count} numbers {len(worse)} got worse ({len(broken(row))} by more than a point) and {len(better)} "
            "better with every seed; the rest is within noise. Intervals of the first seed, paired row by row with the "
            "model as it is, widened so that all "
            f"{count} hold together at 95 %."
        )
        head = ["number", "verdict", "change", "difference", "rows", "scorer"]
        tables.append(Table(f"What {row.name} changed on {row.model}", head, cells, note, folded=True))
    return tables


def _commands(found: Sequence[Row], judged: Sequence[Judged], study: Study) -> dict[str, str]:
    """By model, how to ship what is recommended."""
    said = {}
    for row in chosen(found, study, clean=True):
        assert row.method is not None
        if row.method.preamble:
            said[row.model] = f"To ship it: put {row.method.preamble!r} before every prompt."
            continue
        if row.method.decoding:
            said[row.model] = f"To ship it: decode by {row.method.decoding} (surgery.edits.{row.method.decoding})."
            continue
        first = next(one.cell for one in judged if one.cell.model == row.model and one.cell.name == row.name)
        brought, recipe = first.folder / TAKEN / DELTA, first.folder / TAKEN / "recipe.toml"
        file = brought if brought.is_file() else Path(row.method.delta or first.folder / "run" / DELTA)
        words: list[object] = []
        if not file.is_file() and recipe.is_file():  # taken without its delta; its data lies elsewhere here
            data = ["--set", f"data={study.folder}"] if read_toml(recipe).get("data") else []
            file = Path("RUN") / DELTA
            words = ["surgery", "run", recipe, "--model", row.model, *data, "--out", "RUN", "&&"]
        words += ["surgery", "apply", file, row.model, "--out", "EDITED"]
        words += ["--scale", f"{row.method.scale:g}"] if row.method.scale != 1 else []
        said[row.model] = f"To ship it: {' '.join(word if word == '&&' else quote(str(word)) for word in words)}"
    return said
