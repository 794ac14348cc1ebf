"""The word sets of WEAT (Caliskan et al. 2017) and the sentence sets of SEAT (May et al. 2019), one test a file."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from surgery.data.reading import json_value, read_text
from surgery.data.rows import find_file
from surgery.errors import SurgeryError

SEAT = {
    "gender": ("sent-weat6", "sent-weat6b", "sent-weat7", "sent-weat7b", "sent-weat8", "sent-weat8b"),
    "race": (
        *("sent-angry_black_woman_stereotype", "sent-angry_black_woman_stereotype_b", "sent-weat3", "sent-weat3b"),
        *("sent-weat4", "sent-weat5", "sent-weat5b"),
    ),
    "religion": ("sent-religion1", "sent-religion1b", "sent-religion2", "sent-religion2b"),
}
"""The tests that bias-bench averages over (Meade et al. 2022, Tables 2, 14 and 15)."""
WEAT = {
    "gender": ("weat6", "weat6b", "weat7", "weat7b", "weat8", "weat8b"),
    "race": ("weat3", "weat3b", "weat4", "weat5", "weat5b"),
    "age": ("weat10",),
}


@dataclass(frozen=True)
class Association:
    """Two sets of targets (x, y) and two of attributes (a, b), words or sentences, and what they stand for."""

    name: str
    x: tuple[str, ...]
    y: tuple[str, ...]
    a: tuple[str, ...]
    b: tuple[str, ...]
    about: str

    def sampled(self, limit: int, seed: int) -> "Association":
        """At most ``limit`` of each set, drawn with ``seed``; 0 is all."""
        if not limit:
            return self
        generator = np.random.default_rng(seed)

        def some(texts: Sequence[str]) -> tuple[str, ...]:
            places = generator.choice(len(texts), size=min(limit, len(texts)), replace=False)
            return tuple(texts[place] for place in sorted(places))

        return replace(self, x=some(self.x), y=some(self.y), a=some(self.a), b=some(self.b))


def load(folder: str | Path, name: str) -> Association:
    """The test of ``seat/NAME.jsonl``: one JSON object (over several lines, in spite of the ending).

    Raises ``SurgeryError`` for a missing or malformed file, and a set without two examples.
    """
    path = find_file(folder, f"seat/{name}.jsonl")
    try:
        sets: Any = json_value(read_text(path))
        given = {key: (sets[key]["category"], tuple(sets[key]["examples"])) for key in _KEYS}
    except (ValueError, KeyError, TypeError):
        raise SurgeryError(
            f"{path}: expected one JSON object with {', '.join(_KEYS)}, each with category and examples; mend it"
        ) from None
    for key, (_, texts) in given.items():
        if len(texts) < 2 or not all(isinstance(text, str) and text.strip() for text in texts):
            raise SurgeryError(f"{path}: {key} has {len(texts)} examples; expected at least 2, none of them blank")
    about = " against ".join(" and ".join(given[key][0] for key in pair) for pair in (_KEYS[:2], _KEYS[2:]))
    x, y, a, b = (given[key][1] for key in _KEYS)
    return Association(name, x, y, a, b, about)


_KEYS = ("targ1", "targ2", "attr1", "attr2")
