"""CrowS-Pairs: both files with their noisy labels, every bad row by name, and the three scores by hand."""

import gc
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery import SurgeryError
from surgery.data import crows_pairs
from surgery.metrics import crows_pairs as metric
from surgery.metrics.suite import evaluate_suites

DATA = os.environ.get("SURGERY_DATA")
HEAD = ",sent_more,sent_less,stereo_antistereo,bias_type\n"


def pairs(*rows: tuple[str, str]) -> crows_pairs.Pairs:
    made = [crows_pairs.Pair(f"a{n}", f"b{n}", *row, str(n), "here") for n, row in enumerate(rows)]
    return crows_pairs.Pairs(tuple(made), (), "made")


@pytest.mark.skipif(DATA is None, reason="needs the data folder: set SURGERY_DATA")
def test_both_files_are_read_in_full_and_noisy_labels_survive() -> None:
    folder = Path(str(DATA))
    found = crows_pairs.load(folder)
    assert len(found.rows) == 1280 and found.skipped == ()
    counts = {name: sum(row.bias_type == name for row in found.rows) for name in ("race-color", "gender", "disability")}
    assert counts == {"race-color": 439, "gender": 223, "disability": 50}
    first = found.rows[2]
    assert (first.number, first.direction, first.bias_type) == ("2", "antistereo", "gender")
    revised = crows_pairs.load(folder / "crows_pairs/crows_pairs_revised.csv")
    assert len(revised.rows) == 1250 and revised.skipped == ()
    assert {"other", "stereo"} < {row.bias_type for row in revised.rows}
    assert "Race-color" not in {row.bias_type for row in revised.rows}
    scores = np.tile([1.0, 0.0], (1250, 1))
    assert "other" not in metric.score(revised, scores, data="revised", scorer="x")["metric"]


def test_the_three_scores_by_hand() -> None:
    rows = pairs(*[("stereo", "gender")] * 16, *[("antistereo", "gender")] * 4, ("stereo", "other"))
    scores = np.zeros((21, 2))
    scores[:10, 0] = 1.0  # prefers sent_more of 10 stereo rows; of the other 6 three are ties
    scores[10:13, 1] = 1.0
    scores[16, 0] = scores[20, 0] = 1.0  # of 1 antistereo row, and of the pair of the noisy type
    found = metric.score(rows, scores, data="made", scorer="bos")
    values = {key: {name: one.value for name, one in group.items()} for key, group in found.items()}
    assert values["metric"] == pytest.approx({"gender": 55.0, "overall": 100 * 12 / 21})
    assert values["stereotype"] == pytest.approx({"gender": 62.5, "overall": 100 * 11 / 17})
    assert values["anti_stereotype"] == pytest.approx({"gender": 25.0, "overall": 25.0})
    one = found["anti_stereotype"]["overall"]
    assert (one.n, one.ideal, one.direction, one.scorer) == (4, 50.0, "nearer", "anti-stereotype score, bos")
    margins = np.where(np.arange(21) < 16, 0.5, -1.0)
    margin = metric.score(rows, scores, data="made", scorer="bos", margins=margins)["margin"]
    assert margin["gender"].value == pytest.approx((16 * 0.5 + 4) / 20)  # whichever way it points
    assert margin["overall"].value == pytest.approx((16 * 0.5 + 5) / 21) and set(margin) == {"gender", "overall"}
    stereo = metric.score(pairs(("stereo", "age")), np.ones((1, 2)), data="made", scorer="bos")
    assert stereo["anti_stereotype"] == {}
    with pytest.raises(SurgeryError, match=r"got shape \(2, 2\), expected \(21, 2\)"):
        metric.score(rows, scores[:2], data="made", scorer="bos")


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ("1,,b,stereo,age", "sent_more is empty"),
        ("1,a,,stereo,age", "sent_less is empty"),
        ("1,a,a,stereo,age", "both sentences are the same"),
        ("1,a,b,pro,age", "stereo_antistereo is 'pro', expected stereo or antistereo"),
        ("1,a,b", "stereo_antistereo is '', expected stereo or antistereo"),
    ],
)
def test_a_bad_row_is_skipped_by_file_line_and_reason(cells: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f'{HEAD}0,"one, two",three,stereo,Age\n{cells}\n')
    found = crows_pairs.load(path)
    assert [(row.sent_more, row.bias_type, row.number) for row in found.rows] == [("one, two", "age", "0")]
    assert len(found.skipped) == 1 and found.skipped[0].startswith(f"{path}, line 3: {reason}")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.csv: no such file"),
        ("", "no column 'sent_more'"),
        ("sent_more,sent_less,bias_type\n", "no column 'stereo_antistereo'"),
        (HEAD, "no pair to use; the file has no row"),
        (f"{HEAD}0,a,a,stereo,age\n", "no pair to use; .*line 2: both sentences are the same"),
        (f'{HEAD}0,"a\n', "line 2: malformed"),
    ],
)
def test_files_that_cannot_be_used_are_one_clear_error(content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "a.csv").write_text(content)
    with pytest.raises(SurgeryError, match=message):
        crows_pairs.load(tmp_path / "a.csv")


def test_evaluate_measures_a_model(tiny: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    path = tmp_path / crows_pairs.FILE
    path.parent.mkdir()
    lines = [f"{n},The nurse said that he,The doctor{n % 5} said,stereo,gender\n" for n in range(30)]
    path.write_text(HEAD + "".join(lines) + f"30,a,b,pro,gender\n31,{'nurse ' * 128},b,stereo,gender\n")
    found = evaluate_suites(model, tokenizer, ["crows_pairs"], tmp_path, options={"crows_pairs": {"scorer": "sum"}})
    assert found["crows_pairs"]["metric"]["gender"].n == 30
    assert [line.split(": ")[1][:20] for line in found["crows_pairs"]["skipped"]] == [
        "stereo_antistereo is",
        "129 tokens with a st",
    ]
    few = metric.evaluate(model, tokenizer, tmp_path, limit=7, seed=1)
    assert few["metric"]["overall"].n == 7 and "7 of 31 with seed 1" in few["metric"]["overall"].data


def test_the_collector_leaves_older_things_alone_inside_and_not_afterwards(tmp_path: Path) -> None:
    class Looks:
        def __fspath__(self) -> str:
            seen.append(gc.get_freeze_count())
            return str(tmp_path)  # without data

    for own in (False, True):  # what the caller froze stays so
        seen: list[int] = []
        if own:
            gc.freeze()
        with pytest.raises(SurgeryError, match="crows_pairs"):
            evaluate_suites(None, None, ["crows_pairs"], Looks())  # type: ignore[arg-type]
        assert seen[0] > 1000 and bool(gc.get_freeze_count()) == own
    gc.unfreeze()
