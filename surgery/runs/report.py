"""The one report, a self-contained HTML page: what happened in words, tables with intervals, pictures, the recipe.

Every recipe says its own sentences and chooses its own tables; how they look is the same for all.
"""

import os
import platform
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2

from surgery import __version__
from surgery.files.atomic import write_bytes, write_text
from surgery.metrics.metric import ideal_of
from surgery.runs.definitions import defined
from surgery.runs.mechanism import said
from surgery.runs.paired import told
from surgery.runs.pictures import bytes_of, svg

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AGAIN = ("surgery run recipe.toml --out again         # the same again, byte for byte, on the same machine",)

PLACES = {
    "upper": "from two thirds of the depth to a fifteenth below the end, where this did best on development parts",
    "last": "the last one, which the paper edits",
    "auto": "first of the ranking",
    "random": "drawn at random",
    "blocks": "all of them, without embeddings and head",
    "first": "the first one",
    "middle": "the middle one",
}
"""Why an edit is where it is, by what the recipe's key ``block`` says."""


@dataclass(frozen=True)
class Bar:
    """A cell that shows a number between -1 and 1 as a bar from the middle; it sorts by the number."""

    value: float
    hint: str = ""

    @property
    def left(self) -> float:
        """Where the bar begins, in percent of the cell."""
        return 50 + 50 * max(-1.0, min(0.0, self.value))

    @property
    def width(self) -> float:
        """How long it is, in percent of the cell."""
        return 50 * min(1.0, abs(self.value))


@dataclass(frozen=True)
class Table:
    """A section of the page: its caption, the head of each column and the cells, and what is said below.

    Without a head it has no table, and its picture and note stand alone. A click on a head sorts by that column.
    """

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str | Bar]]
    note: str = ""
    picture: str = ""
    """The name of the figure above the table, or beside a first one; those that no table names stand at the top."""
    hints: Sequence[str] = ()
    """What is shown when a row is pointed at, one for each row."""
    folded: bool = False
    """Shown when its caption is clicked."""
    texts: bool = False
    """Its cells are sentences, which wrap."""
    first: bool = False
    """Stands before the page's sentences."""


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
    hints = []
    for path in paths:
        metrics = [found[name].get(path) for name in columns]
        one = next(metric for metric in metrics if metric)
        hints.append(f"{one['scorer']}, on {one['data']}")
        rows.append([" ".join(path).replace("_", " "), *map(cell, metrics), *([ideal_of(one)] * ideal), f"{one['n']}"])
    said = "; ".join(dict.fromkeys(hints))
    return Table(
        caption,
        ["metric", *columns, *(["ideal"] * ideal), "rows"],
        rows,
        f"{note} Scorers: {said}. Brackets are 95 % bootstrap intervals.".strip(),
        hints=hints,
    )


def beside(differences: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """The edit minus each case of ``surgery.runs.paired.differences``: a row a metric, a column a case."""
    paths = list(dict.fromkeys(path for pairs in differences.values() for path in pairs))

    def shown(pair: Mapping[str, Any] | None) -> str:
        return f"{pair['value']:+.4f} [{pair['low']:+.4f}, {pair['high']:+.4f}] {pair['verdict']}" if pair else ""

    rows = [
        [path.replace(".", " ").replace("_", " "), *(shown(pairs.get(path)) for pairs in differences.values())]
        for path in paths
    ]
    note = (
        "The edit's value minus that of the other, over the same rows drawn together, with its 95 % bootstrap "
        "interval. Of many intervals some miss 0 by chance."
    )
    return Table("The edit minus what stands beside it, paired", ["metric", *differences], rows, note)


def edited(edit: Mapping[str, Any]) -> str:
    """Which blocks an edit changed, and which part of them, in words; ``edit`` as it stands in ``run.json``."""
    blocks, part = edit.get("blocks"), edit.get("part", "all")
    if blocks is None:
        return "prompt only"
    if blocks == "all":
        return "all parameters" if part == "all" else f"all blocks ({part.replace('_', ' ')})"
    where = f"block{'s' * (len(blocks) > 1)} {_ranges(blocks)}"
    return where if part == "all" else f"{where} ({part.replace('_', ' ')})"


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers in words: three or more in a row as "20 to 27"."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][-1] + 1:
            found[-1].append(number)
        else:
            found.append([number])
    said = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in found]
    return ", ".join(said)


def page(
    *,
    title: str,
    lines: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, "Figure"],
    summary: Mapping[str, Any] | None = None,
    recipe: str = "",
    commands: Sequence[str] = AGAIN,
    more: Sequence[str] = (),
    lead: str = "",
) -> tuple[str, dict[str, bytes]]:
    """The page as HTML, with the pictures in it, and those pictures as PNG files (name: bytes).

    ``lead`` is for those who read no further. ``lines`` are the sentences at the top; one that starts with "Warning" is
    marked. ``more`` are further ones, which a click unfolds, but warnings. A figure's label is read to those who do not
    see it. ``summary`` is ``run.json`` of the one run that the page is about, ``recipe`` its settings as TOML, and
    ``commands`` are those that repeat it.
    """
    files_of = {name: bytes_of(figure) for name, figure in figures.items()}
    for figure in figures.values():
        figure.set_layout_engine("none")  # it is laid out; once more would take as long as painting it
    pictures = {
        name: {"label": figure.get_label() or name.replace("_", " "), "svg": svg(name, figure)}
        for name, figure in figures.items()
    }
    placed = {table.picture for table in tables}
    text = files("surgery.runs").joinpath("report.html.jinja").read_text("utf-8")
    template = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(text)
    rendered = template.render(
        title=title,
        about=_about(summary, recipe),
        made_with=_made_with(),
        definitions=defined(heads(tables)),
        lines=[*lines, *(line for line in more if line.startswith("Warning"))],
        more=[line for line in more if not line.startswith("Warning")],
        lead=lead,
        at_top=[picture for name, picture in pictures.items() if name not in placed],
        tables=tables,
        pictures=pictures,
        run=summary or {},
        recipe=recipe,
        commands=commands,
    )
    return rendered, files_of


def write_page(
    folder: Path,
    summary: Mapping[str, Any],
    recipe: str,
    *,
    lines: Sequence[str],
    tables: Sequence[Table],
    figures: Mapping[str, "Figure"],
    commands: Sequence[str] = AGAIN,
    lead: str = "",
) -> None:
    """Write ``report.html`` of a run, and ``plots/NAME.png`` for each of ``figures``, into its folder.

    To ``lines`` and ``tables`` comes what every run says: what moved beyond noise (``surgery.runs.paired.told``), what
    the objective did (``surgery.runs.mechanism.said``), and the paired differences.
    """
    name, method = summary["recipe"], summary.get("method")
    title = f"{name}{f' ({method})' if method not in (None, name) else ''} on {summary['model']}"
    save(
        folder / "report.html",
        *page(
            title=title,
            lines=[
                *([located["said"]] if (located := summary["edit"].get("located")) else []),
                *lines,
                *told(summary),
            ],
            more=said(summary),
            tables=[*tables, *([beside(pairs)] if (pairs := summary.get("differences")) else [])],
            figures=figures,
            summary=summary,
            recipe=recipe,
            commands=commands,
            lead=lead,
        ),
    )


def save(file: Path, text: str, pictures: Mapping[str, bytes]) -> None:
    """Write a page to ``file`` and its pictures to ``plots/NAME.png`` beside it."""
    for name, picture in pictures.items():
        write_bytes(file.parent / "plots" / f"{name}.png", picture)
    write_text(file, text)


def heads(tables: Sequence[Table]) -> list[str]:
    """What tables have in their heads and first columns: the names of which a reader may ask what they mean."""
    return [str(text) for table in tables for text in (*table.head, *(row[0] for row in table.rows))]


def _made_with() -> str:
    """When the page was written, by which versions, on what."""
    said = [f"{date.today()}: model-surgery {__version__}"]
    said += [f"{package} {version(package)}" for package in ("torch", "transformers")]
    said += [f"Python {platform.python_version()}", f"{platform.system()} {platform.machine()}", _hardware()]
    return f"{', '.join(said)}."


def _about(summary: Mapping[str, Any] | None, recipe: str) -> str:
    """When the page was written; of a run also what was edited and why there, how long, with which seed."""
    if summary is None:
        return f"{date.today()}."
    edit = summary["edit"]
    counts = [f"{edit[key]:,} {label}" for key, label in (("parameters", "numbers"), ("steps", "steps")) if key in edit]
    where = f"{edited(edit)}{f' ({reason})' if (reason := why(edit, recipe)) else ''}"
    return f"Edited: {', '.join([where, *counts])}, seed {summary['seed']}. {date.today()}."


def why(edit: Mapping[str, Any], recipe: str) -> str:
    """Why an edit is where it is, by the keys ``reason`` and ``block`` of its recipe; "" where they say nothing."""
    values = tomllib.loads(recipe) if recipe else {}
    if reason := values.get("reason"):
        return str(reason)
    block = values.get("block")
    if block is None or not isinstance(edit.get("blocks"), list):
        return ""
    return PLACES.get(block, "") if isinstance(block, str) else "named in the recipe"


def _hardware() -> str:
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{os.cpu_count()} CPU cores"
