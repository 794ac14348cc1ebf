"""AUSC against numbers worked out by hand, and on models whose attention is known."""

import numpy as np
import pytest
import torch
from families import build, state
from letters import letters

from surgery.errors import SurgeryError
from surgery.metrics import ausc

TEXTS = ["the cat", "a dog on the mat", "he sat"]


def test_curve_and_area_by_hand() -> None:
    """Ranked similarities 1, 0, 0.5: S = 1, 1/2, 1/2; AUSC 2/3, excess 1/6."""
    importance, similarity = np.array([0.1, 0.6, 0.3]), np.array([0.5, 1.0, 0.0])
    np.testing.assert_allclose(ausc.curve(importance, similarity), [1, 0.5, 0.5])
    found = ausc.score([importance], [similarity], scorer="s", data="d")
    assert found["ausc"].value == pytest.approx(2 / 3) and found["excess"].value == pytest.approx(1 / 6)
    assert ausc.score([-importance], [similarity], scorer="s", data="d")["excess"].value < 0


def test_importance_that_ignores_similarity_has_no_excess() -> None:
    generator = np.random.default_rng(0)
    pairs = generator.random((2, 400, 12))
    found = ausc.score(list(pairs[0]), list(pairs[1]), scorer="s", data="d")
    assert found["excess"].low < 0 < found["excess"].high and found["ausc"].value == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("family, query", [("llama", "last"), ("gpt2", "last"), ("bert_classifier", "first")])
def test_measure_equals_one_text_at_a_time(family: str, query: str) -> None:
    model, tokenizer = build(family), letters()
    before = state(model)
    found = ausc.measure(model, tokenizer, TEXTS, ["he", "she"], data="d", query=query)
    assert state(model) == before
    weight = model.get_input_embeddings().weight.detach()
    words = [weight[tokenizer.encode(" " + word, add_special_tokens=False)].mean(0) for word in ("he", "she")]
    model.set_attn_implementation("eager")
    areas = []
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            pattern = model(ids, output_attentions=True).attentions[-1][0].mean(0)
        looked = pattern[0 if query == "first" else -1][1:]  # without [BOS]
        near = torch.stack([torch.cosine_similarity(weight[ids[0, 1:]], word[None]) for word in words]).max(0).values
        ranked = near[looked.argsort(descending=True, stable=True)]
        areas.append(np.mean([ranked[: k + 1].mean() for k in range(len(ranked))]))
    assert found["ausc"].value == pytest.approx(np.mean(areas), abs=1e-5) and found["ausc"].n == 3
    assert "he, she" in found["ausc"].scorer


def test_bad_input_is_refused() -> None:
    model, tokenizer = build("llama"), letters()
    with pytest.raises(SurgeryError, match="no reference word"):
        ausc.measure(model, tokenizer, TEXTS, [], data="d", query="last")
    with pytest.raises(SurgeryError, match=r"text 1 .* no token of its own"):
        ausc.measure(model, tokenizer, ["a", "[EOS]"], ["he"], data="d", query="last")
