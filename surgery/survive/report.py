"""What survived, as plain values, as a table, as a picture and in one sentence."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from hooks.drawing import BLUE, GREY, ORANGE, new_figure
from surgery.runs.report import Table, cell
from surgery.survive.carry_out import Survival

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ENOUGH = 0.9


def to_dict(found: Survival) -> dict[str, Any]:
    """Plain JSON values."""
    return {
        "measured": found.kind,
        "share": "of the relative reduction" if found.relative else "of the difference",
        "untouched": found.untouched.to_dict(),
        "edited": found.edited.to_dict(),
        "treatments": [
            {
                "group": row.group,
                "name": row.name,
                "untouched": row.untouched.to_dict(),
                "edited": row.edited.to_dict(),
                "kept": asdict(row.kept),
            }
            for row in found.rows
        ],
        "verdict": verdict(found),
        "notes": list(found.notes),
    }


def verdict(found: Survival) -> str:
    """One line: how many treatments leave at least nine tenths of the effect, and the one that leaves least."""
    kept = [row for row in found.rows if row.kept.value >= ENOUGH]
    weakest = found.weakest
    return (
        f"{len(kept)} of {len(found.rows)} treatments leave at least {ENOUGH:.0%} of the effect; "
        f"least is left by {weakest.name}: {weakest.kept}"
    )


def table(found: Survival) -> Table:
    """A row for each treatment; the first is the edit as it is applied."""
    rows = [["as applied", cell(found.untouched.to_dict()), cell(found.edited.to_dict()), ""]]
    rows += [[row.name, cell(row.untouched.to_dict()), cell(row.edited.to_dict()), str(row.kept)] for row in found.rows]
    one = found.untouched
    how = (
        "(1 - edited / untouched) after the treatment, divided by the same as applied"
        if found.relative
        else "(untouched - edited) after the treatment, divided by the same as applied"
    )
    return Table(
        "What is left",
        ["treatment", "untouched model", "edited model", "effect left"],
        rows,
        f"{one.scorer}, on {one.data}, n {one.n}, ideal {one.ideal:g}. Both models had the same treatment. Effect "
        f"left: {how}. Brackets are 95 % intervals, paired over groups.",
    )


def lines(found: Survival) -> list[str]:
    """The table for a terminal."""
    given = table(found)
    rows = [[str(text) for text in row] for row in [given.head, *given.rows]]
    widths = [max(len(row[n]) for row in rows) for n in range(len(given.head))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def picture(found: Survival) -> "Figure":
    """A dot with its interval for each treatment; dashed: all of the effect; dotted: nine tenths."""
    figure = new_figure(7.0, 0.6 + 0.34 * len(found.rows))
    axes = figure.subplots()
    for place, row in enumerate(found.rows):
        kept = row.kept
        if kept.low is not None and kept.high is not None:
            axes.plot([100 * kept.low, 100 * kept.high], [place, place], color=BLUE, lw=1.5)
        axes.plot(100 * kept.value, place, "o", color=BLUE if kept.value >= ENOUGH else ORANGE, ms=5)
    axes.set_yticks(range(len(found.rows)), [row.name for row in found.rows], fontsize=8)
    axes.invert_yaxis()
    axes.axvline(100, color=GREY, ls="--", lw=1)
    axes.axvline(100 * ENOUGH, color=GREY, ls=":", lw=1)
    axes.axvline(0, color=GREY, lw=0.7)
    axes.set_xlabel("effect left, % (95 % interval)")
    axes.spines[["top", "right"]].set_visible(False)
    figure.set_label(f"Effect left after {len(found.rows)} treatments. {verdict(found)}")
    return figure
