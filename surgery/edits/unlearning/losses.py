"""The losses of unlearning, each a small function of log-probabilities, with its equation.

``logp`` is the summed log-probability (nats) of a sentence's continuation given its context, ``reference`` the same
of the frozen reference. The equations are those of BiasUnlearn (EMNLP 2025), and of the papers that they come from.
"""

from collections.abc import Mapping

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus

from surgery.errors import SurgeryError

DIRECTIONS = ("forward", "reverse")


def npo(logp: Float[Tensor, " n"], reference: Float[Tensor, " n"], beta: float = 0.1) -> Float[Tensor, " n"]:
    """Negative preference optimisation, Eq. 1 (Zhang et al. 2024, Eq. 3): -2/beta log sigma(-beta log pi/pi_ref).

    One value for each example. It falls as pi does, with a gradient that fades where pi is far below pi_ref;
    beta -> 0 gives ``ascent``'s gradient. It starts at 2 log(2) / beta.
    """
    # -log sigma(-x) = softplus(x)
    return 2 / beta * softplus(beta * (logp - reference))


def npo_batch(nll: Float[Tensor, " n"], reference: Float[Tensor, " n"], beta: float = 0.1) -> Float[Tensor, " n"]:
    """The released code's NPO: one sigmoid of the batch's mean token cross-entropy, the same value for all its rows.

    ``nll`` are each row's mean losses per token. Stereotypes and mixed-in anti-stereotypes cancel inside the
    sigmoid, and long continuations count as much as short ones (the repository's ``train.py``, lines 57-62).
    """
    return (2 / beta * softplus(-beta * (nll.mean() - reference.mean()))).expand_as(nll)


def ascent(logp: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Gradient ascent (Yao et al. 2024): the log-likelihood of what is to be forgotten, to be minimised. Unbounded."""
    return logp


def retention(logp: Float[Tensor, " n"], tokens: Float[Tensor, " n"] | None = None) -> Float[Tensor, " n"]:
    """Cross-entropy of each sentence that is kept, Eq. 2; per token where their numbers ``tokens`` are given.

    Summed it weighs as much as what ``npo`` pushes down, whose argument is a sum too: per token (the released code)
    a continuation of five tokens is held five times less than it is pushed, and all continuations sink together.
    SFT and CDA are this loss on other sentences.
    """
    return -logp if tokens is None else -logp / tokens


def kl(
    reference: Float[Tensor, "tokens vocab"], model: Float[Tensor, "tokens vocab"], direction: str = "forward"
) -> Float[Tensor, " tokens"]:
    """KL divergence (nats) at each token between the next-token distributions of two sets of logits, Eq. 3.

    ``"forward"``: KL(reference || model), which the paper names ("to cover all the areas of space of the original
    LM") and its code computes. ``"reverse"``: KL(model || reference), as Eq. 3 is printed.

    Raises ``SurgeryError`` for another direction.
    """
    if direction not in DIRECTIONS:
        raise SurgeryError(f"kl_direction: got {direction!r}, expected one of {', '.join(DIRECTIONS)}")
    p, q = reference.log_softmax(-1), model.log_softmax(-1)
    if direction == "reverse":
        p, q = q, p
    return (p.exp() * (p - q)).sum(-1)


def dpo(
    chosen: Float[Tensor, " n"],
    rejected: Float[Tensor, " n"],
    chosen_reference: Float[Tensor, " n"],
    rejected_reference: Float[Tensor, " n"],
    beta: float = 0.1,
) -> Float[Tensor, " n"]:
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7), for the comparison of section 4.5.

    ``chosen`` is the anti-stereotype of a triple and ``rejected`` its stereotype. It starts at log 2.
    """
    return softplus(-beta * ((chosen - chosen_reference) - (rejected - rejected_reference)))


def preference(
    margin: Float[Tensor, " n"], beta: float, offset: float | Float[Tensor, " n"] = 0.0
) -> Float[Tensor, " n"]:
    """-log sigma(-beta (m + offset)), m the stereotype's log-probability minus the anti-stereotype's. Ours, labelled.

    DPO without its reference: a pair that prefers the anti-stereotype by more than ``offset`` already weighs little,
    where DPO pushes every pair as far from where it began, whatever it prefers.
    """
    return softplus(beta * (margin + offset))


def batch_weights(sizes: Mapping[str, int], weights: Mapping[str, float]) -> dict[str, float]:
    """Factors of the sentences of each part, with which the mean over a whole chunk is Eq. 4.

    Eq. 4 is sum_p weight_p * mean over part p; a part of ``sizes[p]`` among N sentences gets weight_p * N / sizes[p].
    """
    total = sum(sizes.values())
    return {part: weights[part] * total / size for part, size in sizes.items()}
