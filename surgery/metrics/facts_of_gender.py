"""Whether a model still says he of a king and she of a nun: knowledge, which an edit of a bias must not touch."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from surgery.data.facts_of_gender import SETS
from surgery.data.locality import Row
from surgery.metrics.genbias import LEAST
from surgery.metrics.metric import Metric, mean_metric


def score(
    probabilities: Float[np.ndarray, "prompts words"], rows: Sequence[Row], *, words: Sequence[str], data: str
) -> dict[str, dict[str, Metric]]:
    """``{"right" | "accuracy": {set: Metric, "all": Metric}}``; chance is 1 / number of ``words``.

    - right: mean of P(right pronoun) / sum of P over ``words``, which are he and she, and others where compared.
    - accuracy: the share of prompts after which the right one is the likeliest of them; a tie is not right.

    Intervals resample subjects.
    """
    places = np.array([list(words).index(row.right) for row in rows])
    each = np.arange(len(rows))
    mass = np.maximum(probabilities.sum(axis=1), LEAST)
    others = probabilities.copy()
    others[each, places] = -1.0
    among = ", ".join(words)
    columns = {
        "right": (probabilities[each, places] / mass, f"mean P(right) among {among}"),
        "accuracy": (
            (probabilities[each, places] > others.max(axis=1)).astype(float),
            f"share with the right one likeliest of {among}",
        ),
    }
    kinds, subjects = np.array([row.kind for row in rows]), np.array([row.subject for row in rows])
    return {
        name: {
            kind: mean_metric(
                values[chosen],
                groups=subjects[chosen],
                scorer=scorer,
                data=f"{data}, {kind}",
                ideal=1.0,
                direction="higher",
            )
            for kind, chosen in [*((kind, kinds == kind) for kind in SETS), ("all", np.ones(len(rows), bool))]
            if chosen.any()
        }
        for name, (values, scorer) in columns.items()
    }
