"""CAFIE (Banerjee et al. 2024): each next token is compared with what the model says of the other group; no edit.

A second pass reads the text with its group words exchanged (he and she, son and daughter). What is likelier in the
text as it stands than in its counterfactual is made less likely, and the other way round. Where a text names no group
nothing changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.logit_difference import forward_as
from hooks.tokens import word_pieces
from surgery.errors import SurgeryError

STRENGTH, SHARE = 1000.0, 0.99  # lambda and alpha of the authors' StereoSet script
PAIRS = (
    ("he", "she"), ("him", "her"), ("his", "her"), ("himself", "herself"), ("man", "woman"), ("men", "women"),
    ("boy", "girl"), ("boys", "girls"), ("father", "mother"), ("son", "daughter"), ("brother", "sister"),
    ("husband", "wife"), ("uncle", "aunt"), ("male", "female"), ("gentleman", "lady"), ("king", "queen"),
    ("grandfather", "grandmother"), ("nephew", "niece"), ("actor", "actress"), ("waiter", "waitress"), ("Mr", "Mrs"),
)  # fmt: skip


def fair(
    plain: Float[Tensor, "*rows vocab"], other: Float[Tensor, "*rows vocab"], strength: float, share: float
) -> Float[Tensor, "*rows vocab"]:
    """Log-probabilities from the logits of a text and of its counterfactual (the authors' ``calculate_new_pdf``).

    p' = share p (1 - tanh(strength (p - q))) + (1 - share) p, made to add up to 1 again.
    """
    p, q = plain.softmax(-1), other.softmax(-1)
    weighted = share * p * (1 - torch.tanh(strength * (p - q))) + (1 - share) * p
    return (weighted / weighted.sum(-1, keepdim=True)).log()


def swaps(tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]] = PAIRS) -> dict[int, int]:
    """Token to token, both ways: of each word that is one token, at a sentence's beginning and inside it.

    "her" stands for both "him" and "his"; it becomes the first of them that is one token. Raises ``SurgeryError`` where
    no pair is one token each.
    """
    found: dict[int, int] = {}
    for pair in pairs:
        for spell in (str, str.capitalize):
            for pieces in (word_pieces, _at_start):
                one, two = (pieces(tokenizer, spell(word)) for word in pair)
                if len(one) == len(two) == 1 and tokenizer.unk_token_id not in (*one, *two):
                    found.setdefault(one[0], two[0])
                    found.setdefault(two[0], one[0])
    if not found:
        raise SurgeryError("cafie: the tokenizer has no pair of group words of one token each; expected he and she")
    return found


@contextmanager
def counterfactual(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    strength: float = STRENGTH,
    share: float = SHARE,
    pairs: Sequence[tuple[str, str]] = PAIRS,
) -> Iterator[None]:
    """Inside, ``model(...)`` gives CAFIE's log-probabilities as its logits; afterwards it is as before.

    What differs from the authors: one counterfactual (their third list repeats the second), only words of one token,
    and at every position. Cached keys are refused, since they are of one text alone.

    Raises ``SurgeryError`` as ``swaps``, and from a call without ``input_ids`` or with cached keys.
    """
    table = torch.arange(cast(Tensor, model.get_input_embeddings().weight).shape[0])
    for one, two in swaps(tokenizer, pairs).items():
        table[one] = two
    plain = model.forward

    def forward(*args: Any, **inputs: Any) -> Any:
        ids: Int[Tensor, "batch pos"] | None = inputs.get("input_ids")
        if ids is None or args or inputs.get("past_key_values") is not None:
            raise SurgeryError(
                "cafie: the model was called without input_ids by name, or with cached keys; expected the whole text, "
                "use_cache=False"
            )
        found = plain(**inputs)
        other = plain(**inputs | {"input_ids": table.to(ids.device)[ids]})
        found.logits = fair(found.logits.float(), other.logits.float(), strength, share)
        return found

    with forward_as(model, forward):
        yield


def _at_start(tokenizer: PreTrainedTokenizerBase, word: str) -> tuple[int, ...]:
    return tuple(tokenizer(word, add_special_tokens=False)["input_ids"])
