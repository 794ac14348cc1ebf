"""Choosing doses: each of a grid is trained on all but one fold of the groups, and judged on the fold left out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from recipes.equalize.work import Variant, Work
from surgery.data.pairs import Pair, folds
from surgery.delta import check_edit
from surgery.edits.equalize import Prepared
from surgery.edits.equalize.dose import choose
from surgery.edits.equalize.terms import Term
from surgery.errors import SurgeryError
from surgery.training import steps_of

Build = Callable[[Sequence[Pair], Mapping[str, float]], Sequence[Term]]
Judge = Callable[[Sequence[Pair]], Float[np.ndarray, "pairs scorers"]]


def check_doses(
    pairs: Sequence[Pair], wanted: Mapping[str, float | None], grid: Sequence[float], count: int, seed: int
) -> None:
    """Raises ``SurgeryError`` where a dose is to be chosen, and groups or doses are too few."""
    judged = [pair for pair in pairs if wanted[pair.bias_type] is None]
    if judged:
        folds(judged, count, seed=seed)
        if len(set(grid)) < max(2, len(grid)) or not np.isfinite(grid).all():
            raise SurgeryError(f"doses: got {list(grid)}, expected at least 2 numbers, each once; name others")


def choose_doses(
    work: Work,
    variant: Variant,
    pairs: Sequence[Pair],
    wanted: Mapping[str, float | None],
    build: Build,
    judge: Judge,
) -> dict[str, dict[str, Any]]:
    """The dose of each bias type: as ``wanted``, or with what it was chosen from (``Choice.to_dict``).

    ``build`` makes the terms of a training from its pairs and doses, ``judge`` gives the margins of pairs by the model
    as it is. Each training is done once in a run, as every other step is.
    """
    found: dict[str, dict[str, Any]] = {name: {"dose": dose} for name, dose in wanted.items() if dose is not None}
    judged = [pair for pair in pairs if wanted[pair.bias_type] is None]
    if not judged:
        return found
    fixed = [pair for pair in pairs if wanted[pair.bias_type] is not None]
    check_edit(work.op.model, work.trains(variant), work.op.directory, out=work.op.folder.path)
    settings, scorers = work.settings, len(work.settings.scorers)
    grid = sorted(settings.doses)
    margins = {dose: np.full((len(judged), scorers), np.nan) for dose in grid}
    for number, part in enumerate(folds(judged, settings.folds, seed=settings.split_seed)):
        left_out = set(part)
        train = [*(pair for place, pair in enumerate(judged) if place not in left_out), *fixed]
        held = [judged[place] for place in part]
        prepared: list[Prepared] = []  # the targets are those of every dose
        for dose in grid:
            doses = {name: dose if each is None else each for name, each in wanted.items()}
            name = f"dose {dose:g}, fold {number + 1} of {settings.folds}"
            one = partial(_margins, work, variant, name, build(train, doses), prepared, partial(judge, held))
            margins[dose][part] = work.op.once(f"dose-{number}-{dose:g}", one)
    return found | {name: each.to_dict() for name, each in choose(judged, margins, seed=settings.seed).items()}


def _margins(
    work: Work,
    variant: Variant,
    name: str,
    terms: Sequence[Term],
    prepared: list[Prepared],
    judge: Callable[[], Float[np.ndarray, "pairs scorers"]],
) -> list[list[float]]:
    """Train on ``terms``, and judge with that in memory, rounded as the checkpoint would be."""
    if not prepared:
        prepared.append(work.prepare(variant, terms))
    given = replace(prepared[0], terms=tuple(terms))
    with work.op.tracking(name, steps_of(sum(term.count for term in terms), work.plan(variant))) as track:
        made = work.train(variant, given, track)
    rounding: Any = {"rounding": work.op.rounding, "seed": work.settings.seed, "as_stored": True}
    with work.op.delta(made).applied(work.op.model, **rounding):
        return judge().tolist()
