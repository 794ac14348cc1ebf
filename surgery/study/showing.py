"""What a model does before and after, to be seen: texts side by side, the prompts that changed most, bars by group."""

from collections.abc import Mapping
from typing import Any

from surgery.runs.report import Bar, Table
from surgery.study.agreement import lean_of_prompts

TEXTS, PROMPTS = 12, 15


def shown(before: Mapping[str, Any], after: Mapping[str, Any], model: str, name: str) -> list[Table]:
    """The three tables of a method beside the untouched model; those whose details were not measured are left out."""
    found = [
        _bars(before, after, model, name),
        _prompts(before, after, model, name),
        _texts(before, after, model, name),
    ]
    return [table for table in found if table is not None]


def _bars(before: Mapping[str, Any], after: Mapping[str, Any], model: str, name: str) -> Table | None:
    was, now = lean_of_prompts(before), lean_of_prompts(after)
    both = [key for key in was if key in now]
    if not both:
        return None
    first, second = before["words"]
    order = sorted(both, key=lambda key: -abs(was[key]))
    rows: list[list[str | Bar]] = [[key, Bar(was[key]), Bar(now[key])] for key in order]
    note = (
        f"Mean over a profession's test prompts of (P({first}) - P({second})) / (P({first}) + P({second})): right "
        f"{first}, left {second}. {len(rows)} professions that the edit did not see; most biased before first."
    )
    return Table(f"By profession: {name} on {model}", ["profession", "untouched", name], rows, note, folded=True)


def _prompts(before: Mapping[str, Any], after: Mapping[str, Any], model: str, name: str) -> Table | None:
    if "prompts" not in before or before.get("words") != after.get("words"):
        return None
    words = before["words"]
    pairs = zip(before["prompts"], after.get("prompts", ()), strict=False)
    moved = sorted(pairs, key=lambda pair: -sum(abs(a - b) for a, b in zip(pair[0][2:], pair[1][2:], strict=True)))
    if not moved:
        return None
    rows = [
        [one[0], *(f"{100 * value:.1f} %" for value in one[2:]), *(f"{100 * value:.1f} %" for value in two[2:])]
        for one, two in moved[:PROMPTS]
    ]
    head = ["prompt", *(f"P({word}) untouched" for word in words), *(f"P({word}) {name}" for word in words)]
    note = f"The {len(rows)} of {len(moved)} test prompts whose probabilities moved most."
    return Table(f"Most changed prompts: {name} on {model}", head, rows, note, folded=True)


def _texts(before: Mapping[str, Any], after: Mapping[str, Any], model: str, name: str) -> Table | None:
    old, new = before.get("texts", []), after.get("texts", [])
    if not old or len(old) != len(new):
        return None
    # Those in which somebody becomes another come first, then those of every kind in turn.
    order = sorted(range(len(old)), key=lambda n: (old[n][4] == new[n][4], n))[:TEXTS]
    rows = [[old[n][2], _clean(old[n][3]), _clean(new[n][3])] for n in order]
    changed = sum(one[4] != two[4] for one, two in zip(old, new, strict=True))
    note = (
        f"Sampled with the same random numbers. In {changed} of {len(old)} texts the person is another one (he, she, "
        f"not said); {len(rows)} are shown, those first."
    )
    head = ["start", "untouched", name]
    return Table(f"What it writes: {name} on {model}", head, rows, note, folded=True, texts=True)


def _clean(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"
