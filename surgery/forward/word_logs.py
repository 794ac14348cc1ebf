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


ROWS = 4096  # of a head that are multiplied at a time: more are slower to read again, fewer cost calls


def words_of_head(
    stream: Float[Tensor, "batch d_model"], weight: Float[Tensor, "vocab d_model"], words: Sequence[int]
) -> Float[Tensor, "batch words"]:
    """``word_logs(stream @ weight.T, words)`` for a ``weight`` that does not train; it can be differentiated once.

    The gradient at the stream is the words' rows of ``weight`` minus the mean of all rows under the softmax, which is
    summed up together with it, as in flash attention (Dao et al. 2022, algorithm 1): the weight is read once, and no
    logits are kept.
    """
    found: Tensor = _WordsOfHead.apply(stream, weight, list(words))
    return found


class _WordsOfHead(torch.autograd.Function):
    """In full precision under autocast, too, which casts products but not the sums that they are added to."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, stream: Tensor, weight: Tensor, words: list[int]) -> Tensor:
        columns = stream.T.contiguous()
        top = columns.new_full((len(stream),), -torch.inf)
        total, mean = torch.zeros_like(top), torch.zeros_like(stream)
        for rows in weight.split(ROWS):
            logits = rows @ columns
            higher = torch.maximum(top, logits.amax(0))
            fade, top = (top - higher).exp_(), higher
            masses = logits.sub_(top).exp_()
            total = total.mul_(fade).add_(masses.sum(0))
            if ctx.needs_input_grad[0]:
                mean = mean.mul_(fade[:, None]).addmm_(masses.T, rows)
        chosen = weight[words]
        ctx.save_for_backward(chosen, mean.div_(total[:, None]))
        return stream @ chosen.T - (top + total.log())[:, None]

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Tensor, None, None]:
        chosen, mean = ctx.saved_tensors
        return given @ chosen - given.sum(-1, keepdim=True) * mean, None, None
