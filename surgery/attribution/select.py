"""Selection of training rows by a score, judged beside its controls: is it the bias that was found, or the style?

Coverage and precision (BIAS DIFF Eq. 9 and 10) of a selection say little alone: in a mixture of two sources any
difference between them will do. So each is given for cheap scores as well, and the twin test asks whether a stereotype
scores above its anti-stereotype, from which it differs in the group alone.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from surgery.errors import SurgeryError
from surgery.metrics.metric import Metric, mean_metric

Scores = Float[np.ndarray, " rows"]
Chosen = Bool[np.ndarray, " rows"]

CONTROLS = {
    "random": "one random order of the rows",
    "shuffled": "the influence of the rows in shuffled order",
    "minus_loss": "minus the model's mean loss on the text",
    "tfidf": "TF-IDF similarity to the probe",
}


def select(scores: Scores, *, share: float = 0.0, threshold: float | None = None, seed: int = 0) -> Chosen:
    """Which rows to take: the top ``share`` of the scores, or those of at least ``threshold``; give one of the two.

    ``share`` of n rows is ``round(share * n)`` rows. Among equal scores a seeded draw decides, not the order of the
    file, which may give the classes away. Raises ``SurgeryError`` for no scores, a score or a threshold that is not
    finite, a share outside 0 to 1, both or none of the two.
    """
    values = _finite(scores, "scores")
    if (threshold is None) == (share == 0.0):
        raise SurgeryError("selection: give a share above 0 or a threshold, one of the two")
    if threshold is not None:
        if not np.isfinite(threshold):
            raise SurgeryError(f"selection: got a threshold of {threshold}, expected a finite number")
        return values >= threshold
    if not 0 < share <= 1:
        raise SurgeryError(f"selection: got a share of {share}, expected more than 0 and at most 1")
    chance = np.random.default_rng(seed).permutation(len(values))
    order = np.lexsort((chance, -values))
    chosen = np.zeros(len(values), bool)
    chosen[order[: round(share * len(values))]] = True
    return chosen


def coverage(chosen: Chosen, biased: Chosen, *, scorer: str, data: str, seed: int = 0) -> Metric:
    """The part of the biased rows that is selected: |selected and biased| / |biased| (BIAS DIFF Eq. 9).

    The interval resamples the biased rows. ``ideal`` is what this number of rows could cover at best.
    """
    _both(chosen, biased, data)
    ideal = min(1.0, chosen.sum() / biased.sum())
    return mean_metric(chosen[biased], scorer=scorer, data=data, ideal=ideal, direction="higher", seed=seed)


def precision(chosen: Chosen, biased: Chosen, *, scorer: str, data: str, seed: int = 0) -> Metric:
    """The part of the selected rows that is biased: |selected and biased| / |selected| (BIAS DIFF Eq. 10).

    The interval resamples the selected rows. ``ideal`` is the best that this number of rows could have: with 30 %
    biased rows and 35 % selected it is 0.857.
    """
    _both(chosen, biased, data)
    ideal = min(1.0, biased.sum() / chosen.sum())
    return mean_metric(biased[chosen], scorer=scorer, data=data, ideal=ideal, direction="higher", seed=seed)


def twin_auc(
    stereotypes: Float[np.ndarray, " pairs"],
    twins: Float[np.ndarray, " pairs"],
    *,
    data: str,
    scorer: str = "influence",
    seed: int = 0,
) -> Metric:
    """How often a stereotype scores above its own anti-stereotype; a tie is half, and 0.5 is a score blind to the bias.

    The interval resamples the pairs. Raises ``SurgeryError`` when the two differ in length, or hold no pair.
    """
    return mean_metric(
        _wins(stereotypes, twins),
        scorer=f"P({scorer} of stereotype > of its twin)",
        data=data,
        ideal=1.0,
        direction="higher",
        seed=seed,
    )


def _wins(stereotypes: Scores, twins: Scores) -> Scores:
    ours, theirs = _finite(stereotypes, "stereotypes"), _finite(twins, "anti-stereotypes")
    if len(ours) != len(theirs):
        raise SurgeryError(f"twins: got {len(ours)} stereotypes and {len(theirs)} anti-stereotypes; expected pairs")
    return (ours > theirs) + 0.5 * (ours == theirs)


@dataclass(frozen=True)
class Comparison:
    """A selection of the same number of rows by each score, of methods and controls, and what each one found."""

    chosen: dict[str, Chosen]
    found: dict[str, dict[str, Metric]]
    """By the name of the score: its "coverage" and "precision", and "twin_auc" where twins were scored by it."""
    differences: dict[str, dict[str, Metric]]
    """By method and control: the coverage of the one minus that of the other, over the same rows."""
    twin_differences: dict[str, dict[str, Metric]]
    """The same of the twin AUC, over the same pairs."""
    share: float
    """The part of all rows that is selected."""

    def to_dict(self) -> dict[str, Any]:
        """What ``run.json`` keeps under "selection": {score: {"coverage", "precision"}, "twin_auc"}."""
        plain: dict[str, Any] = {
            name: {key: metric.to_dict() for key, metric in metrics.items()} for name, metrics in self.found.items()
        }
        first = plain[next(iter(self.differences))]
        return plain | ({"twin_auc": first["twin_auc"]} if "twin_auc" in first else {})

    def words(self) -> str:
        """Whether each method beat its controls on this data, in sentences; a claim is one that its interval allows."""
        said = [self._verdict(method) for method in self.differences]
        said += [self._twins(method) for method in self.differences if "twin_auc" in self.found[method]]
        return " ".join(said)

    def _verdict(self, method: str) -> str:
        gaps = self.differences[method]
        better = [name for name, gap in gaps.items() if gap.low > 0]
        worse = [name for name, gap in gaps.items() if gap.high < 0]
        alike = [name for name in gaps if name not in (*better, *worse)]
        covered = {name: f"{metrics['coverage'].value:.0%}" for name, metrics in self.found.items()}
        said = f"{method.capitalize()} covers {covered[method]} of the biased rows in {self.share:.0%} of the data"
        if len(better) == len(gaps):
            return f"{said} and beats every control."
        parts = [
            f"{verb} {', '.join(f'{_label(name)} ({covered[name]})' for name in names)}"
            for verb, names in (("beats", better), ("does not differ from", alike), ("is beaten by", worse))
            if names
        ]
        return (
            f"{said}; it {'; it '.join(parts)}. A score without gradients does as well or better here, so this "
            "selection is no evidence for them."
        )

    def _twins(self, method: str) -> str:
        twin = self.found[method]["twin_auc"]
        interval = f"[{twin.low:.0%}, {twin.high:.0%}]"
        said = f"A stereotype scores above its own twin by {method} in {twin.value:.0%} of {twin.n} pairs {interval}"
        if twin.high < 0.5:
            return f"{said}: the score points the wrong way within pairs."
        if twin.low <= 0.5:
            return f"{said}: it cannot be told from chance, so what was found may be style and not bias."
        as_good = [name for name, gap in self.twin_differences[method].items() if gap.low <= 0]
        if not as_good:
            return f"{said}: the score sees the bias, beyond style."
        others = ", ".join(f"{_label(name)} ({self.found[name]['twin_auc'].value:.0%})" for name in as_good)
        return f"{said}: above chance, but not above {others}, so the words of the groups may be what it sees."


def controls(
    influence: Scores,
    losses: Scores,
    similarity: Scores,
    *,
    seed: int,
    shuffled: Scores | None = None,
) -> dict[str, Scores]:
    """The scores of the four controls, by the names of ``CONTROLS``.

    ``losses`` is the mean loss of each row, ``similarity`` that of ``surgery.attribution.tfidf``. ``shuffled`` is the
    influence computed on the rows in shuffled order and put back: where a score is that of a whole batch it shows what
    the order of the file gave away, so batch scores need it. Without it the rows are dealt each other's influence:
    with one example as the unit no score depends on the order, and what is left of a score without its text is chance.
    """
    generator = np.random.default_rng((seed, 1))
    return {
        "random": generator.random(len(influence)),
        "shuffled": generator.permutation(influence) if shuffled is None else shuffled,
        "minus_loss": -np.asarray(losses),
        "tfidf": similarity,
    }


def compare(
    methods: Mapping[str, Scores],
    others: Mapping[str, Scores],
    biased: Sequence[bool] | Chosen,
    *,
    data: str,
    share: float = 0.0,
    threshold: float | None = None,
    twins: Mapping[str, tuple[Scores, Scores]] | None = None,
    seed: int = 0,
) -> Comparison:
    """Select the same number of rows by each of ``methods`` ("influence", "contrast") and of the controls ``others``.

    ``twins`` are the scores of stereotypes and of their twins, by the name of a method or a control; of the controls
    the TF-IDF similarity matters, since a probe names the same groups over and over. A ``threshold`` holds for the
    first method; the others take as many rows as it took.

    Raises ``SurgeryError`` when a control of ``CONTROLS`` is missing, lengths differ, no row or every row is biased, or
    nothing is selected.
    """
    twins = twins or {}
    labels, scores = np.asarray(biased, dtype=bool), {**methods, **others}
    _refuse_unequal(scores, others, labels, data)
    first = next(iter(methods))
    taken = int(select(scores[first], share=share, threshold=threshold, seed=seed).sum())
    if taken == 0 or labels.all() or not labels.any():
        raise SurgeryError(
            f"{data}: {taken} of {len(labels)} rows selected, {int(labels.sum())} biased; expected some of each"
        )
    part = taken / len(labels)
    chosen = {name: select(values, share=part, seed=seed) for name, values in scores.items()}
    found = {name: _found(rows, labels, part, name, data, seed) for name, rows in chosen.items()}
    for name, (stereotypes, anti) in twins.items():
        found[name]["twin_auc"] = twin_auc(stereotypes, anti, data=data, scorer=name, seed=seed)
    behind = partial(_behind, others=others, data=data, seed=seed)
    covered = {name: rows[labels] for name, rows in chosen.items()}
    wins = {name: _wins(*pair) for name, pair in twins.items()}
    return Comparison(
        chosen,
        found,
        {method: behind("coverage", method, covered) for method in methods},
        {method: behind("twin AUC", method, wins) for method in methods if method in wins},
        part,
    )


def _refuse_unequal(scores: Mapping[str, Scores], others: Mapping[str, Scores], labels: Chosen, data: str) -> None:
    if missing := [name for name in CONTROLS if name not in others]:
        raise SurgeryError(f"controls: {', '.join(missing)} missing; a selection is shown beside all of them")
    for name, values in scores.items():
        if len(values) != len(labels):
            raise SurgeryError(f"{name}: got {len(values)} scores, expected {len(labels)}, one for each row of {data}")


def _found(rows: Chosen, labels: Chosen, part: float, name: str, data: str, seed: int) -> dict[str, Metric]:
    """Coverage and precision of the rows that the score ``name`` selects."""
    return {
        measure.__name__: measure(
            rows, labels, scorer=f"{measure.__name__} of the top {part:.1%} by {_label(name)}", data=data, seed=seed
        )
        for measure in (coverage, precision)
    }


def _behind(
    kind: str, method: str, rows: Mapping[str, np.ndarray], *, others: Iterable[str], data: str, seed: int
) -> dict[str, Metric]:
    """``rows`` of a method minus those of each control, paired."""
    return {
        name: mean_metric(
            rows[method].astype(float) - rows[name],
            scorer=f"{kind} by {method} minus by {_label(name)}",
            data=data,
            ideal=1.0,
            direction="higher",
            seed=seed,
        )
        for name in others
        if name in rows
    }


def _label(name: str) -> str:
    return CONTROLS.get(name, name)


def _finite(scores: Any, what: str) -> Scores:
    values = np.asarray(scores, dtype=np.float64)
    if values.ndim != 1 or not values.size:
        raise SurgeryError(f"{what}: got an array of shape {values.shape}, expected one score for each of the rows")
    if not np.isfinite(values).all():
        where = int(np.flatnonzero(~np.isfinite(values))[0])
        raise SurgeryError(f"{what}: row {where} has the score {values[where]}; expected finite numbers; try float32")
    return values


def _both(chosen: Chosen, biased: Chosen, data: str) -> None:
    if not chosen.any() or not biased.any():
        raise SurgeryError(
            f"{data}: {int(chosen.sum())} rows selected and {int(biased.sum())} labelled biased; expected some of each"
        )
