"""The report of an equalising: what happened in words, and one table for the edit and what stands beside it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.runs import examples
from surgery.runs.caveats import caveats
from surgery.runs.headline import in_short, lead
from surgery.runs.report import compared, write_page
from surgery.runs.words_report import COMMANDS, before_after, controls, find

Summary = Mapping[str, Any]
SINGLE = {
    "UB-Score": ("genhint", "ub"),
    "UB-Score, templates unseen, too": ("distances", "unseen hints", "ub"),
    "Perplexity": ("perplexity",),
}
"""Numbers that the page says in a sentence of their own."""


def write_report(folder: Path, summary: Summary, recipe: str) -> None:
    """``report.html`` and ``plots/*.png`` of one run."""
    columns = {"before": summary["before"], "after, as saved": summary["after"]}
    columns |= {name: each["after"] for name, each in summary["controls"].items()}
    figures = {"before_after": before_after(summary)}
    if summary["controls"]:
        figures["controls"] = controls(summary)
    write_page(
        folder,
        summary,
        recipe,
        lines=summary["verdict"],
        tables=[in_short(summary), compared(columns, ideal=False), *examples.tables(summary)],
        figures=figures,
        commands=COMMANDS,
        lead=lead(summary),
    )


def verdict(summary: Summary) -> list[str]:
    """What happened, in sentences; those that begin with a warning are marked on the page."""
    words = " and ".join(summary["words"])
    edit, applied = summary["edit"], summary["applied"]
    lines = [
        f"{edit['parameters']:,} numbers of blocks {edit['blocks']} were trained in {edit['steps']} steps on "
        + ", ".join(f"{count:,} {name}" for name, count in edit["terms"].items())
        + f"; {applied['changed']:,} of {applied['entries']:,} entries changed in the saved checkpoint."
    ]
    lines += _of(summary, f"gap between {words}", ("genbias",), ("all",), "professions unseen")
    kinds = summary["before"].get("distances", {})
    for kind in sorted(kinds, key=lambda kind: (not kind.startswith("unseen"), kind)):  # of a resumed run, too
        lines += _of(summary, f"gap between {words}", ("distances", kind), (), f"{kind}, professions unseen")
    for name, path in SINGLE.items():
        before, after = find(summary["before"], path), find(summary["after"], path)
        if before and after:
            lines.append(f"{name}: {before['value']:.3f} to {after['value']:.3f}.")
    lines += caveats(summary["before"], summary["after"])
    for name, each in summary["controls"].items():
        now, was = (find(scores, ("genbias", "mass", "all")) for scores in (each["after"], summary["before"]))
        gap = find(each["after"], ("genbias", "relative_gap", "all"))
        if now and was and gap:
            lines.append(
                f"Beside it, {name}: relative gap {gap['value']:.3f}, mass {was['value']:.3f} to {now['value']:.3f}."
            )
    return lines


def _of(summary: Summary, what: str, path: tuple[str, ...], end: tuple[str, ...], where: str) -> list[str]:
    """One line on the gap, AFGB and mass of one set of prompts; a warning where the mass moved by a twentieth."""
    values = []
    for name in ("relative_gap", "afgb", "mass"):
        both = [find(summary[when], (*path, name, *end)) for when in ("before", "after")]
        if not (both[0] and both[1]):
            return []
        values.append((both[0]["value"], both[1]["value"]))
    (gap, gap_after), (afgb, afgb_after), (mass, mass_after) = values
    change = [f"{after / before - 1:+.0%}" if before else "" for before, after in values]
    warning = "Warning, the mass moved: " if abs(mass_after - mass) > 0.05 * mass else ""
    return [
        f"{warning}{where}: relative {what} {gap:.3f} to {gap_after:.3f} ({change[0]}), AFGB {afgb:.3f} to "
        f"{afgb_after:.3f} ({change[1]}), mass {mass:.3f} to {mass_after:.3f} ({change[2]})."
    ]
