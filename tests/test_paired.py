"""Differences of two measurements are paired: the same groups are drawn for both."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.metrics.metric import RESAMPLES, Metric, difference, differences, from_dict, mean_metric
from surgery.runs import paired

SHAPE = {"scorer": "s", "data": "d", "ideal": 0.0, "direction": "lower"}


def of(values: np.ndarray, **more: object) -> Metric:
    return mean_metric(values, **(SHAPE | more))  # type: ignore[arg-type]


def test_the_interval_is_that_of_the_row_by_row_differences() -> None:
    draw = np.random.default_rng(0)
    before = draw.normal(5, 2, 60)
    after = before - 0.3 + draw.normal(0, 0.1, 60)
    groups = np.repeat(np.arange(20), 3)
    found = difference(of(before, groups=groups), of(after, groups=groups))
    direct = of(after - before, groups=groups)
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((direct.value, direct.low, direct.high))
    # The two marginal intervals overlap widely; the pairs tell them apart.
    assert of(after).high > of(before).low and found.high < 0 and found.verdict == "better"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from(["lower", "higher", "nearer"]))
def test_the_same_numbers_twice_are_no_change(seed: int, direction: str) -> None:
    values = np.random.default_rng(seed).normal(0, 1, 12)
    one = of(values, direction=direction)
    found = difference(one, of(values, direction=direction))
    assert found is not None and (found.value, found.low, found.high, found.verdict) == (0, 0, 0, "within noise")


def test_the_verdict_follows_the_direction() -> None:
    low, high = of(np.full(9, 0.2)), of(np.full(9, 0.8))
    verdict = lambda a, b: difference(a, b).verdict  # type: ignore[union-attr]  # noqa: E731
    assert (verdict(high, low), verdict(low, high)) == ("better", "worse")
    low, high = (of(np.full(9, value), direction="higher") for value in (0.2, 0.8))
    assert (verdict(high, low), verdict(low, high)) == ("worse", "better")
    same = [of(np.full(9, value), direction="same", ideal=0.2) for value in (0.2, 0.8, 0.2)]
    assert (verdict(same[0], same[1]), verdict(same[1], same[0])) == ("worse", "worse")  # "same" as it was before
    assert verdict(same[0], same[2]) == "within noise"
    near = [of(np.full(9, value), direction="nearer", ideal=50.0) for value in (60.0, 52.0, 49.0)]
    assert verdict(near[0], near[1]) == "better" and verdict(near[2], near[1]) == "worse"


def test_other_rows_or_another_scorer_are_no_pairs() -> None:
    one = of(np.arange(5.0))
    for other in (of(np.arange(6.0)), of(np.arange(5.0), scorer="t"), of(np.arange(5.0), data="e")):
        assert difference(one, other) is None
    assert one.samples is not None and one.samples.shape == (RESAMPLES,)


def test_looking_at_many_axes_widens_every_interval() -> None:
    draw = np.random.default_rng(0)
    before = draw.normal(5, 2, 60)
    pair = of(before), of(before + draw.normal(0.1, 0.4, 60))
    one, many = (difference(*pair, axes=axes) for axes in (1, 20))
    assert one is not None and many is not None and many.low < one.low and many.high > one.high
    assert (one.verdict, many.verdict) == ("worse", "within noise")


def test_many_axes_take_the_draws_quantile_or_where_few_lie_beyond_it_the_normal_tail() -> None:
    draw = np.random.default_rng(0)
    before, after = (of(values) for values in (np.zeros(8), draw.exponential(1, 8)))  # far from a normal number's shape
    drawn = after.samples - before.samples  # type: ignore[operator]
    for axes in (2, 10):
        found = difference(before, after, axes=axes)
        assert found is not None
        assert (found.low, found.high) == tuple(np.quantile(drawn, [0.025 / axes, 1 - 0.025 / axes]))
    found = difference(before, after, axes=190)  # of 2,000 draws a quarter of one lies there
    assert found is not None and found.low == pytest.approx(after.value - 3.65 * drawn.std(), rel=0.01)
    assert found.low < drawn.min()


def test_a_tree_of_scores_gives_a_tree_of_differences() -> None:
    before = {"a": {"b": of(np.arange(9.0)), "only": of(np.arange(9.0))}, "c": 3}
    after = {"a": {"b": of(np.arange(9.0) + 1), "new": of(np.arange(9.0))}, "c": 4}
    found = differences(before, after)
    assert set(found) == {"a"} and set(found["a"]) == {"b"}
    assert found["a"]["b"]["value"] == 1 and found["a"]["b"]["verdict"] == "worse"
    assert "samples" not in json.dumps(before["a"]["b"].to_dict()) and json.dumps(found)


def test_so_few_rows_that_all_draws_are_alike_tell_nothing() -> None:
    """One answer that turned wrong is no loss of 100 points; of thirty it would be."""
    for rows, axes, verdict in (
        (1, 1, "within noise"),
        (5, 1, "within noise"),
        (6, 1, "worse"),
        (12, 190, "within noise"),
        (13, 190, "worse"),
    ):
        right, wrong = (
            mean_metric(np.full(rows, value), scorer="s", data="d", ideal=1.0, direction="higher")
            for value in (1.0, 0.0)
        )
        found = difference(right, wrong, axes=axes)
        assert found is not None and found.verdict == verdict, (rows, axes)


def test_few_groups_tell_nothing_however_many_rows_they_have() -> None:
    """Rows of three terms that all move the same way are a coin that fell alike thrice."""
    for groups, verdict in ((1, "within noise"), (3, "within noise"), (5, "within noise"), (6, "better")):
        of_group = np.arange(78) % groups
        before, after = (of(np.full(78, value), groups=of_group) for value in (0.8, 0.2))
        found = difference(before, after)
        assert found is not None and (found.n, found.verdict) == (78, verdict), groups
        assert from_dict(after.to_dict(samples=True)).units == groups
    told = paired.told({"after": {"genbias": {"afgb": {"all": after.to_dict() | {"groups": 3}}}}})
    assert "few rows: genbias afgb all on 78 of 3 groups" in told[0]
