"""Prompts whose next pronoun an edit of he and she must leave alone: things, plurals, settled genders, plain text.

Six sets: inanimate subjects (``things``), ``plurals``, nouns with ``gendered`` meaning, first ``names``, other
pronouns as subjects (``others``), and pronouns inside ordinary ``text``. The ``train`` part may hold an edit in
place and the ``test`` part judges it; they share no template or text, and no subject but pronouns.
"""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from surgery.errors import SurgeryError

PARTS = ("train", "test")
SETS = ("things", "plurals", "gendered", "names", "others", "text")
PRONOUNS = ("he", "she", "it", "they", "I", "we", "you")
EACH = 3  # templates of a subject in the test part


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
    """The prompts of one part: of ``test`` each subject in three templates, of ``train`` in all of them.

    Raises ``SurgeryError`` for an unknown part.
    """
    if part not in PARTS:
        raise SurgeryError(f"part of locality: got {part!r}, expected one of {', '.join(PARTS)}")
    content = _file()
    found = []
    for kind, parts in content["sets"].items():
        templates, place = parts[part]["templates"], 0
        for right, subjects in parts[part]["subjects"].items():
            for subject in subjects:
                each = len(templates) if part == "train" or kind == "others" else EACH
                for template in (templates[(place + step) % len(templates)] for step in range(each)):
                    text = template.replace("{subject}", subject)
                    found.append(Row(text[0].upper() + text[1:], kind, subject, right))
                place += 1
    return found + [Row(text, "text", text, right) for text, right in content["text"][part]]


@cache
def _file() -> dict[str, Any]:
    return json.loads(files("surgery.data").joinpath("locality.json").read_text("utf-8"))
