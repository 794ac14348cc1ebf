"""The rows of the matrix of families, and the table of them in docs/families.md: written, and read again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

KINDS = {"causal": "CAUSAL_LM", "masked": "MASKED_LM", "encoder-decoder": "SEQ_TO_SEQ_CAUSAL_LM"}
COLUMNS = ("open", "next word", "batched", "capture", "bmi", "lens", "edit", "delta", "apply", "live", "undo")


@dataclass(frozen=True)
class Family:
    """One class of transformers that reads and writes text."""

    kind: str
    model_type: str
    name: str


@dataclass
class Row:
    """A family's cells by column: "works", "refused: why" or "wrong: what"; `unbuilt` says why it has none."""

    family: Family
    cells: dict[str, str] = field(default_factory=dict)
    unbuilt: str = ""


def word(value: str) -> str:
    """What the table shows of a cell: yes, curve (a lens without contributions), no, wrong, or nothing."""
    if value.startswith("works"):
        return "curve" if "," in value else "yes"
    return {"refused": "no", "wrong": "wrong"}.get(value.partition(":")[0], "")


def markdown(rows: list[Row]) -> str:
    """The table of families by capability, with the reasons as numbered notes."""
    import transformers

    notes: dict[str, int] = {}
    built = [row for row in rows if not row.unbuilt]
    lines = [
        "# Families",
        "",
        f"Written by `python -m tests.matrix --all --markdown docs/families.md` with transformers "
        f"{transformers.__version__}: every class that its mappings of causal, masked and encoder-decoder models name, "
        f"built tiny with random weights ({len(built)} of {len(rows)}), saved, and opened by `surgery.load`. A test "
        "samples it.",
        "",
        "**yes**: the result equals one from outside (a plain forward pass of each prompt alone, the bytes on disk). "
        "**curve**: the lens gives the logit difference along the stream, but no contributions, since writes do not "
        "reach the head unchanged. **no**: refused, with the numbered reason. Empty: not asked of this "
        "kind, or what it needs was refused.",
        "",
        "open: the weights as saved. next word: P(word) of prompts one by one. batched: the same and log-likelihoods "
        "of prompts of several lengths together. capture: the stream into and out of every block. bmi, lens: of a "
        "batch. edit: training the last block (of other kinds: finding its parameters). delta, apply, live, undo: its "
        "delta file, on disk, in memory bit for bit the same, and back byte for byte.",
    ]
    for kind in KINDS:
        mine = sorted((row for row in built if row.family.kind == kind), key=lambda row: row.family.name.lower())
        columns = [c for c in COLUMNS if kind == "causal" or c not in ("next word", "batched")]
        done = sum(all(word(row.cells.get(c, "")) == "yes" for c in ("edit", "delta", "apply")) for row in mine)
        lines += ["", f"## {kind.capitalize()}: {len(mine)} classes, edit, delta and apply in {done}", ""]
        lines += ["| class | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
        for row in mine:
            shown = []
            for column in columns:
                value = row.cells.get(column, "")
                mark = word(value)
                if mark in ("no", "wrong", "curve"):
                    number = notes.setdefault(_reason(value, row), len(notes) + 1)
                    mark += f" [{number}](#reasons)"
                shown.append(mark)
            lines.append(f"| {row.family.name} | " + " | ".join(shown) + " |")
    lines += ["", "## Reasons", ""]
    lines += [f"{number}. {reason}" for reason, number in notes.items()]
    lines += ["", "## Not built", ""]
    lines += [f"- {row.family.name}: {_plain(row.unbuilt)}" for row in rows if row.unbuilt]
    return "\n".join(lines) + "\n"


def _reason(value: str, row: Row) -> str:
    """A cell's reason, the same for families that differ in names and numbers only."""
    text = value.partition("curve only: ")[2] or value.partition(": ")[2]
    text = text.partition("; pass hooks.anatomy.find")[0].removeprefix(f"{row.family.model_type}: ")
    text = re.sub(
        r"blocks\.\d+: \S+ normalises", "a norm behind the sum normalises", text.replace(row.family.name, "it")
    )
    text = re.sub(r"\S*blocks\.\d+: what", "what", text)
    return _plain(re.sub(r"-?\d\.\d{4,}", lambda number: f"{float(number[0]):.2f}", text))


def _plain(text: str) -> str:
    return text.replace("|", "/").replace("<", "(").replace(">", ")").replace("*", "\\*").replace("_", "\\_")


def written(path: Path) -> dict[tuple[str, str], dict[str, str]]:
    """(kind, class) -> column -> word, as the table in `path` has it."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    kind, columns = "", [""]
    for text in path.read_text().splitlines():
        if text.startswith("## "):
            kind = text[3:].partition(":")[0].lower()
        elif text.startswith("| class"):
            columns = [cell.strip() for cell in text.strip("| ").split("|")][1:]
        elif text.startswith("| "):
            name, *cells = [cell.strip() for cell in text[1:-1].split("|")]
            found[kind, name] = {c: cell.split(" ")[0] for c, cell in zip(columns, cells, strict=True)}
    return found


def logged(log: Path) -> Iterator[Row]:
    for text in log.read_text().splitlines():
        held = json.loads(text)
        yield Row(Family(held["kind"], held["type"], held["class"]), held["cells"], held["unbuilt"])
