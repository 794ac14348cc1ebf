"""Which part of an edit's effect is left, with its interval: four measurements of the same rows."""

from dataclasses import dataclass

import numpy as np

from surgery.errors import SurgeryError
from surgery.metrics.metric import Metric


@dataclass(frozen=True)
class Share:
    """value: 1 where all of the effect is left, 0 where none is. low, high: 95 %, paired; None where unbounded."""

    value: float
    low: float | None
    high: float | None

    def __str__(self) -> str:
        low, high = ("open" if end is None else f"{100 * end:.0f}" for end in (self.low, self.high))
        return f"{100 * self.value:.0f} % [{low}, {high}]"


def effect(before: Metric, after: Metric, relative: bool) -> np.ndarray:
    """[1 + resamples]: the fall of the number, divided by what it fell from where ``relative``; first the value.

    Raises ``SurgeryError`` for measurements that cannot be paired.
    """
    if before.samples is None or after.samples is None or before.samples.shape != after.samples.shape:
        raise SurgeryError(f"{before.scorer} on {before.data}: cannot be paired with {after.scorer} on {after.data}")
    start, end = (np.concatenate([[one.value], one.samples]) for one in (before, after))
    with np.errstate(divide="ignore", invalid="ignore"):
        return (start - end) / start if relative else start - end


def share(before: tuple[Metric, Metric], after: tuple[Metric, Metric], *, relative: bool) -> Share:
    """``before``: the untouched model and the edited one as applied; ``after``: both after the same treatment.

    The share is effect after / effect before; the bootstrap draws the same groups for all four numbers.

    Raises ``SurgeryError`` where the effect before may be 0.
    """
    whole, left = effect(*before, relative), effect(*after, relative)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = left / whole
    if not np.isfinite(ratio[0]):
        raise SurgeryError(
            f"{after[0].scorer}: {after[0]} before and {after[1]} after the edit have no ratio of effects"
        )
    kept = ratio[1:][np.isfinite(ratio[1:]) & (np.sign(whole[1:]) == np.sign(whole[0]))]
    # Where the whole effect changes its sign in a draw, the ratio there says nothing, and the interval is open.
    if len(kept) < 0.99 * len(ratio[1:]):
        return Share(float(ratio[0]), None, None)
    low, high = np.quantile(kept, [0.025, 0.975])
    return Share(float(ratio[0]), min(float(low), float(ratio[0])), max(float(high), float(ratio[0])))


def measurable(before: Metric, after: Metric, relative: bool) -> bool:
    """Whether the 95 % interval of the effect leaves out 0."""
    low, high = np.quantile(effect(before, after, relative)[1:], [0.025, 0.975])
    return bool(low > 0 or high < 0)
