"""Log-probabilities of a few words as the next token, with a gradient that writes one array as large as the logits."""

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
