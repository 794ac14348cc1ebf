"""The report of an LFTF run: before and after, the most biased professions, the controls, and where it was edited."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.plots import block_bars
from hooks.ranking import Ranking
from surgery.metrics.metric import ideal_of
from surgery.runs import examples
from surgery.runs.headline import in_short, lead
from surgery.runs.report import Table, cell, edited, write_page
from surgery.runs.words_report import COMMANDS, SHORT, before_after, comparison, controls, rows, verdict

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Summary = Mapping[str, Any]


def write_report(folder: Path, summary: Summary, recipe: str) -> None:
    """``report.html`` and ``plots/*.png`` of one run."""
    figures = {"ranking": _picture(summary), "before_after": before_after(summary)}
    if summary["controls"]:
        figures["controls"] = controls(summary)
    write_page(
        folder,
        summary,
        recipe,
        lines=verdict(summary),
        tables=[in_short(summary), _scores(summary), *examples.tables(summary), _beside(summary), _where(summary)],
        figures=figures,
        commands=COMMANDS,
        lead=lead(summary),
    )


def _scores(summary: Summary) -> Table:
    found = rows(summary)
    cells = [
        [
            row["label"],
            cell(row["before"]),
            cell(row["after"]),
            "" if np.isnan(row["change"]) else f"{row['change']:+.1f} %",
            ideal_of(row["after"]),
            f"{row['after']['n']}",
        ]
        for row in found
    ]
    hints = [f"{row['after']['scorer']}, on {row['after']['data']}" for row in found]
    overall = [row["label"].endswith(", all") or "," not in row["label"] for row in found]
    said = [f"{row['label']}: {hint}." for row, hint, shown in zip(found, hints, overall, strict=True) if shown]
    note = (
        'Everything under "after" was measured on the checkpoint as saved. '
        f"Scorers: {' '.join(said)} Intervals are 95 % percentile bootstraps (2,000 resamples) over professions, for "
        "perplexity over texts."
    )
    head = ["metric", "before [95 % interval]", "after, as saved [95 % interval]", "change", "ideal", "rows"]
    return Table("Before and after", head, cells, note, hints=hints)


def _beside(summary: Summary) -> Table:
    if not summary["controls"]:
        note = (
            "None were asked for. --set controls=random trains a random block beside the located one; "
            "--set ablations=true runs all of them."
        )
        return Table("Controls", [], [], note)
    cells = [
        [
            row["name"],
            edited(row["edit"]) if row["edit"] else "",
            *("as before" if metric is None else cell(metric) for metric in row["cells"]),
        ]
        for row in comparison(summary)
    ]
    return Table("Controls", ["case", "edited", *SHORT], cells, picture="controls")


def _where(summary: Summary) -> Table:
    ranking = summary["ranking"]
    variance = ranking["variance_5x100"]
    note = (
        f"{ranking['method']}: 1 - cos(stream entering a block, stream leaving it), {ranking['positions']} prompt "
        f"token{'s' if ranking['positions'] == 'all' else ''}, {ranking['aggregate']} over {ranking['n']} prompts. "
        "raw: the residual stream itself. final_norm: the last stream after the model's final norm, which is what "
        "transformers returns as the last hidden state and probably what the paper used; the norm alone can lift the "
        f"last block to the top. Mean variance per block over 5 draws of 100 prompts: raw {variance['raw']:.2g}, "
        f"final_norm {variance['final_norm']:.2g} (paper, Table 7: 0.018 to 0.024)."
    )
    return Table("Where", [], [], note, "ranking")


def _picture(summary: Summary) -> "Figure":
    ranking = summary["ranking"]
    columns = {
        name: Ranking(
            "bmi",
            "block",
            np.array(ranking[name]),
            "training prompts",
            ranking["n"],
            errors=None if ranking["error"] is None else np.array(ranking["error"]),
            settings={"stream": name},
        )
        for name in ("raw", "final_norm")
    }
    blocks = summary["edit"]["blocks"]
    figure = block_bars(columns["raw"], columns["final_norm"], edited=blocks if isinstance(blocks, list) else None)
    figure.set_label("Block Mitigating Importance of each block by both conventions")
    return figure
