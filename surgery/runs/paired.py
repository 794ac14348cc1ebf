"""The edit of a run beside what stands next to it, number by number, as paired differences over the same rows."""

from collections.abc import Mapping
from typing import Any

from surgery.metrics.metric import Metric, difference, flat, from_dict

Differences = dict[str, dict[str, dict[str, Any]]]


def differences(summary: Mapping[str, Any]) -> Differences:
    """``{"before" or a control: {metric: the edit's value minus this one's}}``, of ``Summary.to_dict()``.

    A metric whose scores were kept without their bootstrap samples, or are of other rows, has no entry.
    """
    edited = _metrics(summary["after"])
    beside = {"before": summary["before"]} | {name: each["after"] for name, each in summary["controls"].items()}
    found: Differences = {}
    for name, scores in beside.items():
        other = _metrics(scores)
        pairs = {path: difference(other[path], metric) for path, metric in edited.items() if path in other}
        kept = {path: pair for path, pair in pairs.items() if pair is not None}
        if kept:
            found[name] = {
                path: {key: getattr(pair, key) for key in ("value", "low", "high", "verdict")}
                for path, pair in kept.items()
            }
    return found


def without_samples(values: Any) -> Any:
    """A tree of plain values without the bootstrap samples of its metrics."""
    if isinstance(values, Mapping):
        metric = {"value", "scorer"} <= set(values)
        return {key: without_samples(value) for key, value in values.items() if not (metric and key == "samples")}
    return [without_samples(value) for value in values] if isinstance(values, list | tuple) else values


def _metrics(scores: Mapping[str, Any]) -> dict[str, Metric]:
    return flat(_read(scores))


def _read(values: Any) -> Any:
    if not isinstance(values, Mapping):
        return values
    if {"value", "scorer"} <= set(values):
        return from_dict({key: values[key] for key in values if key in Metric.__dataclass_fields__})
    return {key: _read(value) for key, value in values.items()}
