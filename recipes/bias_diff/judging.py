"""A selection of training texts by influence, judged beside its controls and, where there are pairs, by twins."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from recipes.bias_diff.dataset import Material
from surgery.attribution.select import compare, controls, select, twin_auc
from surgery.attribution.tfidf import similarity
from surgery.metrics.metric import Metric

Rows = dict[str, Bool[np.ndarray, " texts"]]


def judge(
    material: Material, scores: Mapping[str, Any], *, share: float, seed: int
) -> tuple[Rows, dict[str, Any], str]:
    """The rows that each score selects; coverage, precision and twins of each, as in ``run.json``; that in words.

    ``scores`` are those of ``surgery.attribution.scoring.combined``. Beside the usual controls a contrast probe has its
    own: the TF-IDF similarity to the stereotypes minus that to their twins, which sees the words of the groups and
    nothing else. ``Material.told`` are the twins. Without labels there are rows only. "labels" are the labelled rows.
    """
    count, pairs = len(material.texts), len(material.told)
    every = [*material.texts, *(pair.text for pair in material.told), *(pair.anti for pair in material.told)]

    def split(values: Float[np.ndarray, " every"]) -> tuple[Any, Any]:
        return values[:count], (values[count : count + pairs], values[count + pairs :])

    near = similarity(every, [pair.text for pair in material.probe])
    tfidf, tfidf_twins = split(near)
    others = controls(scores["rows"]["influence"], scores["losses"], tfidf, seed=seed)
    twins: dict[str, Any] = {**scores["twins"], "tfidf": tfidf_twins, "minus_loss": tuple(-scores["twin_losses"])}
    if material.twinned:
        others["tfidf_contrast"], twins["tfidf_contrast"] = split(
            near - similarity(every, [pair.anti for pair in material.probe])
        )
    if material.biased is None:
        every_score = {**scores["rows"], **others}
        rows = {name: select(values, share=share, seed=seed) for name, values in every_score.items()}
        return rows, {}, "The texts have no labels, so it is not known whether what was selected carries the bias."
    judged = compare(
        scores["rows"],
        others,
        material.biased,
        data=material.name,
        share=share,
        twins=twins if pairs else {},
        seed=seed,
    )
    found = judged.to_dict()
    for name, part, metric in _by_direction(material, twins) if pairs else ():
        found[name][f"twin_auc_{part}"] = metric
    return {**judged.chosen, "labels": material.biased}, found, judged.words()


def _by_direction(material: Material, twins: Mapping[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The twin AUC of each score on CrowS-Pairs' two directions.

    A score that sees the words of the groups and no more is right where the stereotype is about the disadvantaged
    group ("stereo") and wrong where it is about the other one ("antistereo").
    """
    directions = np.array([pair.direction for pair in material.told])
    for name, (stereotypes, antis) in twins.items():
        found = []
        for part in sorted(set(directions.tolist()) - {""}):
            chosen = directions == part
            metric = twin_auc(
                np.asarray(stereotypes)[chosen],
                np.asarray(antis)[chosen],
                data=f"{material.name}, {part} pairs",
                scorer=name,
            )
            found.append(metric)
            yield name, part, metric.to_dict()
        if len(found) == 2 and all(metric.samples is not None for metric in found):
            both = [metric.samples for metric in found if metric.samples is not None]
            yield name, "balanced", _mean_of(found, (both[0] + both[1]) / 2).to_dict()


def _mean_of(found: Sequence[Metric], samples: Float[np.ndarray, " resamples"]) -> Metric:
    """Both directions counted alike, however many pairs each has: chance is 1/2 for the words of the groups."""
    value = float(np.mean([metric.value for metric in found]))
    low, high = np.quantile(samples, [0.025, 0.975])
    count = sum(metric.n for metric in found)
    data = found[0].data.rpartition(",")[0] + ", both directions alike"
    return replace(found[0], value=value, low=float(low), high=float(high), n=count, data=data, samples=samples)
