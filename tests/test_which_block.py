"""The study of which block to edit: its statistics on cases with a known answer, and the numbers that are stored."""

import numpy as np
import pytest

from benchmarks.which_block import TITLES, Case, judge, read, tables
from hooks.rank_correlation import spearman
from surgery.locate.gain import KNOWN

RISING = np.arange(20.0) ** 2 + 1
CASE = Case("m", "race", np.stack([RISING, RISING]), {"natural": -RISING, "natural attention": RISING[::-1].copy()})


def test_a_perfect_and_a_reversed_ranking() -> None:
    depth, gain = judge("depth", [CASE, CASE]), judge("natural", [CASE, CASE])
    assert depth.mean == pytest.approx((1, 1, 1)) and depth.less_depth == pytest.approx((0, 0, 0))
    assert (depth.best, depth.share, depth.cases) == (2, 1.0, 2)
    assert gain.mean == pytest.approx((-1, -1, -1)) and gain.less_depth == pytest.approx((-2, -2, -2))
    assert gain.best == 0 and gain.share == pytest.approx(1 / RISING.max())
    # Places by a gain that falls with depth, plus the number: every block has the same sum, so there is no order.
    together = CASE.score("depth + natural attention")
    assert together is not None and len(set(together)) == 1 and np.isnan(spearman(together, RISING))


def test_an_interval_covers_what_the_plain_bootstrap_gives() -> None:
    draw = np.random.default_rng(5)
    outcome = np.arange(12.0)
    case = Case("m", "race", np.stack([outcome, outcome]), {"natural": outcome + draw.normal(0, 4, 12)})
    row = judge("natural", [case])
    samples = [
        spearman(case.scores["natural"][blocks], outcome[blocks]) for blocks in draw.integers(12, size=(1000, 12))
    ]
    assert row.mean[0] == pytest.approx(spearman(case.scores["natural"], outcome))
    assert row.mean[1:] == pytest.approx(np.nanquantile(samples, [0.025, 0.975]), abs=0.06)


def test_the_stored_cases_make_the_tables() -> None:
    cases = read()
    assert {case.reduction.shape for case in cases} <= {(2, 30), (2, 18)} and len(cases) >= 9
    assert all(scores.shape == case.outcome.shape for case in cases for scores in case.scores.values())
    printed = tables(cases[:2])
    assert all(title in printed for title in TITLES.values()) and "| SmolLM2, he / she | +0.99 |" in printed


def test_what_locate_says_of_its_rankings_is_what_the_study_found() -> None:
    names = {
        "gain_depth": "depth + natural attention",
        "gain_attention": "natural attention",
        "gain_natural": "natural",
        "bmi raw": "bmi raw",
        "bmi final_norm": "bmi final_norm",
    }
    assert list(KNOWN) == list(names)
    cases = read()
    unseen = [case for case in cases if case.unseen]
    for key, name in names.items():
        every, few = judge(name, cases), judge(name, unseen)
        value, low, high = (f"{number:.2f}".replace("0.", ".") for number in every.mean)
        sign = "+" * (every.mean[0] >= 0)
        other = f"{few.mean[0]:+.2f}".replace("0.", ".")
        assert KNOWN[key] == (
            f"Spearman {sign}{value} [{low}, {high}] (unseen {other}), a best-10 % block named in {every.best} of "
            f"{every.cases} cases ({few.best} of {few.cases} unseen)"
        )
