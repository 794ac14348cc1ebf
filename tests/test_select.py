"""Selections by hand-counted scores: coverage, precision, the twin test, the controls, and what is said of them."""

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.attribution.select import (
    CONTROLS,
    compare,
    controls,
    coverage,
    precision,
    select,
    twin_auc,
)
from surgery.attribution.tfidf import similarity
from surgery.errors import SurgeryError
from surgery.metrics.metric import from_dict

BIASED = np.array([True] * 30 + [False] * 70)


def scores(strength: float, seed: int = 0, n: int = 100) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=n) + strength * np.resize(BIASED, n)


def others(influence: np.ndarray, tfidf: np.ndarray | None = None) -> dict[str, np.ndarray]:
    n = len(influence)
    return controls(influence, scores(0, 5, n), scores(0, 6, n) if tfidf is None else tfidf, seed=0)


# Selecting


def test_the_top_share_and_the_threshold() -> None:
    values = np.array([0.1, 0.9, 0.5, 0.7])
    assert select(values, share=0.5).tolist() == [False, True, False, True]
    assert select(values, threshold=0.5).tolist() == [False, True, True, True]
    assert select(values, share=1.0).all()


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.floats(0.01, 1), st.integers(0, 5))
def test_a_share_takes_its_number_of_rows_and_none_below_one_left_out(
    values: list[int], share: float, seed: int
) -> None:
    chosen = select(np.array(values), share=share, seed=seed)
    assert chosen.sum() == round(share * len(values))
    if chosen.any() and not chosen.all():
        assert np.array(values)[chosen].min() >= np.array(values)[~chosen].max()


def test_equal_scores_are_drawn_and_not_taken_in_the_order_of_the_file() -> None:
    """TF-IDF gives many zeros; the first rows of an unshuffled file are of one class."""
    counts = sum(select(np.zeros(100), share=0.3, seed=seed).astype(int) for seed in range(200))
    assert 30 < counts[:30].mean() < 90 and 30 < counts[70:].mean() < 90
    assert (select(np.zeros(9), share=0.4, seed=3) == select(np.zeros(9), share=0.4, seed=3)).all()


@pytest.mark.parametrize(
    "values, options, message",
    [
        ([1.0, 2.0], {}, "give a share above 0 or a threshold"),
        ([1.0, 2.0], {"share": 0.5, "threshold": 1.0}, "one of the two"),
        ([1.0, 2.0], {"share": 1.5}, "got a share of 1.5"),
        ([1.0, 2.0], {"threshold": math.nan}, "got a threshold of nan"),
        ([1.0, math.nan], {"share": 0.5}, "row 1 has the score nan"),
        ([], {"share": 0.5}, "shape \\(0,\\)"),
    ],
)
def test_what_cannot_be_selected_is_refused(values: list[float], options: dict, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        select(np.array(values), **options)


# Measuring


def test_coverage_and_precision_by_hand() -> None:
    """4 of 10 rows biased, 3 selected, 2 of them biased: 2/4 and 2/3; at best 3/4 and 1."""
    biased = np.array([1, 1, 1, 1, 0, 0, 0, 0, 0, 0], bool)
    chosen = np.array([1, 1, 0, 0, 1, 0, 0, 0, 0, 0], bool)
    covered = coverage(chosen, biased, scorer="c", data="d")
    precise = precision(chosen, biased, scorer="p", data="d")
    assert (covered.value, covered.ideal, covered.n) == (0.5, 0.75, 4)
    assert (precise.value, precise.ideal, precise.n) == (pytest.approx(2 / 3), 1.0, 3)
    assert covered.low <= covered.value <= covered.high


def test_the_best_precision_of_the_paper_s_mixture() -> None:
    """30 % biased, 35 % selected: 0.857 at most (all biased rows and 5 more of 100)."""
    perfect = select(BIASED.astype(float), share=0.35)
    measured = precision(perfect, BIASED, scorer="p", data="d")
    assert measured.value == pytest.approx(0.857, abs=5e-4) == measured.ideal
    assert coverage(perfect, BIASED, scorer="c", data="d").value == 1.0


def test_twins_by_hand_with_a_tie() -> None:
    metric = twin_auc(np.array([3.0, 1, 2, 5]), np.array([1.0, 2, 2, 4]), data="d")
    assert metric.value == (1 + 0 + 0.5 + 1) / 4 and metric.n == 4
    with pytest.raises(SurgeryError, match="2 stereotypes and 1 anti-stereotypes"):
        twin_auc(np.ones(2), np.ones(1), data="d")


# Comparing


def test_the_shape_that_run_json_keeps() -> None:
    influence = scores(3)
    twins = {"influence": (scores(0), scores(0, 1)), "tfidf": (scores(0, 2), scores(0, 3))}
    found = compare(
        {"influence": influence, "contrast": scores(1, 9)}, others(influence), BIASED, data="d", share=0.35, twins=twins
    )
    plain = json.loads(json.dumps(found.to_dict()))
    assert set(plain) == {"influence", "contrast", "twin_auc", *CONTROLS}
    assert plain["twin_auc"] == plain["influence"]["twin_auc"]
    for name in ("influence", "contrast", *CONTROLS):
        assert {"coverage", "precision"} <= set(plain[name])
        assert from_dict(plain[name]["coverage"]).n == 30 and from_dict(plain[name]["precision"]).n == 35
        assert found.chosen[name].sum() == 35
    random = from_dict(plain["random"]["coverage"])
    assert random.low < 0.35 < random.high  # chance is the share


def test_a_threshold_holds_for_the_first_and_the_others_take_as_many() -> None:
    influence = scores(3)
    found = compare({"influence": influence}, others(influence), BIASED, data="d", threshold=2.0)
    assert (found.chosen["influence"] == (influence >= 2.0)).all()
    assert {int(rows.sum()) for rows in found.chosen.values()} == {int((influence >= 2.0).sum())}


def test_it_says_when_every_control_is_beaten() -> None:
    influence = scores(6)
    words = compare({"influence": influence}, others(influence), BIASED, data="d", share=0.35).words()
    assert words == "Influence covers 100% of the biased rows in 35% of the data and beats every control."


def test_it_says_when_a_cheap_score_is_better_or_as_good() -> None:
    influence = scores(1.0)
    words = compare({"influence": influence}, others(influence, scores(8, 3)), BIASED, data="d", share=0.35).words()
    assert "is beaten by TF-IDF similarity to the probe (100%)" in words and "no evidence" in words
    words = compare({"influence": influence}, others(influence, influence), BIASED, data="d", share=0.35).words()
    assert re.search("does not differ from [^;]*TF-IDF similarity", words) and "beats every" not in words


def test_a_lead_within_its_interval_is_no_victory() -> None:
    """Influence finds 2 of the 30 biased rows more than TF-IDF: not a claim that resampled rows uphold."""
    influence, cheap = np.zeros(100), np.zeros(100)
    influence[:20], influence[85:] = 1, 1
    cheap[2:20], cheap[83:] = 1, 1
    found = compare({"influence": influence}, others(influence, cheap), BIASED, data="d", share=0.35)
    gap = found.differences["influence"]["tfidf"]
    assert gap.value == pytest.approx(2 / 30) and gap.low <= 0
    assert re.search("does not differ from [^;]*TF-IDF similarity", found.words())


@pytest.mark.parametrize(
    "strength, cheap, said",
    [(3.0, 0.0, "sees the bias, beyond style"), (0.0, 0.0, "cannot be told from chance"),
     (-3.0, 0.0, "points the wrong way"), (1.5, 3.0, "above chance, but not above TF-IDF")],
)  # fmt: skip
def test_it_says_what_the_twins_show(strength: float, cheap: float, said: str) -> None:
    influence = scores(3)
    rng = np.random.default_rng(4)
    noise = rng.normal(size=(4, 200))
    twins = {"influence": (noise[0] + strength, noise[1]), "tfidf": (noise[2] + cheap, noise[3])}
    found = compare({"influence": influence}, others(influence), BIASED, data="d", share=0.35, twins=twins)
    assert said in found.words()


def test_batches_show_the_order_of_the_file() -> None:
    """Batch scores on sorted rows find the class; on shuffled rows, put back, they do not: what `shuffled` is for."""
    rng = np.random.default_rng(0)
    labels = np.sort(np.resize(BIASED, 400))[::-1]
    alone = rng.normal(size=400) + 0.5 * labels

    def batched(order: np.ndarray) -> np.ndarray:
        out = np.empty(400)
        for start in range(0, 400, 8):
            out[order[start : start + 8]] = alone[order[start : start + 8]].mean()
        return out

    by_batch, shuffled = batched(np.arange(400)), batched(rng.permutation(400))
    rest = controls(by_batch, rng.normal(size=400), rng.normal(size=400), seed=0, shuffled=shuffled)
    found = compare({"influence": by_batch}, rest, labels, data="d", share=0.35)
    assert found.found["influence"]["coverage"].value > 0.6 > found.found["shuffled"]["coverage"].value
    assert found.differences["influence"]["shuffled"].low > 0


@pytest.mark.parametrize(
    "change, message",
    [
        ({"drop": "tfidf"}, "controls: tfidf missing"),
        ({"biased": [True] * 99}, "got 100 scores, expected 99"),
        ({"biased": [False] * 100}, "0 biased; expected some of each"),
        ({"share": 0.001}, "0 of 100 rows selected"),
    ],
)
def test_what_cannot_be_compared_is_refused(change: dict, message: str) -> None:
    influence = scores(1)
    rest = others(influence)
    rest.pop(change.get("drop", ""), None)
    with pytest.raises(SurgeryError, match=message):
        compare({"influence": influence}, rest, change.get("biased", BIASED), data="d", share=change.get("share", 0.35))


# TF-IDF


def brute(texts: list[str], probe: list[str]) -> np.ndarray:
    """The definition, over dense vectors of a plain vocabulary."""
    everything = [re.findall(r"\w+", text.lower()) for text in [*texts, *probe]]
    words = sorted({word for row in everything for word in row})
    tf = np.array([[row.count(word) for word in words] for row in everything], float)
    vectors = tf * (1 + np.log((1 + len(tf)) / (1 + (tf > 0).sum(0))))
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    return vectors[: len(texts)] @ vectors[len(texts) :].mean(0)


def test_tfidf_is_its_definition() -> None:
    texts = ["The nurse left early.", "the the car is old!", "", "Old nurses, old cars", "The nurse left early."]
    probe = ["A nurse is a woman.", "the car"]
    assert similarity(texts, probe) == pytest.approx(brute(texts, probe), abs=1e-12)
    assert similarity(lambda: iter(texts), probe) == pytest.approx(brute(texts, probe), abs=1e-12)
    assert similarity(["nurse nurse"], ["Nurse"]) == pytest.approx([1.0])
