"""The baselines' losses: values worked out by hand, gradients that move the right way, and models left as they were."""

import math
from typing import Any

import pytest
import torch
from families import build, state
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from surgery.edits.debiasing import (
    SoftDebias,
    attention_similarity,
    bias_directions,
    last_attention,
    mention_loss,
    soft_debias,
    word_forms,
    word_pairs,
    word_similarity,
)
from surgery.errors import SurgeryError
from surgery.training import Plan


def test_forms_are_single_tokens_of_the_word() -> None:
    tokenizer = tiny_tokenizer()
    words = tokenizer.convert_ids_to_tokens(word_forms(tokenizer, ["he", "the"]))
    assert words == ["he", "He", "the", "The"]  # this tokenizer drops the space
    assert word_pairs(tokenizer, ["he", "she"]) == [tuple(tokenizer.convert_tokens_to_ids(["he", "she"]))]
    for wrong, message in (([], "at least one"), (["engineer"], "splits it into"), (["xyz"], "expected one token")):
        with pytest.raises(SurgeryError, match=message):
            word_forms(tokenizer, wrong)
    for wrong, message in (
        (["he"], "expected pairs"), (["he", "engineer"], "not one token each"), (["he", "he"], "choose other words"),
    ):  # fmt: skip
        with pytest.raises(SurgeryError, match=message):
            word_pairs(tokenizer, wrong)


def test_forms_with_a_real_kind_of_tokenizer() -> None:
    """A byte-level tokenizer keeps the space in the token, so that a word has up to four forms."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({*pre_tokenizers.ByteLevel.alphabet()})
    merges = [("h", "e"), ("Ġ", "he"), ("H", "e")]
    vocabulary = {piece: n for n, piece in enumerate([*letters, *("".join(pair) for pair in merges)])}
    inner = Tokenizer(models.BPE(vocabulary, merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    assert tokenizer.convert_ids_to_tokens(word_forms(tokenizer, ["he"])) == ["Ġhe", "he", "He"]


def test_the_mention_loss_is_minus_the_log_of_saying_none() -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 7, requires_grad=True)
    scored = torch.tensor([[False, True, True, True], [False, False, True, True]])
    mass = logits.softmax(-1)[:, :, [2, 5]].sum(-1)
    by_hand = -(1 - mass).log()
    expected = torch.stack([by_hand[0, :3].mean(), by_hand[1, 1:3].mean()])
    torch.testing.assert_close(mention_loss(logits, [2, 5], scored), expected)
    # As certain as float32 allows: the plain 1 - P would be 0 here, and its log infinite.
    sure = torch.zeros(1, 2, 7)
    sure[..., 2] = 60.0
    assert mention_loss(sure, [2], torch.tensor([[False, True]])).item() == pytest.approx(60 - math.log(6), abs=1e-4)


@pytest.mark.parametrize("weight", [0.0, 1.0, 4.0])
def test_the_optimum_divides_the_words_probability(weight: float) -> None:
    """Minimised over free logits for a text in which the word stands at 60 % of the places."""
    share, logits = 0.6, nn.Parameter(torch.zeros(1, 2, 3))
    optimizer = torch.optim.LBFGS([logits], max_iter=100)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        log = logits[0, 0].log_softmax(-1)
        cross_entropy = -share * log[1] - (1 - share) * log[2]
        loss = cross_entropy + weight * mention_loss(logits, [1], torch.tensor([[False, True]]))[0]
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    assert logits.detach().softmax(-1)[0, 0, 1].item() == pytest.approx(share / (1 + weight), abs=1e-3)


def test_attention_similarity_is_the_attended_similarity() -> None:
    attention = torch.tensor([[[[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.2, 0.3, 0.5]]]])
    similarity = torch.tensor([[0.0, 1.0, 0.5]])
    real = torch.ones(1, 3, dtype=torch.bool)
    torch.testing.assert_close(attention_similarity(attention, similarity, real), torch.tensor([(0 + 0.5 + 0.55) / 3]))
    real[0, 0] = False  # padding: neither a query nor a key
    torch.testing.assert_close(attention_similarity(attention, similarity, real), torch.tensor([(0.5 + 0.55) / 2]))


def test_word_similarity_is_the_largest_positive_cosine() -> None:
    embedding = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0], [-1.0, -1.0]])
    expected = torch.tensor([1.0, 1.0, math.sqrt(0.5), 0.0])
    torch.testing.assert_close(word_similarity(embedding, [0, 1]), expected)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon_new", "bloom"])
def test_the_last_attention_has_gradients_and_leaves_nothing(family: str) -> None:
    model: Any = build(family)
    ids = torch.tensor([[3, 4, 5, 6], [7, 8, 9, 10]])
    before = state(model)
    plain = model(ids).logits
    with pytest.raises(ValueError), last_attention(model) as attention:
        model(ids)
        weights = attention()
        assert weights.shape == (2, 4, 4, 4)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 4))
        assert weights.triu(1).abs().max() == 0
        weights[..., 0].sum().backward()
        assert any(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())
        raise ValueError
    for parameter in model.parameters():
        parameter.grad = None
    assert state(model) == before
    assert torch.equal(model(ids).logits, plain)


def test_bias_directions_span_the_differences() -> None:
    torch.manual_seed(1)
    embedding = torch.randn(10, 6)
    basis = bias_directions(embedding, [(0, 1), (2, 3), (0, 1)])
    assert basis.shape == (2, 6)
    torch.testing.assert_close(basis @ basis.T, torch.eye(2), atol=1e-5, rtol=0)
    difference = embedding[2] - embedding[3]
    torch.testing.assert_close(difference @ basis.T @ basis, difference, atol=1e-5, rtol=0)


def test_soft_debias_flattens_the_bias_and_keeps_the_geometry() -> None:
    torch.manual_seed(2)
    direction = nn.functional.normalize(torch.randn(16), dim=0)
    embedding = torch.randn(60, 16) + torch.randn(60, 1) * 2 * direction
    embedding[0], embedding[1] = 3 * direction, -3 * direction
    plan = Plan(lr=3e-3, epochs=60, batch_size=60, optimizer="adamw")
    change = soft_debias(embedding, [(0, 1)], plan, weight=5.0, hidden=32, seed=0)
    assert change[:2].abs().max() == 0
    before, after = embedding[2:] @ direction, (embedding + change)[2:] @ direction
    assert after.abs().mean() < 0.4 * before.abs().mean()
    # The geometry is kept better than by cutting the direction off, which is what a plain projection does.
    rest = torch.eye(16) - torch.outer(direction, direction)
    grams = [rows[2:] @ rows[2:].T for rows in (embedding, embedding + change, embedding @ rest)]
    assert (grams[1] - grams[0]).norm() < 0.7 * (grams[2] - grams[0]).norm()
    again = soft_debias(embedding, [(0, 1)], plan, weight=5.0, hidden=32, seed=0)
    assert torch.equal(change, again)
    with pytest.raises(SurgeryError, match="no pair"):
        soft_debias(embedding, [], plan, seed=0)


def test_the_network_starts_as_the_identity() -> None:
    rows = torch.randn(5, 8)
    assert torch.equal(SoftDebias(8, 4)(rows), rows)
