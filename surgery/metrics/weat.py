"""WEAT (Caliskan et al. 2017) on a model's input embeddings, and on the contextual states of the same words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.tokens import word_pieces
from surgery.data.seat import WEAT, load
from surgery.errors import SurgeryError
from surgery.metrics.association import lookup, score, states, texts_of
from surgery.progress import Advance

CONTEXT = "This is {word}"


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    step: Advance | None = None,
    site: str | None = None,
) -> dict[str, Any]:
    """``{"embedding" | "context": {"gender" | "race" | "age": {test: {"effect_size", "p"}, "mean_abs": Metric}}}``.

    ``embedding``: a word is the mean of its tokens' input embeddings, written after a space. ``context``: it is the
    state of its last token at the end of ``CONTEXT``, in the last hidden states or at ``site``.
    CrAWD says neither which of the two it reports nor its words; these are Caliskan's. ``limit`` words of each set.
    """
    tests = {kind: [load(folder, name).sampled(limit, seed) for name in names] for kind, names in WEAT.items()}
    words = texts_of([test for group in tests.values() for test in group])
    contexts = [CONTEXT.format(word=word) for word in words]
    vectors = {
        "embedding": (embeddings(model, tokenizer, words), "mean input embedding of the word's tokens"),
        "context": (
            states(model, tokenizer, contexts, pool="last", site=site, step=step),
            f"last token of {CONTEXT.format(word='WORD')!r} at {site or 'the last hidden states'}",
        ),
    }
    return {
        name: {kind: score(group, lookup(words, found), scorer=scorer, seed=seed) for kind, group in tests.items()}
        for name, (found, scorer) in vectors.items()
    }


def embeddings(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> Float[np.ndarray, "words d"]:
    """The mean of each word's input embeddings, as it follows a space.

    Raises ``SurgeryError`` for a word that gives no token, or only the unknown one.
    """
    weight: Tensor = model.get_input_embeddings().weight.detach()  # type: ignore[operator]
    found = []
    for word in words:
        ids = word_pieces(tokenizer, word)
        if not ids or all(token == tokenizer.unk_token_id for token in ids):
            raise SurgeryError(
                f"WEAT word {word!r}: unknown to the tokenizer of {tokenizer.name_or_path or 'this model'}"
            )
        found.append(weight[torch.tensor(ids, device=weight.device)].double().mean(0).cpu().numpy())
    return np.stack(found)
