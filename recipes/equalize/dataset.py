"""The texts that equalising learns from, and those that it holds: the kinds of text that must not move."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.tokens import added
from surgery.data import facts_of_gender, genbias, genhint, locality, neutral, shapes
from surgery.data.genbias import shuffled
from surgery.data.prompts import POSSESSIVES, PromptSet
from surgery.errors import SurgeryError
from surgery.forward.generation import own_texts
from surgery.forward.tokens import Ids, encode, start_token
from surgery.operation import Operation

if TYPE_CHECKING:
    from recipes.equalize.settings import Settings

FACTS = ("nouns", "relations", "gendered")
"""Kinds of what is settled whose gender is a matter of definition, in the noun itself or in a word before it."""
SAMPLED = 40  # tokens of a text of the model's own at most


def of_people(prompts: PromptSet) -> bool:
    """Whether the words are he, she or they, so that the grammar and the settled subjects are about them."""
    return set(prompts.words.words) <= set(POSSESSIVES)


def prompts_to_equalize(
    prompts: PromptSet, *, seed: int, split: str, own: int, count: int, each: int, own_each: int = 0
) -> list[str]:
    """The prompt set's training prompts (``own`` of them; 0 for all), and its training subjects in ``count`` shapes.

    So are people beyond the set, who also stand in ``own_each`` of the set's own templates. Each stands in ``each`` of
    the shapes; 0 leaves the shapes out.
    """
    rows = genbias.records(split, "train", seed, prompts)
    found = [row.text for row in rows[: own or None]]
    if own_each and of_people(prompts):
        templates = prompts.templates
        found += [
            templates[(number * own_each + step) % len(templates)].fill(name)
            for number, name in enumerate(shapes.people("train"))
            for step in range(min(own_each, len(templates)))
        ]
    if each and of_people(prompts):
        people = [*dict.fromkeys(row.profession for row in rows), *shapes.people("train")]
        drawn = shapes.prompts(shapes.shapes("train", count, seed), people, each, seed=seed)
        found += [row.text for row in drawn]
    return list(dict.fromkeys(found))


def hints(prompts: PromptSet, *, seed: int, each: int, every: bool = False) -> list[str]:
    """Hint prompts of the training professions: the set's own with every hint, and ``each`` of the grammar's.

    Of these, too, each stands with ``every`` hint, one after the other, in as many fewer templates.
    """
    if not (prompts.hint_templates and prompts.words.hints):
        return []
    own = genhint.records("train", seed, both=True, prompts=prompts)
    templates, words = shapes.hint_templates("train"), prompts.words.hints
    people = [*dict.fromkeys(row.profession for row in own), *shapes.people("train")] if of_people(prompts) else []
    more = []
    times = -(-each // len(words)) if every else each
    for number, name in enumerate(people):
        for turn in range(number * times, number * times + times):
            text = shapes.fill(templates[turn % len(templates)], name)
            one = words[(turn + turn // len(templates)) % len(words)]
            more += [text.replace("{hint}", word) for word in (words if every else (one,))]
    return list(dict.fromkeys([row.text for row in own] + more))


def settled(
    prompts: PromptSet,
    *,
    seed: int,
    split: str,
    count: int,
    each: int,
    more: bool = False,
) -> dict[str, str]:
    """Prompts about subjects whose pronoun is settled, each with its kind: the training parts of locality and of facts.

    Each subject also stands in ``each`` of the ``count`` shapes that are equalised for professions, so that what
    differs is the subject alone; and so does, once each, everybody who is equalised, introduced as Mr. or Ms. and as
    several people. ``more`` nouns stand there, too.
    """
    if not of_people(prompts):
        return {}
    rows = [*locality.records("train"), *facts_of_gender.records("train")]
    fitting = [text for text in shapes.shapes("train", count, seed) if "the {subject}" in text.lower()]
    templates = shuffled(fitting, seed)
    found = {row.text: row.kind for row in rows}
    turn = 0
    own = dict.fromkeys(row.profession for row in genbias.records(split, "train", seed, prompts))
    people = [*own, *shapes.people("train")]
    known = [(row.subject, row.kind, each) for row in rows if row.kind != "text"]
    known += [(noun, "nouns", each) for noun in (facts_of_gender.more_nouns() if more else ())]
    met = [(subject, "introduced", 1) for subject in introduced(people)]
    met += [(subject, "plurals", 1) for subject in several(people)]
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


def held_kinds(kinds: Mapping[str, str], facts: int, settled: int, seed: int) -> dict[str, list[str]]:
    """So many of the lines ``settled``, each kind alike; apart from them so many ``facts``, where these are not 0."""
    if not facts:
        return {"settled": alike(kinds, settled, seed)}
    ours, others = ({line: kind for line, kind in kinds.items() if (kind in FACTS) == of} for of in (True, False))
    return {"settled": alike(others, settled, seed), "facts": alike(ours, facts, seed)}


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


def texts(file: str | Path) -> list[str]:
    """Ordinary sentences, most with pronouns, and those of a user's file where there is one."""
    return list(dict.fromkeys([*shapes.texts(), *(neutral.sentences(file) if file else [])]))


def encoded(
    op: Operation, tokenizer: PreTrainedTokenizerBase, settings: "Settings", lines: Mapping[str, Sequence[str]]
) -> dict[str, Ids]:
    """Token ids of the ``lines`` of each term that has some; ``texts`` are followed by those the model writes itself.

    Each of these begins with what the tokenizer puts before a text.
    """
    ids = {name: encode(tokenizer, each) for name, each in lines.items() if each}
    if settings.samples and settings.hold_texts:
        own = op.once("own-texts", lambda: written(op, tokenizer, settings))
        begin = added(tokenizer)[0]
        ids["texts"] = tuple(dict.fromkeys([*ids["texts"], *((*begin, *row) for row in own)]))
    return ids


def some(lines: Sequence[str], limit: int, seed: int, size: int = 1) -> list[str]:
    """``limit`` of the lines drawn by the seed, in their order, ``size`` of them together; all for 0."""
    if not limit or limit >= len(lines):
        return list(lines)
    drawn = np.random.default_rng(seed).choice(len(lines) // size, size=-(-limit // size), replace=False)
    return [lines[place * size + turn] for place in sorted(drawn.tolist()) for turn in range(size)]


def refuse_both(equalized: Sequence[str], held: Sequence[str], where: str) -> None:
    """Raises ``SurgeryError`` for a text that would be held and equalised at once."""
    both = next((text for text in held if text in set(equalized)), None)
    if both is not None:
        raise SurgeryError(
            f"{where}: {both!r} is also a training prompt, whose next word is equalised; take it out of one of them"
        )


def first_token(tokenizer: PreTrainedTokenizerBase, samples: int) -> int:
    """The token that begins a text; raises ``SurgeryError`` for a tokenizer that has none."""
    begin = start_token(tokenizer)
    if begin is None:
        raise SurgeryError(
            f"samples: got {samples}, and this tokenizer has no token to begin a text with; expected 0; hold texts of "
            "your own (hold_file)"
        )
    return begin


def written(op: Operation, tokenizer: PreTrainedTokenizerBase, settings: "Settings") -> list[list[int]]:
    """Token ids of the texts that the untouched model writes itself."""
    begin = first_token(tokenizer, settings.samples)
    ends = [token for token in (tokenizer.eos_token_id, tokenizer.pad_token_id) if token is not None]
    room = context_limit(op.model)
    with op.progress.work("texts of the model's own", settings.samples) as step:
        longest = min(SAMPLED, room - 1) if room else SAMPLED
        found = own_texts(
            op.model, settings.samples, begin=begin, ends=ends, longest=longest, seed=settings.seed, step=step
        )
    return [list(row) for row in found]
