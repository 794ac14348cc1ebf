"""The spillover ledger of a run: what else its edit moved, on every axis in a quick form, what got worse first."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from statistics import median

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.delta import Delta
from surgery.files.atomic import write_json, write_text
from surgery.metrics.judges import Judges
from surgery.metrics.metric import Difference, Metric, difference, flat, points
from surgery.progress import Progress
from surgery.runs.report import Table, page

POINT = 1.0
NAMED = 6


def spillover(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Path, judges: Judges, *, progress: Progress
) -> list[str]:
    """Measure ``model`` without and with the delta of a finished ``run`` on the same rows; what came out, in words.

    Writes ``ledger.json`` and ``ledger.html`` into the run's folder. The model is as before afterwards. Raises
    ``SurgeryError`` for a model that a judge cannot measure.
    """
    before = flat(judges.judge(model, tokenizer, progress=progress))
    with Delta.load(run / "delta.safetensors").applied(model, as_stored=True):
        after = flat(judges.judge(model, tokenizer, progress=progress))
    shared = [place for place in after if place in before]
    pairs = {place: difference(before[place], after[place], axes=len(shared)) for place in shared}
    found = {place: pair for place, pair in pairs.items() if pair is not None}
    lines = said(found, after)
    write_json(
        run / "ledger.json",
        {
            "verdict": lines,
            "before": {place: metric.to_dict() for place, metric in before.items()},
            "after": {place: metric.to_dict() for place, metric in after.items()},
            "differences": {place: asdict(pair) for place, pair in found.items()},
        },
    )
    text, _ = page(title="What else the edit moved", lines=lines, tables=[_table(found, before, after)], figures={})
    write_text(run / "ledger.html", text)
    return lines


def said(found: Mapping[str, Difference], after: Mapping[str, Metric]) -> list[str]:
    """How many numbers got worse, and which by more than a point (``surgery.metrics.metric.points``), largest first."""
    worse = [place for place, pair in found.items() if pair.verdict == "worse"]
    better = sum(pair.verdict == "better" for pair in found.values())
    far = {place: points(after[place].to_dict(), found[place].value) for place in worse}
    far = {place: far[place] for place in sorted(far, key=lambda place: -abs(far[place])) if abs(far[place]) > POINT}
    named = ", ".join(f"{_plain(place)} ({value:+.1f})" for place, value in list(far.items())[:NAMED])
    more = f" and {len(far) - NAMED} others" if len(far) > NAMED else ""
    widths = [_width(after[place], pair) for place, pair in found.items()]
    known = f", half of them known to within {median(widths):.1f} points" if widths else ""
    return [
        f"Ledger: of {len(found)} numbers on every axis, paired and corrected for their count{known}, {len(worse)} "
        f"worse, {better} better.",
        *([f"Warning: worse by more than a point: {named}{more}."] if far else []),
    ]


def _width(after: Metric, pair: Difference) -> float:
    """Half the width of a difference's interval in points of what the number was."""
    half = (pair.high - pair.low) / 2
    return abs(points(after.to_dict() | {"value": after.value - pair.value + half}, half))


def _table(found: Mapping[str, Difference], before: Mapping[str, Metric], after: Mapping[str, Metric]) -> Table:
    order = {"worse": 0, "better": 1, "within noise": 2}
    far = {place: abs(points(after[place].to_dict(), pair.value)) for place, pair in found.items()}
    places = sorted(found, key=lambda place: (order[found[place].verdict], -far[place]))
    rows = [
        [
            _plain(place), found[place].verdict, f"{before[place].value:.4f}", f"{after[place].value:.4f}",
            f"{found[place].value:+.4f} [{found[place].low:+.4f}, {found[place].high:+.4f}]", f"{found[place].n}",
        ]
        for place in places
    ]  # fmt: skip
    hints = [f"{found[place].scorer}, on {found[place].data}" for place in places]
    head = ["number", "verdict", "without", "with", "difference", "rows"]
    note = f"Paired over the same rows; intervals widened so that all {len(found)} hold together at 95 %."
    return Table("Every axis, what got worse first, the most first", head, rows, note, hints=hints)


def _plain(place: str) -> str:
    return place.replace("_", " ").replace(".", " ")
