"""What a prompt set would give before a model is opened: tokens of its words, sizes of its parts, leaks, examples."""

from collections.abc import Callable, Iterator
from itertools import groupby

from surgery.data import genbias, genhint
from surgery.data.prompts import PromptSet

# Fewer test subjects than this leave an interval too wide to see a change in.
FEW = 30


def report(prompts: PromptSet, tokens: Callable[[str], list[str]], *, seed: int = genbias.SEED) -> Iterator[str]:
    """Lines about ``prompts``; ``tokens`` gives a text's tokens as the model has them. Warnings begin with "Warning".

    A word is looked at as it follows other text, with a space in front.
    """
    yield f"{prompts.name}: {len(prompts.subjects)} subjects x {len(prompts.templates)} templates"
    for word in prompts.words.words:
        pieces = tokens(" " + word)
        yield f"  word {word!r}: {len(pieces)} token{'s' * (len(pieces) != 1)} {pieces}"
        if len(pieces) != 1:
            yield f"Warning: {word!r} is several tokens, so its next-token probability is not that of the word."
    yield from _parts(prompts, seed)
    yield from _ends(prompts, tokens)
    if prompts.hint_templates:
        hints = ", ".join(f"{h} -> {w}" for h, w in zip(prompts.words.hints or (), prompts.words.words, strict=True))
        yield f"  hints: {hints}; for example {genhint.records(prompts=prompts, seed=seed)[0].text!r}"
    else:
        yield "  no hint templates: whether a hint is still followed will not be measured"


def cautions(prompts: PromptSet, *, seed: int = genbias.SEED) -> list[str]:
    """What is too small or too alike to train on or to judge by, a warning each; empty where nothing is."""
    return list(dict.fromkeys(line for line in _parts(prompts, seed) if line.startswith("Warning")))


def _parts(prompts: PromptSet, seed: int) -> Iterator[str]:
    """The parts of both splits, and what of one part stands in another."""
    for split in genbias.SPLITS:
        count = len(prompts.subjects) * (len(prompts.templates) if split == "pairs" else 1)
        if count < 5:
            yield f"Warning: {count} cannot be split 2:1:2 (split {split!r}); add subjects, or use part all."
            continue
        parts = {part: genbias.records(split, part, seed, prompts) for part in ("train", "dev", "test")}
        sizes = ", ".join(
            f"{part} {len(rows)} prompts of {len({row.profession for row in rows})} subjects"
            for part, rows in parts.items()
        )
        yield f"  split {split!r}: {sizes}"
        shared = {row.profession for row in parts["train"]} & {row.profession for row in parts["test"]}
        if shared:
            yield f"    {len(shared)} test subjects stand in training too: a claim about unseen ones needs 'profession'"
        elif (few := len({row.profession for row in parts["test"]})) < FEW:
            yield f"Warning: {few} test subjects; with fewer than {FEW} most changes are within noise."
    texts = [row.text for row in genbias.records(prompts=prompts)]
    twice = sorted({text for text, same in groupby(sorted(texts)) if len(list(same)) > 1})
    if twice:
        yield f"Warning: {len(twice)} texts stand in the set twice, for example {twice[0]!r}; parts may share them."


def _ends(prompts: PromptSet, tokens: Callable[[str], list[str]]) -> Iterator[str]:
    """An example of every template, with the token that the compared words follow."""
    for template in prompts.templates:
        text = template.fill(prompts.subjects[0].name)
        yield f"  {template.scale}, {template.name}: {text!r} ends in the token {tokens(text)[-1]!r}"
