"""Area under the similarity curve: whether a model attends to words that resemble the sensitive ones.

CrAWD (5.4) takes AUSC from Haque et al. (2024) and prints no formula. The definition used here, for one text of n
tokens (special ones left out) and a list of reference words:

1. importance of token i: the attention of the deciding position (the first token of an encoder, the last of a causal
   model) to it in the last block, mean over heads: the attention-based explanation;
2. similarity of token i: the largest cosine between its input embedding and that of a reference word;
3. S(k) = mean similarity of the k most important tokens, k = 1..n: the similarity curve;
4. AUSC = mean of S(k) over k, the area under S against k/n. Higher: what the model looks at is nearer to the
   sensitive words. It lies between the smallest and the largest similarity.

A text full of such words has a high AUSC whatever the model looks at, so ``excess`` = AUSC - S(n) stands beside it:
0 where importance and similarity have nothing to do with each other.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from hooks.activations import capture
from hooks.batching import context_limit
from hooks.tokens import reads_whole
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.tokens import encode
from surgery.metrics.metric import Metric, mean_metric
from surgery.metrics.weat import embeddings
from surgery.progress import Advance

Values = Float[np.ndarray, " tokens"]


def curve(importance: Values, similarity: Values) -> Values:
    """S(k), k = 1..n: the mean ``similarity`` of the k most important tokens, the earlier one among equals."""
    order = np.argsort(-np.asarray(importance, dtype=float), kind="stable")
    ranked = np.asarray(similarity, dtype=float)[order]
    return ranked.cumsum() / np.arange(1, len(ranked) + 1)


def area(similarity_curve: Values) -> float:
    """AUSC: the area under the steps of S against k/n."""
    return float(np.mean(similarity_curve))


def score(
    importances: Sequence[Values], similarities: Sequence[Values], *, scorer: str, data: str
) -> dict[str, Metric]:
    """``{"ausc", "excess"}``: means over texts of ``area(curve(...))``, and of that less the text's mean similarity."""
    curves = [curve(i, s) for i, s in zip(importances, similarities, strict=True)]
    areas = np.array([area(each) for each in curves])
    plain = np.array([each[-1] for each in curves])
    return {
        "ausc": mean_metric(areas, scorer=f"AUSC, {scorer}", data=data, ideal=0.0, direction="lower"),
        "excess": mean_metric(
            areas - plain, scorer=f"AUSC less the mean similarity, {scorer}", data=data, ideal=0.0, direction="lower"
        ),
    }


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    reference: Sequence[str],
    *,
    data: str,
    query: Literal["first", "last"],
    step: Advance | None = None,
) -> dict[str, Metric]:
    """``score`` of ``texts`` against the ``reference`` words.

    ``query`` is the deciding position: ``first`` for a classifier that reads [CLS], ``last`` for a causal model.
    ``step`` is told of finished texts. Raises ``SurgeryError`` for no reference word, or a text without a token of
    its own, and ``HookError`` for a model without attention patterns.
    """
    if not reference:
        raise SurgeryError("AUSC: got no reference word, expected at least 1, such as he and she")
    words = embeddings(model, tokenizer, reference)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    weight: torch.Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    ids = encode(
        tokenizer,
        texts,
        limit=context_limit(model),
        closed=reads_whole(model),
    )
    special = set(tokenizer.all_special_ids)
    own = [[place for place, token in enumerate(row) if token not in special] for row in ids]
    empty = next((row for row, places in enumerate(own) if not places), None)
    if empty is not None:
        raise SurgeryError(f"AUSC: text {empty} ({texts[empty]!r}) has no token of its own; remove it")
    site = f"blocks.{len(anatomy.find(model).blocks) - 1}.attn.hook_pattern"
    importances: list[np.ndarray] = [np.empty(0)] * len(ids)
    similarities: list[np.ndarray] = [np.empty(0)] * len(ids)
    with evaluating(model):
        for rows in batches_for(model, ids):
            batch = pad(ids, rows, model.device)
            with capture(model, site) as store:
                model(**batch.inputs())
            pattern = store[site].float().mean(1)  # (batch, query, key), mean over heads
            for place, row in enumerate(rows):
                looked = pattern[place, 0 if query == "first" else len(ids[row]) - 1].double().cpu().numpy()
                importances[row] = looked[own[row]]
                vectors = weight[batch.ids[place]].double().cpu().numpy()[own[row]]
                norms = np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
                similarities[row] = (vectors / norms @ words.T).max(axis=1)
            if step:
                step(len(rows))
    scorer = f"attention of the {query} token in the last block, cosine of input embeddings to {', '.join(reference)}"
    return score(importances, similarities, scorer=scorer, data=f"{data}, {len(ids)} texts")
