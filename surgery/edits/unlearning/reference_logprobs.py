"""One forward pass in which only the wanted positions go through the head, and the reference that is kept of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.edits.supervised import Row
from surgery.edits.unlearning.encoding import UNRELATED
from surgery.forward.batching import Batch, batches_for, pad
from surgery.forward.token_logprobs import token_log_probabilities
from surgery.progress import Advance


def head_at(
    model: PreTrainedModel,
    module: nn.Module,
    batch: Batch,
    places: Int[Tensor, " k"],
    extra: Float[Tensor, "e d_model"] | None = None,
) -> Float[Tensor, "k+e vocab"]:
    """Logits at ``places`` of the flattened batch, and behind them those of the head inputs ``extra``.

    The model's own forward pass runs (``module``: the model, or a wrapper around it), with the head's input cut to
    what is wanted, so that whatever a family does to its logits (a scale, a soft cap) is done here too.
    """

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        chosen = args[0].flatten(0, 1)[places]
        if extra is not None:
            chosen = torch.cat([chosen, extra.to(chosen.dtype)])
        return (chosen[None], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        return module(**batch.inputs(), use_cache=False).logits[0]
    finally:
        hook.remove()


def head_inputs(model: PreTrainedModel, batch: Batch, places: Int[Tensor, " k"]) -> Float[Tensor, "k d_model"]:
    """What enters the head at ``places`` of the flattened batch; the head itself does one position."""
    seen: list[Tensor] = []

    def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0].flatten(0, 1)[places])
        return (args[0][:1, :1], *args[1:])

    hook = model.get_output_embeddings().register_forward_pre_hook(cut)
    try:
        model(**batch.inputs(), use_cache=False)
    finally:
        hook.remove()
    return seen[0]


def places_of(rows: Sequence[Row], width: int, *, last: bool = False) -> tuple[list[int], list[int]]:
    """Flat positions in the padded batch of ``rows`` that predict their targets, and whose row each is.

    With ``last`` the position of each row's last token is one of them, although nothing follows it.
    """
    flat, owner = [], []
    for number, row in enumerate(rows):
        begin = number * width
        for at in range(row.start - 1, len(row.ids) - (not last)):
            flat.append(begin + at)
            owner.append(number)
    return flat, owner


def continuation_logp(
    logits: Float[Tensor, "k vocab"], rows: Sequence[Row], owner: Sequence[int]
) -> Float[Tensor, " rows"]:
    """Summed log-probability (nats) of each row's targets; ``logits`` and ``owner`` as from ``places_of``."""
    targets = torch.tensor([token for row in rows for token in row.ids[row.start :]], device=logits.device)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    each = logits.gather(1, targets[:, None])[:, 0] - logits.logsumexp(-1)
    index = torch.tensor(owner, device=logits.device)
    return each.new_zeros(len(rows)).index_add(0, index, each)


@dataclass(frozen=True)
class Reference:
    """What is kept of the frozen model: no second one is needed while training.

    ``logp``: the summed log-probability of each forgettable sentence. ``stream``: of each unrelated sentence the head's
    input at every token. The head does not train, so that this gives the reference's whole distribution again for
    one product with the head, at 1/85 (SmolLM2) to 1/400 (Gemma 3) of the memory of the logits.
    """

    logp: dict[tuple[int, str], float]
    stream: dict[int, Float[Tensor, "tokens d_model"]]


@torch.no_grad()
def reference(
    model: PreTrainedModel,
    rows: Sequence[Mapping[str, Row]],
    sentences: Iterable[tuple[int, str]],
    unrelated: Iterable[int],
    *,
    step: Advance | None = None,
) -> Reference:
    """Run ``model``, in which nothing has trained yet, over ``sentences`` (triple, side) and ``unrelated`` (triple).

    Raises ``SurgeryError`` when a log-probability is not finite.
    """
    wanted, whole = sorted(set(sentences)), sorted(set(unrelated))
    given = [rows[triple][side] for triple, side in wanted]
    found = token_log_probabilities(model, [row.ids for row in given], starts=[row.start for row in given], step=step)
    streams: dict[int, Tensor] = {}
    plain = [rows[triple][UNRELATED] for triple in whole]
    for chosen in batches_for(model, [row.ids for row in plain]):
        batch = pad([row.ids for row in plain], chosen, model.device)
        mine = [plain[n] for n in chosen]
        flat, owner = places_of(mine, batch.ids.shape[1], last=True)
        pieces = head_inputs(model, batch, torch.tensor(flat, device=model.device)).split(
            [owner.count(n) for n in range(len(mine))]
        )
        streams.update(zip((whole[n] for n in chosen), (piece.clone() for piece in pieces), strict=True))
        if step:
            step(len(chosen))
    return Reference({text: float(logs.sum()) for text, logs in zip(wanted, found, strict=True)}, streams)
