"""Starts of texts that a model goes on with: stories, references, interviews and bios about somebody."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from surgery.data import genbias
from surgery.data.locality import shipped
from surgery.data.prompts import Subject, load_prompt_set
from surgery.data.shapes import fill
from surgery.errors import SurgeryError

KINDS = ("story", "reference", "interview", "bio")


@dataclass(frozen=True)
class Start:
    """A text's beginning: its kind, whom it is about, and the stereotype score of that profession (-1 she to 1 he)."""

    text: str
    kind: str
    profession: str
    stereotype_score: float | None


@dataclass(frozen=True)
class Pair:
    """The same beginning about a man and about a woman."""

    man: str
    woman: str
    kind: str
    profession: str


def open_starts(part: str = "test", seed: int = genbias.SEED) -> list[Start]:
    """Each profession of GenBiasEval's part (``split="profession"``) in one start of every kind; no gender is said.

    The order is that of the professions' split, so that a head of the list is a sample.
    """
    templates = _content()["open"]
    people: dict[str, Subject] = {subject.name: subject for subject in load_prompt_set("genbias").subjects}
    names = dict.fromkeys(row.profession for row in genbias.records("profession", part, seed))
    return [
        Start(_filled(templates[kind], number, name), kind, name, people[name].stereotype_score)
        for number, name in enumerate(names)
        for kind in KINDS
    ]


def pairs() -> list[Pair]:
    """Each pair of names in every start that names a person, the professions going round."""
    content = _content()
    jobs = content["occupations"]
    found = []
    for number, (man, woman) in enumerate(content["names"]):
        place = 0
        for kind in KINDS:
            for template in content["given"][kind]:
                job = jobs[(number + 3 * place) % len(jobs)]
                place += 1
                one = _named(template, man, "he", "him", job)
                found.append(Pair(one, _named(template, woman, "she", "her", job), kind, job))
    return found


def words() -> Mapping[str, frozenset[str]]:
    """The word lists: agency, competence, warmth; our own, in lower case."""
    return {name: frozenset(listed) for name, listed in _content()["words"].items()}


def _filled(templates: list[str], number: int, profession: str) -> str:
    text = templates[number % len(templates)].replace("{profession}", "{subject}")
    return fill(text, profession)


def _named(template: str, name: str, they: str, them: str, job: str) -> str:
    text = template.replace("{name}", name).replace("{they}", they).replace("{them}", them)
    return fill(text.replace("{profession}", "{subject}"), job)


@cache
def _content() -> dict[str, Any]:
    found = shipped("free_text.json")
    if set(found["open"]) != set(KINDS) or set(found["given"]) != set(KINDS):
        raise SurgeryError(f"free_text.json: expected the kinds {', '.join(KINDS)}")
    return found
