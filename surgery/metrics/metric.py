"""The one shape of a measured number, and its 95 % bootstrap interval."""

import base64
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from statistics import NormalDist
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.errors import SurgeryError

RESAMPLES = 2000
TAIL = 5  # draws beyond a quantile, of fewer of which it is not known
CHUNK = 250_000  # resampled entries held at once: 2 MB, which stay in the cache


@dataclass(frozen=True)
class Metric:
    """A measured number that can stand on its own in a table.

    ``low`` and ``high`` are the 95 % percentile bootstrap interval over the ``n`` rows of ``data``;
    ``ideal`` is the value of a perfect model, and ``direction`` says where better lies.
    """

    value: float
    low: float
    high: float
    n: int
    scorer: str
    data: str
    ideal: float
    direction: str
    """Lower, higher, nearer (to the ideal), or same: as before the edit, whatever that was."""
    samples: Float[np.ndarray, " resamples"] | None = field(default=None, repr=False, compare=False)
    """The bootstrap's values, for differences (``difference``); they do not go into JSON."""
    groups: int | None = None
    """How many groups of rows were resampled as one (professions, terms); None where each row stands for itself."""

    def to_dict(self, *, samples: bool = False) -> dict[str, Any]:
        """Plain JSON values; with ``samples`` also those, in 32 bits, so that what is read again can be paired."""
        found = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "samples"}
        if samples and self.samples is not None:
            found["samples"] = base64.b64encode(self.samples.astype("<f4").tobytes()).decode()
        return found

    @property
    def units(self) -> int:
        """How many independent things were measured: the groups, or the rows where there are none."""
        return self.n if self.groups is None else self.groups

    def __str__(self) -> str:
        return f"{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]"


def mean_metric(
    values: Float[np.ndarray, " n"],
    *,
    scorer: str,
    data: str,
    ideal: float,
    direction: str,
    transform: Callable[[Any], Any] | None = None,
    weights: Float[np.ndarray, " n"] | None = None,
    groups: np.ndarray | None = None,
    seed: int = 0,
) -> Metric:
    """The (weighted) mean of per-row ``values``, passed through ``transform``, with its bootstrap interval.

    Rows are resampled with replacement ``RESAMPLES`` times by a generator of its own, so that the interval is
    the same in each run. ``groups`` resamples whole groups (professions that share a prompt, say) instead of
    rows: rows of one profession are not independent.

    Raises ``SurgeryError`` when there are no rows or a value is not finite.
    """
    values = np.asarray(values, dtype=np.float64)
    if values.size == 0:
        raise SurgeryError(f"{scorer} on {data}: no rows to measure; expected at least 1")
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise SurgeryError(
            f"{scorer} on {data}: row {where} has the value {values[where]}; expected finite numbers; "
            "the model's outputs are broken, try float32"
        )
    alike = weights is None and groups is None  # then every resample has the same mass, which need not be added up
    weights = np.ones_like(values) if weights is None else np.asarray(weights, dtype=np.float64)
    totals, masses = values * weights, weights
    if groups is not None:
        _, index = np.unique(np.asarray(groups), return_inverse=True)
        totals, masses = np.bincount(index, totals), np.bincount(index, masses)
    apply = transform or (lambda x: x)
    generator = np.random.default_rng(seed)
    samples = np.empty(RESAMPLES)
    rows = max(1, CHUNK // totals.size)
    for start in range(0, RESAMPLES, rows):
        stop = min(RESAMPLES, start + rows)
        picks = generator.integers(0, totals.size, size=(stop - start, totals.size))
        samples[start:stop] = totals[picks].sum(axis=1) / (totals.size if alike else masses[picks].sum(axis=1))
    samples = apply(samples)
    low, high = np.quantile(samples, [0.025, 0.975])
    return Metric(
        value=float(apply(totals.sum() / masses.sum())),
        low=float(low),
        high=float(high),
        n=int(values.size),
        scorer=scorer,
        data=data,
        ideal=ideal,
        direction=direction,
        groups=None if groups is None else int(totals.size),
        samples=samples,
    )


def sampled_metric(
    value: float,
    samples: Float[np.ndarray, " resamples"],
    *,
    n: int,
    scorer: str,
    data: str,
    ideal: float,
    direction: str,
) -> Metric:
    """A number that is no mean, with the 95 % percentile interval of its bootstrap ``samples``.

    Samples of a maximum or an absolute value lie above it; the interval is widened to hold the value where need be.
    """
    low, high = np.quantile(samples, [0.025, 0.975])
    low, high = min(float(low), float(value)), max(float(high), float(value))
    return Metric(float(value), low, high, n, scorer, data, ideal, direction, samples=samples)


@dataclass(frozen=True)
class Difference:
    """``after`` - ``before`` of one number, paired: ``low`` and ``high`` bound the difference (95 %), not its parts.

    ``verdict``: "better" or "worse" where the interval excludes 0, and "within noise" where it does not.
    """

    value: float
    low: float
    high: float
    n: int
    scorer: str
    data: str
    verdict: str


def difference(before: Metric, after: Metric, *, axes: int = 1) -> Difference | None:
    """The paired difference of two measurements of the same rows; None where they cannot be paired.

    The bootstrap draws the same groups for both (its generator starts anew for each metric), so that the difference of
    the samples is the bootstrap of the difference. Other rows, another scorer or data, or no samples: None.
    ``axes``: how many differences are looked at together; each interval is widened (Bonferroni) so that all hold.
    Of very few rows or groups the draws may all be alike; where even a sign test in which all moved the same way would
    leave a chance above the level (2^(1 - n), so 6 alone and 13 among 190 numbers), nothing is beyond noise.
    """
    told = (before.scorer, before.data, before.n) == (after.scorer, after.data, after.n)
    if not told or before.samples is None or after.samples is None or before.samples.shape != after.samples.shape:
        return None
    drawn, value = after.samples - before.samples, after.value - before.value
    low, high = np.quantile(drawn, [0.025 / axes, 1 - 0.025 / axes])
    low, high = min(float(low), value), max(float(high), value)
    if drawn.size * 0.025 < TAIL * axes:  # so far out lie a few draws or none: there the normal tail is wider
        reach = NormalDist().inv_cdf(1 - 0.025 / axes) * float(drawn.std())
        low, high = min(low, value - reach), max(high, value + reach)
    better = _better(before, after)
    few = 2.0 ** (1 - after.units) > 0.05 / axes
    verdict = "within noise" if few or low <= 0 <= high or better == 0 else "better" if better > 0 else "worse"
    return Difference(value, low, high, after.n, after.scorer, after.data, verdict)


def _better(before: Metric, after: Metric) -> float:
    """Positive where ``after`` is the better value."""
    if after.direction == "same":
        return -abs(after.value - before.value)
    if after.direction == "nearer":
        return abs(before.value - before.ideal) - abs(after.value - after.ideal)
    return (after.value - before.value) * (1 if after.direction == "higher" else -1)


def points(metric: Mapping[str, Any], difference: float) -> float:
    """A difference that led to ``metric`` (as plain JSON values) in points.

    Of numbers that run to 100 (their ideal is 50 or 100) a point is 1, of a perplexity one percent of what it was, of
    all others, which are shares, chances and effect sizes, a hundredth.
    """
    if metric["direction"] == "lower" and metric["ideal"] == 1:
        return 100 * difference / (float(metric["value"]) - difference)
    return difference * (1 if metric["ideal"] >= 50 else 100)


def differences(before: Mapping[str, Any], after: Mapping[str, Any], *, axes: int = 1) -> dict[str, Any]:
    """``difference`` of every metric that stands at the same place of two trees of scores, as plain JSON values."""
    found: dict[str, Any] = {}
    for key, value in after.items():
        other = before.get(key)
        if isinstance(value, Metric) and isinstance(other, Metric):
            one = difference(other, value, axes=axes)
            if one is not None:
                found[key] = asdict(one)
        elif (
            isinstance(value, Mapping)
            and isinstance(other, Mapping)
            and (below := differences(other, value, axes=axes))
        ):
            found[key] = below
    return found


def flat(scores: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Metric]:
    """Every metric of a tree of scores by its place, such as "genbias.afgb.all", in the tree's order."""
    found: dict[str, Metric] = {}
    for key, value in scores.items():
        if isinstance(value, Metric):
            found[".".join((*path, key))] = value
        elif isinstance(value, Mapping):
            found |= flat(value, (*path, key))
    return found


def ideal_of(metric: Mapping[str, Any]) -> str:
    """The ideal as it stands in a table, of a metric as plain JSON values."""
    return "as before" if metric["direction"] == "same" else f"{metric['ideal']:g}"


def from_dict(fields: dict[str, Any]) -> Metric:
    """The ``Metric`` that ``Metric.to_dict`` wrote."""
    kept = fields.get("samples")
    samples = None if kept is None else np.frombuffer(base64.b64decode(kept), "<f4").astype(np.float64)
    return replace(Metric(0, 0, 0, 0, "", "", 0, ""), **{**fields, "samples": samples})
