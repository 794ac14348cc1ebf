"""Scales of a delta's tensors fitted to a relative of its base, where what the relative prefers itself is left.

A delta takes away what its base preferred. A fine-tuned child prefers something else besides, and one scale of the
whole cannot give it: it needs a shift. The tensors of the delta shift by different amounts, which is measured: the
derivatives of all answers by all scales (``surgery.forward.scale_slopes``), and least squares on them (Gauss-Newton).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float, Int

from hooks import anatomy
from surgery.delta import Delta, compose
from surgery.delta.live import touched
from surgery.forward.scale_slopes import Part
from surgery.progress import Advance, Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RIDGES = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 0.05)
FOLDS = 5
ROUNDS = 8  # at most: one where the answers are linear, two to four where they are not
NEAR = 0.05  # by so much of what was foretold the answers may miss it and pass for linear
QUIET = Progress(quiet=True)

Values = Float[np.ndarray, "answers"]
Slopes = Float[np.ndarray, "parts answers"]


@dataclass(frozen=True)
class Equation:
    """Wanted: ``slopes.T @ (change of the scales) = lack``; its mean square counts ``weight``.

    With ``groups`` it is what the fit is for, and what a ridge is chosen by: on groups that the others leave out.
    """

    weight: float
    lack: Float[np.ndarray, "rows"]
    slopes: Float[np.ndarray, "parts rows"]
    groups: Int[np.ndarray, "rows"] | None = None


@dataclass(frozen=True)
class Task:
    """What a model is to answer: how it is looked at, and which equations what was seen gives.

    ``look(parts, step)`` gives the answers, and their derivatives by the scale of each part; ``step`` is told of
    finished examples, of which there are ``count``.
    """

    look: Callable[[Sequence[Part], Advance], tuple[Values, Slopes]]
    equations: Callable[[Values, Slopes], list[Equation]]
    count: int


@dataclass(frozen=True)
class Fit:
    """The scales by tensor; the mean square of what is wanted, with the delta as it is, as foretold, and as found."""

    scales: Mapping[str, float]
    ridge: float
    given: float
    foretold: float
    found: float


def fitted(delta: Delta, model: "PreTrainedModel", task: Task, *, progress: Progress = QUIET) -> tuple[Delta, Fit]:
    """``delta`` with each tensor at a scale of its own, chosen on ``model``, and what was chosen.

    Each matrix has a scale, and all vectors have one. Least squares of the task's equations with a ridge towards 1, by
    cross-validation over groups. Where the answers come out as foretold it was as good as linear; else the next round
    begins there. What is best of all that was looked at is taken. ``model`` is as it was afterwards. Raises
    ``SurgeryError`` for a delta of kind "module" and one that does not fit ``model``.
    """
    whole = compose([delta])
    names = together(whole)
    parts = directions(whole, model, names)

    def look(asked: Sequence[Part], scales: Float[np.ndarray, "parts"]) -> list[Equation]:
        label = f"answers to {len(parts)} scales" if asked else "answers at the scales found"
        with scaled(whole, names, scales).applied(model), progress.work(label, task.count) as step:
            return task.equations(*task.look(asked, step))

    scales, ridge, given = np.ones(len(parts)), 0.0, 0.0
    best = (np.inf, 0.0, 0.0, scales)  # cost, what is wanted as foretold and as found, scales
    for turn in range(ROUNDS):
        equations = look(parts, scales)
        if turn == 0:
            ridge, given = choose(equations), wanted(equations)
            best = (cost(equations, ridge, scales), given, given, scales)
        change = solve(equations, ridge, scales - 1)
        foretold = cost(equations, ridge, scales, change), wanted(equations, change)
        scales = scales + change
        there = look([], scales)
        found = cost(there, ridge, scales)
        if found >= best[0]:
            break
        best = (found, foretold[1], wanted(there), scales)
        if found < (1 + NEAR) * foretold[0]:
            break
    _, as_foretold, as_found, scales = best
    chosen = {name: float(scale) for group, scale in zip(names, scales, strict=True) for name in group}
    return scaled(whole, names, scales), Fit(chosen, ridge, given, as_foretold, as_found)


def together(delta: Delta) -> list[list[str]]:
    """What has one scale: each matrix, and all vectors (gains of norms, biases) together."""
    vectors = [name for name, shape in delta.shapes.items() if len(shape) < 2]
    return [[name] for name in delta.shapes if name not in vectors] + ([vectors] if vectors else [])


def directions(whole: Delta, model: "PreTrainedModel", names: Sequence[Sequence[str]]) -> list[Part]:
    """{parameter: its difference} of each group of tensors, as the model holds them."""
    held = touched(whole, model)
    return [
        held.parameters_of({name: torch.from_numpy(whole.tensors[name]).to(model.device) for name in group})
        for group in names
    ]


def scaled(whole: Delta, names: Sequence[Sequence[str]], scales: Float[np.ndarray, "parts"]) -> Delta:
    """``whole`` with the tensors of each group multiplied by the group's scale."""
    of = {name: np.float32(scale) for group, scale in zip(names, scales, strict=True) for name in group}
    return replace(whole, tensors={name: array * of[name] for name, array in whole.tensors.items()})


def solve(equations: Sequence[Equation], ridge: float, gone: Float[np.ndarray, "parts"]) -> Float[np.ndarray, "parts"]:
    """The change of the scales, which have ``gone`` so far from 1 already, in the sense of least squares."""
    left, right = [np.sqrt(ridge) * np.eye(len(gone))], [-np.sqrt(ridge) * gone]
    for each in equations:
        root = np.sqrt(each.weight / max(1, len(each.lack)))
        left.append(root * each.slopes.T)
        right.append(root * each.lack)
    return np.linalg.lstsq(np.concatenate(left), np.concatenate(right), rcond=None)[0]


def choose(equations: Sequence[Equation]) -> float:
    """The ridge by which scales chosen without a fold's groups leave least of what is wanted there."""

    def error(ridge: float) -> float:
        total = 0.0
        for fold in range(FOLDS):
            kept, apart = zip(*(_apart(each, fold) for each in equations), strict=True)
            change = solve(kept, ridge, np.zeros(len(equations[0].slopes)))
            total += sum(float(((each.lack - change @ each.slopes) ** 2).sum()) for each in apart if each)
        return total

    return min(RIDGES, key=error)


def _apart(equation: Equation, fold: int) -> tuple[Equation, Equation | None]:
    """The equation without a fold's groups, and with these alone; one that is only held stays whole."""
    if equation.groups is None:
        return equation, None
    out = equation.groups % FOLDS == fold

    def only(rows: np.ndarray) -> Equation:
        return replace(equation, lack=equation.lack[rows], slopes=equation.slopes[:, rows], groups=None)

    return only(~out), only(out)


def _lacks(equations: Sequence[Equation], change: Float[np.ndarray, "parts"] | None) -> list[np.ndarray]:
    """What each equation lacks, as it is or after a change of the scales."""
    return [each.lack if change is None else each.lack - change @ each.slopes for each in equations]


def wanted(equations: Sequence[Equation], change: Float[np.ndarray, "parts"] | None = None) -> float:
    """The mean square of what the fit is for and lacks."""
    pairs = zip(equations, _lacks(equations, change), strict=True)
    return float((np.concatenate([lack for each, lack in pairs if each.groups is not None]) ** 2).mean())


def cost(
    equations: Sequence[Equation],
    ridge: float,
    scales: Float[np.ndarray, "parts"],
    change: Float[np.ndarray, "parts"] | None = None,
) -> float:
    """What ``solve`` makes small: the weighted mean squares of all that lacks, and the ridge; after a ``change``."""
    total = ridge * float(((scales - 1 + (0.0 if change is None else change)) ** 2).sum())
    pairs = zip(equations, _lacks(equations, change), strict=True)
    return total + sum(each.weight * float((lack**2).mean()) for each, lack in pairs)


def first_block(delta: Delta, model: "PreTrainedModel") -> int:
    """The first block that ``delta`` changes; 0 where it changes what stands before or outside of the blocks."""
    blocks = [block.name for block in anatomy.find(model).blocks]
    held = touched(delta, model).parameters
    inside = [[at for at, block in enumerate(blocks) if name.startswith(f"{block}.")] for name in held]
    return min(at[0] for at in inside) if all(inside) else 0
