"""What a tuning says: each setting that was tried, what it leaves of the bias and costs, and the recipe that won."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.plots import BLUE, GREY, ORANGE, new_figure
from surgery.files.atomic import write_json
from surgery.runs.caveats import caveats
from surgery.runs.compare import Case, pareto
from surgery.runs.headline import in_short
from surgery.runs.recipe_files import dump
from surgery.runs.report import Table, cell, edited, page, save
from surgery.runs.settings import Settings
from surgery.runs.words_report import find

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BIAS = (
    ("gap", ("genbias", "relative_gap", "all")),
    ("AFGB", ("genbias", "afgb", "all")),
    ("gap, unseen templates", ("distances", "unseen templates", "relative_gap")),
    ("AFGB, unseen templates", ("distances", "unseen templates", "afgb")),
)
"""The bias: what is left of these, on average."""
COST = (
    ("mass", ("genbias", "mass", "all")),
    ("UB-Score", ("genhint", "ub")),
    ("perplexity", ("perplexity",)),
    ("wrong pronoun of gendered nouns", ("locality", "gendered", "wrong")),
    ("facts of gender", ("facts_of_gender", "right", "all")),
)
TOLERANCE = 0.01
"""Of the perplexity on the report's own texts; a larger rise is an objection."""
OBJECTION = 0.05
"""What an objection weighs beside the share of the bias that is left."""
FINAL = "final"
EDGE: Any = {"edgecolor": "white", "height": 0.7}
SHOWN = 0.2
"""A larger rise of the perplexity stands in the table, and not in the picture, which would show nothing else."""


@dataclass(frozen=True)
class Tried:
    """One setting: its name in words, its round, what it changes of the recipe, its edit, and both measurements.

    ``pairs`` are the paired differences between these (``surgery.runs.paired``), by the metric's path.
    """

    name: str
    round: str
    changes: Mapping[str, Any]
    edit: Mapping[str, Any]
    before: Mapping[str, Any]
    after: Mapping[str, Any]
    pairs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """The share of the bias that is left, mean over those of ``BIAS`` that were measured: 0 is none."""
        pairs = [(find(self.before, path), find(self.after, path)) for _, path in BIAS]
        shares = [now["value"] / was["value"] for was, now in pairs if was and now and was["value"]]
        return sum(shares) / len(shares) if shares else math.nan

    @property
    def perplexity(self) -> float:
        """The change of the perplexity as a share of what it was."""
        was, now = find(self.before, ("perplexity",)), find(self.after, ("perplexity",))
        return now["value"] / was["value"] - 1 if was and now else 0.0

    @property
    def objections(self) -> list[str]:
        """What the report of a run would warn of, and a perplexity that rose by more than ``TOLERANCE``."""
        found = [line.removeprefix("Warning: ") for line in caveats(self.before, self.after)]
        if self.perplexity > TOLERANCE:
            found.append(f"perplexity on neutral text rose by {self.perplexity:.1%}.")
        return [line[0].upper() + line[1:] for line in found]

    @property
    def dearer(self) -> float:
        """By how much the perplexity rose beyond ``TOLERANCE``, in multiples of it; not a number where it is none."""
        return 0.0 if self.perplexity <= TOLERANCE else self.perplexity / TOLERANCE - 1

    @property
    def price(self) -> float:
        """What is left of the bias, and ``OBJECTION`` for each objection and for each further percent of perplexity.

        The smallest wins; what cannot be compared never does.
        """
        return _priced(self.left, len(self.objections) + self.dearer)

    @property
    def screened(self) -> float:
        """The same of the perplexity alone, which is all that few steps can tell of the cost."""
        return _priced(self.left, (self.perplexity > TOLERANCE) + self.dearer)

    @property
    def said(self) -> str:
        """What is left and what it costs, in a line."""
        count = len(self.objections)
        objections = f"{count} objection{'s' * (count != 1)}"
        return f"{self.left:.0%} of the bias left, perplexity {self.perplexity:+.1%}, {objections}"


@dataclass(frozen=True)
class Tuned:
    """A finished tuning: its folder, the winning recipe in it, and what is to be said."""

    folder: Path
    recipe: Path
    lines: Sequence[str]


def _priced(left: float, against: float) -> float:
    found = left + OBJECTION * against
    return found if math.isfinite(found) else math.inf


def better(tried: Sequence[Tried]) -> list[Tried]:
    """Those of the last round first, then by price."""
    return sorted(tried, key=lambda one: (one.round != FINAL, one.price))


def finish(
    part: Path, out: Path, recipe: str, settings: Settings, tried: Sequence[Tried], ranking: Mapping[str, Any]
) -> Tuned:
    """Write ``tuned.toml``, ``tune.json`` and ``report.html`` into ``part``, which is to be called ``out``."""
    best = better(tried)[0]
    lines = _why(tried, best)
    reason = f"chosen by surgery tune from {len({one.name for one in tried})} settings: {best.said}, development parts"
    chosen = type(settings).model_validate(settings.model_dump() | dict(best.changes) | {"reason": reason})
    head = [f"Chosen by surgery tune on {settings.model}, {date.today()}, from {len(tried)} trainings:", *lines]
    text = "".join(f"# {line}\n" for line in head) + dump(recipe, chosen)
    (part / "tuned.toml").write_text(text, "utf-8")
    about = ("left", "perplexity", "objections", "price")
    rows = [asdict(one) | {key: getattr(one, key) for key in about} for one in tried]
    write_json(part / "tune.json", {"model": settings.model, "ranking": dict(ranking), "why": lines, "tried": rows})
    figures = {"tried": _bars(tried, best), **_pictures(tried)}
    command = f"surgery run {out / 'tuned.toml'} --out runs/tuned"
    short = in_short({"before": best.before, "after": best.after, "differences": {"before": best.pairs}}, "tried")
    note = "After: what is proposed, in memory, on development rows. Changes are paired. No test part was looked at."
    html, pictures = page(
        title=f"What to run on {settings.model}",
        lead=lines[0],
        lines=[*lines[1:], f"Next: {command}"],
        tables=[replace(short, note=note), _table(tried, best, "pareto" if "pareto" in figures else "")],
        figures=figures,
        recipe=text,
        commands=[command],
    )
    save(part / "report.html", html, pictures)
    return Tuned(out, out / "tuned.toml", [*lines, f"next: {command}"])


def _why(tried: Sequence[Tried], best: Tried) -> list[str]:
    """The reason in sentences, the same in the recipe, on the page and in the terminal."""
    finals: dict[str, Tried] = {}  # each training at its best scale
    for one in better(tried):
        if one.round == FINAL:
            finals.setdefault(str({key: value for key, value in one.changes.items() if key != "scales"}), one)
    lines = [f"Chosen: {best.name} ({edited(best.edit)}): {best.said}, on development parts."]
    objections = best.objections
    lines.append(f"Objections: {' '.join(objections)}" if objections else "No objection: no warning of the report.")
    for one in list(finals.values())[1:]:
        lines.append(f"Not {one.name} ({edited(one.edit)}): {one.said}.")
    bias = "; ".join(name for name, path in BIAS if find(best.after, path))
    lines.append(
        f"Least wins: the share of the bias left (mean of {bias}), and {OBJECTION:g} for each objection and each "
        "further percent of perplexity. One seed; intervals of single numbers are on the page."
    )
    return lines


def _table(tried: Sequence[Tried], best: Tried, picture: str) -> Table:
    places = [*BIAS, *COST]
    head = ["number", "setting", "round", "edited", "bias left", "objections", *(name for name, _ in places)]
    rows = [
        ["", "untouched", name, "", "", "", *(cell(find(before, path)) for _, path in places)]
        for name, before in {one.round: one.before for one in tried}.items()
    ]
    for number, one in enumerate(tried, 1):
        name = f"{one.name} (chosen)" if one is best else one.name
        told = [str(number), name, one.round, edited(one.edit), f"{one.left:.0%}", str(len(one.objections))]
        rows.append([*told, *(cell(find(one.after, path)) for _, path in places)])
    metrics = [(name, find(best.after, path)) for name, path in places]
    said = "; ".join(f"{name}: {one['scorer']}, on {one['data']}, n {one['n']}" for name, one in metrics if one)
    note = (
        f"{said}. Brackets are 95 % bootstrap intervals. Numbers of different rounds are of different rows: compare "
        "within a round. No test part was looked at."
    )
    return Table("What was tried", head, rows, note, picture)


def _bars(tried: Sequence[Tried], best: Tried) -> "Figure":
    """What each setting leaves of the bias, and behind it what its objections weigh; the best on top."""
    rows = better(tried)
    figure = new_figure(4.6, 0.9 + 0.25 * len(rows))
    figure.set_label("For each setting the share of the bias that is left and the weight of what speaks against it")
    figure.set_layout_engine("constrained", w_pad=0.12)
    axes = figure.subplots()
    end = min(1.0, 3 * rows[0].price + 0.1)
    for place, one in enumerate(rows):
        left, price = min(one.left, end), min(one.price, end)
        axes.barh(place, left, color=BLUE if one.round == FINAL else GREY, hatch="" if one is best else "///", **EDGE)
        axes.barh(place, price - left, left=left, color=ORANGE, **EDGE)
        if one.price > end:
            axes.text(end, place, f"perplexity {one.perplexity:+.0%} ", ha="right", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [one.name for one in rows], fontsize=8)
    axes.get_yticklabels()[0].set_fontweight("bold")
    axes.invert_yaxis()
    axes.set_xlim(0, end)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    said = "share of the bias left (blue: finalists, grey: screened), orange: weight of objections"
    figure.suptitle(said, fontsize=7.5)
    return figure


def _pictures(tried: Sequence[Tried]) -> dict[str, Any]:
    """The screening by perplexity, the finalists by the wrong pronoun too, the points numbered as in the table."""
    named = dict((*BIAS, *COST))
    bias = BIAS[2][0] if find(tried[0].after, BIAS[2][1]) else BIAS[0][0]
    figures = {}
    for key, of_final, cost in (("pareto", False, "perplexity"), ("locality", True, "wrong pronoun of gendered nouns")):
        shown = [(n, one) for n, one in enumerate(tried, 1) if (one.round == FINAL) == of_final]
        shown = [(n, one) for n, one in shown if one.perplexity < SHOWN]
        if not shown or find(shown[0][1].after, named[cost]) is None:
            continue
        every = [("untouched", shown[0][1].before), *((str(n), one.after) for n, one in shown)]
        cases = [
            Case(name, {x: found for x in (bias, cost) if (found := find(scores, named[x]))}, 1, reference=not number)
            for number, (name, scores) in enumerate(every)
        ]
        figures[key] = pareto(cases, bias, cost)
        which = "finalists" if of_final else f"screened settings whose perplexity rose by less than {SHOWN:.0%}"
        figures[key].set_label(f"{bias} against {cost} of the {which}")
    return figures
