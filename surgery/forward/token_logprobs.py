"""Log-probabilities of the tokens of many sequences, each shared beginning encoded once.

Sequences that begin alike share a stem (``surgery.forward.trees``). A sequence's last token is only predicted and
never run, and only tokens whose successor is asked for go through the head.

Architectures where a mask cannot say who sees whom (recurrent layers, biases by distance, sliding windows shorter
than a sequence) are found by comparison and run one sequence a row.
"""

import warnings
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hooks import anatomy
from hooks.batching import context_limit
from hooks.errors import Note
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, logit_budget, sent
from surgery.forward.evaluation import evaluating
from surgery.forward.trees import PACK, Ids, Pack, Plan, filled, plans, sees, why_no_trees
from surgery.processes import dealt, joined, together
from surgery.progress import Advance

CPU_TOKENS, CARD_TOKENS = 2048, 4096  # of a batch: on one H100 as quick as 16384, and shared out more evenly
PLANNED = 2048  # sequences that are laid into trees together: those that begin alike mostly are neighbours
LAST, LAST_TOKENS = 4, 1024  # how many batches are cut into smaller ones, which are dealt last


def token_log_probabilities(
    model: PreTrainedModel,
    rows: Ids,
    *,
    starts: Sequence[int] | None = None,
    size: int = PACK,
    share: bool = True,
    step: Advance | None = None,
) -> list[Float[np.ndarray, " tokens"]]:
    """For each sequence the natural log of P(token | all tokens before it), of its tokens from ``starts[i]`` on.

    ``starts`` defaults to 1: every token that has one before it. Softmax over the full vocabulary, in float32.
    ``size`` is how many tokens a tree has at most; without ``share`` nothing but equal sequences is run together.
    ``step`` is told of finished sequences. The model is in evaluation mode inside and as it was afterwards.

    Raises ``SurgeryError`` for a sequence with nothing to predict, one longer than the model's context, and values
    that are not finite.
    """
    _head(model)
    starts = [1] * len(rows) if starts is None else list(starts)
    limit = context_limit(model)
    for row, (ids, start) in enumerate(zip(rows, starts, strict=True)):
        if not 1 <= start < len(ids):
            raise SurgeryError(
                f"sequence {row}: token {start} of {len(ids)} is asked for; expected 1 to {len(ids) - 1}"
            )
        if limit and len(ids) > limit:
            raise SurgeryError(f"sequence {row}: {len(ids)} tokens, the model takes {limit}; shorten or remove it")
    offsets = np.cumsum([0, *(len(ids) - start for ids, start in zip(rows, starts, strict=True))])
    with evaluating(model):
        reason = why_no_trees(model, max(map(len, rows))) if share and len(rows) > 1 else None
        if reason:
            said = f"{type(model).__name__}: shared beginnings are encoded each time: {reason}"
            warnings.warn(said, Note, stacklevel=2)
        found = _run(model, rows, starts, offsets, _size(model, size), shared=share and reason is None, step=step)
    if not np.isfinite(found).all():
        broken = np.searchsorted(offsets, np.flatnonzero(~np.isfinite(found))[0], side="right") - 1
        raise SurgeryError(
            f"{type(model).__name__}: log-probabilities of sequence {broken} are not finite; the weights or the dtype "
            f"({model.dtype}) are broken, try float32"
        )
    return [found[begin:end] for begin, end in pairwise(offsets.tolist())]


def continuation_probabilities(
    model: PreTrainedModel, prompts: Ids, words: Ids, *, step: Advance | None = None
) -> Float[np.ndarray, "prompts words"]:
    """P(word | prompt) of words of any number of tokens: exp of the summed log-probability of the word's tokens.

    ``step`` is told of finished prompts. Raises ``SurgeryError`` as ``token_log_probabilities`` does.
    """
    rows = [(*prompt, *word) for prompt in prompts for word in words]
    starts = [len(prompt) for prompt in prompts for _ in words]
    found = token_log_probabilities(model, rows, starts=starts)
    if step:
        step(len(prompts))
    return np.exp(summed(found)).reshape(len(prompts), len(words))


def summed(logs: Sequence[Float[np.ndarray, " tokens"]]) -> Float[np.ndarray, " sequences"]:
    """The log-probability of each sequence: the sum of those of its tokens, of which each has at least one."""
    if not logs:
        return np.empty(0)
    return np.add.reduceat(np.concatenate(logs), np.cumsum([0, *map(len, logs[:-1])]))


def _run(
    model: PreTrainedModel,
    rows: Ids,
    starts: Sequence[int],
    offsets: Int[np.ndarray, " sequences+1"],
    size: int,
    *,
    shared: bool,
    step: Advance | None = None,
) -> Float[np.ndarray, " tokens"]:
    """The values of all sequences, each from its entry of ``offsets`` on, shared over the processes."""
    found, where, values = np.zeros(offsets[-1]), [], []
    for planned in dealt(_batches(model, _planned(rows, starts, size=size, shared=shared))):
        batch = [filled(rows, starts, each.rows) for each in planned]
        width = max(len(pack.ids) for pack in batch)
        wanted = [
            (place * width + node, token, offsets[row] + at)
            for place, pack in enumerate(batch)
            for node, token, row, at in pack.wanted
        ]
        nodes, tokens, places = np.array(wanted).T
        index, inverse = np.unique(nodes, return_inverse=True)
        logits = _logits(model, batch, width, index, shared=shared)
        # A few rows at a time: their float32 copy stays small, and on a CPU in the cache.
        wide = torch.promote_types(logits.dtype, torch.float32)
        totals = torch.cat([few.to(wide).logsumexp(-1) for few in logits.split(64)])
        chosen, token = sent(np.stack([inverse, tokens]), logits.device)
        values.append((logits[chosen, token].to(wide) - totals[chosen]).double())
        where.append(places)
        if step:
            step(sum(len(pack.rows) for pack in batch))
    if values:  # read at the end: an accelerator works on while the next batch is laid out
        found[np.concatenate(where)] = torch.cat(values).cpu().numpy()
    return joined(found) if len(rows) else found


def _planned(rows: Ids, starts: Sequence[int], *, size: int, shared: bool) -> list[Plan]:
    """The trees of all sequences; of so many that each process can lay out a share, ``PLANNED`` are looked at alone."""

    def laid_out(firsts: Sequence[int]) -> list[list[Plan]]:
        parts = [(rows[first : first + PLANNED], starts[first : first + PLANNED]) for first in firsts]
        return [plans(*part, size=size, shared=shared) for part in parts]

    firsts = range(0, len(rows), PLANNED)
    found = together(firsts, laid_out) if len(firsts) > 1 else laid_out(firsts)
    return [
        each._replace(rows=[first + row for row in each.rows])
        for first, every in zip(firsts, found, strict=True)
        for each in every
    ]


def _head(model: PreTrainedModel) -> str:
    if not model.can_generate() or model.config.is_encoder_decoder:
        raise SurgeryError(f"{type(model).__name__}: expected a causal language model with its head; open one")
    found = anatomy.find(model).head
    if found is None:
        raise SurgeryError(f"{type(model).__name__}: the module of its head could not be found; open another model")
    return found


def _size(model: PreTrainedModel, size: int) -> int:
    """Tokens of a tree; some architectures keep a mask as wide as their context and take no wider row."""
    return min(size, context_limit(model) or size)


def _batches(model: PreTrainedModel, every: list[Plan]) -> list[list[Plan]]:
    """Trees of like size, as many as the budget of logits allows and the model takes at once; small batches last."""
    longest_first = sorted(every, key=lambda each: -each.nodes)
    # Only some tokens go through the head: few of prompts with their options, most of sentences.
    read = sum(each.read for each in every)
    share = read / sum(each.nodes for each in every) if read else 1.0
    most = CPU_TOKENS if model.device.type == "cpu" else CARD_TOKENS
    tokens = min(most, int(logit_budget(model) / share))
    groups = _grouped(model, longest_first, tokens)
    few = [each for group in groups[:LAST] for each in group]
    if len(groups) > LAST:  # every process then ends at about the same time
        groups = _grouped(model, few, min(tokens, LAST_TOKENS)) + groups[LAST:]
    return groups[::-1]


def _grouped(model: PreTrainedModel, every: list[Plan], tokens: int) -> list[list[Plan]]:
    groups = batches_for(model, [range(each.nodes) for each in every], tokens=tokens)
    return [[every[place] for place in group] for group in groups]


def _logits(
    model: PreTrainedModel, batch: list[Pack], width: int, index: Int[np.ndarray, " nodes"], *, shared: bool
) -> Float[Tensor, "nodes vocab"]:
    """The logits of the nodes ``index`` of the flattened batch; nothing else goes through the head."""
    device, dtype = model.device, model.dtype
    # Padded on the right, where no causal model looks.
    inputs = {"input_ids": sent([pack.ids + [0] * (width - len(pack.ids)) for pack in batch], device)}
    if shared:
        seen = sees(batch, width, device)
        closed = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
        depths = [pack.depths + [0] * (width - len(pack.ids)) for pack in batch]
        inputs |= {"attention_mask": closed[:, None], "position_ids": sent(depths, device)}
    where = sent(index, device)

    def cut(_: torch.nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].flatten(0, 1)[where.to(args[0].device)], *args[1:])

    handle = model.get_submodule(_head(model)).register_forward_pre_hook(cut)
    try:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits.to(device)
    finally:
        handle.remove()
