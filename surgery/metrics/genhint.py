"""GenHintEval (LFTF section 3.2): UB-Score, whether the next pronoun follows a hint such as "his"."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from surgery.data.genhint import HintPrompt
from surgery.metrics.metric import Metric, mean_metric


def score(
    probabilities: Float[np.ndarray, "prompts words"],
    prompts: Sequence[HintPrompt],
    *,
    data: str,
    words: Sequence[str] = ("he", "she"),
) -> dict[str, Metric]:
    """``{"ub": Metric, "mass": Metric}`` from the probabilities of the compared ``words``.

    - ub: mean of F (P(he) - P(she)), F = +1 after a male hint and -1 after a female one, Eq. 2-3. -1..1, higher is
      better; a model that always says one pronoun has 0. With more than two words: the hinted word's probability
      minus the mean of the others', which is the same for two.
    - mass: mean of the words' summed probability, whose ideal is what it was before the edit: an edit may raise ub by
      saying the words more often.
    """
    hints = np.array([prompt.hint for prompt in prompts])
    hinted = probabilities[np.arange(len(hints)), hints]
    others = (probabilities.sum(axis=1) - hinted) / (probabilities.shape[1] - 1)
    names = [f"P({word})" for word in words]
    apart = f"F*({names[0]}-{names[1]})" if len(words) == 2 else f"P(hinted) - mean P(others) of {', '.join(words)}"
    groups = np.array([prompt.profession for prompt in prompts])
    mass = probabilities.sum(axis=1)
    return {
        "ub": mean_metric(
            hinted - others,
            groups=groups,
            scorer=f"mean {apart}, full vocabulary (LFTF Eq. 2-3)",
            data=data,
            ideal=1.0,
            direction="higher",
        ),
        "mass": mean_metric(
            mass,
            groups=groups,
            scorer=f"mean {'+'.join(names)}, full vocabulary",
            data=data,
            ideal=float(mass.mean()),
            direction="same",
        ),
    }
