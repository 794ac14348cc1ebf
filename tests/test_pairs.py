"""Pairs of sentences: the files they come from, their folds, and the squared margin against values by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from surgery import SurgeryError
from surgery.data import pairs as data
from surgery.data.pairs import Pair
from surgery.edits.equalize import equalize, prepare
from surgery.edits.equalize.dose import choose, crossing, slopes
from surgery.edits.equalize.pairs import pairs_term, squared_margin
from surgery.edits.equalize.training import losses_of
from surgery.metrics.sentences import per_token, sentence_tokens
from surgery.training import Plan

PAIRS = (
    Pair("The nurse smiled because she waited", "The nurse smiled because he waited", "gender", "nurse", "1"),
    Pair("The plumber called a friend", "The plumber took a long break", "work", "plumber", "2"),
)
DOSES = {"gender": 0.25, "work": -0.5}


def test_the_loss_by_hand() -> None:
    margin = torch.tensor([0.3, -0.2], dtype=torch.float64)
    dose = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert squared_margin(margin, dose).tolist() == pytest.approx([0.16, 0.0])


def test_the_term_is_the_squared_margin_of_the_scorers(tiny: Any) -> None:
    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    first, *rest = DOSES
    doses = {first: (0.1, 0.4), **{name: DOSES[name] for name in rest}}  # of the first type by form
    term = pairs_term(tokenizer, PAIRS, doses)
    assert (term.count, term.size) == (4, 2)
    with torch.no_grad():
        found = losses_of(model, model, prepare(model, [term]), [(0, example) for example in range(4)])
    sides = [text for pair in PAIRS for text in (pair.more, pair.less)]
    expected: list[float] = []
    for form, scorer in enumerate(("bos", "no-start")):  # with a start token before the sentence, and without one
        means = per_token(sentence_tokens(model, tokenizer, sides, scorer=scorer)).reshape(2, 2)
        wanted = [d[form] if isinstance(d, tuple) else d for d in doses.values()]
        expected += [(m + d) ** 2 for m, d in zip(means[:, 0] - means[:, 1], wanted, strict=True)]
    assert found.tolist() == pytest.approx(expected, rel=1e-3)
    assert min(expected) > 1e-4


def test_training_moves_the_margins_to_minus_the_dose_and_leaves_the_model(tiny: Any) -> None:
    model, tokenizer = tiny
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    term = pairs_term(tokenizer, PAIRS, DOSES, starts=(False,))
    trained = equalize(model, [term], Plan(2e-3, epochs=60, batch_size=2), blocks=range(4), seed=0)
    assert trained.losses[-1] < 0.01 * trained.losses[0]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_type_without_a_dose_and_a_side_that_is_too_long_are_refused(tiny: Any) -> None:
    _, tokenizer = tiny
    with pytest.raises(SurgeryError, match="none for the bias type 'work'"):
        pairs_term(tokenizer, PAIRS, {"gender": 0.1})
    with pytest.raises(SurgeryError, match="2: a side has 5 tokens, expected 2 to 4"):
        pairs_term(tokenizer, PAIRS[1:], DOSES, starts=(False,), longest=4)


def test_a_file_of_your_own(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    rows: list[dict[str, Any]] = [{"more": "a b", "less": "a c"}, {"more": "d", "less": "e", "bias_type": "age"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = data.load(path)
    assert [(row.more, row.less, row.bias_type) for row in found.rows] == [("a b", "a c", "all"), ("d", "e", "age")]
    assert len({row.group for row in found.rows}) == 2 and found.types == ("age", "all")
    for bad, said in (
        ({"more": "a", "less": "a"}, "row 1: both sides are 'a'"),
        ({"more": "a", "less": " "}, "row 1: less is .* expected text"),
        ({"more": "a", "less": "b", "group": 3}, "row 1: group is 3"),
        ({"more": "a"}, "expected the key 'less'"),
        ({"more": "a", "less": "b", "groups": "x"}, "row 1: got the key 'groups', .* did you mean 'group'"),
    ):
        path.write_text(json.dumps(bad) + "\n")
        with pytest.raises(SurgeryError, match=said):
            data.load(path)


def test_the_same_two_sentences_are_never_both_learnt_and_judged(tmp_path: Path) -> None:
    """Twenty pairs, each three times, once the other way round, without a group: a fold holds all three or none."""
    rows = [{"more": f"a {n}", "less": f"b {n}", "id": n} for n in range(20)]
    turned = [{"more": row["less"], "less": row["more"]} for row in rows]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *turned, *rows]))
    found = data.load(tmp_path / "own.jsonl").rows
    parts = data.folds(found, 5, seed=0)
    assert all(sorted(n % 20 for n in part) == sorted(3 * sorted({n % 20 for n in part})) for part in parts)


def test_folds_share_no_group_and_few_groups_are_refused() -> None:
    pairs = [Pair("a", "b", kind, f"{kind}{n % 12}", "") for kind in ("x", "y") for n in range(40)]
    parts = data.folds(pairs, 4, seed=1)
    assert sorted(n for part in parts for n in part) == list(range(80))
    groups = [{pairs[n].group for n in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 24
    for part in parts:
        assert 9 <= sum(pairs[n].bias_type == "x" for n in part) <= 12  # 3 or 4 rows a group
    assert parts == data.folds(pairs, 4, seed=1) != data.folds(pairs, 4, seed=2)
    few = [Pair("a", "b", "z", f"{n % 9}", "") for n in range(40)]
    with pytest.raises(SurgeryError, match="bias type 'z': 9 groups, expected at least 10"):
        data.folds(few, 4, seed=0)


def test_a_group_of_several_types_stays_together() -> None:
    """Twelve groups with rows of both types, beside six of y alone."""
    pairs = [Pair("a", "b", kind, f"{n % count}", "") for kind, count in (("x", 12), ("y", 18)) for n in range(36)]
    parts = data.folds(pairs, 4, seed=1)
    assert sorted(n for part in parts for n in part) == list(range(72))
    groups = [{pairs[n].group for n in part} for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 18
    for part in parts:
        assert sum(pairs[n].bias_type == "x" for n in part) == 9
        assert 8 <= sum(pairs[n].bias_type == "y" for n in part) <= 10


def test_the_slope_of_a_dose_is_that_of_all_types_beside_a_line_of_each() -> None:
    """After = before / 2 - .7 dose of one type and 1 - before / 4 - .7 dose of the other, one dose a pair."""
    pairs = [Pair("a", "b", kind, f"{number}", "") for kind in "tu" for number in range(6)]
    before = np.linspace(-1, 1, 12)[:, None] ** 3
    at, t = np.array([0.0, 0.4] * 6), np.array([True] * 6 + [False] * 6)
    after = np.where(t[:, None], before / 2, 1 - before / 4) - 0.7 * at[:, None]
    assert np.allclose(slopes(pairs, np.hstack([before, before**2]), np.hstack([after, after]), at)[0], -0.7)


def test_the_dose_is_where_held_out_pairs_prefer_neither_side() -> None:
    # Two groups of one type. On straight lines the second row of x and that of y come to 0 at dose .3: just below it
    # the scores are 66.7 and 100, from it on 33.3 and 0, so that 50 lies within the last step (.01) up to .3.
    pairs = [Pair("a", "b", "t", group, "") for group in ("x", "x", "x", "y")]
    margins = {
        0.0: np.array([[0.1], [0.2], [0.3], [0.4]]),
        0.2: np.array([[-0.1], [0.1], [0.2], [0.1]]),
        0.4: np.array([[-0.3], [-0.1], [0.1], [-0.1]]),
    }
    found = choose(pairs, margins)["t"]
    assert list(found.curve.values()) == pytest.approx([100, 250 / 3, 50 / 3])
    assert 0.29 < found.dose <= 0.3 and found.reached
    assert found.low <= found.dose <= found.high and found.groups == 2
    assert crossing([0.0, 0.2], [60.0, 55.0], 50.0) == (0.2, False)
    assert crossing([0.1, 0.2], [49.0, 45.0], 50.0) == (0.1, False)
    assert crossing([0.1, 0.2], [49.0, 45.0], 50.0, 1.0) == (0.1, True)
    assert crossing([0.0, 0.2], [53.0, 49.0], 50.0, 1.0) == (pytest.approx(0.1), True)
    with pytest.raises(SurgeryError, match="expected at least 2 to choose between"):
        choose(pairs, {0.0: margins[0.0]})
