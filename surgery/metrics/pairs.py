"""What a model prefers among pairs of sentences of any source: StereoSet's scores, as far as the rows allow them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.pairs import Pair
from surgery.data.stereoset import Triple, Triples
from surgery.metrics import stereoset
from surgery.metrics.sentences import DEFINITIONS, per_token, pooled, sentence_tokens
from surgery.progress import Advance


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Pair],
    *,
    data: str,
    scorer: str,
    step: Advance | None = None,
) -> dict[str, Any]:
    """SS and the mean |margin| of each bias type and overall, means over groups (``surgery.metrics.stereoset.score``).

    LMS and ICAT, too, where every pair has an unrelated sentence. ``step`` is told of finished sentences.
    """
    triples = Triples(tuple(_triple(pair, number) for number, pair in enumerate(pairs)), (), data)
    if all(pair.unrelated for pair in pairs):
        return stereoset.evaluate_triples(model, tokenizer, triples, scorer=scorer, step=step)
    logs = sentence_tokens(model, tokenizer, _sides(pairs), scorer=scorer, step=step)
    means = per_token(logs).reshape(-1, 2)
    both = pooled(logs, DEFINITIONS[scorer].pool).reshape(-1, 2)
    without = np.full((len(pairs), 1), np.nan)  # so that what compares with it is left out below
    scores = np.concatenate([both, without], axis=1)
    found = stereoset.score(triples, scores, data=data, scorer=scorer, margins=means[:, 0] - means[:, 1])
    return {name: found[name] for name in ("ss", "margin")}


def margins(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], scorers: Sequence[str]
) -> Float[np.ndarray, "pairs scorers"]:
    """Mean token log-probability (nats) of each pair's ``more`` minus its ``less``, by each of the scorers."""
    found = [per_token(sentence_tokens(model, tokenizer, _sides(pairs), scorer=name)) for name in scorers]
    return np.stack([means[::2] - means[1::2] for means in found], axis=1)


def _sides(pairs: Sequence[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.more, pair.less)]


def _triple(pair: Pair, number: int) -> Triple:
    sides = (pair.more, pair.less, pair.unrelated)
    return Triple(pair.group, pair.bias_type, "BLANK", *sides, str(number), "intrasentence", pair.where)
