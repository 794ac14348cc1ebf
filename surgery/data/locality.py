"""Prompts whose next pronoun an edit of he and she must leave alone: things, plurals, settled genders, plain text.

Six sets: inanimate subjects (``things``), ``plurals``, nouns with ``gendered`` meaning, first ``names``, other
pronouns as subjects (``others``), and pronouns inside ordinary ``text``. The ``train`` part may hold an edit in
place, settings are chosen on ``dev``, and ``test`` judges; they share no template or text, and no subject but pronouns.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from surgery.errors import SurgeryError

PARTS = ("train", "dev", "test")
SETS = ("things", "plurals", "gendered", "names", "others", "text")
PRONOUNS = ("he", "she", "it", "they", "I", "we", "you")
EACH = 2  # templates of a subject in the parts that judge


@dataclass(frozen=True)
class Row:
    """One prompt: its set, its subject (what intervals resample), and the pronoun that fits."""

    text: str
    kind: str
    subject: str
    right: str

    @property
    def wrong(self) -> tuple[str, ...]:
        """He and she where the sentence is about something else; the other one where it is about a man or woman."""
        return tuple(word for word in ("he", "she") if word != self.right)


def records(part: str = "test") -> list[Row]:
    """The prompts of one part: of ``train`` each subject in all templates, of the others in two.

    Raises ``SurgeryError`` for an unknown part.
    """
    check_part(part, "locality")
    content = shipped("locality.json")
    found = []
    for kind, parts in content["sets"].items():
        templates = parts[part]["templates"]
        each = len(templates) if part == "train" or kind == "others" else EACH
        found += expand(kind, templates, parts[part]["subjects"], each)
    return found + [Row(text, "text", text, right) for text, right in content["text"][part]]


def check_part(part: str, where: str) -> None:
    """Raises ``SurgeryError`` for an unknown part."""
    if part not in PARTS:
        raise SurgeryError(f"part of {where}: got {part!r}, expected one of {', '.join(PARTS)}")


def expand(kind: str, templates: Sequence[str], subjects: Mapping[str, Sequence[str]], each: int) -> list[Row]:
    """Each subject in ``each`` of the templates, which go round; ``subjects`` are listed by the pronoun that fits."""
    named = [(right, subject) for right, names in subjects.items() for subject in names]
    found = []
    for place, (right, subject) in enumerate(named):
        for step in range(each):
            text = templates[(place + step) % len(templates)].replace("{subject}", subject)
            found.append(Row(text[0].upper() + text[1:], kind, subject, right))
    return found


@cache
def shipped(name: str) -> dict[str, Any]:
    """A word list of this package."""
    return json.loads(files("surgery.data").joinpath(name).read_text("utf-8"))
