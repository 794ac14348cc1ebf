"""The development set, cut from the training source by target term: what steers training has terms of its own."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from surgery.data.stereoset import Triple
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class Split:
    """Numbers of triples: to train on; held out, with other terms; and the few of these scored while training."""

    train: tuple[int, ...]
    held_out: tuple[int, ...]
    watched: tuple[int, ...]


def split_terms(triples: Sequence[Triple], *, share: float, watched: int, seed: int) -> Split:
    """Hold out the ``share`` of each bias type's target terms (at least one, at most all but one), drawn by ``seed``.

    Of their rows ``watched`` of each type are scored while training, taken from the terms in turn, since rows of one
    term are alike. Raises ``SurgeryError`` when a type has one term only.
    """
    groups: dict[str, dict[str, list[int]]] = {}
    for number, triple in enumerate(triples):
        groups.setdefault(triple.bias_type, {}).setdefault(triple.target, []).append(number)
    train, held, seen = [], [], []
    for place, kind in enumerate(sorted(groups)):
        terms = groups[kind]
        if len(terms) < 2:
            raise SurgeryError(
                f"bias type {kind}: all rows have the target term {next(iter(terms))!r}; expected at least 2 terms, "
                "since some are held out"
            )
        generator = np.random.default_rng([seed, place])
        names = [sorted(terms)[n] for n in generator.permutation(len(terms))]
        cut = min(len(names) - 1, max(1, round(share * len(names))))
        train += [number for name in names[cut:] for number in terms[name]]
        columns = [[terms[name][n] for n in generator.permutation(len(terms[name]))] for name in names[:cut]]
        held += [number for column in columns for number in column]
        turns = [column[turn] for turn in range(max(map(len, columns))) for column in columns if turn < len(column)]
        seen += turns[:watched]
    return Split(tuple(sorted(train)), tuple(sorted(held)), tuple(sorted(seen)))
