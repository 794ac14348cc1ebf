"""The edits that one LFTF run makes: the edit itself and the controls of the paper's Table 8 beside it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from surgery.data.prompts import WordSet
from surgery.edits.places import choose
from surgery.errors import SurgeryError

CONTROLS = ("last", "random", "first", "middle", "fpft", "pb")
ABLATIONS = ("without_attention", "without_mlp")  # and one for each word, LFTF Table 8


@dataclass(frozen=True)
class Variant:
    """One edit to make: which parameters, and which words stand in the loss."""

    name: str
    blocks: tuple[int, ...] | None
    part: str
    words: tuple[str, ...]
    located: Mapping[str, Any] | None = None
    """Of the edit itself: how its block was found."""


@dataclass(frozen=True)
class Place:
    """How many blocks the model has, and the seed that draws among them."""

    blocks: int
    seed: int


def main_variant(block: str | int | list[int], part: str, named: list[str], words: WordSet, at: Place) -> Variant:
    """The edit that the settings ask for; raises ``SurgeryError`` for blocks or trained words that do not exist."""
    check_trained(named, words)
    trained = tuple(named) or words.words
    return Variant("lftf", choose(block, at.blocks, at.seed), part, trained)


def check_trained(named: list[str], words: WordSet) -> None:
    """Raises ``SurgeryError`` for a word to train that is not compared."""
    unknown = next((word for word in named if word not in words.words), None)
    if unknown is not None:
        raise SurgeryError(f"trained_words: got {unknown!r}, expected some of {', '.join(words.words)}")


def control_names(controls: list[str], ablations: bool, words: WordSet, random: int = 1) -> list[str]:
    """The controls that the settings ask for, or all with ``ablations``; raises ``SurgeryError`` for unknown ones.

    "random" stands for ``random`` blocks: random, random_2, ...
    """
    known = (*CONTROLS, *ABLATIONS, *(f"without_{word}" for word in words.words))
    names = list(known) if ablations else list(dict.fromkeys(controls))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SurgeryError(f"controls: got {unknown[0]!r}, expected some of {', '.join(known)}")
    more = [f"random_{number}" for number in range(2, random + 1)]
    return [each for name in names for each in ([name, *more] if name == "random" else [name])]


def control_variant(name: str, main: Variant, at: Place) -> Variant:
    """The edit that stands beside ``main`` for comparison; the prompt baseline (pb) edits nothing."""
    main = replace(main, located=None)
    if name == "pb":
        return replace(main, name=name, blocks=None, part="prompt")
    if name == "fpft":
        return replace(main, name=name, blocks=None, part="all")
    if name.startswith("random"):
        return replace(main, name=name, blocks=(_random_block(int(name.partition("_")[2] or 1), main, at),))
    if name in ("first", "middle", "last"):
        return replace(main, name=name, blocks=choose(name, at.blocks, at.seed))
    if name in ABLATIONS:
        return replace(main, name=name, part=name)
    left = tuple(word for word in main.words if f"without_{word}" != name)
    return replace(main, name=name, words=left)


def _random_block(number: int, main: Variant, at: Place) -> int:
    """The ``number``-th random block (from 1), any but the edited ones, so that the control is not the claim itself."""
    free = [index for index in range(at.blocks) if index not in (main.blocks or ())] or [0]
    draw = np.random.default_rng(at.seed)
    first = free[int(draw.integers(len(free)))]
    order = [first, *(free[place] for place in draw.permutation(len(free)) if free[place] != first)]
    if number > len(order):
        raise SurgeryError(f"random_blocks: got {number} or more, expected at most {len(order)} beside the edited one")
    return order[number - 1]


def starts(variants: Sequence[Variant]) -> list[int]:
    """The first edited block of each variant that edits blocks: the stream that enters it is worth keeping."""
    return sorted({min(each.blocks) for each in variants if each.blocks})
