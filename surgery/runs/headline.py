"""What a report on a gap between words begins with: a sentence, and the few numbers that decide."""

from collections.abc import Mapping
from typing import Any

from surgery.metrics.metric import ideal_of
from surgery.runs.report import Table
from surgery.runs.words_report import ROWS, find

Summary = Mapping[str, Any]
HEADLINE = (
    *(row for row in ROWS if row[0] in ("relative gap, all", "AFGB, all", "word mass, all", "UB-Score")),
    ("relative gap, unseen templates", ("distances", "unseen templates", "relative_gap")),
    *(row for row in ROWS if row[0] in ("wrong pronoun, gendered", "facts of gender, P(right)", "perplexity")),
)
IN_WORDS = {
    "word mass, all": "the words' mass",
    "facts of gender, P(right)": "facts of gender",
    "wrong pronoun, gendered": "the wrong pronoun after gendered nouns",
}


def in_short(summary: Summary, picture: str = "before_after") -> Table:
    """The few numbers that decide, each with its change and whether that is more than noise; a picture beside them."""
    pairs = summary.get("differences", {}).get("before", {})
    found = []
    for label, path in HEADLINE:
        before, after = find(summary["before"], path), find(summary["after"], path)
        if before and after:
            change = f"{after['value'] / before['value'] - 1:+.1%}" if before["value"] else ""
            verdict = pairs.get(".".join(path), {}).get("verdict", "not paired")
            values = [f"{v:.3f}" if abs(v) < 100 else f"{v:.1f}" for v in (before["value"], after["value"])]
            found.append([label, *values, ", ".join(filter(None, (change, verdict))), ideal_of(after)])
    note = "After: the checkpoint as saved, on test rows. Changes are paired. All numbers with intervals stand below."
    return Table("In short", ["number", "before", "after", "change", "ideal"], found, note, picture, first=True)


def lead(summary: Summary) -> str:
    """The page's first sentence: how far the bias went where training never saw it, and what of the rest moved."""
    before, after = (find(summary[when], ("genbias", "relative_gap", "all")) for when in ("before", "after"))
    if not (before and after and before["value"]):
        return ""
    pairs = summary.get("differences", {}).get("before", {})
    moved: dict[str, list[str]] = {"better": [], "worse": [], "within noise": []}
    for label, path in HEADLINE:
        told = pairs.get(".".join(path), {}).get("verdict")
        if told in moved and path[:1] != ("distances",) and path[-2:-1] not in (("relative_gap",), ("afgb",)):
            moved[told].append(IN_WORDS.get(label, label))
    change = after["value"] / before["value"] - 1
    lines = [
        f"The gap between {' and '.join(summary['words'])} {'fell' if change < 0 else 'rose'} by {abs(change):.0%}, "
        f"from {before['value']:.3f} to {after['value']:.3f}, on {after['n']} prompts of "
        f"{after['data'].removesuffix(', all')}."
    ]
    said = {"within noise": "Unchanged within noise", "better": "Better, too", "worse": "Worse"}
    lines += [f"{text}: {', '.join(moved[key])}." for key, text in said.items() if moved[key]]
    return " ".join(lines)
