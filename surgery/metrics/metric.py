"""The one shape of a measured number, and its 95 % bootstrap interval."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.errors import SurgeryError

RESAMPLES = 2000
CHUNK = 4_000_000  # resampled entries held at once


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
    direction: str  # "lower" | "higher" | "nearer" (to the ideal)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

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
        samples[start:stop] = totals[picks].sum(axis=1) / masses[picks].sum(axis=1)
    low, high = np.quantile(apply(samples), [0.025, 0.975])
    return Metric(
        value=float(apply(totals.sum() / masses.sum())),
        low=float(low),
        high=float(high),
        n=int(values.size),
        scorer=scorer,
        data=data,
        ideal=ideal,
        direction=direction,
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
    return Metric(
        float(value), min(float(low), float(value)), max(float(high), float(value)), n, scorer, data, ideal, direction
    )


def from_dict(fields: dict[str, Any]) -> Metric:
    """The ``Metric`` that ``Metric.to_dict`` wrote."""
    return replace(Metric(0, 0, 0, 0, "", "", 0, ""), **fields)
