"""The edit of a run beside what stands next to it, number by number, as paired differences over the same rows."""

from collections.abc import Iterator, Mapping
from typing import Any

from surgery.metrics.metric import Metric, difference, flat, from_dict

FEW, FEW_GROUPS = 30, 10
"""Fewer rows than this, or groups of rows, are said to be few."""
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


def told(summary: Mapping[str, Any]) -> list[str]:
    """How many numbers got better, worse, or moved within noise against the model before; and which rows are few."""
    pairs = summary.get("differences", {}).get("before", {})
    by: dict[str, list[str]] = {}
    for path, pair in pairs.items():
        by.setdefault(pair["verdict"], []).append(path.replace(".", " ").replace("_", " "))
    lines = []
    if pairs:
        worse = by.get("worse", [])
        named = f" ({', '.join(worse[:6])}{' and others' if len(worse) > 6 else ''})" if worse else ""
        lines.append(
            f"Of {len(pairs)} numbers, paired over the same rows with the model before: {len(by.get('better', []))} "
            f"better, {len(worse)} worse{named}, {len(by.get('within noise', []))} within noise."
        )
    few = [
        f"{path} on {one['n']}" + (f" of {one['groups']} groups" if one.get("groups") else "")
        for path, one in _whole(summary.get("after", {}))
        if one["n"] < FEW or (one.get("groups") or FEW_GROUPS) < FEW_GROUPS
    ]
    if few:
        names = ", ".join(few[:4])
        lines.append(
            f"Warning: few rows: {names}{' and others' if len(few) > 4 else ''}. Intervals over so few are wide and "
            "too narrow at once; do not read small changes."
        )
    return lines


def _whole(scores: Any, path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Metrics over all rows of their kind, not those of a part such as a scale or a set."""
    for key, value in scores.items() if isinstance(scores, Mapping) else ():
        name = f"{path} {key}".strip().replace("_", " ")
        if isinstance(value, Mapping) and {"value", "scorer"} <= set(value):
            if not path.count(" ") or key in ("all", "overall"):
                yield name, value
        else:
            yield from _whole(value, name)
