"""The texts that equalising learns from, and those that it holds: the kinds of text that must not move."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from transformers import PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.tokens import added
from surgery.data import genbias, genhint, neutral, shapes
from surgery.data.prompts import POSSESSIVES, PromptSet
from surgery.errors import SurgeryError
from surgery.forward.generation import own_texts
from surgery.forward.tokens import Ids, encode, start_token
from surgery.operation import Operation

if TYPE_CHECKING:
    from recipes.equalize.settings import Settings

SAMPLED = 40  # tokens of a text of the model's own at most


def of_people(prompts: PromptSet) -> bool:
    """Whether the words are he, she or they, so that the grammar and the settled subjects are about them."""
    return set(prompts.words.words) <= set(POSSESSIVES)


def prompts_to_equalize(
    prompts: PromptSet,
    *,
    seed: int,
    split: str,
    own: int,
    count: int,
    each: int,
    people: Sequence[str],
    own_each: int = 0,
    endings: int = 1,
    longest: int = 0,
) -> list[str]:
    """The prompt set's training prompts (``own`` of them; 0 for all), and its training subjects in ``count`` shapes.

    So are ``people`` beyond the set, who also stand in ``own_each`` of the set's own templates. Each stands in ``each``
    of the shapes, of at most ``longest`` words, each with so many ``endings``; 0 leaves the shapes out.
    """
    rows = genbias.records(split, "train", seed, prompts)
    found = [row.text for row in rows[: own or None]]
    if own_each and of_people(prompts):
        templates = prompts.templates
        found += [
            templates[(number * own_each + step) % len(templates)].fill(name)
            for number, name in enumerate(people)
            for step in range(min(own_each, len(templates)))
        ]
    if each and of_people(prompts):
        everybody = [*dict.fromkeys(row.profession for row in rows), *people]
        drawn = shapes.prompts(shapes.shapes("train", count, seed, longest), everybody, each, seed=seed)
        found += shapes.with_endings([row.text for row in drawn], endings)
    return list(dict.fromkeys(found))


def hints(prompts: PromptSet, *, seed: int, each: int, people: Sequence[str]) -> list[str]:
    """Hint prompts of the training professions: the set's own, and about ``each`` of the grammar's, of ``people``, too.

    Each stands with every hint, one after the other.
    """
    if not (prompts.hint_templates and prompts.words.hints):
        return []
    own = genhint.records("train", seed, both=True, prompts=prompts)
    templates, words = shapes.hint_templates("train"), prompts.words.hints
    everybody = [*dict.fromkeys(row.profession for row in own), *people] if of_people(prompts) else []
    found = []
    times = -(-each // len(words))  # templates
    for number, name in enumerate(everybody):
        for turn in range(number * times, number * times + times):
            text = shapes.fill(templates[turn % len(templates)], name)
            found += [text.replace("{hint}", word) for word in words]
    return list(dict.fromkeys([row.text for row in own] + found))


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
