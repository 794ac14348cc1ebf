"""What the inner products of a few groups' gradients say of each unit: the rankings of `hooks.gain`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hooks.errors import HookError
from hooks.rank_correlation import Correlation, compare
from hooks.ranking import Ranking

By = Literal["block", "attention", "mlp", "matrix"]
Method = Literal["natural", "ratio", "agreement", "inner", "snr", "rgn"]


@dataclass(frozen=True)
class Place:
    """A parameter: its name, its block's number, and whether it is attention's, the MLP's or another ("other")."""

    name: str
    block: int
    part: str


@dataclass(frozen=True)
class _Sums:
    """Sums over the parameters of one unit: Gram matrices of the groups' mean gradients, tr F, |w|^2."""

    whitened: Float[np.ndarray, "group group"]
    plain: Float[np.ndarray, "group group"]
    fisher: float
    weights: float


def _natural(sums: _Sums) -> float:
    return float(sums.whitened.mean())


def _ratio(sums: _Sums) -> float:
    return float(np.sqrt(sums.plain.mean() / max(sums.fisher, 1e-300)))


def _agreement(sums: _Sums) -> float:
    """Mean cosine over all ways to halve the groups."""
    groups = len(sums.plain)
    found = []
    for chosen in combinations(range(groups), groups // 2):
        half = np.isin(np.arange(groups), chosen)
        a, b = half / half.sum(), ~half / (~half).sum()
        length = np.sqrt((a @ sums.plain @ a) * (b @ sums.plain @ b))
        found.append(a @ sums.plain @ b / length if length > 0 else 0.0)
    return float(np.mean(found))


def _inner(sums: _Sums) -> float:
    groups = len(sums.plain)
    return float((sums.plain.sum() - np.trace(sums.plain)) / (groups * (groups - 1)))


def _snr(sums: _Sums) -> float:
    """Squared mean over variance between groups, both summed over the unit's parameters."""
    groups, square = len(sums.plain), sums.plain.mean()
    variance = (np.trace(sums.plain) - groups * square) / (groups - 1)
    return float(square / max(variance, 1e-300))


def _rgn(sums: _Sums) -> float:
    return float(np.sqrt(sums.plain.mean() / max(sums.weights, 1e-300)))


_SCORES: dict[Method, Callable[[_Sums], float]] = {
    "natural": _natural,
    "ratio": _ratio,
    "agreement": _agreement,
    "inner": _inner,
    "snr": _snr,
    "rgn": _rgn,
}
METHODS = tuple(_SCORES)


@dataclass(frozen=True, eq=False)
class Gain:
    """Gradients of an objective, reduced to inner products between groups of its examples.

    places: the ranked parameters; sizes: entries of each. whitened: inner products of the groups' mean gradients under
    1 / (F + damping); plain: under the identity. fisher: trace of F; weights: squared norm of the weights.
    """

    places: tuple[Place, ...]
    sizes: NDArray[np.int64]
    whitened: Float[np.ndarray, "parameter group group"]
    plain: Float[np.ndarray, "parameter group group"]
    fisher: Float[np.ndarray, " parameter"]
    weights: Float[np.ndarray, " parameter"]
    data: str
    count: int
    settings: Mapping[str, Any]

    def ranking(self, method: Method = "natural", by: By = "block", *, only: Iterable[int] | None = None) -> Ranking:
        """Units from the most promising down, with a 95 % interval (jackknife over groups of examples, Efron 1979).

        - natural: sum of g^2 / (F + damping), g the mean gradient of the objective.
        - ratio: norm of g over the root of F's trace, the norm of a retain token's gradient.
        - agreement: cosine between g of two halves of the examples, mean over all ways to halve the groups.
        - inner: mean inner product of different groups' gradients, what a step for some examples gains on others
          to first order (Layer Gradient Analysis, arXiv 2602.20207).
        - snr, rgn: Lee et al. 2023 (Surgical Fine-Tuning, section 4): signal to noise, here as the ratio of sums; norm
          of g over the norm of the weights.

        by: "block"; "attention" or "mlp" with a score for each block; "matrix" with names. only: groups to take.

        Raises HookError for another method or unit, and for a unit that the model has no parameters of.
        """
        if method not in _SCORES:
            raise HookError(f"gain: method is {method!r}; expected one of {', '.join(METHODS)}")
        groups = list(range(self.plain.shape[1])) if only is None else list(only)
        units, names = self._units(by)
        score = _SCORES[method]
        scores = np.array([score(self._sums(unit, groups)) for unit in units])
        left = [[group for group in groups if group != out] for out in groups] if len(groups) >= 4 else []
        low = high = None
        if left:
            again = np.array([[score(self._sums(unit, some)) for unit in units] for some in left])
            error = np.sqrt((len(left) - 1) / len(left) * ((again - again.mean(0)) ** 2).sum(0))
            low, high = scores - 1.96 * error, scores + 1.96 * error
        unit_name: Any = by
        return Ranking(
            f"gain_{method}", unit_name, scores, self.data, self.count, low=low, high=high, settings=self.settings,
            names=names,
        )  # fmt: skip

    def halves(self, method: Method = "natural", by: By = "block") -> tuple[Ranking, Ranking]:
        """The same ranking on the even and on the odd groups."""
        groups = range(self.plain.shape[1])
        return self.ranking(method, by, only=groups[::2]), self.ranking(method, by, only=groups[1::2])

    def stability(self, method: Method = "natural", by: By = "block") -> Correlation:
        """Spearman's correlation of the two halves' rankings: the method's agreement with itself."""
        halves = self.halves(method, by)
        found = compare(halves[:1], repeats=[halves])
        return next(iter(found.stability.values()))

    def _units(self, by: str) -> tuple[list[list[int]], tuple[str, ...] | None]:
        """Places of the parameters of each unit; names where these are no blocks."""
        if by == "matrix":
            matrices = [number for number, place in enumerate(self.places) if self.sizes[number] > 1]
            return [[number] for number in matrices], tuple(self.places[number].name for number in matrices)
        if by not in ("block", "attention", "mlp"):
            raise HookError(f"gain: by is {by!r}; expected block, attention, mlp or matrix")
        blocks = max(place.block for place in self.places) + 1
        units = [
            [n for n, place in enumerate(self.places) if place.block == block and by in ("block", place.part)]
            for block in range(blocks)
        ]
        empty = [block for block, unit in enumerate(units) if not unit]
        if empty:
            raise HookError(f"gain: block {empty[0]} has no ranked parameters of its {by}; rank by matrix instead")
        return units, None

    def _sums(self, unit: list[int], groups: list[int]) -> _Sums:
        whitened, plain = (gram[unit].sum(0)[np.ix_(groups, groups)] for gram in (self.whitened, self.plain))
        return _Sums(whitened, plain, float(self.fisher[unit].sum()), float(self.weights[unit].sum()))
