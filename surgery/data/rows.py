"""Rows of a benchmark's file with the place they stand at, and seeded samples and splits of them."""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from surgery.data.texts import table
from surgery.errors import SurgeryError

T = TypeVar("T")
PARTS = ("train", "dev", "test")
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def truth(value: Any) -> bool | None:
    """Whether a cell says true (1, yes) or false (0, no), in any case; None where it says neither.

    >>> [truth(cell) for cell in (True, "No", " TRUE ", 0, 1.0, "maybe", None)]
    [True, False, True, False, True, None, None]
    """
    if isinstance(value, float) and value in (0.0, 1.0):
        value = int(value)
    return _WORDS.get(str(value).strip().lower())


def label_of(value: Any, column: str, at: str) -> bool:
    """``truth`` of a label at ``at``; raises ``SurgeryError`` where the cell says neither true nor false."""
    found = truth(value)
    if found is None:
        raise SurgeryError(
            f"{at}: {column!r} is {value!r}, expected true or false (yes or no, 1 or 0); mend it, or another column"
        )
    return found


def find_file(folder: str | Path, name: str) -> Path:
    """``folder/name``; raises ``SurgeryError`` naming both when it is not there."""
    path = Path(folder) / name
    if not path.is_file():
        raise SurgeryError(f"{path}: no such file; expected {name} under the data directory {folder}; name another one")
    return path


def read_rows(path: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of a ``.jsonl``, ``.csv`` or ``.tsv`` file (``surgery.data.texts.table``), each of which has ``keys``.

    Raises ``SurgeryError`` naming the file and the line, and for a file without rows.
    """
    rows = []
    for at, row in table(path):
        missing = next((key for key in keys if key not in row), None)
        if missing is not None:
            got = ", ".join(map(str, row))[:80]
            raise SurgeryError(f"{at}: got {got}, expected the key {missing!r}; mend that row")
        rows.append(row)
    return rows


def sample(rows: Sequence[T], limit: int, seed: int, stratum: Callable[[T], Hashable] = lambda row: None) -> list[T]:
    """``limit`` rows drawn without replacement, the strata in their proportions, in the order of ``rows``; 0 is all.

    The strata's shares are met to within one row (largest remainders first).

    Raises ``SurgeryError`` for a negative limit.
    """
    if limit < 0:
        raise SurgeryError(f"limit: got {limit}, expected 0 (all rows) or more")
    if limit == 0 or limit >= len(rows):
        return list(rows)
    generator = np.random.default_rng(seed)
    shuffled = [int(place) for place in generator.permutation(len(rows))]
    strata: dict[Hashable, list[int]] = {}
    for place in shuffled:
        strata.setdefault(stratum(rows[place]), []).append(place)
    shares = {key: limit * len(places) / len(rows) for key, places in strata.items()}
    counts = {key: int(share) for key, share in shares.items()}
    # Ties fall to the stratum met first in the shuffled order, so they depend on the seed only.
    for key in sorted(shares, key=lambda key: counts[key] - shares[key])[: limit - sum(counts.values())]:
        counts[key] += 1
    return [rows[place] for place in sorted(p for key, places in strata.items() for p in places[: counts[key]])]


def part(
    rows: Sequence[T],
    wanted: str,
    seed: int,
    *,
    stratum: Callable[[T], Hashable],
    unit: Callable[[T], Hashable] | None = None,
    shares: tuple[float, float] = (0.6, 0.2),
) -> list[T]:
    """The ``train``, ``dev`` or ``test`` rows of a seeded split, or ``all``; ``shares`` are those of train and dev.

    Units (the rows with one ``unit`` key, or each row) stay together, and are dealt out within each stratum of
    their first row, so that each part has the strata in their proportions. The order is that of ``rows``.

    Raises ``SurgeryError`` for an unknown part.
    """
    if wanted == "all":
        return list(rows)
    if wanted not in PARTS:
        raise SurgeryError(f"part: got {wanted!r}, expected one of {', '.join(PARTS)}, all")
    units: dict[Hashable, list[int]] = {}
    for place, row in enumerate(rows):
        units.setdefault(place if unit is None else unit(row), []).append(place)
    strata: dict[Hashable, list[list[int]]] = {}
    for places in units.values():
        strata.setdefault(stratum(rows[places[0]]), []).append(places)
    generator = np.random.default_rng(seed)
    kept: list[int] = []
    for members in strata.values():
        # A random offset deals the rounding of small strata to all three parts alike.
        grid = (np.arange(len(members)) + generator.random()) / len(members)
        bounds = np.cumsum(shares)
        for place, position in zip(generator.permutation(len(members)), grid, strict=True):
            if PARTS[int(np.searchsorted(bounds, position, side="right"))] == wanted:
                kept += members[place]
    return [rows[place] for place in sorted(kept)]
