"""What is done with the sentences of a chunk: the loss of each, and how large and how steep each term is."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.edits.supervised import Row
from surgery.edits.unlearning import losses as equations
from surgery.edits.unlearning.batches import Item, other
from surgery.edits.unlearning.reference_logprobs import Reference, continuation_logp, head_at, places_of
from surgery.forward.batching import pad


@dataclass(frozen=True)
class Objective:
    """What is done with the sentences of each role; ``weights`` are Eq. 4's alphas by role."""

    weights: Mapping[str, float]
    forget: str = "npo"  # "npo" | "npo_batch" (the released code) | "ascent"
    beta: float = 0.1
    kl_direction: str = "forward"
    retain_by: str = (
        "sentence"  # "sentence": Eq. 2's cross-entropy summed over a sentence's tokens; "token": their mean
    )
    unit: str = "sum"
    """A sentence's log-probability in every loss but KL: "sum" over its learnt tokens as printed, or their "mean"."""
    prefer: str = "dpo"  # "dpo", or "margin": ``losses.preference`` with ``offsets``
    offsets: Sequence[float] = ()
    """Of each triple's margin; none: 0 of all."""
    ratio: float = 0.0
    """How steep what pushes ("forget", "prefer") is beside "retain": see ``push``. 0 leaves the weights as they are."""


def batch_losses(
    model: PreTrainedModel,
    module: nn.Module,
    items: Sequence[Item],
    rows: Sequence[Mapping[str, Row]],
    kept: Reference,
    objective: Objective,
) -> tuple[Float[Tensor, " items"], float]:
    """The unweighted loss of each item, from one padded forward pass; and the forget loss as a multiple of its start.

    The latter is the mean negative log-likelihood of the sentences to forget over the reference's of the same
    sentences: NPO itself stays bounded while a model collapses.
    """
    texts, first = _texts(items)
    unrelated = [item for item in items if item.role == "unrelated"]
    targeted = [rows[triple][side] for triple, side in texts]
    plain = [rows[item.triple][item.side] for item in unrelated]
    batch = pad([row.ids for row in (*targeted, *plain)], range(len(targeted) + len(plain)), model.device)
    width = batch.ids.shape[1]
    flat, owner = places_of(targeted, width)
    whole, owner_of_whole = places_of(plain, width, last=True)
    places = torch.tensor([*flat, *(len(targeted) * width + at for at in whole)], device=model.device)
    streams = torch.cat([kept.stream[item.triple] for item in unrelated]) if unrelated else None
    logits = head_at(model, module, batch, places, streams)
    logits = logits if logits.dtype == torch.float64 else logits.float()

    logp = continuation_logp(logits[: len(flat)], targeted, owner)
    tokens = logp.new_tensor([len(row.ids) - row.start for row in targeted])
    reference = logp.new_tensor([kept.logp.get(text, math.nan) for text in texts])
    if objective.unit == "mean":
        logp, reference, tokens = logp / tokens, reference / tokens, torch.ones_like(tokens)
    values, ratio = logp.new_zeros(len(items)), 0.0
    for role in {item.role for item in items}:
        mine = torch.tensor([n for n, item in enumerate(items) if item.role == role], device=logp.device)
        at = torch.tensor(first, device=logp.device)[mine]
        if role == "unrelated":
            each = equations.kl(logits[len(places) :], logits[len(flat) : len(places)], objective.kl_direction)
            index = torch.tensor(owner_of_whole, device=each.device)
            part = each.new_zeros(len(plain)).index_add(0, index, each) / each.new_tensor([len(r.ids) for r in plain])
        elif role == "prefer":
            if objective.prefer == "margin":
                offsets = objective.offsets or [0.0] * len(rows)
                offset = logp.new_tensor([offsets[item.triple] for item in items if item.role == role])
                part = equations.preference(logp[at + 1] - logp[at], objective.beta, offset)
            else:
                part = equations.dpo(logp[at], logp[at + 1], reference[at], reference[at + 1], objective.beta)
        elif role != "forget":
            part = equations.retention(logp[at], tokens[at] if objective.retain_by == "token" else None)
        elif objective.forget == "npo_batch":
            part = equations.npo_batch(-logp[at] / tokens[at], -reference[at] / tokens[at], objective.beta)
        else:
            part = equations.ascent(logp[at])
            if objective.forget == "npo":
                part = equations.npo(logp[at], reference[at], objective.beta)
        if role == "forget":
            ratio = float(logp[at].detach().sum() / reference[at].sum())
        values = values.index_copy(0, mine, part)
    return values, ratio


def _texts(items: Sequence[Item]) -> tuple[list[tuple[int, str]], list[int]]:
    """The sentences (triple, side) whose log-probability the items ask for, and where each item's begin among them."""
    texts: list[tuple[int, str]] = []
    first = []
    for item in items:
        first.append(len(texts))
        if item.role == "prefer":
            texts.append((item.triple, other(item.side)))
        if item.role != "unrelated":
            texts.append((item.triple, item.side))
    return texts, first


PUSHES = ("forget", "prefer")


def push(objective: Objective, gradients: Mapping[str, float]) -> float:
    """By what the weights of ``PUSHES`` are multiplied, given the norm of each role's gradient.

    So that the sum of the norms of their weighted gradients is ``objective.ratio`` times that of "retain".
    """
    sizes = {role: objective.weights[role] * norm for role, norm in gradients.items()}
    steep = sum(size for role, size in sizes.items() if role in PUSHES)
    return objective.ratio * sizes["retain"] / steep if steep else 1.0


ItemLosses = Callable[[Sequence[Item]], Float[Tensor, " items"]]


def gradients_of_terms(items: Sequence[Item], losses: ItemLosses, parameters: Sequence[Tensor]) -> dict[str, float]:
    """Of each role the norm of the gradient by ``parameters`` of its mean loss over ``items``, without its weight."""
    roles = list(dict.fromkeys(item.role for item in items))
    found: dict[str, float] = {}
    with torch.enable_grad():
        each = losses(items)
        for role in roles:
            mine = torch.tensor([place for place, item in enumerate(items) if item.role == role], device=each.device)
            mean = each[mine].mean()
            grads = torch.autograd.grad(mean, list(parameters), retain_graph=role != roles[-1], allow_unused=True)
            squares = [grad.double().square().sum() for grad in grads if grad is not None]
            found[role] = float(torch.stack(squares).sum().sqrt())
    return found
