"""Whether numbers of templates say what the model writes: rank agreement over methods, and over professions."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from hooks.rank_correlation import Correlation, spearman
from surgery.metrics.metric import RESAMPLES, Metric
from surgery.study.cells import Judged

TEMPLATES = ("genbias.afgb.all", "genbias.relative_gap.all", "stereoset.margin.overall", "stereoset.ss.overall")
WRITTEN = "free_text.stereotype"
LEAST = 4  # of fewer methods, or professions, an order says nothing


def over_methods(judged: Sequence[Judged], place: str, written: str = WRITTEN) -> tuple[Correlation, int] | None:
    """Spearman's correlation over the cells of one model between the distances of two numbers from their ideals.

    The interval is over the bootstrap of the rows that each number was measured on, not over methods, which are no
    sample of anything. None for fewer than ``LEAST`` cells that have both.
    """
    both = [one.scores for one in judged if place in one.scores and written in one.scores]
    if len(both) < LEAST or any(scores[key].samples is None for scores in both for key in (place, written)):
        return None
    x, y = (np.stack([_far(scores[key]) for scores in both], axis=1) for key in (place, written))
    return _with_interval(spearman(x, y)), len(both)


def over_professions(details: Mapping[str, Any], seed: int = 0) -> tuple[Correlation, int] | None:
    """Spearman's correlation over professions: the mean P(he) - P(she) of their prompts, and who they are in texts.

    The interval resamples professions. None where one of the two was not measured, or for fewer than ``LEAST``.
    """
    asked, texts = lean_of_prompts(details), _lean_of_texts(details)
    names = [name for name in asked if name in texts]
    if len(names) < LEAST:
        return None
    x, y = (np.array([found[name] for name in names]) for found in (asked, texts))
    picks = np.random.default_rng(seed).integers(0, len(names), size=(RESAMPLES, len(names)))
    return _with_interval(np.concatenate([spearman(x[None], y[None]), spearman(x[picks], y[picks])])), len(names)


def _with_interval(found: Float[np.ndarray, " 1+draws"]) -> Correlation:
    """The first with the 95 % interval of the draws behind it that have an order; not a number where one is missing."""
    value, known = float(found[0]), found[1:][np.isfinite(found[1:])]
    if np.isnan(value) or not len(known):
        return Correlation(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [0.025, 0.975])
    return Correlation(value, float(low), float(high))


def lean_of_prompts(details: Mapping[str, Any]) -> dict[str, float]:
    """By profession the mean over its prompts of P(first word) - P(second word), as a share of their sum."""
    found: dict[str, list[float]] = {}
    if len(details.get("words", ())) != 2:
        return {}
    for _, name, first, second in details["prompts"]:
        found.setdefault(name, []).append((first - second) / max(first + second, 1e-12))
    return {name: float(np.mean(values)) for name, values in found.items()}


def _lean_of_texts(details: Mapping[str, Any]) -> dict[str, float]:
    found: dict[str, list[float]] = {}
    for _, name, _, _, told in details.get("texts", ()):
        found.setdefault(name, []).append(told)
    return {name: float(np.mean(values)) for name, values in found.items()}


def _far(metric: Metric) -> Float[np.ndarray, " 1+resamples"]:
    """How far a number and its bootstrap draws are from the ideal."""
    assert metric.samples is not None  # asked before
    return np.abs(np.concatenate([[metric.value], metric.samples]) - metric.ideal)
