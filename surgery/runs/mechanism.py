"""Sentences on whether a method did what it says: how far its objective moved, and what its own part did."""

from collections.abc import Iterator, Mapping
from typing import Any

from surgery.moved import Moved, Term

LITTLE = 0.02  # of the objective's value before
LOUD = 20.0  # times the gradient of another term


def said(summary: Mapping[str, Any]) -> list[str]:
    """What every run says of its edit, from ``run.json``; what went too little, or has no say, as warnings."""
    return [*objective(summary["edit"].get("moved")), *own_part(summary)]


def own_part(summary: Mapping[str, Any]) -> Iterator[str]:
    """What the numbers are with the method's own part switched off (``Summary.own_part``)."""
    own = summary.get("own_part")
    if not own or own["without"] not in summary["controls"]:
        return
    without = summary["controls"][own["without"]]["after"]
    pairs = summary.get("differences", {}).get(own["without"], {})
    told = []
    for path in own["metrics"]:
        on, off = (_at(scores, path) for scores in (summary["after"], without))
        if on is None or off is None:
            continue
        pair = pairs.get(path)
        apart = f" [{pair['low']:+.3g}, {pair['high']:+.3g}], {pair['verdict']}" if pair else ", not paired"
        label = path.replace(".", " ").replace("_", " ")
        told.append(
            f"{label} {on['value']:.4g} with it, {off['value']:.4g} without ({on['value'] - off['value']:+.3g}{apart})"
        )
    if told:
        yield f"What {own['part']} does itself (control {own['without']}): {'; '.join(told)}."


def _at(scores: Any, path: str) -> Any:
    for key in path.split("."):
        scores = scores.get(key) if isinstance(scores, Mapping) else None
    return scores if isinstance(scores, Mapping) and "value" in scores else None


def objective(found: Mapping[str, Any] | None) -> Iterator[str]:
    """How far the objective moved, of ``Moved.to_dict()``, and its terms."""
    if not found:
        return
    whole = Moved.from_dict(found)
    bounds = "" if whole.low is None else f" [{whole.low:+.4g}, {whole.high:+.4g}]"
    how = (
        f"{whole.before:.4g} to {whole.after:.4g} on {whole.examples} examples that it was trained on, the same before "
        f"and after (difference {whole.after - whole.before:+.4g}{bounds})"
    )
    if abs(whole.share) < LITTLE:
        yield (
            f"Warning: the objective moved by {abs(whole.share):.1%} only: {how}. What is measured is hardly an effect "
            "of this objective; take more steps (epochs) or a higher rate (lr)."
        )
    elif whole.low is None or whole.high is None or whole.low <= 0 <= whole.high:
        moved = "fell" if whole.share > 0 else "rose"
        yield f"The objective {moved} by {abs(whole.share):.0%}: {how}, which so few examples do not tell from none."
    elif whole.share < 0:
        yield f"Warning: the objective rose by {-whole.share:.0%}: {how}. Lower lr."
    else:
        yield f"The objective fell by {whole.share:.0%}: {how}."
    if len(whole.terms) > 1:
        yield from _terms_said(whole.terms)


def _terms_said(terms: Mapping[str, Term]) -> Iterator[str]:
    for moment in ("before", "after"):
        norms = {name: getattr(term, f"gradient_{moment}") for name, term in terms.items()}
        parts = [f"{name} {getattr(term, moment):.4g} (gradient {norms[name]:.3g})" for name, term in terms.items()]
        yield f"Weighted terms {moment} training: {', '.join(parts)}."
    loudest = max(terms, key=lambda name: terms[name].gradient_after)
    top = terms[loudest]
    for name, term in terms.items():
        if not any((term.before, term.after, term.gradient_before, term.gradient_after)):
            yield f"None of the examples asked belongs to {name}: its say is not known."
            continue
        # At the start a term that holds what the untouched model does has no gradient yet; so the end is asked, too.
        faint = [top.gradient_after > LOUD * term.gradient_after, top.gradient_before > LOUD * term.gradient_before]
        if name != loudest and all(faint):
            yield (
                f"Warning: the gradient of {loudest} is {_times(top.gradient_before, term.gradient_before)} that of "
                f"{name} before training and {_times(top.gradient_after, term.gradient_after)} after it: {name} had "
                "hardly a say; raise its weight, or sum both over the same unit."
            )


def _times(one: float, other: float) -> str:
    return f"{one / other:.0f} times" if other else "all, none being"
