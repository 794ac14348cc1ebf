"""Accuracy and TPR gaps over groups, for any classifier's predictions (Equality of Opportunity).

The TPR of class c in group g is the share of the rows of class c and group g that are predicted as c. The gap of a
class between two groups is the absolute difference of their TPRs (for two groups: De-Arteaga et al. 2019). Over more
groups or classes CrAWD does not say what is reported, so both stand in the result: ``max``, the largest gap of any
class between any two groups, and ``mean``, the mean over all classes and pairs of groups.
"""

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.errors import SurgeryError
from surgery.metrics.metric import RESAMPLES, Metric, mean_metric, sampled_metric


def score(
    predictions: Sequence[Hashable],
    labels: Sequence[Hashable],
    groups: Sequence[Hashable],
    *,
    data: str,
    positive: Sequence[Hashable] | None = None,
    least: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """``{"accuracy": Metric, "tpr_gap": {"max": Metric, "mean": Metric}}`` of one prediction, label and group a row.

    ``positive`` are the classes whose TPRs are compared (all by default; the one positive class of a detector). A
    class counts between two groups where each has at least ``least`` of its rows; what is left out is in ``data``.
    Rows with the group ``""`` or ``None`` count for accuracy only.

    Intervals of the gaps resample the rows of each class and group. A gap is an absolute value, and ``max`` a
    maximum of such, so on few rows both are above the true gap even for a fair classifier, and so are their
    intervals: compare two classifiers on the same rows, or raise ``least``.

    Raises ``SurgeryError`` for columns of unlike length, and where no class has rows in two groups.
    """
    if not len(predictions) == len(labels) == len(groups):
        raise SurgeryError(
            f"groups on {data}: {len(predictions)} predictions, {len(labels)} labels, {len(groups)} groups; "
            "expected as many of each"
        )
    right = np.array([predicted == label for predicted, label in zip(predictions, labels, strict=True)], dtype=float)
    correct = mean_metric(right, scorer="accuracy", data=data, ideal=1.0, direction="higher", seed=seed)
    cells: dict[Hashable, dict[Hashable, list[float]]] = {}
    for hit, label, group in zip(right, labels, groups, strict=True):
        if group not in ("", None) and (positive is None or label in positive):
            cells.setdefault(label, {}).setdefault(group, []).append(hit)
    kept = {label: {g: hits for g, hits in by.items() if len(hits) >= least} for label, by in cells.items()}
    pairs = [(label, *pair) for label, by in kept.items() for pair in combinations(sorted(by, key=str), 2)]
    if not pairs:
        raise SurgeryError(
            f"TPR gap on {data}: no class has {least} rows in each of two groups; expected at least one; "
            "take more rows, or a smaller least"
        )
    left_out = len(cells) - len({label for label, *_ in pairs})
    generator = np.random.default_rng(seed)
    # Resampling the rows of a cell with replacement makes its number of hits binomial.
    drawn = {
        (label, group): generator.binomial(len(hits), np.mean(hits), RESAMPLES) / len(hits)
        for label, by in kept.items()
        for group, hits in by.items()
    }
    value = np.array([abs(np.mean(kept[label][a]) - np.mean(kept[label][b])) for label, a, b in pairs])
    samples = np.stack([abs(drawn[label, a] - drawn[label, b]) for label, a, b in pairs], axis=1)
    where = f"{data}; {len(pairs)} gaps of {len(kept)} classes" + (f", {left_out} classes left out" if left_out else "")
    rows = sum(len(hits) for by in kept.values() for hits in by.values())
    return {
        "accuracy": correct,
        "tpr_gap": {
            "max": _gap(value.max(), samples.max(axis=1), rows, "largest |TPR(a) - TPR(b)| of a class", where),
            "mean": _gap(value.mean(), samples.mean(axis=1), rows, "mean |TPR(a) - TPR(b)| over classes, pairs", where),
        },
    }


def _gap(value: float, samples: Float[np.ndarray, " resamples"], n: int, scorer: str, data: str) -> Metric:
    made = sampled_metric(value, samples, n=n, scorer=scorer, data=data, ideal=0.0, direction="lower")
    return replace(made, samples=None)  # hits were drawn, not rows: two models' samples are no pairs
