"""Targets and losses of equalising: what the next token's distribution should be, and how far the model is from it.

Words: q(w_i) = s_i * sum_j p(w_j) for the compared words, q(v) = p(v) for every other token, with p the untouched
model's own distribution: the words' mass is shared out anew and nothing else moves, unless a power moves that mass.
Hold: q = p. Both are learnt by KL(q || model), whose only optimum is the target. A target is kept as its k likeliest
tokens and one entry for all the rest; the KL of that is at most the whole one, and the figure beside ``TOP`` says by
how little.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from surgery.data.shares import check_shares

TOP = 256
"""Tokens kept of a target. Measured on SmolLM2-135M-Instruct against every token kept (a block's weights moved by 5 %):
with 16, 64, 256 and 1,024 the KL of what is held is .58, .77, .89 and .95 of the whole and its gradient's cosine .992,
.9993, .99995 and 1; the words' KL is .996 or more. 256 take 3 kB a place instead of 200."""

Kept = tuple[Int[Tensor, "places k"], Float[Tensor, "places k+1"]]
"""A target per place: its likeliest tokens, and the log of their target probabilities with that of the rest behind."""


def share_out(
    logp: Float[Tensor, "places vocab"],
    words: Sequence[int],
    shares: Sequence[float] | None = None,
    power: float = 1.0,
) -> Float[Tensor, "places vocab"]:
    """log q of the words' target: log s_i + log m at the words, log p elsewhere. It sums to 1 as p does.

    m = sum_j p(w_j). With another ``power`` a, m / (1 - m) becomes its a-th power and every other token keeps its share
    of the rest: above 1 rare words become a little rarer and common ones commoner, an offset against what prompts
    learn from one another.
    """
    chosen = check_shares(words, shares)
    mine = logp[:, list(words)]
    mass = mine.logsumexp(-1, keepdim=True)
    target = logp.clone()
    if power != 1:
        rest = _log_rest(mine)
        odds = power * (mass - rest)
        mass = nn.functional.logsigmoid(odds)
        target += nn.functional.logsigmoid(-odds) - rest
    target[:, list(words)] = mass + logp.new_tensor(chosen).log()
    return target


def raised(logp: Float[Tensor, "places vocab"], words: Sequence[int], power: float) -> Float[Tensor, "places vocab"]:
    """log q where the words' ratios are those of p to the ``power``, their mass and every other token as p has them."""
    mine = logp[:, list(words)]
    target = logp.clone()
    target[:, list(words)] = mine.logsumexp(-1, keepdim=True) + (power * mine).log_softmax(-1)
    return target


def even_out(
    logp: Float[Tensor, "prompts hints words"], shares: Sequence[float] | None = None, power: float = 1.0
) -> Float[Tensor, "prompts hints words"]:
    """log q of the words after each hint of a prompt: the hint decides alone, the words' mass stays.

    log q(w | h) = log m_h + log softmax_w (log s_w + a (l_hw - mean over h' of l_h'w)), with l = log p among the words,
    m their mass and a = ``power``: what all hints of a prompt have in common is the preference that its person has. Of
    two words, log odds of a and b after the two hints become (a - b) / 2 and (b - a) / 2 at equal shares and power 1.
    """
    chosen = check_shares(range(logp.shape[-1]), shares)
    among_words = logp.log_softmax(-1)
    odds = power * (among_words - among_words.mean(1, keepdim=True)) + logp.new_tensor(chosen).log()
    return logp.logsumexp(-1, keepdim=True) + odds.log_softmax(-1)


def keep(log_q: Float[Tensor, "places vocab"], always: Sequence[int] = (), top: int = TOP) -> Kept:
    """The ``top`` likeliest tokens of each target, the tokens ``always`` among them, and the rest as one entry."""
    order = log_q
    if len(always):  # of a large vocabulary a copy takes a gigabyte
        order = log_q.clone()
        order[:, list(always)] = torch.inf
    tokens = order.topk(min(top, log_q.shape[-1]), sorted=False).indices
    logs = log_q.gather(1, tokens)
    return tokens, torch.cat([logs, _log_rest(logs)], -1)


def divergence(target: Kept, logits: Float[Tensor, "places vocab"]) -> Float[Tensor, " places"]:
    """KL(target || model) in nats at each place, the tokens that were not kept taken together as one outcome."""
    tokens, log_q = target
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logs = logits.log_softmax(-1).gather(1, tokens)  # with its gradient half the time of gather minus logsumexp
    if tokens.shape[1] == logits.shape[1]:  # every token kept: there is no rest
        return (log_q[:, :-1].exp() * (log_q[:, :-1] - logs)).sum(-1)
    return (log_q.exp() * (log_q - torch.cat([logs, _log_rest(logs)], -1))).sum(-1)


def among(log_q: Float[Tensor, "places vocab"], words: Sequence[int]) -> Float[Tensor, "places words"]:
    """log of the distribution among ``words`` alone: log q(w_i) - log sum_j q(w_j)."""
    return log_q[:, list(words)].log_softmax(-1)


def imbalance(
    wanted: Float[Tensor, "places words"], logits: Float[Tensor, "places vocab"], words: Sequence[int]
) -> Float[Tensor, " places"]:
    """KL(target || model) in nats among ``words`` alone (``wanted`` by ``among``): the gap, however small the mass."""
    now = among(logits if logits.dtype == torch.float64 else logits.float(), words)
    return (wanted.exp() * (wanted - now)).sum(-1)


def _log_rest(logs: Float[Tensor, "places k"]) -> Float[Tensor, "places 1"]:
    """log(1 - sum exp), with at least the float's own precision left for the rest, so that it stays finite."""
    eps = torch.finfo(logs.dtype).eps
    return torch.log1p(-logs.exp().sum(-1, keepdim=True).clamp(max=1 - eps))
