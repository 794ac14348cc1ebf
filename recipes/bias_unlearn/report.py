"""The report of an unlearning run: what happened in sentences, tables with intervals, scores along the steps."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.plots import BLUE, GREEN, GREY, ORANGE, PINK, new_figure
from recipes.bias_unlearn.measuring import skipped_rows
from surgery.runs.caveats import caveats
from surgery.runs.report import Table, compared, write_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LARGEST_FALL = 1.5  # of LMS; the paper's largest is 1.42
SCORES = ("ss", "lms", "icat")


def write_report(
    notes: Sequence[str], before: dict[str, Any], folder: Path, summary: dict[str, Any], recipe: str
) -> None:
    """Write ``report.html`` and the picture; ``notes`` say what the data are, ``before`` also what was skipped."""
    steps = summary["edit"].get("evaluations")
    write_page(
        folder,
        summary,
        recipe,
        lines=[*summary["verdict"], *notes, *skipped_rows(before)],
        tables=tables(summary),
        figures={"steps": picture(steps, summary["edit"]["kept_step"])} if steps else {},
    )


def verdict(summary: Mapping[str, Any]) -> list[str]:
    """What happened, from the contents of ``run.json``, in a few plain sentences."""
    before, after = (summary[when]["stereoset"] for when in ("before", "after"))
    overall = {name: (before[name]["overall"]["value"], after[name]["overall"]["value"]) for name in SCORES}
    lines = [
        f"{summary['method']}, variant {summary['variant']}: {summary['edit']['objective']}.",
        "Overall on the test rows: "
        + ", ".join(f"{name.upper()} {was:.2f} to {now:.2f}" for name, (was, now) in overall.items())
        + f", mean |margin| {before['margin']['overall']['value']:.3f} to {after['margin']['overall']['value']:.3f}.",
    ]
    if "stopped" in summary["edit"]:
        lines.append(
            f"Training ended because {summary['edit']['stopped']}; the checkpoint of step "
            f"{summary['edit']['kept_step']} was kept."
        )
        applied = summary["applied"]
        lines.append(
            f"Everything under after was measured on the checkpoint as saved: {applied['rounding']} rounding, "
            f"{applied['changed']:,} of {applied['entries']:,} entries changed, {applied['lost']:,} lost to rounding."
        )
    lines += passes(summary["edit"])
    fall = overall["lms"][0] - overall["lms"][1]
    if fall > LARGEST_FALL:
        lines.append(f"Warning: the language modelling score fell by {fall:.2f}; the paper's largest fall is 1.42.")
    return [*lines, *caveats(summary["before"], summary["after"])]


def passes(edit: Mapping[str, Any]) -> list[str]:
    """The weights that the terms had, and how often the sentences of each set were seen."""
    lines = []
    if edit.get("weights"):
        lines.append(
            "Weights of the terms: " + ", ".join(f"{role} {w:.3g}" for role, w in edit["weights"].items()) + "."
        )
    for role, by_type in edit.get("passes", {}).items():
        shown = ", ".join(f"{kind} {count:.2f}" for kind, count in by_type.items())
        start = "Warning, not every sentence was seen: passes" if min(by_type.values()) < 1 else "Passes"
        lines.append(f"{start} through the sentences of {role}, all steps together: {shown}.")
    return lines


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Test and development set before and after, and the development set's scores while training."""
    controls = {name: each["after"] for name, each in summary["controls"].items()}
    found = [
        compared({"before": summary["before"], "after": summary["after"]} | controls, caption="Test"),
        compared(summary["dev"], caption="Development set (held-out terms of the training source)"),
    ]
    evaluations = summary["edit"].get("evaluations", [])
    if evaluations:
        kinds = list(evaluations[0]["ss"])
        rows = [
            [
                str(row["step"]),
                *(f"{row['ss'][kind]:.1f}" for kind in kinds),
                f"{row['lms']['overall']:.1f}",
                f"{row['icat']['overall']:.1f}",
                *([f"{row['perplexity']['overall']:.2f}"] if "perplexity" in row else []),
            ]
            for row in evaluations
        ]
        note = "On the rows of the development set that are scored while training; these numbers steer it."
        head = ["step", *kinds, "LMS overall", "ICAT overall"]
        head += ["perplexity, 40 shipped sentences"] if "perplexity" in evaluations[0] else []
        found.append(Table("Stereotype score while training", head, rows, note))
    return found


def picture(evaluations: Sequence[Mapping[str, Any]], kept: int) -> "Figure":
    """Stereotype score of each bias type, and LMS, along the steps; ``kept`` is the step of the kept checkpoint."""
    figure = new_figure(8, 3.2)
    axes = figure.subplots()
    steps = [row["step"] for row in evaluations]
    colours, marks = (BLUE, ORANGE, GREEN, PINK, GREY) * 3, "osD^v" * 3
    for kind, colour, mark in zip(sorted(evaluations[0]["ss"]), colours, marks, strict=False):
        axes.plot(steps, [row["ss"][kind] for row in evaluations], color=colour, marker=mark, label=kind)
    axes.plot(steps, [row["lms"]["overall"] for row in evaluations], color="black", linestyle=":", label="LMS")
    axes.axhline(50, color="black", linewidth=0.8)
    axes.axvline(kept, color=GREY, linestyle="--", linewidth=0.8)
    axes.set_xlabel("step (dashed: the kept checkpoint)")
    axes.set_ylabel("SS, LMS (%)")
    axes.legend(ncols=3, fontsize="small")
    return figure
