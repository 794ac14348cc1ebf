"""Scores of a file of texts of any length, written row by row beside what the controls need: flat memory, resumable.

The result is one JSON object that has each row on a line of its own, so that it can also be read line by line.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from hooks.gradient_influence import Influence
from hooks.gradient_influence.examples import WINDOW
from surgery.errors import SurgeryError
from surgery.files.atomic import take

_FACTS = ("norm", "loss", "tokens", "tfidf")


class Totals:
    """Correlations with the controls and the highest rows, kept while the rows pass by."""

    def __init__(self, names: Iterable[str], top: int) -> None:
        self.names, self.count, self._kept = tuple(names), 0, top
        self.top: dict[str, list[tuple[float, int]]] = {name: [] for name in self.names}
        self._keys = (*self.names, "loss", "tfidf")
        self._sums = np.zeros(len(self._keys))
        self._products = np.zeros((len(self._keys), len(self._keys)))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Take in some rows, in order."""
        values = np.array([[row[key] for key in self._keys] for row in rows])
        self.count += len(rows)
        self._sums += values.sum(0)
        self._products += values.T @ values
        for name in self.names:
            found = self.top[name] + [(-row[name], row["row"]) for row in rows]
            self.top[name] = sorted(found)[: self._kept]

    def summary(self) -> dict[str, Any]:
        """Pearson's correlation of each score with minus the loss and with TF-IDF, and the rows with the top scores."""
        mean = self._sums / self.count
        spread = self._products / self.count - np.outer(mean, mean)
        size = np.sqrt(np.clip(np.diag(spread), 1e-30, None))
        matrix = spread / np.outer(size, size)
        minus, similar = len(self.names), len(self.names) + 1
        return {
            "count": self.count,
            "correlation": {
                name: {"minus_loss": -float(matrix[n, minus]), "tfidf": float(matrix[n, similar])}
                for n, name in enumerate(self.names)
            },
            "top": {name: [{"row": row, "score": -score} for score, row in self.top[name]] for name in self.names},
        }


def write_scores(
    out: Path,
    header: dict[str, Any],
    score: Callable[[int], Iterator[tuple[Influence, list[float]]]],
    *,
    resume: bool = False,
    top: int = 100,
) -> dict[str, Any]:
    """Write ``out``: the ``header``, the rows, and a summary, which is returned.

    ``score(start)`` gives the scores from row ``start`` on, window by window, with the TF-IDF similarity of each row.
    Rows are written to ``out`` with ``.part`` as they come, and an interruption leaves them there; with ``resume``
    (and the same header) the work goes on behind the last whole window. Any other failure removes the ``.part``.

    Raises ``SurgeryError`` for a ``.part`` that stands in the way, belongs to other settings or to a running process.
    """
    part = out.with_name(out.name + ".part")
    if not out.parent.is_dir():
        raise SurgeryError(f"{out.parent}: no such folder for {out.name}; create it first")
    first = json.dumps(header, ensure_ascii=False, allow_nan=False)[:-1] + ', "rows": ['
    totals = Totals(header["scores"], top)
    with _alone(part) as file:
        begun = os.fstat(file.fileno()).st_size > 0
        if begun and not resume:
            raise SurgeryError(f"{part}: an interrupted result is here; continue it with --resume, or remove it")
        size = _taken_up(part, first, totals) if begun else 0
        try:
            file.truncate(size)
            if not size:
                file.write(first.encode() + b"\n")
            summary = _written(file, score, totals)
        except Exception:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, out)
    return summary


@contextmanager
def _alone(part: Path) -> Iterator[IO[bytes]]:
    """The file, to write behind its end; inside, no other process has it, until this one ends however it ends."""
    with part.open("ab") as file:
        take(file.fileno(), f"{part}: another process is writing it; wait for it, or choose another file")
        if not part.exists() or os.stat(part).st_ino != os.fstat(file.fileno()).st_ino:
            raise SurgeryError(f"{part}: was finished or removed by another process at this moment; run it again")
        yield file


def _written(
    file: IO[bytes], score: Callable[[int], Iterator[tuple[Influence, list[float]]]], totals: Totals
) -> dict[str, Any]:
    """Write the rows that are missing, and the summary, which is returned."""
    for found, similarity in score(totals.count):
        rows = list(_rows(found, similarity))
        lead = "" if totals.count == 0 else ","
        text = "\n,".join(json.dumps(row, allow_nan=False) for row in rows)
        file.write(f"{lead}{text}\n".encode())
        file.flush()
        totals.add(rows)
    if not totals.count:
        raise SurgeryError("got no texts to score, expected at least 1")
    summary = totals.summary()
    file.write(("], " + json.dumps(summary, allow_nan=False)[1:] + "\n").encode())
    file.flush()
    os.fsync(file.fileno())
    return summary


def _rows(found: Influence, similarity: list[float]) -> Iterator[dict[str, Any]]:
    facts = zip(found.norms, found.losses, found.tokens, similarity, strict=True)
    for number, (scores, row) in enumerate(zip(found.scores, facts, strict=True)):
        named = dict(zip(found.names, map(_short, scores), strict=True))
        values = dict(zip(_FACTS, (_short(row[0]), _short(row[1]), int(row[2]), _short(row[3])), strict=True))
        yield {"row": found.first + number, **named, **values}


def _short(value: float) -> float:
    return float(f"{float(value):.8g}")


def _taken_up(part: Path, first: str, totals: Totals) -> int:
    """The bytes of the whole windows in ``part``, whose rows go into ``totals``."""
    with part.open("rb") as file:
        if file.readline().rstrip(b"\n").decode() != first:
            raise SurgeryError(f"{part}: was begun with other settings; resume with the same ones, or remove it")
        size, held = file.tell(), list[dict[str, Any]]()
        for line in file:
            try:
                held.append(json.loads(line.lstrip(b",")))
            except ValueError:
                break  # cut off by the interruption, or the end of the rows
            if len(held) == WINDOW:
                totals.add(held)
                size, held = file.tell(), []
    return size


def read_scores(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a result, one at a time.

    Raises ``SurgeryError`` for a file that ends within them.
    """
    with path.open("rb") as file:
        file.readline()
        for line in file:
            if line.startswith(b"]"):
                return
            yield json.loads(line.lstrip(b","))
    raise SurgeryError(f"{path}: ends within its rows; expected a complete result of surgery attribute score")
