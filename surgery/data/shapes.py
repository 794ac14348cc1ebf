"""Sentence starts of hundreds of shapes about one person, from a small grammar; parts share neither shapes nor people.

A shape is an opening, an action and a connective ("Late in the evening the {profession} sat down because"), or a whole
frame ("We called the {profession} because", "The {profession}'s phone rang, and"), some with a sentence before it. The
kinds in ``OTHERS`` (two sentences, dialogue, a name beside the profession) have no training part at all.
"""

import json
import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from surgery.data.genbias import SEED, Prompt, shuffled
from surgery.errors import SurgeryError

PARTS = ("train", "dev", "test")
OTHERS = ("two sentences", "dialogue", "name")
_KINDS = ("plain", "frame", "plain after a sentence", "frame after a sentence")
_ODDS = (0.45, 0.35, 0.1, 0.1)


def people(part: str, more: bool = False) -> tuple[str, ...]:
    """The persons of a part, none of them among the 262 professions: three fifths of them train, one dev, one test.

    Training has as many again, whose names do not end like a person's that judges (no "lab assistant" for "assistant").
    With ``more`` there are some 360 others behind them, no part of whose name is a person's that judges.
    """
    _check(part)
    order = shuffled(_grammar()["people"], SEED)
    bounds = {"train": (0, 0.6), "dev": (0.6, 0.8), "test": (0.8, 1)}[part]
    trained = ("trained people", *(["more people"] if more else [])) if part == "train" else ()
    beyond = (name for key in trained for name in _grammar()[key])
    return (*order[slice(*(round(bound * len(order)) for bound in bounds))], *beyond)


def shapes(part: str, count: int, seed: int = SEED, longest: int = 0) -> list[str]:
    """``count`` different templates with ``{subject}``, drawn from a part's words by the seed.

    ``longest``: of at most so many words, the subject counted as one; 0 for any length.

    Raises ``SurgeryError`` for an unknown part, or more templates than the part's words can give.
    """
    _check(part)
    words = {key: _grammar()[key][part] for key in ("openings", "actions", "connectives", "frames", "before")}
    draw = np.random.default_rng([seed, PARTS.index(part)])
    found: dict[str, None] = {}
    idle = 0  # draws in a row that gave nothing new
    while len(found) < count and idle < 2000:
        size = len(found)
        pick = {key: values[int(draw.integers(len(values)))] for key, values in words.items()}
        kind = _KINDS[int(draw.choice(len(_KINDS), p=_ODDS))]
        if kind.startswith("plain"):
            start = f"{pick['openings']} the" if pick["openings"] else "The"
            text = f"{start} {{subject}} {pick['actions']} {pick['connectives']}".replace(" ,", ",").replace(" ;", ";")
        else:
            text = pick["frames"]
        text = f"{pick['before']} {text}" if kind.endswith("a sentence") else text
        if not longest or len(text.split()) <= longest:
            found[text] = None
        idle = idle + 1 if len(found) == size else 0
    if len(found) < count:
        most, longer = (f" of at most {longest} words", ", or for longer ones") if longest else ("", "")
        raise SurgeryError(
            f"shapes of {part}: got {len(found)} of {count}{most}; its words give no more; ask for fewer{longer}"
        )
    return list(found)


def others(kind: str, part: str) -> list[str]:
    """The templates of a kind of text that training never sees; raises ``SurgeryError`` for the training part."""
    if kind not in OTHERS or part not in ("dev", "test"):
        raise SurgeryError(
            f"other shapes: got {kind!r}, {part!r}; expected one of {', '.join(OTHERS)}, and dev or test"
        )
    return list(_grammar()["others"][kind][part])


def hint_templates(part: str) -> list[str]:
    """Templates with ``{subject}`` and ``{hint}`` (his, her, ..), in which the hint settles the pronoun."""
    _check(part)
    return list(_grammar()["hints"][part])


def surnames() -> list[str]:
    """Names of people who are introduced as Mr. or Ms. while an edit is held."""
    return list(_grammar()["surnames"])


def texts() -> list[str]:
    """Ordinary sentences of our own, most with pronouns, by which an edit may be held; no judge uses them."""
    return list(_grammar()["texts"])


def fill(template: str, subject: str) -> str:
    """The prompt; "a" becomes "an" before a vowel.

    >>> fill("My cousin works as a {subject} because", "engineer")
    'My cousin works as an engineer because'
    """
    if subject[0].lower() in "aeiou":
        template = template.replace(" a {subject}", " an {subject}").replace("A {subject}", "An {subject}")
    return template.replace("{subject}", subject)


def prompts(
    templates: Sequence[str], subjects: Sequence[str], each: int, *, seed: int = SEED, scale: str = "sentence"
) -> list[Prompt]:
    """Each subject in ``each`` of the templates, dealt out so that every template comes about equally often."""
    order = [template for turn in range(2) for template in shuffled(templates, seed + turn)]
    draw = np.random.default_rng(seed)
    found = {}
    for number, subject in enumerate(subjects):
        for step in range(each):
            # Going round deals the templates evenly; the random step keeps subject and template independent.
            place = (number * each + step) % len(templates)
            template = order[place] if draw.random() < 0.5 else order[len(templates) + place]
            found[fill(template, subject)] = Prompt(fill(template, subject), subject, scale, template, None, None)
    return list(found.values())


def with_endings(lines: Sequence[str], count: int, size: int = 1) -> list[str]:
    """Each line, and ``count`` - 1 others that differ from it by their training connective alone, which go round.

    One that ends in no connective stands alone. ``size`` lines that follow one another have the same ones.

    >>> with_endings(["The potter sat down because", "Here is the potter."], 3)
    ['The potter sat down because', 'The potter sat down, and', 'The potter sat down, but', 'Here is the potter.']
    """
    found: dict[str, None] = {}
    turn = 0
    for group in _groups(lines, size):
        found |= dict.fromkeys(group)
        own = _connective(group)
        if own is None or count < 2:
            continue
        others = [end for end in _connectives() if end != own]
        for step in range(count - 1):
            other = others[(turn + step) % len(others)]
            found |= dict.fromkeys(line.removesuffix(own) + other for line in group)
        turn += count - 1
    return list(found)


def of_fewer_beginnings(lines: Sequence[str], count: int, size: int = 1) -> list[str]:
    """About as many lines, those that end in a connective with a ``count``-th of their beginnings, each with so many.

    >>> of_fewer_beginnings(["A potter sat down because", "A potter ran because", "Here is the potter."], 2)
    ['A potter sat down because', 'A potter sat down, and', 'Here is the potter.']
    """
    groups = _groups(lines, size)
    ended = [number for number, group in enumerate(groups) if _connective(group)]
    left = set(ended) - set(ended[::count])
    return with_endings(
        [line for number, group in enumerate(groups) if number not in left for line in group], count, size
    )


def _groups(lines: Sequence[str], size: int) -> list[Sequence[str]]:
    return [lines[at : at + size] for at in range(0, len(lines), size)]


def _connective(group: Sequence[str]) -> str | None:
    """The training connective in which all of these lines end, or None."""
    return max((end for end in _connectives() if all(line.endswith(end) for line in group)), key=len, default=None)


@cache
def _connectives() -> list[str]:
    """Those of the training part, with the space or the comma before them."""
    return list(dict.fromkeys(re.sub(" (?=[,;])", "", f" {end}") for end in _grammar()["connectives"]["train"]))


@cache
def _grammar() -> dict[str, Any]:
    return json.loads(files("surgery.data").joinpath("shapes.json").read_text("utf-8"))


def _check(part: str) -> None:
    if part not in PARTS:
        raise SurgeryError(f"part of the shapes: got {part!r}, expected one of {', '.join(PARTS)}")
