"""Choosing doses and the delta's scale: all folds of the groups but one are learnt, each type at a dose of its grid.

The fold left out is judged at every scale, in memory. Of a type each fold has one dose of the grid, and of every other
type another, so that with eight folds and two doses three types stand at all combinations; what a dose does is the
slope over all folds, and moves a fold's margins to the doses that it did not have. So many folds can be afforded, and
nearly all groups are learnt from, as in the last training: what is learnt of two thirds reaches the others less.

At each scale a bias type's dose is the smallest at which nearly as many of its held-out pairs prefer one side as the
other, since a dose costs text; the scale is the smallest at which enough of the margin goes, since what an edit does to
other text grows about as the square of the scale, and what it does to the pairs in proportion. Then each fold is
trained once more with every type at the dose found, since what one of them learns may move the others, and doses and
scale are taken anew, from these margins.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from operator import mul
from typing import Any

import numpy as np
from jaxtyping import Float

from recipes.equalize.work import Variant, Work
from surgery.data.pairs import Pair, folds
from surgery.delta import check_edit
from surgery.edits.equalize.dose import Choice, Dose, choose, read_levels, slopes
from surgery.edits.equalize.terms import Term
from surgery.errors import SurgeryError

Build = Callable[[Sequence[Pair], Mapping[str, Dose]], Sequence[Term]]
Judge = Callable[[Sequence[Pair]], tuple[Float[np.ndarray, "pairs scorers"], float]]


@dataclass(frozen=True)
class Chosen:
    """The dose of each bias type, in words with what it was chosen from (``Choice``), the delta's scale, its grid."""

    doses: Mapping[str, Dose]
    told: Mapping[str, Mapping[str, Any]]
    scale: float
    scales: Sequence[Mapping[str, Any]] = ()
    """For each scale: the share of the mean |margin| that goes from held-out pairs with the doses chosen there (the
    least of the scorers'), the rise of perplexity on ordinary text, and whether every type's dose lay inside the grid;
    first of the trainings at the doses of the grid, then of those with every type at its ``own``."""


def check_doses(
    pairs: Sequence[Pair],
    wanted: Mapping[str, Dose | None],
    grid: Sequence[str | float],
    count: int,
    seed: int,
) -> None:
    """Raises ``SurgeryError`` where a dose is to be chosen, and groups, doses or folds are too few."""
    judged = [pair for pair in pairs if wanted[pair.bias_type] is None]
    if judged:
        folds(judged, count, seed=seed)
        levels = read_levels(grid, list(wanted))
        most = max((len(levels[name]), name) for name, dose in wanted.items() if dose is None)
        if most[0] > count:
            raise SurgeryError(
                f"doses: got {most[0]} for {most[1]} and {count} folds, which take one each; name fewer, or more folds"
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
    was = np.array(before["margins"])
    scales, levels = sorted(work.settings.scales), read_levels(work.settings.doses, list(wanted))
    types = list(dict.fromkeys(pair.bias_type for pair in judged))
    parts = folds(judged, work.settings.folds, seed=work.settings.split_seed)
    turns = _turns({name: levels[name] for name in types}, len(parts))
    across = partial(_held_out, work, variant, judged, fixed, build=build, judge=judge)
    measured, costs = across("grid", [given | doses for doses in turns], scales)
    at = np.empty(len(judged))
    for doses, part in zip(turns, parts, strict=True):
        at[part] = [doses[judged[place].bias_type] for place in part]
    slope = {scale: slopes(judged, was, after, at) for scale, after in measured.items()}
    spread = {scale: slopes(judged, np.abs(was), np.abs(after), at) for scale, after in measured.items()}
    judging = _Judging(work, judged, was, before["perplexity"], slope, spread, levels)
    _, first, rows = judging.taken(measured, at, costs, own=False)
    own = {name: each.dose for name, each in first.items()}
    settled, costs = across("own", [given | own] * len(parts), scales)
    scale, found, more = judging.taken(settled, _at(judged, own), costs, own=True)
    told |= {name: each.to_dict() for name, each in found.items()}
    return Chosen(given | {name: each.dose for name, each in found.items()}, told, scale, [*rows, *more])


_ByScale = Mapping[float, Float[np.ndarray, "pairs scorers"]]
_Choices = Mapping[str, Choice]  # by bias type


def _turns(levels: Mapping[str, Sequence[float]], count: int) -> list[dict[str, float]]:
    """For each of ``count`` folds a dose of each type: the first type changes with every fold, the next more slowly.

    >>> [list(each.values()) for each in _turns({"a": [0.0, 1.0], "b": [2.0, 3.0]}, 4)]
    [[0.0, 2.0], [1.0, 2.0], [0.0, 3.0], [1.0, 3.0]]
    """
    strides = accumulate(map(len, levels.values()), mul, initial=1)
    each = {name: (doses, stride) for (name, doses), stride in zip(levels.items(), strides, strict=False)}
    turns = range(count)
    return [{name: doses[turn // stride % len(doses)] for name, (doses, stride) in each.items()} for turn in turns]


def _at(pairs: Sequence[Pair], doses: Mapping[str, float]) -> Float[np.ndarray, " pairs"]:
    return np.array([doses[pair.bias_type] for pair in pairs])


@dataclass(frozen=True)
class _Judging:
    """What choices are made by: the left-out pairs, untouched, and what a unit of dose does at each scale.

    Its ``slope`` is of the margin, its ``spread`` of |margin|: moved by the slope alone, a pair's |margin| would hardly
    change in the mean, while a larger dose does give margin back (pairs differ in how far it moves them).
    """

    work: Work
    pairs: Sequence[Pair]
    before: Float[np.ndarray, "pairs scorers"]
    perplexity: float
    slope: Mapping[float, Float[np.ndarray, " scorers"]]
    spread: Mapping[float, Float[np.ndarray, " scorers"]]
    levels: Mapping[str, Sequence[float]]

    def taken(
        self, after: _ByScale, at: Float[np.ndarray, " pairs"], costs: Mapping[float, Sequence[float]], *, own: bool
    ) -> tuple[float, _Choices, list[dict[str, Any]]]:
        """The scale, each type's choice there, and a row for each scale, where every pair had the dose ``at``."""
        chosen: dict[float, _Choices] = {}
        rows: list[dict[str, Any]] = []
        for scale, margins in after.items():
            slope = self.slope[scale]
            plain = margins - slope * at[:, None]  # at no dose
            chosen[scale] = self._choices(plain, slope)
            doses = {name: each.dose for name, each in chosen[scale].items()}
            left = np.abs(margins).mean(axis=0) + self.spread[scale] * (_at(self.pairs, doses) - at).mean()
            row = {"scale": scale, "margin_gone": float((1 - left / np.abs(self.before).mean(axis=0)).min())}
            row["perplexity"] = float(np.exp(np.mean(costs[scale]) - np.log(self.perplexity)) - 1)
            row["reached"] = all(each.reached for each in chosen[scale].values())
            rows.append(row | {"doses": doses, "own": own})
        least = self.work.settings.margin_gone
        enough = [row["scale"] for row in rows if row["reached"] and row["margin_gone"] >= least]
        scale = min(enough, default=max(after))
        return scale, chosen[scale], rows

    def _choices(
        self, plain: Float[np.ndarray, "pairs scorers"], slope: Float[np.ndarray, " scorers"]
    ) -> dict[str, Choice]:
        """The choice of each bias type, from its margins at no dose and the dose's slope.

        One dose serves both forms of a sentence: of the slope of one form's own dose so few groups say too little.
        """
        found: dict[str, Choice] = {}
        within, seed = self.work.settings.ss_within, self.work.settings.seed
        for name in dict.fromkeys(pair.bias_type for pair in self.pairs):
            mine = [place for place, pair in enumerate(self.pairs) if pair.bias_type == name]
            curve = {dose: plain[mine] + slope * dose for dose in self.levels[name]}
            found |= choose([self.pairs[place] for place in mine], curve, within=within, seed=seed)
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
        groups = {judged[place].group for place in part}  # which may have rows of a type whose dose is given
        train = [pair for place, pair in enumerate(judged) if place not in left_out]
        train += [pair for pair in fixed if pair.group not in groups]
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
