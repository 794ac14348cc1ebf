"""What other fine-tuning methods add to the cross-entropy to remove a bias: CrAWD's baselines, one function for each.

CrAWD (5.3, Tables 2, 3 and 7) names them and gives no formula or setting. Each function here says what it takes, from
which paper, and what that leaves open.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy, sites
from hooks import trace_modules as probe
from hooks.activations import ask_for_weights
from hooks.tokens import ids_of, word_pieces
from surgery.errors import SurgeryError
from surgery.training import Log, Plan, train


def word_forms(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[int]:
    """The tokens that stand for one of ``words`` alone: after a space or not, and with a capital or not.

    Forms that the tokenizer splits into pieces are left out: their first piece may begin any other word.
    Raises ``SurgeryError`` for no words, or a word of which no form is one token.
    """
    if not words or isinstance(words, str):
        raise SurgeryError(f"words: got {words!r}, expected at least one reference word, such as he and she")
    found: dict[int, None] = {}
    for word in words:
        single = [token for token in _forms(tokenizer, word) if token is not None]
        if not single:
            pieces = tokenizer.tokenize(" " + word)
            raise SurgeryError(
                f"word {word!r}: the tokenizer splits it into {pieces}; expected one token; choose another"
            )
        found |= dict.fromkeys(single)
    return list(found)


def word_pairs(tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> list[tuple[int, int]]:
    """The tokens of reference words two by two (he, she; man, woman), a pair for each form that both have.

    Raises ``SurgeryError`` for an odd number of words, or two words without a form in common.
    """
    if len(words) % 2 or not words:
        raise SurgeryError(
            f"reference words: got {', '.join(words) or 'none'}, expected pairs such as he,she,man,woman"
        )
    found: dict[tuple[int, int], None] = {}
    for one, other in zip(words[::2], words[1::2], strict=True):
        forms = zip(_forms(tokenizer, one), _forms(tokenizer, other), strict=True)
        pairs = [(left, right) for left, right in forms if left is not None and right is not None and left != right]
        if not pairs:
            raise SurgeryError(f"reference words {one!r}, {other!r}: not one token each; choose other words")
        found |= dict.fromkeys(pairs)
    return list(found)


def _forms(tokenizer: PreTrainedTokenizerBase, word: str) -> list[int | None]:
    """The token of the word after a space, at a start, and both with a capital; None for a form of several tokens."""
    pieces = [
        piece
        for form in (word, word.capitalize())
        for piece in (word_pieces(tokenizer, form), ids_of(tokenizer, [form])[0])
    ]
    return [piece[0] if len(piece) == 1 and piece[0] != tokenizer.unk_token_id else None for piece in pieces]


def mention_loss(
    logits: Float[Tensor, "batch pos vocab"], words: Sequence[int], scored: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """Debias Tuning (Dong et al. 2024) for the metric GAS: -log(1 - P(any of ``words``)) at each place, its mean.

    GAS counts the generations that hold a gendered word, which has no gradient. The sum of these terms over a
    sampled text is -log of the probability that it holds none, so this is GAS's own quantity, per token and in nats.
    With weight w beside the cross-entropy its optimum divides the words' probability by 1 + w wherever they stood.
    (CrAWD says only that "a gender probability loss, derived from their bias metric" is added, in section 1; Dong
    et al. have three such metrics.) ``scored`` marks the tokens that are learnt; the prediction for a token stands
    one place before it.
    """
    log = logits[:, :-1].float().log_softmax(-1)
    inside = torch.zeros(log.shape[-1], dtype=torch.bool, device=log.device)
    inside[list(words)] = True
    # log(1 - P) as the log-sum-exp of all other tokens: exact where P is near 1, too.
    losses = -log.masked_fill(inside, -torch.inf).logsumexp(-1)
    return _mean_over(losses, scored[:, 1:])


def attention_similarity(
    attention: Float[Tensor, "batch head query key"],
    similarity: Float[Tensor, "batch key"],
    real: Bool[Tensor, "batch key"],
) -> Float[Tensor, " batch"]:
    """Indirect Bias Mitigation (Haque et al. 2024): how similar to the sensitive words the tokens attended to are.

    The mean over heads and real queries of sum_key attention * similarity, with similarities from
    ``word_similarity``. Haque et al. take the tokens that an attention-based explanation calls important in the
    instance; here the attention weights of the last block are the importance, of every token that is predicted from.
    Which layer, and how many tokens count as important, is left open by CrAWD.
    """
    attended = torch.einsum("bhqk,bk->bhq", attention.float(), similarity.float() * real).mean(1)
    return _mean_over(attended, real)


@torch.no_grad()
def word_similarity(embedding: Float[Tensor, "vocab d_model"], words: Sequence[int]) -> Float[Tensor, " vocab"]:
    """Each token's largest cosine with one of the reference words in the input embedding, negative ones as 0."""
    unit = nn.functional.normalize(embedding.detach().float(), dim=-1)
    return (unit @ unit[list(words)].T).amax(-1).clamp(min=0)


def bias_energy(ids: Sequence[Sequence[int]], groups: Sequence[int], vocabulary: int) -> Float[Tensor, " vocab"]:
    """Controlling Bias Exposure (He et al. 2022): how much each token says of the protected attribute, in nats.

    The auxiliary model guesses a row's group from one token: P(group | token) by counts of rows, shrunk to P(group) as
    if one more row had shown the token. A token's energy is how far its guess is above chance, the expected fall of
    the guess's negative log-likelihood: KL(P(group | token) || P(group)). It is added with ``attention_similarity``, so
    that what the classifier attends to tells little. CrAWD says no more than that the auxiliary model's negative
    log-likelihood is an energy that regulates the impact of biased tokens; He et al. learn the auxiliary model as a
    network and gate rationales with it. Rows of group -1 are of none and left out.

    Raises ``SurgeryError`` for fewer than two groups.
    """
    known = sorted({group for group in groups if group >= 0})
    if len(known) < 2:
        raise SurgeryError("cbe: rows are of fewer than two groups; expected groups to tell apart")
    shown = torch.zeros(vocabulary, len(known), dtype=torch.float64)
    for row, group in zip(ids, groups, strict=True):
        if group >= 0:
            shown[sorted(set(row)), known.index(group)] += 1
    prior = torch.tensor([sum(group == one for group in groups) for one in known], dtype=torch.float64)
    prior = prior / prior.sum()
    guess = (shown + prior) / (shown.sum(1, keepdim=True) + 1)
    return torch.special.xlogy(guess, guess / prior).sum(1).float()


@contextmanager
def last_attention(model: PreTrainedModel) -> Iterator[Callable[[], Tensor]]:
    """Inside, the function gives the last block's attention weights of the newest pass, with their gradients.

    The weights are (batch head query key). Attention is eager inside; afterwards all is as it was. Raises
    ``HookError`` for a model whose attention gives no weights.
    """
    found = anatomy.find(model)
    (site,) = sites.expand(found, f"{found.blocks[-1].site}.attn.hook_pattern")
    held: list[Tensor] = []

    def keep(_: nn.Module, args: object, output: tuple[Tensor, ...]) -> None:
        held[:] = [output[site.index]]

    with ExitStack() as stack:
        stack.enter_context(probe.eager(model))
        stack.callback(ask_for_weights(model, site))
        stack.callback(model.get_submodule(site.module).register_forward_hook(keep).remove)
        yield lambda: held.pop()


def bias_directions(
    embedding: Float[Tensor, "vocab d_model"], pairs: Sequence[tuple[int, int]]
) -> Float[Tensor, "rank d_model"]:
    """The subspace of the bias: an orthonormal basis of the differences between the two tokens of each pair."""
    left, right = (embedding.detach().float()[[pair[side] for pair in pairs]] for side in (0, 1))
    basis, values, _ = torch.linalg.svd((left - right).T, full_matrices=False)
    return basis[:, values > 1e-5 * values.max()].T


class SoftDebias(nn.Module):
    """A compact residual network on embeddings: e + W2 tanh(W1 e); it starts as the identity."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(width, hidden), nn.Linear(hidden, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The debiased rows."""
        return rows + self.outer(torch.tanh(self.inner(rows)))


def soft_debias(
    embedding: Float[Tensor, "vocab d_model"],
    pairs: Sequence[tuple[int, int]],
    plan: Plan,
    *,
    weight: float = 1.0,
    hidden: int = 256,
    seed: int,
    log: Log | None = None,
) -> Float[Tensor, "vocab d_model"]:
    """Deep Soft Debias (Rakshit et al. 2025): the difference that a small network makes to an embedding matrix.

    Soft debiasing (Bolukbasi et al. 2016) with a network f in the place of the linear map: the loss of each row e is
    the mean over the batch of (f(e) f(e') - e e')^2, which keeps the geometry, plus ``weight`` times the squared
    projection of f(e) on the bias subspace of ``pairs``, which both are learnt with rows of mean square norm 1. The
    tokens of the pairs themselves keep their place and their difference, as gender-specific words do in soft
    debiasing. Sizes, weights and what counts as neutral are left open by CrAWD; here all other tokens are neutral.

    Raises ``SurgeryError`` for no pairs, or when the loss is not finite.
    """
    if not pairs:
        raise SurgeryError("deep soft debias: no pair of reference words; name them two by two, such as he and she")
    scale = embedding.detach().float().pow(2).sum(-1).mean().sqrt()
    rows = embedding.detach().float() / scale
    basis = bias_directions(rows, pairs)
    specific = sorted({token for pair in pairs for token in pair})
    neutral = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    neutral[specific] = False
    places = neutral.nonzero().flatten()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = SoftDebias(rows.shape[1], hidden).to(rows.device)

    def losses(module: nn.Module, chosen: Sequence[int]) -> Tensor:
        before = rows[places[list(chosen)]]
        after = module(before)
        kept = (after @ after.T - before @ before.T).pow(2).mean(1)
        return kept + weight * (after @ basis.T).pow(2).sum(1)

    train(network, dict(network.named_parameters()), losses, len(places), plan, seed=seed, log=log)
    with torch.no_grad():
        change = (network(rows) - rows) * scale
        change[specific] = 0
    return change


def _mean_over(values: Float[Tensor, "batch pos"], counted: Bool[Tensor, "batch pos"]) -> Float[Tensor, " batch"]:
    return (values * counted).sum(1) / counted.sum(1).clamp(min=1)
