"""Choosing doses and the delta's scale: all folds of the groups but one are learnt at a dose of the grid, in turn.

The fold left out is judged at every scale, in memory. Each fold has one dose of the grid; what a dose does is taken
from all of them, and moves a fold's margins to the doses that it did not have. So many folds can be afforded, and
nearly all groups are learnt from, as in the last training: what is learnt of two thirds reaches the others less.

At each scale a bias type's dose is where as many of its held-out pairs prefer one side as the other; the scale is the
smallest at which enough of the margin goes, since what an edit does to other text grows about as the square of the
scale, and what it does to the pairs in proportion. Then each fold is trained once more with every type at the dose
found, since what one of them learns moves the others, and the choice is made anew with that point in its curve.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float

from recipes.equalize.work import Variant, Work
from surgery.data.pairs import Pair, folds
from surgery.delta import check_edit
from surgery.edits.equalize.dose import Choice, Dose, between, choose, moved
from surgery.edits.equalize.terms import Term
from surgery.errors import SurgeryError
from surgery.metrics.sentences import DEFINITIONS

Build = Callable[[Sequence[Pair], Mapping[str, Dose]], Sequence[Term]]
Judge = Callable[[Sequence[Pair]], tuple[Float[np.ndarray, "pairs scorers"], float]]
Margins = Mapping[float, Float[np.ndarray, "pairs scorers"]]  # by dose
Form = tuple[str, list[int]]  # in words, and its scorers


@dataclass(frozen=True)
class Chosen:
    """The dose of each bias type, in words with what it was chosen from (``Choice``), the delta's scale, its grid."""

    doses: Mapping[str, Dose]
    told: Mapping[str, Mapping[str, Any]]
    scale: float
    scales: Sequence[Mapping[str, Any]] = ()
    """For each scale: the share of the mean |margin| that goes from held-out pairs with the doses chosen there, the
    rise of perplexity on ordinary text, and whether every type's dose lay inside the grid; then the same of the
    training with every type at its ``own`` dose, before the last choice."""


def forms(scorers: Sequence[str]) -> list[Form]:
    """The forms of a sentence, each with the places of the scorers that read it: with a start token, and without one.

    One form stands for both where no scorer reads the other. A model may prefer one side of a pair in one form and the
    other in the other (Gemma 3 270M: SS 65.8 with a start token, 54.4 without), so each has doses of its own.
    """
    begun = [place for place, name in enumerate(scorers) if DEFINITIONS[name].start == "before"]
    bare = [place for place in range(len(scorers)) if place not in begun]
    if begun and bare:
        return [("with a start token", begun), ("without one", bare)]
    return [("", [*begun, *bare])]


def check_doses(
    pairs: Sequence[Pair], wanted: Mapping[str, Dose | None], grid: Sequence[float], count: int, seed: int
) -> None:
    """Raises ``SurgeryError`` where a dose is to be chosen, and groups, doses or folds are too few."""
    judged = [pair for pair in pairs if wanted[pair.bias_type] is None]
    if judged:
        folds(judged, count, seed=seed)
        if len(set(grid)) < max(2, len(grid)) or not np.isfinite(grid).all():
            raise SurgeryError(f"doses: got {list(grid)}, expected at least 2 numbers, each once; name others")
        if len(grid) > count:
            raise SurgeryError(
                f"doses: got {len(grid)} and {count} folds, which take one each; name fewer, or more folds"
            )


def check_scales(scales: Sequence[float], wanted: Mapping[str, Dose | None]) -> None:
    """Raises ``SurgeryError`` for what is no scale, and for several where no dose is chosen with which to choose."""
    if not scales or len(set(scales)) < len(scales) or not all(0 < scale <= 2 for scale in scales):
        raise SurgeryError(f"scales: got {list(scales)}, expected numbers above 0 up to 2, each once; name others")
    if len(scales) > 1 and None not in wanted.values():
        raise SurgeryError(
            f"scales: got {list(scales)} and a dose for every bias type; a scale is chosen together with a dose "
            "(auto); name one scale, or leave a dose to be chosen"
        )


def choose_doses(
    work: Work,
    variant: Variant,
    pairs: Sequence[Pair],
    wanted: Mapping[str, Dose | None],
    build: Build,
    judge: Judge,
) -> Chosen:
    """The dose of each bias type, as ``wanted`` or chosen, and the scale.

    ``build`` makes the terms of a training from its pairs and doses, ``judge`` gives the margins of pairs by the model
    as it is, and its perplexity. Each training is done once in a run, as every other step is.
    """
    given = {name: dose for name, dose in wanted.items() if dose is not None}
    told = {name: {"dose": dose} for name, dose in given.items()}
    judged = [pair for pair in pairs if wanted[pair.bias_type] is None]
    if not judged:
        return Chosen(given, told, work.settings.scales[0])
    fixed = [pair for pair in pairs if wanted[pair.bias_type] is not None]
    check_edit(work.op.model, work.trains(variant), work.op.directory, out=work.op.folder.path)
    before = work.op.once("dose-untouched", lambda: _plain(judge(judged)))
    types = dict.fromkeys(pair.bias_type for pair in judged)
    across = partial(_held_out, work, variant, judged, fixed, build=build, judge=judge)
    grid, parts = sorted(work.settings.doses), folds(judged, work.settings.folds, seed=work.settings.split_seed)
    turns = [grid[number % len(grid)] for number in range(len(parts))]
    at = np.full(len(judged), np.nan)
    for dose, part in zip(turns, parts, strict=True):
        at[part] = dose
    measured, costs = across(
        "grid", [given | dict.fromkeys(types, dose) for dose in turns], sorted(work.settings.scales)
    )
    was = np.array(before["margins"])
    margins = {scale: moved(judged, was, after, at, grid) for scale, after in measured.items()}
    kinds, seed = forms(work.settings.scorers), work.settings.seed

    def row(
        scale: float, doses: Mapping[str, Dose], found: _Choices, left: float, cost: Sequence[float]
    ) -> dict[str, Any]:
        return {
            "scale": scale,
            "margin_gone": float(1 - left / np.abs(before["margins"]).mean()),
            "perplexity": float(np.exp(np.mean(cost) - np.log(before["perplexity"])) - 1),
            "reached": all(each.reached for form in found for each in form.values()),
            "doses": dict(doses),
        }

    chosen: dict[float, _Choices] = {}
    rows: list[dict[str, Any]] = []
    for scale, by_dose in margins.items():
        chosen[scale] = [choose(judged, _of_form(by_dose, form), seed=seed) for form in kinds]
        doses = _by_type(chosen[scale])
        left = _left(judged, by_dose, kinds, chosen[scale])
        rows.append(row(scale, doses, chosen[scale], left, costs[scale]) | {"own": False})
    enough = [each["scale"] for each in rows if each["reached"] and each["margin_gone"] >= work.settings.margin_gone]
    scale = enough[0] if enough else max(margins)
    own = _by_type(chosen[scale])
    settled, cost = across("own", [given | own] * len(parts), [scale])
    chosen[scale] = [
        _anew(judged, _of_form(margins[scale], form), settled[scale][:, form[1]], found, seed)
        for form, found in zip(kinds, chosen[scale], strict=True)
    ]
    rows.append(row(scale, own, chosen[scale], np.abs(settled[scale]).mean(), cost[scale]) | {"own": True})
    for (form, _), found in zip(kinds, chosen[scale], strict=True):
        told |= {f"{name}, {form}" if form else name: each.to_dict() for name, each in found.items()}
    return Chosen(given | _by_type(chosen[scale]), told, scale, rows)


_Choices = Sequence[Mapping[str, Choice]]  # by form, by bias type


def _by_type(found: _Choices) -> dict[str, Dose]:
    if len(found) == 1:
        return {name: each.dose for name, each in found[0].items()}
    begun, bare = found
    return {name: (each.dose, bare[name].dose) for name, each in begun.items()}


def _of_form(margins: Margins, form: Form) -> Margins:
    return {dose: values[:, form[1]] for dose, values in margins.items()}


def _anew(
    pairs: Sequence[Pair],
    grid: Margins,
    own: Float[np.ndarray, "pairs scorers"],
    first: Mapping[str, Choice],
    seed: int,
) -> dict[str, Choice]:
    """The choice of each bias type by the grid and the training with every type at the dose that ``first`` has."""
    found: dict[str, Choice] = {}
    for name, choice in first.items():
        mine = [place for place, pair in enumerate(pairs) if pair.bias_type == name]
        curve = {dose: values[mine] for dose, values in grid.items()} | {choice.dose: own[mine]}
        found |= choose([pairs[place] for place in mine], curve, seed=seed)
    return found


def _held_out(
    work: Work,
    variant: Variant,
    judged: Sequence[Pair],
    fixed: Sequence[Pair],
    said: str,
    doses: Sequence[Mapping[str, Dose]],
    scales: Sequence[float],
    *,
    build: Build,
    judge: Judge,
) -> tuple[dict[float, Float[np.ndarray, "pairs scorers"]], dict[float, list[float]]]:
    """By scale, the margins of every pair after the training on the other folds, at that fold's ``doses`` by bias type,
    and the log perplexity of each training.

    A fold goes through its fewer pairs more often, so that it takes about as many steps as the last training will: what
    a dose does grows with them.
    """
    settings = work.settings
    epochs = round(settings.epochs * settings.folds / (settings.folds - 1))
    work = replace(work, settings=settings.model_copy(update={"epochs": epochs}))
    margins = {scale: np.full((len(judged), len(settings.scorers)), np.nan) for scale in scales}
    costs: dict[float, list[float]] = {scale: [] for scale in scales}
    for number, part in enumerate(folds(judged, settings.folds, seed=settings.split_seed)):
        left_out = set(part)
        train = [*(pair for place, pair in enumerate(judged) if place not in left_out), *fixed]
        name = f"{said} doses, fold {number + 1} of {settings.folds}"
        terms = build(train, doses[number])
        one = partial(_scored, work, variant, name, terms, partial(judge, [judged[at] for at in part]), scales)
        for scale, found in zip(scales, work.op.once(f"dose-{number}-{said}", one), strict=True):
            margins[scale][part] = found["margins"]
            costs[scale].append(np.log(found["perplexity"]))
    return margins, costs


def _scored(
    work: Work,
    variant: Variant,
    name: str,
    terms: Sequence[Term],
    judge: Callable[[], tuple[Float[np.ndarray, "pairs scorers"], float]],
    scales: Sequence[float],
) -> list[dict[str, Any]]:
    """Train on ``terms``, and judge with that in memory at each scale, rounded as the checkpoint would be."""
    _, delta = work.learnt(name, variant, work.prepare(variant, terms))
    found = []
    for scale in scales:
        with work.op.edited(delta, scale):
            found.append(_plain(judge()))
    return found


def _plain(judged: tuple[Float[np.ndarray, "pairs scorers"], float]) -> dict[str, Any]:
    return {"margins": judged[0].tolist(), "perplexity": judged[1]}


def _left(pairs: Sequence[Pair], margins: Margins, kinds: Sequence[Form], found: _Choices) -> float:
    """The mean |margin| of the pairs, each at its type's dose in each form."""
    fine = between(margins)
    at = np.array(list(fine))
    left: list[float] = []
    for (_, scorers), choices in zip(kinds, found, strict=True):
        nearest = {name: list(fine.values())[int(np.abs(at - each.dose).argmin())] for name, each in choices.items()}
        for place, pair in enumerate(pairs):
            left += np.abs(nearest[pair.bias_type][place, scorers]).tolist()
    return float(np.mean(left))
