"""Does a location hold? Rankings against each other and against their own repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from hooks.display import Readable
from hooks.errors import HookError
from hooks.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Correlation:
    """Spearman's rank correlation, -1 to 1, with the bounds of its 95 % bootstrap interval over the units.

    NaN where a ranking gives every unit the same score, which has no order.
    """

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            "none: all scores equal"
            if np.isnan(self.value)
            else f"{self.value:+.2f}  [{self.low:+.2f}, {self.high:+.2f}]"
        )


@dataclass(frozen=True, repr=False)
class Comparison(Readable):
    """Rank correlations of every pair of rankings; `stability` is that of each method with itself on other data.

    The interval resamples the units (blocks). Neighbouring blocks are alike, so it is rather too narrow.
    names: in the order given; target: the name of what the others are to predict; tops: name -> first unit.
    """

    names: tuple[str, ...]
    pairs: Mapping[tuple[str, str], Correlation]
    stability: Mapping[str, Correlation]
    tops: Mapping[str, Any]
    target: str | None
    unit: str
    units: int

    def get(self, first: str, second: str) -> Correlation:
        """The correlation of two rankings by name, in either order. Raises HookError for an unknown name."""
        found = self.pairs.get((first, second)) or self.pairs.get((second, first))
        if found is None:
            raise HookError(f"comparison: no pair {first!r}, {second!r}; expected two of {', '.join(self.names)}")
        return found

    def table(self) -> str:
        """Plain text: pairs (with the target first), then stability; each with its interval."""
        wide = max(map(len, self.names))
        lines = [f"Spearman's rank correlations, {self.units} {self.unit}s, 95 % intervals over {self.unit}s"]
        first = [pair for pair in self.pairs if self.target in pair]
        for a, b in first + [pair for pair in self.pairs if pair not in first]:
            lines.append(f"  {a:{wide}}  {b:{wide}}  {self.pairs[a, b]}")
        if self.stability:
            lines.append("stability: each method with itself on other prompts, mean over pairs of repeats")
            lines += [f"  {name:{wide}}  {value}" for name, value in self.stability.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; an undefined correlation is null."""

        def plain(c: Correlation) -> dict[str, float | None]:
            return {k: None if np.isnan(v) else v for k, v in vars(c).items()}

        return {
            "unit": self.unit,
            "units": self.units,
            "target": self.target,
            "tops": dict(self.tops),
            "pairs": [{"first": a, "second": b} | plain(c) for (a, b), c in self.pairs.items()],
            "stability": {name: plain(c) for name, c in self.stability.items()},
        }


def compare(
    rankings: Sequence[Ranking],
    target: Ranking | None = None,
    *,
    repeats: Sequence[Sequence[Ranking]] = (),
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Spearman correlations between rankings of the same units, with percentile bootstrap intervals (Efron 1979).

        compare([bmi.raw, lens.ranking()], target=after_fine_tuning, repeats=[[half_1, half_2]]).table()

    target: what the others should predict, such as the bias reduction of each block. repeats: for some methods,
    the rankings of each on halves of the data or by other seeds.

    Raises HookError for fewer than two rankings (and no repeats), fewer than three units, other units or shapes,
    and two rankings of the same name (`name`).
    """
    every = [*rankings, *([target] if target is not None else [])]
    names = [name(ranking) for ranking in every]
    twice = {n for n in names if names.count(n) > 1}
    if twice:
        raise HookError(f"compare: {sorted(twice)[0]!r} is there twice; give rankings of one method as repeats")
    if not every or (len(every) < 2 and not repeats):
        raise HookError(f"compare: got {len(every)} rankings; expected at least two, or repeats of one")
    draws = _draws(every, resamples, seed)
    pairs = {(names[i], names[j]): _interval(draws[:, i, j]) for i, j in combinations(range(len(every)), 2)}
    stable = {}
    for runs in repeats:
        if len({name(run) for run in runs}) != 1 or len(runs) < 2:
            raise HookError(
                f"compare: repeats of {sorted({name(run) for run in runs})}, {len(runs)} in all; "
                "expected at least two of one method"
            )
        own = _draws([*runs, every[0]], resamples, seed)  # the first ranking checks that the units are the same
        among = [own[:, i, j] for i, j in combinations(range(len(runs)), 2)]
        stable[name(runs[0])] = _interval(np.mean(among, axis=0))
    tops = {n: ranking.top()[0] for n, ranking in zip(names, every, strict=True)}
    goal = None if target is None else name(target)
    return Comparison(tuple(names), pairs, stable, tops, goal, every[0].unit, every[0].scores.size)


def name(ranking: Ranking) -> str:
    """The method, and for BMI which of the two streams the last block's is."""
    return " ".join([ranking.method, *([str(ranking.settings["stream"])] if "stream" in ranking.settings else [])])


def ranks(scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank of each score, 1 for the lowest; equal scores share the mean of their ranks."""
    _, place, count = np.unique(scores.ravel(), return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x: Float[np.ndarray, "*draw n"], y: Float[np.ndarray, "*draw n"]) -> Float[np.ndarray, "*draw"]:
    """Spearman's rank correlation along the last axis; NaN where all values of one side are equal."""
    first, second = (np.apply_along_axis(ranks, -1, np.asarray(values, dtype=np.float64)) for values in (x, y))
    first, second = (each - each.mean(-1, keepdims=True) for each in (first, second))
    with np.errstate(invalid="ignore", divide="ignore"):
        found: np.ndarray = (first * second).sum(-1) / np.sqrt((first**2).sum(-1) * (second**2).sum(-1))
    return found


def _draws(rankings: Sequence[Ranking], resamples: int, seed: int) -> Float[np.ndarray, "draw ranking ranking"]:
    """Correlation matrices: first that of all units, then those of the bootstrap samples."""
    first = rankings[0]
    for ranking in rankings:
        if ranking.unit != first.unit or ranking.scores.shape != first.scores.shape:
            raise HookError(
                f"compare: {name(ranking)} ranks {ranking.scores.shape} {ranking.unit}s, {name(first)} "
                f"{first.scores.shape} {first.unit}s; expected the same units"
            )
    size = first.scores.size
    if size < 3:
        raise HookError(f"compare: {size} {first.unit}s; an order needs at least three")
    draw = np.random.default_rng(seed)
    times = np.concatenate([np.ones((1, size)), draw.multinomial(size, np.full(size, 1 / size), size=resamples)])
    centred = []  # (draw, unit): mid-rank of each unit among those drawn, as often as they were, less the mean rank
    for ranking in rankings:
        x = ranking.scores.ravel()
        below = (x[:, None] < x) + 0.5 * (x[:, None] == x)  # [other, own]
        centred.append(times @ below - size / 2)
    products = np.einsum("du,idu,jdu->dij", times, centred, centred, optimize=True)
    length = np.sqrt(np.einsum("dii->di", products))
    product = length[:, :, None] * length[:, None]
    return np.divide(products, product, out=np.full_like(products, np.nan), where=product > 0)


def _interval(draws: NDArray[np.float64]) -> Correlation:
    value, known = float(draws[0]), draws[1:][~np.isnan(draws[1:])]  # a sample of one unit only has no order
    if np.isnan(value) or not known.size:
        return Correlation(value, np.nan, np.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Correlation(value, float(low), float(high))


def rank_map(rankings: Sequence[Ranking]) -> Figure:
    """Methods x blocks: lighter ranks higher, and the first three of each method carry their rank."""
    from hooks.drawing import LIGHTNESS, new_figure

    table = np.stack([ranks(ranking.scores) for ranking in rankings])
    methods, blocks = table.shape
    figure = new_figure(3.0 + 0.28 * max(blocks, 10), 1.2 + 0.36 * methods)
    axes = figure.subplots()
    image = axes.imshow(table, cmap=LIGHTNESS, vmin=1, vmax=blocks, aspect="auto")
    for row, ranking in enumerate(rankings):
        for rank, block in enumerate(ranking.top(3), 1):
            axes.text(block, row, str(rank), ha="center", va="center", fontsize=9, weight="bold")
    axes.set_xticks(range(0, blocks, max(1, blocks // 15)))
    axes.set_yticks(range(methods), [name(ranking).replace("_", "-") for ranking in rankings])
    axes.set_xlabel("block (1, 2, 3: the method's first three)")
    figure.colorbar(image, ax=axes, label="rank", ticks=[1, blocks]).ax.set_yticklabels(["last", "first"])
    axes.set_title(f"{rankings[0].data}, n = {rankings[0].count}", fontsize=10)
    return figure
