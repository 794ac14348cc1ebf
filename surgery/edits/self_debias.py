"""Self-Debias (Schick et al. 2021): decoding that avoids what a prompt for discrimination makes likelier; no edit.

The model is asked twice, with and without such a prompt before the text. It is the control that costs no training
and two passes at every use.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.tokens import ids_of, text_tokens
from surgery.catalogue import check_scorer
from surgery.data.stereoset import Triples
from surgery.edits.supervised import Row
from surgery.edits.unlearning.reference_logprobs import head_at, places_of
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, pad
from surgery.forward.token_logprobs import evaluating
from surgery.metrics.sentences import DEFINITIONS, fitting, per_token, pooled, start_token
from surgery.metrics.stereoset import score
from surgery.progress import Advance

PROMPT = "The following text discriminates against people because of their {bias_type}:\n"
"""Schick et al. 2021, section 5.1, and bias-bench."""
DECAY, EPSILON = 50.0, 0.01  # their lambda, and the least factor of a token


def adjusted(
    plain: Float[Tensor, "tokens vocab"],
    prompted: Float[Tensor, "tokens vocab"],
    *,
    decay: float = DECAY,
    epsilon: float = EPSILON,
) -> Float[Tensor, "tokens vocab"]:
    """Log-probabilities of the debiased distribution from two sets of logits (their Eq. 2-4).

    p'(w) is proportional to alpha(delta(w)) p(w), with delta = p(w) - p(w | prompt) and alpha(x) = 1 for x >= 0, else
    exp(decay x), at least ``epsilon``.
    """
    p = plain.softmax(-1)
    delta = p - prompted.softmax(-1)
    weighted = p * torch.where(delta >= 0, 1.0, (decay * delta).exp()).clamp(min=epsilon)
    return (weighted / weighted.sum(-1, keepdim=True)).log()


@torch.no_grad()
def sentence_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    prompts: Sequence[str],
    *,
    scorer: str = "bias-bench",
    decay: float = DECAY,
    step: Advance | None = None,
) -> list[Float[np.ndarray, " tokens"]]:
    """``surgery.metrics.sentences.sentence_tokens`` under the debiased distribution; one prompt a sentence.

    What stands before a sentence in the plain pass is the scorer's; in the prompted pass it is the prompt.
    Raises ``SurgeryError`` for an unknown scorer.
    """
    check_scorer(scorer)
    start = DEFINITIONS[scorer].start
    first = [] if start == "none" else [start_token(tokenizer, scorer)]
    before = first if start == "before" else []
    coded = ids_of(tokenizer, sentences)
    every = list(dict.fromkeys(prompts))
    asked = dict(zip(every, text_tokens(tokenizer, every), strict=True))
    # What each pass predicts of a sentence: all its tokens, or those behind the first where nothing stands before it.
    plain = [Row((*before, *ids), 1) for ids in coded]
    prompted = [
        Row((*asked[prompt], *ids), len(asked[prompt]) + (start == "none"))
        for ids, prompt in zip(coded, prompts, strict=True)
    ]
    found: list[Any] = [None] * len(coded)
    # Two sets of logits and what is made of them: 128 MB each in float32.
    budget = max(64, 2**25 // model.get_output_embeddings().weight.shape[0])
    with evaluating(model):
        alone = _logits(model, [Row((*first, 0), 1)])[0] if start == "alone" else None
        for chosen in batches_for(model, [row.ids for row in prompted], tokens=budget):
            usual = _logits(model, [plain[n] for n in chosen])
            if alone is not None:  # the first token's distribution is that after the start token
                usual = [torch.cat([alone, piece]) for piece in usual]
            for n, one, two in zip(chosen, usual, _logits(model, [prompted[n] for n in chosen]), strict=True):
                row = prompted[n]
                targets = torch.tensor(row.ids[row.start :], device=one.device)
                found[n] = adjusted(one, two, decay=decay).gather(1, targets[:, None])[:, 0].double().cpu().numpy()
            if step:
                step(len(chosen))
    return found


def evaluate_triples(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    triples: Triples,
    *,
    scorer: str = "bias-bench",
    step: Advance | None = None,
) -> dict[str, Any]:
    """``surgery.metrics.stereoset.evaluate_triples`` of intrasentence triples, each under its bias type's prompt.

    Those too long for the model with the prompt before them are skipped, and are reasons under ``"skipped"``.

    Raises ``SurgeryError`` for intersentence triples, whose context the prompt would not reach.
    """
    other = next((row.where for row in triples.rows if row.kind != "intrasentence"), None)
    if other is not None:
        raise SurgeryError(f"{other}: an intersentence row; Self-Debias is scored on intrasentence rows; leave it out")
    asked = [[PROMPT.format(bias_type=row.bias_type) + text for text in row.sentences] for row in triples.rows]
    kept, long = fitting(model, tokenizer, asked, [row.where for row in triples.rows])
    used = Triples(tuple(triples.rows[row] for row in kept), (*triples.skipped, *long), triples.name)
    sentences = [text for row in used.rows for text in row.sentences]
    prompts = [PROMPT.format(bias_type=row.bias_type) for row in used.rows for _ in row.sentences]
    logs = sentence_tokens(model, tokenizer, sentences, prompts, scorer=scorer, step=step)
    values, means = pooled(logs, DEFINITIONS[scorer].pool).reshape(-1, 3), per_token(logs).reshape(-1, 3)
    name, margins = f"{scorer} under Self-Debias", means[:, 0] - means[:, 1]
    found: dict[str, Any] = score(used, values, data=used.name, scorer=name, margins=margins)
    return found | ({"skipped": list(used.skipped)} if used.skipped else {})


def _logits(model: PreTrainedModel, rows: Sequence[Row]) -> list[Float[Tensor, "tokens vocab"]]:
    """Of each row the logits that predict its tokens from its start on."""
    batch = pad([row.ids for row in rows], range(len(rows)), model.device)
    flat, _ = places_of(rows, batch.ids.shape[1])
    logits = head_at(model, model, batch, torch.tensor(flat, dtype=torch.long, device=model.device)).float()
    return list(logits.split([len(row.ids) - row.start for row in rows]))
