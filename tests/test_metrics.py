"""Known answers of the metrics, and the shape of a measured number."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.data import genbias, genhint
from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words
from surgery.metrics import genbias as genbias_metric
from surgery.metrics import genhint as genhint_metric
from surgery.metrics import perplexity
from surgery.metrics.metric import from_dict, mean_metric

PROMPTS = genbias.records("profession", "test")
HINTS = genhint.records()


def constant(he: float, she: float, rows: int) -> np.ndarray:
    return np.tile([he, she], (rows, 1))


def test_afgb_mass_and_gap_of_constant_models() -> None:
    table = genbias_metric.score(constant(0.3, 0.1, len(PROMPTS)), PROMPTS, data="x")
    for scale in ("word", "phrase", "sentence", "all"):
        assert table["afgb"][scale].value == pytest.approx(0.2)
        assert table["mass"][scale].value == pytest.approx(0.4)
        assert table["relative_gap"][scale].value == pytest.approx(0.5)
        assert table["afgb"][scale].low == pytest.approx(0.2)
        assert (table["afgb"][scale].ideal, table["relative_gap"][scale].ideal) == (0, 0)
        assert table["mass"][scale].ideal == pytest.approx(0.4)  # what it is, before an edit
    assert table["afgb"]["all"].n == 945 and table["afgb"]["word"].n == 315


def test_a_silent_model_has_afgb_0_and_the_other_numbers_say_so() -> None:
    table = genbias_metric.score(constant(3e-5, 1e-5, len(PROMPTS)), PROMPTS, data="x")
    assert table["afgb"]["all"].value < 1e-4
    assert table["mass"]["all"].value < 1e-4 and table["relative_gap"]["all"].value == pytest.approx(0.5)


def test_words_that_a_model_never_says_still_have_their_ratio(tiny: Any) -> None:
    """Unlearning can drive both words below what float32 holds; their gap is then no 0, which would be fair."""
    model, _ = tiny
    head = torch.nn.Linear(model.config.hidden_size, 8)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0, -150 + math.log(3), -150]))
    model.lm_head = head
    model.config.tie_word_embeddings = False
    found = next_words(model, [(3, 4), (5, 6, 7)], (6, 7)).probabilities
    assert found[:, 0] / found[:, 1] == pytest.approx(3, rel=1e-4) and (found < 1e-60).all()
    table = genbias_metric.score(found, PROMPTS[:2], data="x")
    assert table["relative_gap"]["all"].value == pytest.approx(0.5, rel=1e-4)


def test_average_is_over_prompts_not_over_scales() -> None:
    """LFTF Table 2, Llama3-8B: .2741/.2888/.1492 with 308/330/306 prompts gives .2388."""
    scales = ["word"] * 308 + ["phrase"] * 330 + ["sentence"] * 306
    prompts = [genbias.Prompt("", str(i), scale, "", None, None) for i, scale in enumerate(scales)]
    gaps = np.array([{"word": 0.2741, "phrase": 0.2888, "sentence": 0.1492}[scale] for scale in scales])
    table = genbias_metric.score(np.stack([gaps, 0 * gaps], axis=1), prompts, data="x")
    assert table["afgb"]["all"].value == pytest.approx(0.2388, abs=5e-5)


@pytest.mark.parametrize("he, she", [(1.0, 0.0), (0.0, 1.0), (0.5, 0.5)])
def test_one_sided_models_have_ub_0(he: float, she: float) -> None:
    assert genhint_metric.score(constant(he, she, len(HINTS)), HINTS, data="x")["ub"].value == pytest.approx(0.0)


def test_a_model_that_follows_every_hint_has_ub_1() -> None:
    follows = np.array([[1.0, 0.0] if row.hint == 0 else [0.0, 1.0] for row in HINTS])
    assert genhint_metric.score(follows, HINTS, data="x")["ub"].value == 1.0
    assert genhint_metric.score(1 - follows, HINTS, data="x")["ub"].value == -1.0


def test_three_words_reduce_to_the_two_word_definitions() -> None:
    two, three = constant(0.3, 0.1, len(PROMPTS)), np.tile([0.3, 0.2, 0.1], (len(PROMPTS), 1))
    gap = genbias_metric.score(three, PROMPTS, data="x")["afgb"]["all"].value
    assert gap == genbias_metric.score(two, PROMPTS, data="x")["afgb"]["all"].value
    follows = np.where(np.arange(3) == np.array([row.hint for row in HINTS])[:, None], 0.5, 0.2)
    hinted = genhint_metric.score(follows, HINTS, data="x", words=("he", "she", "they"))["ub"]
    assert hinted.value == pytest.approx(0.3)  # the hinted word's less the mean of the two others'
    assert hinted.groups == len({row.profession for row in HINTS})


def test_perplexity_of_a_uniform_model_is_the_vocabulary_size() -> None:
    counts = np.array([3.0, 10.0, 7.0])
    found = perplexity.score(counts * math.log(50), counts, data="x")
    assert found.value == pytest.approx(50) and found.low == pytest.approx(50) and found.n == 3


def test_perplexity_weighs_tokens_not_texts() -> None:
    found = perplexity.score(np.array([0.0, 9 * math.log(4)]), np.array([1.0, 9.0]), data="x")
    assert found.value == pytest.approx(4**0.9)


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_intervals_hold_the_value_and_are_repeatable(values: list[float]) -> None:
    first = mean_metric(np.array(values), scorer="s", data="d", ideal=0, direction="lower")
    again = mean_metric(np.array(values), scorer="s", data="d", ideal=0, direction="lower")
    assert first == again == from_dict(first.to_dict())
    assert min(values) - 1e-6 <= first.low <= first.high <= max(values) + 1e-6


def test_intervals_cover_the_truth_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        found = mean_metric(generator.normal(1.0, 1.0, 80), scorer="s", data="d", ideal=0, direction="lower")
        hits += found.low <= 1.0 <= found.high
    assert 180 <= hits <= 199


def test_grouped_rows_widen_the_interval() -> None:
    """Ten copies of each row are no more evidence than one."""
    values = np.random.default_rng(0).normal(size=40)
    single = mean_metric(values, scorer="s", data="d", ideal=0, direction="lower")
    copied = mean_metric(
        np.repeat(values, 10), groups=np.repeat(np.arange(40), 10), scorer="s", data="d", ideal=0, direction="lower"
    )
    assert copied.high - copied.low == pytest.approx(single.high - single.low, rel=0.1)


def test_broken_numbers_are_refused() -> None:
    with pytest.raises(SurgeryError, match="no rows"):
        mean_metric(np.array([]), scorer="s", data="d", ideal=0, direction="lower")
    with pytest.raises(SurgeryError, match="row 1 has the value nan"):
        mean_metric(np.array([0.0, np.nan]), scorer="s", data="d", ideal=0, direction="lower")


def test_a_scorer_is_called_by_the_words_that_were_measured() -> None:
    age = genbias.records(prompts=load_prompt_set("age"))
    table = genbias_metric.score(constant(0.3, 0.1, len(age)), age, data="age", words=("young", "old"))
    assert "|P(young)-P(old)|" in table["afgb"]["all"].scorer and "P(young)+P(old)" in table["mass"]["all"].scorer
    assert not any("P(he)" in one.scorer for scales in table.values() for one in scales.values())
    three = genbias_metric.score(np.full((len(age), 3), 0.1), age, data="age", words=("he", "she", "they"))
    assert "largest - smallest P of he, she, they" in three["afgb"]["all"].scorer
