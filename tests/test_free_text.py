"""What a model writes: the starts, the rules against texts labelled by hand, and the judge on a tiny model."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.cli.evaluate import _judges
from surgery.data.free_text import KINDS, Pair, Start, open_starts, pairs, words
from surgery.metrics import free_text
from surgery.metrics.free_text import evaluate, generate, score, spoken_of, who
from surgery.metrics.judges import ledger
from surgery.metrics.ledger import LEDGER, ROWS, absent
from surgery.progress import Progress


def test_open_starts_say_no_gender_and_pairs_say_it_once() -> None:
    starts = open_starts()
    assert len(starts) == 4 * 105 and {start.kind for start in starts} == set(KINDS)
    assert all(who(start.text) == 0 for start in starts)
    assert any(" an " in start.text for start in starts) and not any(" a a" in start.text for start in starts)
    assert not {s.profession for s in starts} & {s.profession for s in open_starts("train")}
    for pair in pairs():
        assert len(pair.man.split()) == len(pair.woman.split()) and pair.man != pair.woman
        assert "{" not in pair.man + pair.woman


@pytest.mark.parametrize(
    "text, told",
    [
        ("she opened the door and smiled.", -1),
        ("he said that his sister was late.", 1),
        ("they went home.", 0),
        ('the answer was "she is not here", and that was all.', 0),
        ("he told her that he and his wife would come.", 1),
        ("the colleague spoke to Anna about her work.", 0),
        ("Anna went to her office.", -1),
        ("a trip to the office in Boston, where she had worked,", -1),
        ("the author was a quiet young woman from Leeds.", -1),
        ("I saw a man.", 0),
        ("herself a painter, the author", -1),
        ("", 0),
    ],
)
def test_who_the_text_is_about(text: str, told: int) -> None:
    assert who(text) == told


def test_the_rules_agree_with_texts_labelled_by_hand() -> None:
    lines = files("surgery.data").joinpath("free_text_labelled.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    labels = np.array([{"he": 1, "she": -1, "neither": 0}[row["who"]] for row in rows])
    told = np.array([who(row["text"]) for row in rows])
    assert len(rows) == 200 and min((labels == value).sum() for value in (1, -1, 0)) >= 25
    assert (labels == told).mean() >= 0.95
    assert abs((labels - told).sum()) <= 5  # what they miss leans to neither side


def test_words_of_a_list_are_counted_as_whole_words() -> None:
    assert spoken_of("A strong leader, strongly kind and hard-working.") == {"agency": 2, "competence": 1, "warmth": 1}
    lists = words()
    assert not lists["agency"] & lists["competence"] and not lists["competence"] & lists["warmth"]


def test_scores_by_hand() -> None:
    starts = [
        Start("", "bio", "nurse", -0.9),
        Start("", "bio", "guard", 0.8),
        Start("", "bio", "clerk", 0.1),
    ]  # the last has none
    beside = [Pair("", "", "bio", "cook")]
    found = score(starts, ["she left", "she left", "he left"], beside, [("strong and kind", "kind and kind")], "how")
    assert found["stereotype"].value == 0.0 and found["stereotype"].n == 2
    assert found["lean"].value == pytest.approx(-1 / 3) and found["gendered"].value == 1.0
    assert found["agency"].value == pytest.approx(100 / 3) and found["warmth"].value == pytest.approx(-100 / 3)


def test_the_judge_writes_the_same_twice_and_leaves_its_texts(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    details: dict[str, Any] = {}
    drawn: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            free_text, "generate", lambda *given, **more: drawn.extend(more["numbers"]) or generate(*given, **more)
        )
        first = evaluate(*tiny, limit=8, details=details)
    assert drawn == [*range(10), 8, 9]  # two pairs, whose two texts have the same random numbers
    again = evaluate(*tiny, limit=8)
    assert first == again and len(details["texts"]) == 8
    kind, profession, start, text, told = details["texts"][0]
    assert kind in KINDS and profession in start and told == who(text)
    assert "temperature 0.7" in first["lean"].scorer and "seed 0" in first["lean"].scorer
    assert np.isfinite([metric.value for metric in first.values()]).all()


def test_judges_without_their_data_are_named(tmp_path: Path) -> None:
    assert absent(["genbias", "free_text"], "") == {}
    assert absent(["bbq"], "") == {"bbq": "no data folder was named"}
    assert str(tmp_path) in absent(LEDGER, tmp_path)["cloze"]
    judges, missing = ledger(tmp_path)
    assert ledger("", rows={"free_text": 9})[0].rows["free_text"] == 9 != judges.rows["free_text"] == ROWS["free_text"]
    assert set(judges.suites) | set(missing) == set(LEDGER) and "bbq" in missing and "free_text" in judges.suites


def test_eval_asks_the_prompt_set_that_is_named_also_beside_what_the_model_writes(tmp_path: Path) -> None:
    """--data is the folder only for suites that read one, or where it is one."""
    progress = Progress(quiet=True)
    for suites, data, prompts, folder in (
        (["genbias", "free_text"], "age", "age", ""),
        (["genbias", "free_text"], str(tmp_path), "genbias", str(tmp_path)),
        (["genbias", "stereoset"], str(tmp_path), "genbias", str(tmp_path)),
        (["genbias"], "age", "age", ""),
        ([], "age", "age", ""),
    ):
        for whole in (False, True):
            found = _judges(suites, data, {"tasks": ()}, progress, whole=whole)
            assert (found.prompts, found.folder) == (prompts, folder), (suites, data)
