"""The objectives whose gain is measured, as losses of the untouched model: of words after prompts, and of pairs."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.natural_gain import Objective
from surgery.catalogue import OBJECTIVES, PAIR_OBJECTIVES
from surgery.data.pairs import Pair
from surgery.edits.block import word_loss
from surgery.edits.equalize import Term, losses_untouched, words_term
from surgery.edits.equalize.pairs import pairs_term
from surgery.edits.equalize.terms import Target
from surgery.edits.unlearning.losses import dpo, npo
from surgery.errors import SurgeryError
from surgery.forward.batching import pad
from surgery.forward.residual_cache import shortcut
from surgery.forward.tokens import start_token


def term_objective(model: PreTrainedModel, term: Term) -> Objective:
    """The losses of the term's examples, as equalising ``model`` starts with them."""
    return lambda _, rows: losses_untouched(model, term, rows)


def words_objective(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], words: Sequence[int], name: str = "equalize"
) -> Objective:
    """The losses of the prompts ``ids``: equalise (the words' mass shared out equally), or LFTF's log form.

    Raises ``SurgeryError`` for another name.
    """
    if name == "equalize":
        return term_objective(model, words_term(ids, words))
    if name not in OBJECTIVES or name in PAIR_OBJECTIVES:
        raise SurgeryError(f"objective: got {name!r}, expected equalize or log for words after prompts")

    def losses(module: nn.Module, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        with shortcut(model, call=module) as run:
            return word_loss(run(pad(ids, rows, model.device)), words)

    return losses


def pairs_objective(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], name: str = "equalize"
) -> Objective:
    """The losses of the pairs: equalise (squared margin a token), npo of the stereotype, or dpo for the other side.

    The reference of npo and dpo is the model itself, as it is where training starts. Sentences are read with a start
    token where the tokenizer has one. Raises ``SurgeryError`` for another name, and as ``pairs_term`` does.
    """
    doses = dict.fromkeys((pair.bias_type for pair in pairs), 0.0)
    term = pairs_term(tokenizer, pairs, doses, starts=(start_token(tokenizer) is not None,))
    if name == "equalize":
        return term_objective(model, term)
    if name not in PAIR_OBJECTIVES:
        raise SurgeryError(f"objective: got {name!r}, expected equalize, {' or '.join(PAIR_OBJECTIVES)} for pairs")

    def loss(logits: Float[Tensor, "places vocab"], _: Target, rows: Sequence[int]) -> Float[Tensor, " examples"]:
        wanted = torch.tensor([token for row in rows for token in term.ids[row][1:]], device=logits.device)
        logs = logits.float().gather(1, wanted[:, None])[:, 0] - logits.float().logsumexp(-1)
        logp = torch.stack([piece.sum() for piece in logs.split([len(term.places[row]) for row in rows])])
        more, less = logp[::2], logp[1::2]
        if name == "npo":
            return npo(more, more.detach())
        return dpo(less, more, less.detach(), more.detach())

    return term_objective(model, replace(term, name=name, loss=loss))
