"""Scales of a delta's parts fitted to a relative of its base, where what the relative prefers itself is left.

A delta takes away what its base preferred. A fine-tuned child prefers something else besides, and one scale of the
whole cannot give it: it needs a shift. The delta's parts (the strongest singular components of each matrix, and the
rest of it) shift by different amounts, which is measured: the derivatives of all answers by all scales
(``surgery.forward.scale_slopes``), and least squares on them (Gauss-Newton).
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
ROUNDS = 8  # at most: two to four as a rule
GAIN = 0.01  # a round that takes less of what is left is the last
COMPONENTS = 4  # of each matrix, which have a scale of their own
QUIET = Progress(quiet=True)

Piece = Mapping[str, Float[np.ndarray, "..."]]
"""{tensor: what of its difference is multiplied by one scale}."""

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
    """The scales by piece; the mean square of what is wanted, with the delta as it is, as foretold, and as found."""

    scales: Float[np.ndarray, "pieces"]
    ridge: float
    given: float
    foretold: float
    found: float


def fitted(
    delta: Delta,
    model: "PreTrainedModel",
    task: Task,
    *,
    components: int = COMPONENTS,
    progress: Progress = QUIET,
) -> tuple[Delta, Fit]:
    """``delta`` with each of its ``pieces`` at a scale of its own, chosen on ``model``, and what was chosen.

    Least squares of the task's equations with a ridge towards 1, by cross-validation over groups; then from there
    again, until a round gains next to nothing. What is best of all that was looked at is taken. ``model`` is as it was
    afterwards. Raises ``SurgeryError`` for a delta of kind "module" and one that does not fit ``model``.
    """
    whole = compose([delta])
    cut = pieces(whole, components)
    parts = directions(whole, model, cut)

    def look(asked: Sequence[Part], scales: Float[np.ndarray, "pieces"]) -> list[Equation]:
        label = f"answers to {len(parts)} scales" if asked else "answers at the scales found"
        with scaled(whole, cut, scales).applied(model), progress.work(label, task.count) as step:
            return task.equations(*task.look(asked, step))

    scales, ridge, given = np.ones(len(parts)), 0.0, 0.0
    best = (np.inf, 0.0, 0.0, scales)  # cost, what is wanted as foretold and as found, scales
    for turn in range(ROUNDS):
        equations = look(parts, scales)
        if turn == 0:
            ridge, given = choose(equations), wanted(equations)
            best = (cost(equations, ridge, scales), given, given, scales)
        change = solve(equations, ridge, scales - 1)
        foretold, scales = wanted(equations, change), scales + change
        there = look([], scales)
        left, before = cost(there, ridge, scales), best[0]
        if left < before:
            best = (left, foretold, wanted(there), scales)
        if left > (1 - GAIN) * before:
            break
    _, as_foretold, as_found, scales = best
    return scaled(whole, cut, scales), Fit(scales, ridge, given, as_foretold, as_found)


def pieces(whole: Delta, components: int = COMPONENTS) -> list[Piece]:
    """What has one scale each: of a matrix its strongest singular ``components`` and the rest, all vectors together.

    The components of a matrix D are D v v^T with v the eigenvectors of D^T D (or from the left, whichever is smaller).
    A tensor of three dimensions or more is one piece.
    """
    vectors: dict[str, np.ndarray] = {}
    found: list[Piece] = []
    for name, array in whole.tensors.items():
        if array.ndim < 2:
            vectors[name] = array
            continue
        rest = array.astype(np.float32)
        for component in strongest(rest, components) if array.ndim == 2 else ():
            found.append({name: component})
            rest = rest - component
        found.append({name: rest})
    return found + ([vectors] if vectors else [])


def strongest(matrix: Float[np.ndarray, "rows columns"], count: int) -> list[Float[np.ndarray, "rows columns"]]:
    """The ``count`` components of rank one with the largest singular values, the largest first."""
    wide = matrix.shape[0] < matrix.shape[1]
    tall = matrix.T if wide else matrix
    _, vectors = np.linalg.eigh(tall.T @ tall)
    found = [np.outer(tall @ vector, vector) for vector in vectors.T[::-1][: min(count, tall.shape[1] - 1)]]
    return [each.T if wide else each for each in found]


def directions(whole: Delta, model: "PreTrainedModel", cut: Sequence[Piece]) -> list[Part]:
    """{parameter: its difference} of each piece, as the model holds them."""
    held = touched(whole, model)

    def sent(piece: Piece) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(np.ascontiguousarray(array)).to(model.device) for name, array in piece.items()}

    return [held.parameters_of(sent(piece)) for piece in cut]


def scaled(whole: Delta, cut: Sequence[Piece], scales: Float[np.ndarray, "pieces"]) -> Delta:
    """``whole`` with each piece multiplied by its scale."""
    tensors = {name: np.zeros(shape, np.float32) for name, shape in whole.shapes.items()}
    for piece, scale in zip(cut, scales, strict=True):
        for name, array in piece.items():
            tensors[name] += np.float32(scale) * array
    return replace(whole, tensors=tensors)


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
