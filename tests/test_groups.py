"""Accuracy and TPR gaps over groups against numbers worked out by hand."""

import numpy as np
import pytest

from surgery.errors import SurgeryError
from surgery.metrics import groups


def test_gaps_of_one_positive_class_over_three_groups() -> None:
    """TPRs 1/2, 1, 1/4: gaps 1/2, 1/4, 3/4."""
    labels = [1] * 8 + [0] * 3
    of = ["a", "a", "b", "b", "c", "c", "c", "c", "a", "b", "c"]
    predicted = [1, 0, 1, 1, 1, 0, 0, 0, 0, 1, 0]
    found = groups.score(predicted, labels, of, data="d", positive=[1])
    assert found["accuracy"].value == pytest.approx(6 / 11)
    assert found["tpr_gap"]["max"].value == pytest.approx(0.75)
    assert found["tpr_gap"]["mean"].value == pytest.approx(0.5)
    assert found["tpr_gap"]["mean"].samples is found["tpr_gap"]["max"].samples is None  # two models' are no pairs
    assert found["tpr_gap"]["max"].high == 1.0 > found["tpr_gap"]["mean"].high
    assert found["tpr_gap"]["max"].n == 8 and "3 gaps of 1 classes" in found["tpr_gap"]["max"].data


def test_gaps_of_many_classes_between_two_groups() -> None:
    """TPR of x: women 1, men 0; of y: 1/2 and 1/2; z has no man, and counts for accuracy only."""
    labels = ["x", "x", "y", "y", "y", "y", "z"]
    of = ["F", "M", "F", "F", "M", "M", "F"]
    predicted = ["x", "y", "y", "x", "y", "z", "z"]
    found = groups.score(predicted, labels, of, data="d")
    assert found["tpr_gap"]["max"].value == 1.0 and found["tpr_gap"]["mean"].value == 0.5
    assert "1 classes left out" in found["tpr_gap"]["max"].data
    assert found["accuracy"].value == pytest.approx(4 / 7)


def test_rows_without_group_count_for_accuracy_only_and_small_cells_can_be_left_out() -> None:
    labels, of = [1] * 7, ["a", "a", "a", "b", "b", "", None]
    predicted = [1, 1, 1, 1, 0, 0, 0]
    found = groups.score(predicted, labels, of, data="d")
    assert found["tpr_gap"]["max"].value == 0.5 and found["accuracy"].value == pytest.approx(4 / 7)
    with pytest.raises(SurgeryError, match="no class has 3 rows in each of two groups"):
        groups.score(predicted, labels, of, data="d", least=3)
    with pytest.raises(SurgeryError, match="expected as many"):
        groups.score(predicted, labels, of[1:], data="d")


def test_intervals_cover_a_true_gap_about_95_times_in_100() -> None:
    generator = np.random.default_rng(0)
    labels, of = np.ones(600, int), np.repeat(["a", "b"], 300)
    truth, hits = np.repeat([0.8, 0.6], 300), 0
    for seed in range(100):
        predicted = (generator.random(600) < truth).astype(int)
        gap = groups.score(predicted, labels, of, data="d", seed=seed)["tpr_gap"]["max"]
        hits += gap.low <= 0.2 <= gap.high
    assert 88 <= hits <= 100


def test_intervals_hold_the_value_even_where_resampling_only_raises_it() -> None:
    labels, of = [1] * 8, ["a", "b"] * 4
    gap = groups.score([1, 1, 0, 0, 1, 1, 0, 0], labels, of, data="d")["tpr_gap"]["max"]
    assert gap.value == gap.low == 0.0 < gap.high
