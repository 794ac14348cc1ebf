"""The rows of a .txt, .jsonl, .csv or .tsv file, one by one; of a training file texts, or prompts with answers."""

import csv
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from surgery.data.reading import json_object
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
    """The rows that ``stream`` gives, in a list; the first ``limit`` of them where that is not 0."""
    return list(islice(stream(path, columns=columns), limit or None))


def stream(path: str | Path, *, columns: Columns | None = None) -> Iterator[Example]:
    """The rows of a training file, in order and one at a time, so that memory does not grow with the file.

    Rows are texts or prompt and answer, told apart by the names in ``columns``. Texts are taken as they stand: white
    space at their ends is part of the tokens. Files and errors are those of ``table``.
    """
    columns = columns or Columns()
    return (_example(row, columns, at) for at, row in table(path))


def table(path: str | Path, *, header: bool = True) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the row by column name) for each row of a file, in order and one at a time.

    ``.txt`` holds a text on each line, which becomes the column "text". ``.jsonl`` holds an object on each line,
    ``.csv`` and ``.tsv`` a first row of column names; without ``header`` the names are "1", "2" and so on. Blank lines
    are skipped. The file is opened, and refused where it is missing or of another kind, at the call.

    Raises ``SurgeryError`` for a missing, unreadable, malformed or empty file, naming the file and its line.
    """
    path = Path(path)
    ending = path.suffix.lower()
    if not path.is_file() or ending not in ENDINGS:
        got = f"the ending {ending or 'none'!r}" if path.is_file() else "no such file"
        raise SurgeryError(f"{path}: got {got}, expected a file ending in {', '.join(ENDINGS)}")
    return _table(path, ending, header)


def _table(path: Path, ending: str, header: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    empty = True
    try:
        # Only the line feed ends a line of text: others may stand inside a JSON string. A CSV cell may hold any.
        with path.open(encoding="utf-8-sig", newline="\n" if ending in (".txt", ".jsonl") else "") as file:
            if ending in (".csv", ".tsv"):
                rows = _cells(file, "," if ending == ".csv" else "\t", path, header)
            else:
                located = ((f"{path}, line {number}", line) for number, line in _lines(file))
                rows = ((at, {"text": line} if ending == ".txt" else json_object(line, at)) for at, line in located)
            for row in rows:
                empty = False
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise SurgeryError(
            f"cannot read {path}: got {type(error).__name__} ({error}), expected a UTF-8 text file; "
            "check the file, its permissions and its encoding"
        ) from error
    if empty:
        raise SurgeryError(f"{path}: got no row, expected at least 1; fill it")


def _lines(file: Iterable[str]) -> Iterator[tuple[int, str]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            yield number, line.removesuffix("\n").removesuffix("\r")


def _cells(file: Iterable[str], delimiter: str, path: Path, header: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    reader = csv.reader(file, delimiter=delimiter, strict=True)
    names: list[str] = []
    try:
        for cells in reader:
            at = f"{path}, line {reader.line_num}"
            if not cells:
                continue
            if not names:
                names = cells if header else [str(number) for number in range(1, len(cells) + 1)]
                twice = next((name for name in names if names.count(name) > 1), None)
                if twice is not None:
                    raise SurgeryError(f"{at}: two columns are named {twice!r}; the first row must name each once")
                if header:
                    continue
            if len(cells) != len(names):
                raise SurgeryError(
                    f"{at}: got {len(cells)} cells, expected {len(names)} ({', '.join(names)[:80]}); mend that row"
                )
            yield at, dict(zip(names, cells, strict=True))
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
