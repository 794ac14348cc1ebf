"""Perplexity on neutral text: what an edit costs where no bias is asked about."""

import numpy as np
from jaxtyping import Float

from surgery.metrics.metric import Metric, mean_metric


def score(losses: Float[np.ndarray, " texts"], counts: Float[np.ndarray, " texts"], *, data: str) -> Metric:
    """exp of the mean negative log-likelihood per token (nats), over all tokens of all texts but each text's first.

    ``losses`` and ``counts`` are per text (``surgery.forward.next_token.token_losses``); the interval resamples texts.
    """
    return mean_metric(
        losses / counts,
        weights=counts,
        transform=np.exp,
        scorer="exp(mean token NLL), each text's first token unscored",
        data=data,
        ideal=1.0,
        direction="lower",
    )
