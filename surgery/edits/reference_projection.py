"""CrAWD's decay as a projection of what the head reads, off the rows of the reference words (ours, not the paper's)."""

from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import capture
from surgery.forward.batching import batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.tokens import Ids
from surgery.modules.projection import Projection


def reference_rows(model: PreTrainedModel, words: Sequence[int]) -> Float[Tensor, "rank d_model"]:
    """An orthonormal basis of the rows of ``words`` in the head, without the mean row, which moves all logits alike."""
    rows = cast(nn.Linear, model.get_output_embeddings()).weight.detach().float()
    basis, values, _ = torch.linalg.svd((rows[list(words)] - rows.mean(0)).T, full_matrices=False)
    return basis[:, values > 1e-5 * values.max()].T


@torch.no_grad()
def about_mean(model: PreTrainedModel, words: Sequence[int], ids: Ids, decay: float) -> Projection:
    """Of how far a state lies from the mean state along the rows of ``words``, 1 - decay goes.

    The mean is over all tokens of the texts ``ids``. Without it the projection also takes off what all states have in
    common along these rows, which moves every logit: on SmolLM2 that costs ten times the perplexity.
    """
    basis = reference_rows(model, words).cpu()
    part = (1 - decay) * basis.T
    return Projection(part.contiguous(), basis.contiguous(), part @ (basis @ _mean_state(model, ids)))


def _mean_state(model: PreTrainedModel, ids: Ids) -> Float[Tensor, " d_model"]:
    """Of what the head reads, over all tokens."""
    total, count = torch.zeros(()), 0
    with evaluating(model), capture(model, "ln_final.hook_out") as store:
        for chosen in batches_for(model, ids):
            batch = pad(ids, chosen, model.device)
            model(**batch.inputs(), use_cache=False)
            states = store["ln_final.hook_out"][batch.mask.bool()]
            total, count = total + states.double().sum(0).cpu(), count + len(states)
    return (total / count).float()
