"""T-REx facts (Elsahar et al. 2018) as prompts that end before the object, by the patterns of ParaRel."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from surgery.data.rows import read_rows
from surgery.errors import SurgeryError

FOLDER = "factual/trex_pararel"


@dataclass(frozen=True)
class Fact:
    """``prompt`` is the relation's pattern up to its object: "The native language of Louis Jules Trochu is"."""

    relation: str
    subject: str
    object: str
    prompt: str


@dataclass(frozen=True)
class Facts:
    """The facts, and how many had to be left out because their relation (named) has no usable pattern."""

    rows: tuple[Fact, ...]
    skipped: int
    relations_skipped: tuple[str, ...]


def load(folder: str | Path) -> Facts:
    """Every fact of ``facts/*.jsonl`` with its relation's first pattern in which the object [Y] stands last.

    Raises ``SurgeryError`` for a missing folder or a malformed file.
    """
    root = Path(folder) / FOLDER
    files = sorted((root / "facts").glob("*.jsonl"))
    if not files:
        raise SurgeryError(f"{root / 'facts'}: got no .jsonl file, expected one a relation; name other data")
    found: list[Fact] = []
    without: list[str] = []
    skipped = 0
    for path in files:
        rows = read_rows(path, ("sub_label", "obj_label"))
        patterns = root / "patterns" / path.name
        pattern = usable(row["pattern"] for row in read_rows(patterns, ("pattern",))) if patterns.is_file() else None
        if pattern is None:
            skipped, without = skipped + len(rows), [*without, path.stem]
            continue
        found += [
            Fact(path.stem, row["sub_label"], row["obj_label"], pattern.replace("[X]", row["sub_label"]))
            for row in rows
        ]
    return Facts(tuple(found), skipped, tuple(without))


def usable(patterns: Iterable[str]) -> str | None:
    """The first of ``patterns`` with one [X] and, after it and last but for a full stop, one [Y]; cut before [Y]."""
    for pattern in patterns:
        text = pattern.rstrip(" .")
        if pattern.count("[X]") == pattern.count("[Y]") == 1 and text.endswith("[Y]"):
            return text.removesuffix("[Y]").rstrip()
    return None
