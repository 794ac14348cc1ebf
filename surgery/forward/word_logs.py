"""Log-probabilities of a few words as the next token, without an array as large as the vocabulary where one can do."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor


def word_logs(logits: Float[Tensor, "batch vocab"], words: Sequence[int]) -> Float[Tensor, "batch words"]:
    """``logits.float().log_softmax(-1)[:, words]``, in float32 or wider; it can be differentiated once.

    The gradient of a word's log-probability by the logits is 1 at the word, minus the softmax: neither all
    log-probabilities nor a zero for every other token need be written, which is a tenth of a step of a last block.
    """
    wide: Tensor = logits.to(torch.promote_types(logits.dtype, torch.float32))
    found: Tensor = _WordLogs.apply(wide, list(words))
    return found


class _WordLogs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, words: list[int]) -> Tensor:
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total)
        ctx.words = words
        return logits[:, words] - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None]:
        logits, total = ctx.saved_tensors
        found = (logits - total).exp_().mul_(-given.sum(-1, keepdim=True))
        for place, word in enumerate(ctx.words):  # one by one: a word may be named twice
            found[:, word] += given[:, place]
        return found, None


PARTS = 16  # of a head, which threads may share; the same on every machine, so that its numbers are, too


def words_of_head(
    stream: Float[Tensor, "batch d_model"], weight: Float[Tensor, "vocab d_model"], words: Sequence[int]
) -> Float[Tensor, "batch words"]:
    """``word_logs(stream @ weight.T, words)`` for a ``weight`` that does not train; it can be differentiated once.

    The gradient at the stream is the words' rows of ``weight`` minus the mean of all rows under the softmax. That mean
    is attention with ``weight`` as keys and values, so torch's flash attention (Dao et al. 2022, algorithm 1) gives it:
    512 rows at a time, both products of which find them in the cache, and no logits are kept.
    """
    found: Tensor = _WordsOfHead.apply(stream, weight, list(words))
    return found


def _attended(
    stream: Tensor, weight: Tensor
) -> tuple[Float[Tensor, "part batch d_model"], Float[Tensor, "part batch"]]:
    """The mean of the rows of each part of ``weight`` under the softmax of their logits, and the log of their sum."""
    least = len(weight) // PARTS
    means, totals = [], []
    for rows in weight.split(max(1, least * PARTS)):  # the second, where there is one, has fewer than PARTS rows
        parts = rows[None].unflatten(1, (PARTS if len(rows) >= PARTS else 1, -1))
        query = stream[None, None].expand(1, parts.shape[1], -1, -1)
        mean, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, parts, parts, scale=1.0)
        means.append(mean[0])
        totals.append(total[0])
    return torch.cat(means), torch.cat(totals)


class _WordsOfHead(torch.autograd.Function):
    """In full precision under autocast, too."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, stream: Tensor, weight: Tensor, words: list[int]) -> Tensor:
        means, totals = _attended(stream, weight)
        total, chosen = totals.logsumexp(0), weight[words]
        mean = ((totals - total).exp()[..., None] * means).sum(0)
        ctx.save_for_backward(chosen, mean)
        return stream @ chosen.T - total[:, None]

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        chosen, mean = ctx.saved_tensors
        return given @ chosen - given.sum(-1, keepdim=True) * mean, None, None
