"""Pairs of sentences of which neither should be preferred: of StereoSet, of CrowS-Pairs, or of a user's own file."""

import difflib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from surgery.data import crows_pairs, stereoset
from surgery.data.rows import read_rows
from surgery.errors import SurgeryError

LEAST = 10  # groups of a bias type: with fewer, what was chosen on some of them says little of the others


@dataclass(frozen=True)
class Pair:
    """``more`` shows the stereotype and ``less`` does not. Rows with one ``group`` (a target term) are alike.

    ``unrelated`` is a third sentence that fits neither; empty where the data has none.
    """

    more: str
    less: str
    bias_type: str
    group: str
    where: str
    unrelated: str = ""


@dataclass(frozen=True)
class Pairs:
    """The pairs that can be used, one line for each row that cannot, and the data's name."""

    rows: tuple[Pair, ...]
    skipped: tuple[str, ...]
    name: str

    @property
    def types(self) -> tuple[str, ...]:
        """The bias types, sorted."""
        return tuple(sorted({row.bias_type for row in self.rows}))


def load(path: str | Path) -> Pairs:
    """Read StereoSet (``.json``, or ``.jsonl`` with triples), CrowS-Pairs (``.csv``) or a ``.jsonl`` of your own.

    A row of the last has "more" and "less", and may have "bias_type" (default "all"), "group" (rows that are alike;
    default: each row for itself, and with it those of the same two sentences) and "unrelated". StereoSet's group is the
    target term; of CrowS-Pairs, which names no term, each row is its own.

    Raises ``SurgeryError`` naming file and line for a malformed row, a side that is no text, equal sides, and a key
    that is one of these misspelt; other keys are left alone.
    """
    path = Path(path)
    if path.suffix.lower() == ".csv":
        found = crows_pairs.load(path)
        rows = [Pair(row.sent_more, row.sent_less, row.bias_type, row.where, row.where) for row in found.rows]
        return Pairs(tuple(rows), found.skipped, found.name)
    if path.suffix.lower() == ".jsonl" and path.is_file() and "more" in read_rows(path, ())[0]:
        own = [_own(raw, f"{path}, row {number}") for number, raw in enumerate(read_rows(path, ("more", "less")), 1)]
        first: dict[frozenset[str], str] = {}  # two sentences twice, either way round, are alike whatever is said
        alike = [first.setdefault(frozenset((row.more, row.less)), row.group) for row in own]
        return Pairs(tuple(replace(row, group=group) for row, group in zip(own, alike, strict=True)), (), path.name)
    triples = stereoset.load(path, least=1)
    return Pairs(tuple(of_triples(triples.rows)), triples.skipped, triples.name)


def of_triples(rows: Sequence[stereoset.Triple]) -> list[Pair]:
    """StereoSet's triples as pairs in groups of their target terms."""
    return [
        Pair(row.stereotype, row.anti_stereotype, row.bias_type, row.target, row.where, row.unrelated) for row in rows
    ]


def _own(raw: dict[str, object], where: str) -> Pair:
    known = ("more", "less", "bias_type", "group", "unrelated")
    for key in raw:
        near = difflib.get_close_matches(str(key).lower(), known, 1, 0.8)
        if near and key not in known:
            raise SurgeryError(f"{where}: got the key {key!r}, which is read as nothing; did you mean {near[0]!r}?")
    fields = {"bias_type": "all", "group": where, "unrelated": ""} | {key: raw[key] for key in known if key in raw}
    for key, value in fields.items():
        if not isinstance(value, str) or not (value.strip() or key == "unrelated"):
            raise SurgeryError(f"{where}: {key} is {json.dumps(value)[:60]}, expected text that is not blank; mend it")
    if fields["more"] == fields["less"]:
        raise SurgeryError(f"{where}: both sides are {raw['more']!r}; expected two sentences; mend or remove the row")
    return Pair(**fields, where=where)  # type: ignore[arg-type]


TO_CHOOSE = (
    "to choose its dose by cross-validation, beside any kept back; give its dose yourself, or leave the type out"
)


def folds(
    pairs: Sequence[Pair], count: int, *, seed: int, least: int = LEAST, purpose: str = TO_CHOOSE
) -> list[list[int]]:
    """The numbers of the pairs in ``count`` parts with no group in two of them, each bias type dealt out evenly.

    ``purpose`` says in an error what the groups are needed for, and what to do.

    Raises ``SurgeryError`` for fewer than 2 parts, and for a bias type with fewer than ``least`` groups.
    """
    if count < 2:
        raise SurgeryError(f"folds: got {count}, expected at least 2")
    groups: dict[str, dict[str, list[int]]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(pair.bias_type, {}).setdefault(pair.group, []).append(number)
    found: list[list[int]] = [[] for _ in range(count)]
    parts: dict[str, int] = {}  # by group, whose rows may be of several types
    generator = np.random.default_rng(seed)
    for name in sorted(groups):
        members = groups[name]
        if len(members) < max(least, count):
            raise SurgeryError(
                f"bias type {name!r}: {len(members)} groups, expected at least {max(least, count)} {purpose}"
            )
        order = sorted(members)
        mixed = [order[n] for n in generator.permutation(len(order))]
        sizes = [0] * count
        # The largest groups first, each into the fold that is smallest in this type so far, behind those that have one.
        for group in sorted(mixed, key=lambda group: (group not in parts, -len(members[group]))):
            place = parts.setdefault(group, sizes.index(min(sizes)))
            found[place] += members[group]
            sizes[place] += len(members[group])
    return [sorted(part) for part in found]
