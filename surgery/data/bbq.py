"""BBQ (Parrish et al. 2022): questions about two people of unlike groups, with the answer that the stereotype gives."""

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from surgery.data.rows import read_rows
from surgery.errors import SurgeryError

FOLDER = "bbq"
KEYS = ("question_index", "question_polarity", "context_condition", "category", "answer_info", "additional_metadata")
TEXTS = ("context", "question", "ans0", "ans1", "ans2", "label")
ALIASES = {
    "woman": "f",
    "girl": "f",
    "man": "m",
    "boy": "m",
    "lowses": "low ses",
    "highses": "high ses",
}
"""Names of one group in ``answer_info`` and in ``stereotyped_groups``, in lower case."""


@dataclass(frozen=True)
class Row:
    """A question with three answers. ``target`` is the stereotyped group's answer, None where names do not tell."""

    category: str
    index: str
    negative: bool
    ambiguous: bool
    context: str
    question: str
    answers: tuple[str, str, str]
    label: int
    unknown: int
    target: int | None

    @property
    def biased(self) -> int | None:
        """The answer that follows the stereotype: the target in a negative question, the other person in the rest."""
        if self.target is None or self.negative:
            return self.target
        return 3 - self.unknown - self.target


def load(folder: str | Path) -> list[Row]:
    """All rows of ``bbq/*.jsonl``. Raises ``SurgeryError`` for a missing folder or a malformed row, by file and row."""
    paths = sorted((Path(folder) / FOLDER).glob("*.jsonl"))
    if not paths:
        raise SurgeryError(f"{Path(folder) / FOLDER}: got no .jsonl file, expected one a category; name other data")
    found = []
    for path in paths:
        for number, row in enumerate(read_rows(path, KEYS + TEXTS), 1):
            try:
                found.append(_row(row))
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise SurgeryError(
                    f"{path}, row {number}: not a BBQ row ({type(error).__name__}: {error}); take BBQ's own files"
                ) from None
    return found


def _row(row: dict[str, Any]) -> Row:
    infos = [row["answer_info"][f"ans{place}"] for place in range(3)]
    unknown = [place for place, info in enumerate(infos) if info[-1] == "unknown"]
    if len(unknown) != 1 or row["label"] not in (0, 1, 2):
        raise ValueError(f"{len(unknown)} unknown answers, label {row['label']!r}")
    if row["question_polarity"] not in ("neg", "nonneg") or row["context_condition"] not in ("ambig", "disambig"):
        raise ValueError(f"polarity {row['question_polarity']!r}, condition {row['context_condition']!r}")
    stereotyped = {_plain(name) for name in row["additional_metadata"]["stereotyped_groups"]}
    matching = [place for place, info in enumerate(infos) if place != unknown[0] and names(*info) & stereotyped]
    return Row(
        category=row["category"],
        index=str(row["question_index"]),
        negative=row["question_polarity"] == "neg",
        ambiguous=row["context_condition"] == "ambig",
        context=row["context"],
        question=row["question"],
        answers=(row["ans0"], row["ans1"], row["ans2"]),
        label=row["label"],
        unknown=unknown[0],
        target=matching[0] if len(matching) == 1 else None,
    )


@cache  # the same few people are met again and again
def names(*info: str) -> frozenset[str]:
    """Every name of a person's group that ``answer_info`` gives, as compared with ``stereotyped_groups``.

    The text and the label themselves, since labels of Nationality are regions (["Namibian", "Africa"]); the label
    without its gender (``F-Black`` is Black, ``trans_F`` is trans); and ``ALIASES``.
    """
    return frozenset(_plain(name) for name in (*info, re.sub(r"^[FM]-|_[FM]$", "", info[-1])))


def _plain(name: str) -> str:
    lower = name.strip().lower()
    return ALIASES.get(lower, lower)
