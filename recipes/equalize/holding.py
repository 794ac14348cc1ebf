"""Texts that are held since their pronoun is settled: things, plurals, names, nouns with gender, introductions."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from recipes.equalize.dataset import of_people
from surgery.data import facts_of_gender, genbias, locality, shapes
from surgery.data.genbias import shuffled
from surgery.data.prompts import PromptSet

FACTS = ("nouns", "gendered", "relations")
"""Kinds of what is settled whose gender is a matter of definition, in the noun itself or in a word before it."""


def settled(
    prompts: PromptSet,
    *,
    seed: int,
    split: str,
    count: int,
    each: int,
    people: Sequence[str],
    nouns: bool = False,
    longest: int = 0,
) -> dict[str, str]:
    """Prompts about subjects whose pronoun is settled, each with its kind: the training parts of locality and of facts.

    Each subject also stands in ``each`` of the ``count`` shapes, of at most ``longest`` words, that are equalised for
    professions, so that what differs is the subject alone; and so does, once each, everybody who is equalised (the
    set's professions and ``people``), introduced as Mr. or Ms. and as several people. More ``nouns`` stand there, too.
    """
    if not of_people(prompts):
        return {}
    rows = [*locality.records("train"), *facts_of_gender.records("train")]
    fitting = [text for text in shapes.shapes("train", count, seed, longest) if "the {subject}" in text.lower()]
    templates = shuffled(fitting, seed)
    found = {row.text: row.kind for row in rows}
    turn = 0
    own = dict.fromkeys(row.profession for row in genbias.records(split, "train", seed, prompts))
    everybody = [*own, *people]
    known = [(row.subject, row.kind, each) for row in rows if row.kind != "text"]
    known += [(noun, "nouns", each) for noun in (facts_of_gender.more_nouns() if nouns else ())]
    met = [(subject, "introduced", 1) for subject in introduced(everybody)]
    met += [(subject, "plurals", 1) for subject in several(everybody)]
    for subject, kind, times in dict.fromkeys(known + met):
        for _ in range(times):
            # Going round, past the templates that the subject does not fit.
            places = (place % len(templates) for place in range(turn, turn + len(templates)))
            place = next((place for place in places if _fits(templates[place], subject, kind)), None)
            if place is None:
                break
            found[_settle(templates[place], subject, kind)] = kind
            turn = place + 1
    return found


def apart(kinds: Mapping[str, str], settled: int, facts: int, endings: int, seed: int) -> dict[str, list[str]]:
    """So many ``facts`` of the lines, and so many of those ``settled`` otherwise; each kind alike, 0 for all.

    Facts, and who is introduced, stand with so many ``endings`` behind one beginning.
    """
    ours, others = ({line: kind for line, kind in kinds.items() if (kind in FACTS) == of} for of in (True, False))
    held = alike(others, settled, seed)
    if endings > 1:
        met = [line for line in held if kinds[line] == "introduced"]
        held = [line for line in held if kinds[line] != "introduced"] + shapes.of_fewer_beginnings(met, endings)
    return {"settled": held, "facts": shapes.of_fewer_beginnings(alike(ours, facts, seed), endings)}


def alike(kinds: Mapping[str, str], limit: int, seed: int) -> list[str]:
    """``limit`` of the lines, or all for 0, in their order: from each kind as many, but where it has fewer."""
    if not limit or limit >= len(kinds):
        return list(kinds)
    lines = list(kinds)
    turns: dict[str, int] = {}
    order = []  # (how many of its kind were drawn before it, its place)
    for place in np.random.default_rng(seed).permutation(len(lines)).tolist():
        kind = kinds[lines[place]]
        turns[kind] = turns.get(kind, -1) + 1
        order.append((turns[kind], place))
    return [lines[place] for place in sorted(place for _, place in sorted(order)[:limit])]


def introduced(people: Sequence[str]) -> list[str]:
    """ "Mr. Dalton, the plumber," and so on; not of what people are whose introduction judges an edit."""
    judged = " ".join(row.subject for part in ("dev", "test") for row in facts_of_gender.records(part))
    names = shapes.surnames()
    fresh = [name for name in dict.fromkeys(people) if not re.search(rf"\b{re.escape(name)}\b", judged)]
    return [
        f"{('Mr.', 'Ms.')[turn % 2]} {names[turn // 2 % len(names)]}, the {name}," for turn, name in enumerate(fresh)
    ]


def several(people: Sequence[str]) -> list[str]:
    """ "plumbers" and so on; not of what is among the plurals that judge, nor of "head of state", whose head is inside.

    >>> several(["plumber", "notary", "head of state", "coach"])
    ['plumbers', 'notaries', 'coaches']
    """
    judged = {row.subject for part in ("dev", "test") for row in locality.records(part) if row.kind == "plurals"}
    found = [_plural(name) for name in people if not re.search(" (of|in) ", name)]
    return [name for name in dict.fromkeys(found) if name not in judged]


def _plural(name: str) -> str:
    for ending, others in (
        (r"man$", "men"),
        (r"(?<=thie)f$|(?<=midwi)fe$", "ves"),
        (r"(?<![aeiou])y$", "ies"),
        (r"(?<=s|x|z|h)$", "es"),
    ):
        if re.search(ending, name):
            return re.sub(ending, others, name)
    return name + "s"


SINGULAR = re.compile(r" (was|is|has|wants)\b|\{subject\} (\w+ )?\w+s\b")
"""Verbs that a plural, I, we, you and they do not take: some by name, and what ends in s behind the subject."""


def _fits(template: str, subject: str, kind: str) -> bool:
    if kind in ("plurals", "others") and SINGULAR.search(template):
        return False
    return not ("{subject}'s" in template and (kind == "others" or subject.endswith(",")))


def _settle(template: str, subject: str, kind: str) -> str:
    """The template about ``subject``, which takes its article along only where it is a bare noun."""
    if kind in ("names", "others", "relations", "introduced"):
        template = template.replace("The {subject}", subject[0].upper() + subject[1:])
        template = template.replace("the {subject}", subject)
    return template.replace("{subject}", subject).replace(",,", ",")
