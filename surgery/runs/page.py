"""One self-contained HTML page of a run: what happened in words, tables with intervals, pictures, the recipe.

Every recipe says its own sentences and chooses its own tables; how they look is the same for all.
"""

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from surgery.metrics.metric import ideal_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Table:
    """A table as it is printed: its caption, the head of each column, and the cells as text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


def leaves(scores: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every metric of a tree of scores (as plain dictionaries) with the keys that lead to it, in the tree's order."""
    for key, value in scores.items():
        if isinstance(value, Mapping) and {"value", "scorer"} <= set(value):
            yield (*path, key), dict(value)
        elif isinstance(value, Mapping):
            yield from leaves(value, (*path, key))


def cell(metric: Mapping[str, Any] | None) -> str:
    """The value with its 95 % interval, as it stands in every table; empty where there is none."""
    return "" if metric is None else f"{metric['value']:.4f} [{metric['low']:.4f}, {metric['high']:.4f}]"


def compared(
    columns: Mapping[str, Mapping[str, Any]], *, caption: str = "Before and after", note: str = "", ideal: bool = True
) -> Table:
    """A row for every metric of any column (``{"before": scores, "after": scores}``), a column for every case."""
    found = {name: dict(leaves(scores)) for name, scores in columns.items()}
    paths = list(dict.fromkeys(path for scores in found.values() for path in scores))
    rows: list[list[str]] = []
    scorers: dict[tuple[str, str], None] = {}
    for path in paths:
        metrics = [found[name].get(path) for name in columns]
        one = next(metric for metric in metrics if metric)
        scorers[one["scorer"], one["data"]] = None
        rows.append([" ".join(path).replace("_", " "), *map(cell, metrics), *([ideal_of(one)] * ideal), f"{one['n']}"])
    said = "; ".join(f"{scorer}, on {data}" for scorer, data in scorers)
    return Table(
        caption,
        ["metric", *columns, *(["ideal"] * ideal), "rows"],
        rows,
        f"{note} Scorers: {said}. Brackets are 95 % bootstrap intervals.".strip(),
    )


def page(
    *,
    title: str,
    lines: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, "Figure"],
    recipe: str = "",
    delta: Mapping[str, Any] | None = None,
) -> tuple[str, dict[str, bytes]]:
    """The page as HTML, with the pictures in it, and those pictures as PNG files (name: bytes).

    ``lines`` are the sentences at the top; one that starts with "Warning" is marked. ``delta`` has the file's
    name, kind, bytes and sha256.
    """
    pictures = {}
    for name, figure in figures.items():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=130)
        pictures[name] = data.getvalue()
    text = files("surgery.runs").joinpath("page.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    encoded = {name: base64.b64encode(picture).decode("ascii") for name, picture in pictures.items()}
    return (
        template.render(title=title, lines=lines, tables=tables, pictures=encoded, recipe=recipe, delta=delta),
        pictures,
    )


def write_page(
    folder: Path,
    *,
    title: str,
    lines: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, "Figure"],
    recipe: str,
    delta: Mapping[str, Any] | None = None,
) -> None:
    """Write ``page(...)`` as ``report.html`` and ``plots/NAME.png`` for each of ``figures`` into ``folder``."""
    text, pictures = page(title=title, lines=lines, tables=tables, figures=figures, recipe=recipe, delta=delta)
    for name, picture in pictures.items():
        (folder / "plots").mkdir(exist_ok=True)
        (folder / "plots" / f"{name}.png").write_bytes(picture)
    (folder / "report.html").write_text(text, "utf-8")
