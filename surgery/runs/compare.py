"""Finished runs side by side: a row for every setting that differs, the mean over seeds, and who dominates whom."""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.plots import BLUE, GREY, ORANGE, new_figure
from surgery.errors import SurgeryError
from surgery.metrics.metric import ideal_of
from surgery.runs.recipe_files import read_toml
from surgery.runs.report import Table, cell, leaves

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Scores = dict[str, dict[str, Any]]
# So many settings stand in the name of a row.
NAMED = 4
# Two-sided 95 % quantile of Student's t for 1, 2, ... degrees of freedom; the normal one beyond the table.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A finished run: the settings it was made with, and what it wrote into ``run.json``."""

    folder: Path
    settings: dict[str, Any]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A row: runs that differ only in their seed, or what they were compared with (``reference``)."""

    name: str
    scores: Scores
    """Metrics by their place in the scores, such as "perplexity" or "gas.share"; means over the runs. Where runs
    measured different things at one place (other words, other data), the place ends in what it was."""
    seeds: int
    """Over how many different seeds."""
    reference: bool = False
    runs: int = 1
    """How many measurements with different results the means are of."""

    @property
    def count(self) -> str:
        """How many runs, and seeds where these are not as many, in words."""
        seeds = f"{self.seeds} {'seed' if self.seeds == 1 else 'seeds'}"
        if self.reference:
            return "measured once" if self.runs == 1 else f"measured {self.runs} times"
        return seeds if self.runs == self.seeds else f"{self.runs} runs, {seeds}"


def read_run(folder: str | Path) -> Finished:
    """A run's folder, as ``surgery run`` leaves it. Raises ``SurgeryError`` when it is not a finished run."""
    folder = Path(folder)
    try:
        summary = json.loads((folder / "run.json").read_text("utf-8"))
    except OSError as error:
        inside = len(list(folder.glob("*/run.json")))  # of a sweep
        step = f"give the {inside} runs in it: {folder}/*" if inside else "give the folder of a surgery run"
        raise SurgeryError(f"{folder}: no finished run (run.json: {error.strerror}); {step}") from None
    except ValueError as error:
        raise SurgeryError(f"{folder / 'run.json'}: not JSON ({error}); run it again") from None
    if not isinstance(summary, dict) or not isinstance(summary.get("after"), dict):
        raise SurgeryError(f"{folder / 'run.json'}: has no scores under 'after'; expected what surgery run writes")
    return Finished(folder, read_toml(folder / "recipe.toml"), summary)


def cases(runs: Sequence[Finished]) -> list[Case]:
    """What was measured before, every control, and every setting, with the runs that differ only in seed together.

    Equal results stand once: the same model before the edit, the same control of several runs, a run and its
    repetition. A row is named by what differs, within its recipe. Raises ``SurgeryError`` for no run.
    """
    if not runs:
        raise SurgeryError("compare: got no run, expected the folders of one or more; name them")
    varied, told = differing(runs), _told_apart(runs)
    references: dict[str, list[Scores]] = {}
    groups: dict[str, list[tuple[int, Scores]]] = {}
    for run in runs:
        model = f" {run.settings['model']}" if "model" in varied else ""
        given = {"before": run.summary.get("before")}
        given |= {f"control {name}": value.get("after") for name, value in run.summary.get("controls", {}).items()}
        for name, scores in given.items():
            if isinstance(scores, Mapping) and (found := _flat(scores, told)):
                kept = references.setdefault(name + model, [])
                if found not in kept:
                    kept.append(found)
        measured = (int(run.settings.get("seed", 0)), _flat(run.summary["after"], told))
        members = groups.setdefault(_name(run, runs, varied), [])
        if measured not in members:
            members.append(measured)
    return [
        *(Case(name, _pooled(found), 1, reference=True, runs=len(found)) for name, found in references.items()),
        *(
            Case(name, _pooled(scores for _, scores in found), len({seed for seed, _ in found}), runs=len(found))
            for name, found in groups.items()
        ),
    ]


def _name(run: Finished, runs: Sequence[Finished], varied: Sequence[str]) -> str:
    """What tells a run from the others: its recipe if there are several, and the settings that differ within it."""
    recipe = run.settings.get("recipe")
    own = [other for other in runs if other.settings.get("recipe") == recipe]
    keys = [key for key in differing(own) if key != "seed"]
    if "model" in varied and "model" not in keys:
        keys.insert(0, "model")
    words = [f"{key} {_short(run.settings.get(key))}" for key in keys[:NAMED]]
    if len(keys) > NAMED:  # too many to read: the folder's name says it better
        words = [run.folder.name, *words[:1], f"and {len(keys) - 1} other settings"]
    return ", ".join(([str(recipe)] if "recipe" in varied or not words else []) + words)


def differing(runs: Sequence[Finished]) -> list[str]:
    """The settings that are not the same in all runs, in the order of the recipe."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({json.dumps(run.settings.get(key)) for run in runs}) > 1]


def mean_over_seeds(metrics: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One metric for several runs: their mean, with the 95 % interval of Student's t over the runs.

    A single run keeps its own bootstrap interval. The two say different things: how the result varies with the
    seed, and how it would vary with the rows that it was measured on.
    """
    if len(metrics) == 1:
        return dict(metrics[0])
    values = np.array([metric["value"] for metric in metrics], dtype=np.float64)
    freedom = len(values) - 1
    quantile = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96
    half = float(quantile * values.std(ddof=1) / math.sqrt(len(values)))
    mean = float(values.mean())
    return dict(metrics[0]) | {"value": mean, "low": mean - half, "high": mean + half}


def table(found: Sequence[Case], *, only: Sequence[str] = ()) -> Table:
    """The cases as rows, their metrics as columns; ``only`` those whose place starts with one of these words.

    Raises ``SurgeryError`` where no metric's place does.
    """
    paths = list(dict.fromkeys(path for case in found for path in case.scores))
    chosen = [path for path in paths if not only or path.startswith(tuple(only))]
    if not chosen:
        raise SurgeryError(f"metrics: got {', '.join(only)}; these runs have {', '.join(paths)}; name some of them")
    rows = [
        [case.name, case.count, *(cell(case.scores.get(path)) for path in chosen)]
        for case in sorted(found, key=lambda case: not case.reference)
    ]
    measured = [next(case.scores[path] for case in found if path in case.scores) for path in chosen]
    said = "; ".join(f"{p}: {m['scorer']}, on {m['data']}" for p, m in zip(chosen, measured, strict=True))
    ideals = ", ".join(f"{p} {ideal_of(m)}" for p, m in zip(chosen, measured, strict=True))
    note = (
        f"Ideal: {ideals}. {said}. Brackets are 95 % intervals: of Student's t over the runs where a row holds "
        "several, else bootstrap intervals."
    )
    return Table("Runs side by side", ["run", "of", *(path.replace("_", " ") for path in chosen)], rows, note)


def axis(places: Iterable[str], path: str) -> str:
    """``path``, or the one of ``places`` that ends in it. Raises ``SurgeryError`` where there is none, or several."""
    known = list(dict.fromkeys(places))
    near = [one for one in known if one == path] or [one for one in known if one.endswith(path)]
    if len(near) != 1:
        raise SurgeryError(
            f"metric {path!r}: {len(near) or 'none'} of what was measured; expected one of {', '.join(known)}"
        )
    return near[0]


def loss(metric: Mapping[str, Any]) -> float:
    """How far a metric is from good, so that smaller is better whichever way it points."""
    value = float(metric["value"])
    return {"lower": value, "higher": -value}.get(metric["direction"], abs(value - metric["ideal"]))


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which points no other point dominates (is at least as small in both, smaller in one), from left to right."""
    kept = [n for n, (x, y) in enumerate(points) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)]
    return sorted(kept, key=lambda n: points[n])


def pareto(found: Sequence[Case], bias: str, cost: str) -> "Figure":
    """Every case as a point (``cost`` to the right, ``bias`` upwards); those that no other dominates are joined.

    Raises ``SurgeryError`` where no case has both.
    """
    shown = [case for case in found if bias in case.scores and cost in case.scores]
    if not shown:
        raise SurgeryError(f"no run has both {bias!r} and {cost!r}; choose metrics that were measured together")
    figure = new_figure(8, 5)
    axes = figure.subplots()
    pairs = [(case.scores[cost], case.scores[bias]) for case in shown]
    for case, (x, y) in zip(shown, pairs, strict=True):
        error: Any = [[abs(y["value"] - y["low"])], [abs(y["high"] - y["value"])]]
        side: Any = [[abs(x["value"] - x["low"])], [abs(x["high"] - x["value"])]]
        look: Any = {"color": ORANGE, "marker": "s"} if case.reference else {"color": BLUE, "marker": "o"}
        axes.errorbar(x["value"], y["value"], yerr=error, xerr=side, lw=0.7, alpha=0.9, **look)
        axes.annotate(case.name, (x["value"], y["value"]), xytext=(5, 4), textcoords="offset points", fontsize=8)
    best = front([(loss(x), loss(y)) for x, y in pairs])
    axes.plot([pairs[n][0]["value"] for n in best], [pairs[n][1]["value"] for n in best], color=GREY, ls="--", zorder=0)
    for name, metric, label in (("x", pairs[0][0], cost), ("y", pairs[0][1], bias)):
        better = metric["direction"] in ("lower", "higher")
        ideal = f"{metric['direction']} is better" if better else f"ideal {ideal_of(metric)}"
        getattr(axes, f"set_{name}label")(f"{label.replace('_', ' ').replace('.', ' ')} ({ideal})")
    axes.set_title("Squares: before and controls. The dashed line joins what nothing else dominates.", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _flat(scores: Mapping[str, Any], told: Mapping[str, Collection[str]]) -> Scores:
    return {
        place if len(told.get(place, ())) < 2 else f"{place} ({_measured(metric)})": metric
        for path, metric in leaves(scores)
        for place in [".".join(path)]
    }


def _measured(metric: Mapping[str, Any]) -> str:
    """What was measured; a seed that the run drew texts or rows by makes no other thing of it."""
    return re.sub(r"\bseed \d+", "seed of the run", f"{metric['scorer']}, {metric['data']}")


def _told_apart(runs: Sequence[Finished]) -> dict[str, set[str]]:
    """What was measured at each place: two words' gap and three words' gap are not one number."""
    found: dict[str, set[str]] = {}
    for run in runs:
        controls = [value.get("after") for value in run.summary.get("controls", {}).values()]
        for scores in (run.summary.get("before"), run.summary["after"], *controls):
            for path, metric in leaves(scores) if isinstance(scores, Mapping) else ():
                found.setdefault(".".join(path), set()).add(_measured(metric))
    return found


def _pooled(found: Iterable[Scores]) -> Scores:
    every = list(found)
    paths = dict.fromkeys(path for scores in every for path in scores)
    return {path: mean_over_seeds([scores[path] for scores in every if path in scores]) for path in paths}


def _short(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else f"{value}"
