"""A training mixture with labels, drawn from any files with a seed, in constant memory and shuffled.

Each row of the mixture is a JSON line: ``text``, ``source`` (the name of its file), ``biased`` (true or false),
``group`` (a label from the file, or null) and ``id`` (the source's name and the row's number in it, from 0).
Rows are shuffled, since a batch of neighbours from one source gives the source away (BIAS DIFF scores whole batches).
``surgery.data.mixtures`` holds the mixtures of the paper.
"""

import json
import math
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from surgery.data.rows import truth
from surgery.data.texts import table
from surgery.errors import SurgeryError
from surgery.files.atomic import check_destination, publish, temporary

BUCKET = 100_000  # rows shuffled in memory at once


@dataclass(frozen=True)
class Source:
    """A file of the mixture: how much of it, and what it is labelled."""

    path: Path
    column: str = "text"
    """The column of the text; several, joined by a space, as "title+description"."""
    name: str = ""
    """What its rows are labelled; empty: the file's name without its ending."""
    share: float = 0.0
    """Its part of the mixture; the shares of all sources are divided by their sum, so 3 and 7 do as well."""
    count: int = 0
    """Or so many rows; where neither is given, all of them."""
    biased: bool = False
    group: str = ""
    """The column of the group label, or empty."""
    header: bool = True
    """Whether a .csv or .tsv file begins with column names; without, they are "1", "2" and so on."""

    @property
    def label(self) -> str:
        """The name that its rows carry."""
        return self.name or self.path.stem


def parse(spec: str) -> Source:
    """The ``Source`` of ``PATH[,key=value]...``, such as ``crows.csv,column=sent_more,share=0.3,biased=true``.

    Raises ``SurgeryError`` for an unknown key or a value of the wrong type, naming the right ones.
    """
    first, *pairs = spec.split(",")
    kinds: dict[str, Any] = {"column": str, "name": str, "share": _finite, "count": int, "group": str}
    kinds |= {"biased": _bool, "header": _bool}
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if key not in kinds or not sign:
            raise SurgeryError(f"source {spec!r}: got {pair!r}, expected key=value with a key of {', '.join(kinds)}")
        try:
            values[key] = kinds[key](text)
        except ValueError:
            raise SurgeryError(f"source {spec!r}: {key} is {text!r}, expected a {_named(kinds[key])}") from None
    return Source(Path(first), **values)


def _finite(text: str) -> float:
    if not math.isfinite(found := float(text)):
        raise ValueError(text)
    return found


def _bool(text: str) -> bool:
    found = truth(text)
    if found is None:
        raise ValueError(text)
    return found


def _named(kind: Any) -> str:
    return {_finite: "number", int: "whole number", _bool: "true or false"}[kind]


def mix(sources: Sequence[Source], out: Path, *, seed: int, rows: int = 0) -> dict[str, int]:
    """Write the mixture of ``sources`` to ``out`` (.jsonl), complete or not at all; returns the rows of each source.

    With shares, ``rows`` is the size of the mixture; 0 makes the largest one that the files give. Rows are drawn
    without replacement. The same sources and seed give the same file. Files are read twice, row by row.

    Raises ``SurgeryError`` for sources that share a name, a mixture of shares and counts, a source that has too few
    rows, a row without its text, and what ``surgery.data.texts.table`` refuses.
    """
    check_destination(out)
    if not sources:
        raise SurgeryError(f"{out}: a mixture of no source; give at least one file")
    labels = [source.label for source in sources]
    if len(set(labels)) < len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise SurgeryError(f"two sources are named {twice!r}; tell them apart with name=")
    have = [sum(1 for _ in _texts(source)) for source in sources]
    want = sizes(sources, have, rows)
    generator = np.random.default_rng(seed)
    drawn = (
        row
        for source, count, total in zip(sources, want, have, strict=True)
        for row in _draw(_texts(source), count, total, generator)
    )
    with temporary(out, folder=False) as part:
        write_shuffled(part, drawn, sum(want), generator)
        publish(part, out)
    return dict(zip(labels, want, strict=True))


def sizes(sources: Sequence[Source], have: Sequence[int], rows: int = 0) -> list[int]:
    """How many rows each source gives, of the ``have`` rows that it holds; raises ``SurgeryError`` as ``mix`` does."""
    shared = [source.share for source in sources if source.share > 0]
    if any(source.share < 0 or source.count < 0 for source in sources):
        raise SurgeryError("a source has a share or a count below 0; expected more than 0")
    if shared and (len(shared) < len(sources) or any(source.count for source in sources)):
        raise SurgeryError("some sources have a share and some have not; give all of them a share, or none")
    if rows and not shared:
        raise SurgeryError(f"rows is {rows}, but no source has a share; leave rows out, or give shares")
    if not shared:
        want = [source.count or total for source, total in zip(sources, have, strict=True)]
    else:
        parts = [source.share / math.fsum(shared) for source in sources]
        # 1e-9: three tenths of 1,000 rows are 300 whatever binary fractions say.
        total = rows or min(math.floor(held / part + 1e-9) for held, part in zip(have, parts, strict=True))
        want = [math.floor(part * total + 1e-9) for part in parts]
        # What rounding down left goes to those that lost most (largest remainder).
        for place in sorted(range(len(want)), key=lambda n: want[n] - parts[n] * total)[: total - sum(want)]:
            want[place] += 1
    for source, count, held in zip(sources, want, have, strict=True):
        if count > held or count == 0:
            raise SurgeryError(
                f"{source.path}: has {held:,} rows, the mixture needs {count:,}; ask for fewer rows or another share"
            )
    return want


def write_shuffled(path: Path, rows: Iterable[dict[str, Any]], n: int, generator: np.random.Generator) -> None:
    """Write ``rows`` (``n`` of them) as JSON lines in random order, with one part of them in memory at a time."""
    with ExitStack() as stack:
        buckets = [
            stack.enter_context(tempfile.TemporaryFile(dir=path.parent)) for _ in range(math.ceil(n / BUCKET) or 1)
        ]
        for row in rows:
            line = json.dumps(row, ensure_ascii=False) + "\n"
            buckets[generator.integers(len(buckets))].write(line.encode())
        with path.open("wb") as file:
            # Independent uniform buckets, each shuffled, make every order of all rows equally likely.
            for bucket in buckets:
                bucket.seek(0)
                file.writelines(_shuffled(bucket, generator))


def _shuffled(bucket: IO[bytes], generator: np.random.Generator) -> Iterator[bytes]:
    lines = bucket.readlines()  # gone before the next bucket's are read
    for place in generator.permutation(len(lines)):
        yield lines[place]


def _draw(
    rows: Iterator[dict[str, Any]], count: int, total: int, generator: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """``count`` of ``total`` rows, each subset equally likely, in one pass (Knuth, TAOCP 3.4.2, algorithm S)."""
    for seen, row in enumerate(rows):
        if generator.random() * (total - seen) < count:
            count -= 1
            yield row
        if count == 0:
            return


def _texts(source: Source) -> Iterator[dict[str, Any]]:
    names = source.column.split("+")
    for number, (at, row) in enumerate(table(source.path, header=source.header)):
        missing = next((name for name in [*names, source.group] if name and name not in row), None)
        if missing is not None:
            raise SurgeryError(f"{at}: no column {missing!r}; expected one of {', '.join(map(str, row))[:200]}")
        cells = [row[name] for name in names]
        if not all(isinstance(cell, str) and cell.strip() for cell in cells):
            raise SurgeryError(f"{at}: {source.column!r} is {str(cells)[:60]}, expected text that is not blank")
        group = row[source.group] if source.group else None
        yield labelled(" ".join(cells), source.label, source.biased, group, number)


def labelled(text: str, source: str, biased: bool, group: str | None, number: int) -> dict[str, Any]:
    """A row of a mixture."""
    return {"text": text, "source": source, "biased": biased, "group": group, "id": f"{source}:{number}"}
