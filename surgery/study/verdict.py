"""What a study says: each method's numbers over its seeds, what it spoilt, and which edit to ship."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.metrics import metric
from surgery.metrics.metric import Difference, Metric, difference
from surgery.runs.compare import front, loss, mean_over_seeds
from surgery.study.cells import Flat, Judged
from surgery.study.settings import Method, Study

BIAS = ("genbias.relative_gap.all", "genbias.afgb.all", "stereoset.ss.overall", "stereoset.margin.overall")
COST = (
    "perplexity", "genbias.mass.all", "genhint.ub", "stereoset.lms.overall", "cloze.accuracy",
    "facts_of_gender.accuracy.all",
)  # fmt: skip
NAMES = {
    "genbias.relative_gap.all": "relative gap",
    "genbias.afgb.all": "AFGB",
    "genbias.mass.all": "mass of the words",
    "genhint.mass": "mass of the words after hints",
    "genhint.ub": "UB-Score",
    "stereoset.ss.overall": "StereoSet SS",
    "stereoset.margin.overall": "StereoSet |margin|",
    "stereoset.lms.overall": "StereoSet LMS",
    "stereoset.icat.overall": "StereoSet ICAT",
    "crows_pairs.metric.overall": "CrowS-Pairs",
    "crows_pairs.margin.overall": "CrowS-Pairs |margin|",
    "crows_pairs.stereotype.overall": "CrowS-Pairs stereotypes",
    "crows_pairs.anti_stereotype.overall": "CrowS-Pairs anti-stereotypes",
    "bbq.accuracy.overall.overall": "BBQ accuracy",
    "bbq.accuracy.ambiguous.overall": "BBQ accuracy where it is not said",
    "bbq.accuracy.disambiguated.overall": "BBQ accuracy where it is said",
    "bbq.s_amb.overall": "BBQ bias where it is not said",
    "bbq.s_dis.overall": "BBQ bias where it is said",
    "free_text.stereotype": "stereotype in free text",
    "cloze.accuracy": "T-REx facts",
    "facts_of_gender.accuracy.all": "facts of gender",
    "facts_of_gender.right.all": "right word in facts of gender",
    "wikitext.perplexity": "perplexity of WikiText",
    "perplexity_pronouns": "perplexity with pronouns",
    **{
        f"locality.{kind}.{number}": f"{what} {where}"
        for kind, where in (
            ("gendered", "after nouns of settled gender"),
            ("names", "after first names"),
            ("plurals", "after plurals"),
            ("things", "after things"),
            ("others", "after other pronouns"),
            ("text", "in plain text"),
        )
        for number, what in (("right", "right pronoun"), ("wrong", "wrong pronoun"), ("mass", "he + she"))
    },
}


@dataclass(frozen=True)
class Row:
    """A method on one model: its numbers over the seeds, and each seed's paired differences from the model as it is."""

    model: str
    name: str
    method: Method | None
    scores: Mapping[str, Mapping[str, Any]]
    differences: tuple[Mapping[str, Difference], ...]
    refused: str = ""
    """Why nothing was measured; where some seeds were, the reason of the others is ``lacks``."""
    lacks: str = ""
    cells: tuple[Flat, ...] = ()
    """The numbers of each seed, with the draws of their bootstraps."""

    def worse(self) -> list[str]:
        """Places that got worse with every seed, the intervals widened so that all of them hold together."""
        if not self.differences:
            return []
        places = [
            place
            for place in self.differences[0]
            if all(one.get(place) is not None and one[place].verdict == "worse" for one in self.differences)
        ]
        return sorted(places, key=lambda place: -abs(self.change(place)))

    def change(self, place: str) -> float:
        """The mean difference over the seeds, as a share of what it was (of 1 where that was 0)."""
        values = [one[place].value for one in self.differences if place in one]
        mean = sum(values) / len(values)
        was = float(self.scores[place]["value"]) - mean
        return mean / abs(was) if was else mean

    def points(self, place: str) -> float:
        """The mean difference over the seeds in points (``surgery.metrics.metric.points``)."""
        values = [one[place].value for one in self.differences if place in one]
        return metric.points(self.scores[place], sum(values) / len(values))


def axes(study: Study, found: Collection[str]) -> tuple[list[str], list[str]]:
    """The study's bias and cost numbers; where it names none, the usual ones among those that were measured."""
    return (
        [place for place in (study.bias or BIAS) if study.bias or place in found],
        [place for place in (study.cost or COST) if study.cost or place in found],
    )


def rows(judged: Sequence[Judged]) -> list[Row]:
    """A row for every method and model, the untouched model first."""
    found: list[Row] = []
    for model in dict.fromkeys(one.cell.model for one in judged):
        own = [one for one in judged if one.cell.model == model]
        untouched = next(one for one in own if one.cell.method is None)
        for name in dict.fromkeys(one.cell.name for one in own):
            members = [one for one in own if one.cell.name == name]
            measured = [one for one in members if not one.refused]
            places = dict.fromkeys(place for one in measured for place in one.scores)
            scores = {
                place: mean_over_seeds([one.scores[place].to_dict() for one in measured if place in one.scores])
                for place in places
            }
            for place, one in scores.items():  # what is to stay has the untouched value as its ideal
                if one["direction"] == "same" and place in untouched.scores:
                    one["ideal"] = untouched.scores[place].value
            paired = () if members[0] is untouched else tuple(paired_with(one, own) for one in measured)
            refused = next((one.refused for one in members if one.refused), "")
            why = {"lacks" if measured else "refused": refused}
            own_cells = tuple(m.scores for m in measured)
            found.append(Row(model, name, members[0].cell.method, scores, paired, cells=own_cells, **why))
    return found


def paired_with(one: Judged, judged: Sequence[Judged]) -> dict[str, Difference]:
    """By place the paired difference from the untouched model, widened so that all hold together; {} for itself.

    Those that a cell of another folder brought with it, from the untouched model as it was measured there.
    """
    if one.differences is not None:
        return dict(one.differences)
    before = next(other for other in judged if other.cell.method is None and other.cell.model == one.cell.model).scores
    after = {} if one.cell.method is None else one.scores
    shared = [place for place in after if place in before]
    pairs = {place: difference(before[place], after[place], axes=len(shared)) for place in shared}
    return {place: one for place, one in pairs.items() if one is not None}


def removed(row: Row, untouched: Row, bias: Sequence[str]) -> float:
    """The share of the bias that is gone, mean over the bias numbers: 1 is all of it, below 0 it grew.

    A number that was not measured with the method counts as nothing removed.
    """
    shares = []
    for place in bias:
        if place in untouched.scores and (was := _distance(untouched.scores[place])):
            shares.append(1 - _distance(row.scores[place]) / was if place in row.scores else 0.0)
    return sum(shares) / len(shares) if shares else 0.0


def removed_between(row: Row, untouched: Row, bias: Sequence[str]) -> tuple[float, float] | None:
    """The 95 % interval of ``removed``: a paired bootstrap of the ratio, the same rows drawn before and after.

    The draws of several seeds are averaged. None where a number has no draws, or its bias vanishes in one.
    """
    drawn = []
    for place in (place for place in bias if place in untouched.scores):
        was = _distances(untouched.cells[0].get(place))
        now = [_distances(scores.get(place)) for scores in row.cells if place in scores]
        if not now:
            drawn.append(np.zeros(1))
            continue
        if was is None or any(one is None or one.shape != was.shape for one in now) or not was.all():
            return None
        drawn.append(np.mean([1 - one / was for one in now if one is not None], axis=0))
    if not drawn:
        return None
    low, high = np.quantile(np.mean(np.broadcast_arrays(*drawn), axis=0), [0.025, 0.975])
    return float(low), float(high)


def _distances(metric: Metric | None) -> Float[np.ndarray, " resamples"] | None:
    if metric is None or metric.samples is None:
        return None
    if metric.direction == "lower":
        return np.abs(metric.samples)
    return np.abs(metric.samples - metric.ideal)


def _distance(metric: Mapping[str, Any]) -> float:
    return abs(loss(metric)) if metric["direction"] != "higher" else abs(metric["ideal"] - metric["value"])


def objections(row: Row, cost: Sequence[str], tolerance: float) -> list[str]:
    """The cost numbers that got worse with every seed and by more than ``tolerance`` points."""
    return [place for place in row.worse() if place in cost and abs(row.points(place)) > tolerance]


def chosen(found: Sequence[Row], study: Study, *, clean: bool = False) -> list[Row]:
    """For each model the method to ship: of those that spoil nothing, the one that removes most of the bias.

    Where there is none, the one that removes most; with ``clean`` it is left out.
    """
    best = []
    for untouched in (row for row in found if row.method is None and not row.refused):
        bias, cost = axes(study, untouched.scores)
        ranked = ranking(found, untouched, bias)
        fitting = [
            row for row in ranked if removed(row, untouched, bias) > 0 and not objections(row, cost, study.tolerance)
        ]
        best += (fitting or ([] if clean else ranked))[:1]
    return best


def ranking(found: Sequence[Row], untouched: Row, bias: Sequence[str]) -> list[Row]:
    """The methods of one model that were measured, the one that removes most of the bias first."""
    own = [row for row in found if row.model == untouched.model and row.method is not None and not row.refused]
    return sorted(own, key=lambda row: -removed(row, untouched, bias))


def unbeaten(found: Sequence[Row], model: str, bias: Sequence[str], cost: Sequence[str]) -> dict[str, tuple[int, int]]:
    """For each method of a model on how many pairs of bias and cost no other is better on both, and of how many."""
    counts: dict[str, tuple[int, int]] = {}
    own = [row for row in found if row.model == model and not row.refused]
    for x, y in product(cost, bias):
        shown = [row for row in own if x in row.scores and y in row.scores]
        best = front([(loss(row.scores[x]), loss(row.scores[y])) for row in shown])
        for place, row in enumerate(shown):
            on, of = counts.get(row.name, (0, 0))
            counts[row.name] = (on + (place in best), of + 1)
    return counts


def plain_words(place: str) -> str:
    """A number's place as it is read: "StereoSet LMS", "StereoSet LMS (gender)" of a part, else its own words."""
    head, _, part = place.rpartition(".")
    whole = next((NAMES[f"{head}.{of}"] for of in ("all", "overall") if f"{head}.{of}" in NAMES), "")
    own = (f"{whole} ({part})" if whole else place).replace("_", " ").replace(".", " ")
    return NAMES.get(place, own)
