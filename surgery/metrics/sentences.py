"""How likely a causal language model finds a sentence: one number a sentence, by scorers that each have a name.

One model under six scorers ranged from 49.7 to 65.0 on the same triples, so the scorer's name stands with every
number. All come from the same token log-probabilities; they differ in what stands before the first token and in how
a sentence's tokens become one number.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.errors import Note
from hooks.tokens import ids_of
from surgery.catalogue import check_scorer
from surgery.errors import SurgeryError
from surgery.forward import tokens
from surgery.forward.token_logprobs import summed, token_log_probabilities
from surgery.metrics.metric import Metric, mean_metric
from surgery.processes import together
from surgery.progress import Advance, in_proportion


@dataclass(frozen=True)
class Scorer:
    """What a sentence score is.

    ``start``: the start token "alone" predicts the first token and is not seen by the others; stands "before" the
    whole sentence; or there is "none", and the first token is not scored. ``pool``: the "geometric" or "arithmetic"
    mean of the token probabilities, or the "sum" of their natural logs.
    """

    start: Literal["alone", "before", "none"]
    pool: Literal["geometric", "arithmetic", "sum"]


DEFINITIONS = {
    "bias-bench": Scorer("alone", "geometric"),
    "bos": Scorer("before", "geometric"),
    "sum": Scorer("before", "sum"),
    "legacy-biasedit": Scorer("none", "arithmetic"),
    "no-start": Scorer("none", "geometric"),
    "no-start-sum": Scorer("none", "sum"),
}


def sentence_scores(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    scorer: str = "bias-bench",
    contexts: Sequence[str] | None = None,
    step: Advance | None = None,
) -> Float[np.ndarray, " sentences"]:
    """One score a sentence; higher is likelier. Probabilities, but natural logs where the scorer is a sum.

    - ``bias-bench`` (Meade et al. 2022, after Nadeem et al. 2021; used by BiasUnlearn): 2^(mean log2 p), the
      geometric mean of the token probabilities. The first token's is that after a start token alone; the others are
      computed WITHOUT a start token in the context.
    - ``bos``: the same mean, with the start token before the whole sentence.
    - ``sum`` (lm-eval): summed log p with the start token before the whole sentence; longer sentences score lower.
    - ``legacy-biasedit`` (released code of BiasEdit and EditBias): the arithmetic mean of the token probabilities.
      One easy token outweighs the rest, which pulls SS towards 50; for comparison with their tables only.
    - ``no-start``: geometric mean without a start token, the first token unscored.
    - ``no-start-sum``: summed log p of the same tokens.

    The start token is the tokenizer's BOS, or EOS where it has none (GPT-2's are one). ``contexts`` (one a sentence,
    of StereoSet's intersentence task) stand before the sentence with a space between; only the sentence's tokens
    are scored, given the context.

    Raises ``SurgeryError`` for an unknown scorer, a tokenizer without BOS and EOS where a start token is needed, and
    a text longer than the model's context.
    """
    logs = sentence_tokens(model, tokenizer, sentences, scorer=scorer, contexts=contexts, step=step)
    return pooled(logs, DEFINITIONS[scorer].pool)


def pooled(logs: Sequence[Float[np.ndarray, " tokens"]], pool: str) -> Float[np.ndarray, " sentences"]:
    """The token log-probabilities (nats) of each sentence as one number: see ``Scorer.pool``."""
    if pool == "sum":
        return summed(logs)
    if pool == "arithmetic":
        return per_token([np.exp(values) for values in logs])
    return np.exp(per_token(logs))


def per_token(logs: Sequence[Float[np.ndarray, " tokens"]]) -> Float[np.ndarray, " sentences"]:
    """The mean token log-probability (nats) of each sentence."""
    return summed(logs) / np.array([len(values) for values in logs])


def margin_metric(
    margins: Float[np.ndarray, " rows"],
    *,
    scorer: str,
    data: str,
    weights: Float[np.ndarray, " rows"] | None = None,
    groups: np.ndarray | None = None,
) -> Metric:
    """Mean |margin|, ideal 0: how strongly either sentence is preferred, whichever it is.

    A score that counts signs is at its ideal also where every preference is as strong as before and half of them
    point the other way. ``margins``: mean token log-probability of a row's first sentence minus the second's (nats).
    """
    return mean_metric(
        np.abs(margins),
        scorer=f"mean |margin| per token (nats), {scorer}",
        data=data,
        ideal=0.0,
        direction="lower",
        weights=weights,
        groups=groups,
    )


def sentence_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    *,
    scorer: str = "bias-bench",
    contexts: Sequence[str] | None = None,
    step: Advance | None = None,
) -> list[Float[np.ndarray, " tokens"]]:
    """The natural log-probabilities of the tokens that ``scorer`` scores, sentence by sentence; raises as above."""
    check_scorer(scorer)
    start = DEFINITIONS[scorer].start
    if start != "before" and tokens.leaves_out_start(tokenizer):
        warnings.warn(
            f"scorer {scorer!r} leaves out the start token ({tokenizer.bos_token}) that this model's tokenizer puts "
            "before every text; scorer 'bos' keeps it",
            Note,
            stacklevel=2,
        )
    before = [] if start == "none" else [start_token(tokenizer, scorer)]
    rows, firsts = _encoded(model, tokenizer, sentences, contexts, before if start == "before" else [])
    places = [max(1, first) for first in firsts]
    if start == "alone":
        # One distribution serves every sentence: that of the token after the start token.
        heads = sorted({ids[0] for ids, first in zip(rows, firsts, strict=True) if first == 0})
        later = [row for row, (ids, place) in enumerate(zip(rows, places, strict=True)) if len(ids) > place]
        found = token_log_probabilities(
            model,
            [*([*before, head] for head in heads), *(rows[row] for row in later)],
            starts=[*(1 for _ in heads), *(places[row] for row in later)],
            step=step and in_proportion(step, len(heads) + len(later), len(rows)),
        )
        alone = dict(zip(heads, found, strict=False))
        logs = dict(zip(later, found[len(heads) :], strict=True))
        none = np.empty(0)
        return [
            np.concatenate([alone[ids[0]] if first == 0 else none, logs.get(row, none)])
            for row, (ids, first) in enumerate(zip(rows, firsts, strict=True))
        ]
    short = [row for row, (ids, place) in enumerate(zip(rows, places, strict=True)) if len(ids) <= place]
    if short:
        raise SurgeryError(
            f"sentence {short[0]} ({sentences[short[0]]!r}) is one token, which scorer {scorer!r} does not score"
        )
    return token_log_probabilities(model, rows, starts=places, step=step)


def start_token(tokenizer: PreTrainedTokenizerBase, scorer: str) -> int:
    """The token that stands for the beginning of a text: BOS, else EOS.

    Raises ``SurgeryError`` for a tokenizer with neither.
    """
    found = tokens.start_token(tokenizer)
    if found is None:
        raise SurgeryError(
            f"tokenizer {tokenizer.name_or_path or type(tokenizer).__name__}: it has neither BOS nor EOS, and scorer "
            f"{scorer!r} starts a sentence with one; set tokenizer.bos_token, or use scorer 'no-start'"
        )
    return found


def fitting(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]], places: Sequence[str]
) -> tuple[list[int], list[str]]:
    """The numbers of the rows whose texts all fit into the model's context after a start token.

    And a line for each other row: its file and line (from ``places``) and how long it is. Raises ``SurgeryError``
    where none fits.
    """
    limit = context_limit(model)
    texts = [text for row in rows for text in row]
    counts = iter(together(texts, lambda some: [len(ids) for ids in ids_of(tokenizer, some)]))
    lengths = [1 + max(next(counts) for _ in row) for row in rows]
    kept = [number for number, length in enumerate(lengths) if not limit or length <= limit]
    out = [
        f"{place}: {length} tokens with a start token, the model takes {limit}"
        for place, length in zip(places, lengths, strict=True)
        if limit and length > limit
    ]
    if not kept:
        raise SurgeryError(f"no row fits into the context of {type(model).__name__}: {out[0]}; use a longer context")
    return kept, out


def _encoded(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sentences: Sequence[str],
    contexts: Sequence[str] | None,
    before: list[int],
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each text and the place of the first token to score; without the tokenizer's own specials."""
    texts = list(sentences) if contexts is None else [f"{a} {b}" for a, b in zip(contexts, sentences, strict=True)]
    if not texts:
        raise SurgeryError("sentences: got none, expected at least 1")
    rows = [[*before, *ids] for ids in together(texts, partial(ids_of, tokenizer))]
    firsts = [len(before)] * len(rows)
    if contexts is not None:
        given = [[*before, *ids] for ids in together(contexts, partial(ids_of, tokenizer))]
        # A token across the border belongs to the sentence: the common beginning ends before it.
        firsts = [_common(ids, context) for ids, context in zip(rows, given, strict=True)]
    limit = context_limit(model)
    for number, (ids, first) in enumerate(zip(rows, firsts, strict=True)):
        if len(ids) <= first:
            raise SurgeryError(f"sentence {number} ({sentences[number]!r}) gives no token; remove it")
        if limit and len(ids) > limit:
            raise SurgeryError(
                f"sentence {number} ({texts[number][:40]!r}...): {len(ids)} tokens, the model takes {limit}; shorten it"
            )
    return rows, firsts


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    length = 0
    while length < min(len(one), len(other)) and one[length] == other[length]:
        length += 1
    return length
