"""A user's training file: texts, or prompts with their answers, from .txt, .jsonl, .csv or .tsv."""

import csv
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.data.prompts import read_text
from surgery.errors import SurgeryError

ENDINGS = (".txt", ".jsonl", ".csv", ".tsv")


@dataclass(frozen=True)
class Example:
    """One row of the file. ``prompt`` is empty for a text, whose every token is learnt; else only ``answer`` is."""

    prompt: str
    answer: str


@dataclass(frozen=True)
class Columns:
    """Under which names the file keeps what; an empty name means that the file has no such column."""

    text: str = "text"
    prompt: str = "prompt"
    answer: str = "answer"


def examples(path: str | Path, *, columns: Columns | None = None, limit: int = 0) -> list[Example]:
    """The rows of a training file, in order; the first ``limit`` of them where that is not 0.

    ``.txt`` holds a text on each line. ``.jsonl`` holds an object on each line, ``.csv`` and ``.tsv`` a first row of
    column names; their rows are texts or prompt and answer, told apart by the names in ``columns``. Blank lines are
    skipped. Texts are taken as they stand: white space at their ends is part of the tokens.

    Raises ``SurgeryError`` for a missing, unreadable, malformed or empty file, naming the file and its line.
    """
    path, columns = Path(path), columns or Columns()
    ending = path.suffix.lower()
    if not path.is_file() or ending not in ENDINGS:
        got = f"the ending {ending or 'none'!r}" if path.is_file() else "no such file"
        raise SurgeryError(f"training file {path}: got {got}, expected a file ending in {', '.join(ENDINGS)}")
    content = read_text(path)
    if ending == ".txt":
        rows: Iterator[Example] = (Example("", line) for _, line in _lines(content))
    elif ending == ".jsonl":
        rows = (_example(_object(line, at), columns, at) for at, line in _located(content, path))
    else:
        rows = _table(content, "," if ending == ".csv" else "\t", path, columns)
    found = []
    for row in rows:
        found.append(row)
        if len(found) == limit:
            break
    if not found:
        raise SurgeryError(f"training file {path}: got no row, expected at least 1; fill it")
    return found


def _lines(text: str) -> Iterator[tuple[int, str]]:
    # Only the line feed ends a line: str.splitlines would also cut at characters inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.removesuffix("\r")


def _located(text: str, path: Path) -> Iterator[tuple[str, str]]:
    return ((f"{path}, line {number}", line) for number, line in _lines(text))


def _object(line: str, at: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SurgeryError(f"{at}: got {line[:60]!r}, expected a JSON object on one line; mend that line")
    return value


def _table(text: str, delimiter: str, path: Path, columns: Columns) -> Iterator[Example]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            at = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if not names:
                names = cells
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise SurgeryError(f"{at}: two columns are named {twice!r}; the first row must name each once")
                _kind(dict.fromkeys(names), columns, at)
            elif len(cells) != len(names):
                raise SurgeryError(
                    f"{at}: got {len(cells)} cells, expected {len(names)} ({', '.join(names)[:80]}); mend that row"
                )
            else:
                yield _example(dict(zip(names, cells, strict=True)), columns, at)
    except csv.Error as error:
        raise SurgeryError(f"{path}, line {reader.line_num}: malformed ({error}); mend the quotes there") from None


def _kind(row: Mapping[str, Any], columns: Columns, at: str) -> str:
    """Whether a row is a "text" or a "pair"."""
    text = bool(columns.text) and columns.text in row
    pair = [name for name in (columns.prompt, columns.answer) if name and name in row]
    if text and pair:
        raise SurgeryError(
            f"{at}: has both {columns.text!r} and {pair[0]!r}; say which to learn by setting the other's name to ''"
        )
    if not text and len(pair) != 2:
        raise SurgeryError(
            f"{at}: got {', '.join(map(str, row))[:80]!r}, expected {columns.text!r}, or {columns.prompt!r} and "
            f"{columns.answer!r}; name your columns with text, prompt and answer"
        )
    return "text" if text else "pair"


def _example(row: Mapping[str, Any], columns: Columns, at: str) -> Example:
    if _kind(row, columns, at) == "text":
        return Example("", _string(row, columns.text, at))
    return Example(_string(row, columns.prompt, at), _string(row, columns.answer, at))


def _string(row: Mapping[str, Any], name: str, at: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise SurgeryError(f"{at}: {name!r} is {str(value)[:60]!r}, expected text that is not blank; mend that row")
    return value
