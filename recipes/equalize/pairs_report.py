"""The report of equalising pairs: SS beside margin and LMS by bias type, the doses, what it cost, and what it hides."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.runs.caveats import caveats
from surgery.runs.report import Table, compared, write_page
from surgery.runs.words_report import COMMANDS, find

Summary = Mapping[str, Any]
SUITES = {"pairs": "Pairs kept back", "stereoset": "StereoSet", "crows_pairs": "CrowS-Pairs"}
SCORES = (
    ("ss", "SS (ideal 50)"),
    ("metric", "score (ideal 50)"),
    ("lms", "LMS"),
    ("icat", "ICAT"),
    ("margin", "mean |margin| (nats a token)"),
)
COSTLY = 0.1  # rise of perplexity


def write_report(folder: Path, summary: Summary, recipe: str) -> None:
    """``report.html`` of one run."""
    columns = {"before": summary["before"], "after, as saved": summary["after"]}
    columns |= {name: each["after"] for name, each in summary["controls"].items()}
    write_page(
        folder,
        summary,
        recipe,
        lines=summary["verdict"],
        tables=[
            *by_type(summary),
            dose_table(summary),
            *scale_table(summary),
            compared(columns, caption="All that was measured"),
        ],
        figures={},
        commands=COMMANDS,
    )


def suites_of(summary: Summary) -> Iterator[tuple[str, str, str]]:
    """(key in the scores, name for people, scorer) of every set of pairs that was measured."""
    first = summary["scorers"][0]
    for name in summary["before"]:
        suite, _, scorer = name.partition(", ")
        if suite in SUITES:
            yield name, SUITES[suite], scorer or first


def by_type(summary: Summary) -> list[Table]:
    """For each set of pairs and scorer a row for each bias type, before and after side by side."""
    found = []
    for name, label, scorer in suites_of(summary):
        before, after = summary["before"][name], summary["after"][name]
        kinds = [(score, words) for score, words in SCORES if score in before]
        rows = []
        for kind in before["margin"]:
            cells = (f"{each[score][kind]['value']:.3f}" for score, _ in kinds for each in (before, after))
            rows.append([kind, *cells, f"{after['margin'][kind]['n']}"])
        head = ["bias type", *(f"{words}, {when}" for _, words in kinds for when in ("before", "after")), "rows"]
        note = "A score of 50 with the margin as large as before is a preference turned round in part, not gone."
        found.append(Table(f"{label}, scorer {scorer}", head, rows, note))
    return found


def dose_table(summary: Summary) -> Table:
    """Each bias type's dose, its interval, and the SS of groups left out at each dose of the grid."""
    rows = []
    for kind, each in summary["doses"].items():
        curve = ", ".join(f"{dose}: {score:.1f}" for dose, score in each.get("curve", {}).items())
        chosen = f"[{each['low']:.3f}, {each['high']:.3f}]" if curve else "given"
        rows.append([kind, _said(each["dose"]), chosen, str(each.get("groups", "")), curve])
    head = ["bias type", "dose", "95 % interval", "groups", "SS of unseen groups by dose"]
    note = "The interval is over groups drawn anew; the scores are means over groups and scorers."
    return Table("Doses (nats a token)", head, rows, note)


def scale_table(summary: Summary) -> list[Table]:
    """What each scale does to groups left out, with the doses that it needs."""
    rows = []
    last = next((row for row in reversed(summary["scales"]) if row["scale"] == summary["scale"]), None)
    for each in summary["scales"]:
        doses = ", ".join(f"{kind} {_said(dose)}" for kind, dose in each["doses"].items())
        cells = [f"{each['margin_gone']:.1%}", f"{each['perplexity']:+.1%}", "yes" if each["reached"] else "no", doses]
        name = f"{each['scale']:g}{', each type at its own dose' if each['own'] else ''}"
        rows.append([name + " (taken)" * (each is last), *cells])
    head = ["scale", "mean |margin| gone", "perplexity, sentences with pronouns", "SS comes to 50", "doses"]
    note = "Of trainings that never saw the groups on which margins are measured, without an interval."
    return [Table("Scales of what is learnt", head, rows, note)] if rows else []


def verdict(summary: Summary) -> list[str]:
    """What happened, in sentences; those that begin with a warning are marked on the page."""
    edit, applied, before, after = (summary[name] for name in ("edit", "applied", "before", "after"))
    lines = [
        f"{edit['parameters']:,} numbers of blocks {edit['blocks']} were trained in {edit['steps']} steps on "
        + ", ".join(f"{count:,} {name}" for name, count in edit["terms"].items())
        + f"; {applied['changed']:,} of {applied['entries']:,} entries changed in the saved checkpoint."
    ]
    for name, label, scorer in suites_of(summary):
        parts = []
        for score, words in SCORES:
            both = [find(scores, (name, score, "overall")) for scores in (before, after)]
            if both[0] and both[1]:
                parts.append(f"{words} {both[0]['value']:.3f} to {both[1]['value']:.3f}")
        lines.append(f"{label}, scorer {scorer}, overall: {', '.join(parts)}.")
        if skipped := after[name].get("skipped"):
            lines.append(f"{label}, scorer {scorer}: {len(skipped)} rows skipped, not scored: {skipped[0]}.")
    lines += [_dose(kind, each) for kind, each in summary["doses"].items()]
    taken = next((row for row in reversed(summary["scales"]) if row["scale"] == summary["scale"]), None)
    if taken and taken["margin_gone"] < summary["margin_gone"]:
        lines.append(
            f"Warning: of the mean |margin| of groups left out {taken['margin_gone']:.0%} goes at scale "
            f"{taken['scale']:g}, the best that was tried, wanted: {summary['margin_gone']:.0%}; train longer, or "
            "widen scales."
        )
    elif summary["scale"] != 1:
        lines.append(f"What was learnt is multiplied by {summary['scale']:g}.")
    for name, words in (("perplexity", "neutral text"), ("perplexity_pronouns", "text full of pronouns")):
        if was := find(before, (name,)):
            change = after[name]["value"] / was["value"] - 1
            start = "Warning, the model got worse at text: perplexity" if change > COSTLY else "Perplexity"
            lines.append(f"{start} on {words}: {was['value']:.2f} to {after[name]['value']:.2f} ({change:+.1%}).")
    return [*lines, *_hidden(summary), *(note for note in summary["rows"]["notes"])]


def _said(dose: Any) -> str:
    """``dose``, or with a start token/without one."""
    return f"{dose:.3g}" if isinstance(dose, int | float) else "/".join(f"{each:.3g}" for each in dose)


def _dose(kind: str, each: Mapping[str, Any]) -> str:
    if "curve" not in each:
        return f"Dose of {kind}: {_said(each['dose'])}, as given."
    said = f"{kind}: {each['dose']:.3f} [{each['low']:.3f}, {each['high']:.3f}], chosen on {each['groups']} groups"
    if each["reached"]:
        return f"Dose of {said} by cross-validation."
    return (
        f"Warning: dose of {said}, is an end of the grid: on groups left out SS comes to 50 nowhere between the doses "
        "that were tried; widen doses."
    )


def _hidden(summary: Summary) -> Sequence[str]:
    """The caveats of the first scorer's results and of everything else, then those of each further scorer."""
    found = caveats(summary["before"], summary["after"])
    for scorer in summary["scorers"][1:]:
        end = f", {scorer}"
        own = (
            {key.removesuffix(end): s[key] for key in s if key.endswith(end)}
            for s in (summary["before"], summary["after"])
        )
        found += [f"{line.removesuffix('.')} (scorer {scorer})." for line in caveats(*own)]
    return found
