"""StereoSet: three file forms, every bad row by name, and the authors' own numbers from their own sentence scores."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import demo

from surgery import SurgeryError
from surgery.data import stereoset
from surgery.metrics import stereoset as metric
from surgery.metrics.suite import evaluate_suites, plain
from surgery.runs.report import leaves

DATA = os.environ.get("SURGERY_DATA")
needs_data = pytest.mark.skipif(DATA is None, reason="needs the data folder: set SURGERY_DATA")
# The authors' predictions.txt for the intrasentence gender rows of the dev file.
KNOWN = {
    "gpt2": (62.66777425, 93.27790824, 69.64543856),
    "gpt2-medium": (65.58105727, 93.58464056, 64.42168769),
    # Printed as ICAT 66.16556533, which LMS min(SS, 100 - SS) / 50 of the two printed means is not; it gives this.
    "gpt2-large": (65.29146280, 95.31597163, 66.16555894),
}


def raw(number: int, bias_type: str = "gender", kind: str = "intrasentence") -> dict[str, Any]:
    context = f"The nurse{number} is BLANK." if kind == "intrasentence" else f"The nurse{number} is here."
    words = {"stereotype": "kind", "anti-stereotype": "rude", "unrelated": "blue"}
    return {"type": kind, "target": f"nurse{number % 4}", "bias_type": bias_type, "context": context} | {
        label: f"The nurse{number} is {word}." for label, word in words.items()
    }


def official(row: dict[str, Any], number: int = 0, votes: dict[str, list[str]] | None = None) -> dict[str, Any]:
    kept = {key: row[key] for key in ("target", "bias_type", "context")}
    sentences = [
        {
            "id": f"{label}{number}",
            "sentence": row[label],
            "gold_label": label,
            "labels": [{"label": vote, "human_id": "h"} for vote in (votes or {}).get(label, [])],
        }
        for label in ("unrelated", "stereotype", "anti-stereotype")
    ]
    return kept | {"id": f"row{number}", "sentences": sentences}


def write(path: Path, rows: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


@needs_data
@pytest.mark.parametrize("name", KNOWN)
def test_the_authors_scores_from_the_authors_sentence_scores(name: str) -> None:
    folder = Path(str(DATA)) / "stereoset"
    triples = stereoset.load(folder / "stereoset_dev_gender_with_ids.json")
    given = json.loads((folder / f"predictions/{name}_gender.json").read_text())["intrasentence"]
    by_id = {cell["id"]: cell["score"] for cell in given}
    ids = {
        row["id"]: [row["data"][label]["id"] for label in stereoset.LABELS]
        for row in json.loads((folder / "stereoset_dev_gender_with_ids.json").read_text())
    }
    scores = np.array([[by_id[cell] for cell in ids[row.id]] for row in triples.rows])
    found = metric.score(triples, scores, data="dev", scorer="authors")
    for key, known in zip(("ss", "lms", "icat"), KNOWN[name], strict=True):
        for group in ("gender", "overall"):
            assert found[key][group].value == pytest.approx(known, abs=1e-6)
            assert found[key][group].low < known < found[key][group].high
            assert found[key][group].n == 255


@needs_data
def test_the_demo_model_has_its_known_score() -> None:
    """SS of the first 100 gender rows in float32, measured with other code by bias-bench's definition: 68.69."""
    model, tokenizer = demo()
    gender = [row for row in stereoset.load(str(DATA)).rows if row.bias_type == "gender"]
    triples = stereoset.Triples(tuple(gender[:100]), (), "first 100 gender rows")
    found = metric.evaluate_triples(model, tokenizer, triples)
    assert found["ss"]["gender"].value == pytest.approx(68.69, abs=0.01)


@needs_data
def test_every_file_at_hand_is_read_in_full() -> None:
    folder = Path(str(DATA))
    counts = {kind: len(stereoset.load(folder, kind=kind).rows) for kind in ("intrasentence", "intersentence", "all")}
    assert counts == {"intrasentence": 1065, "intersentence": 2123, "all": 3188}
    lines = stereoset.load(folder / "stereoset/stereoset_train_union.jsonl")
    same = stereoset.load(folder / "stereoset/stereoset_train_union_official_format.json")
    assert [row.sentences for row in lines.rows] == [row.sentences for row in same.rows] and len(lines.rows) == 2656
    small = stereoset.load(folder / "stereoset/train_source/editbias_dev.json")
    assert len(small.rows) == 799 - 12 == 799 - len(small.skipped)


def test_scores_are_means_over_target_terms_and_ties_count_against() -> None:
    rows = [raw(0), raw(4), raw(8), raw(1), raw(2, "race"), raw(5, "race")]
    triples = stereoset.Triples(tuple(stereoset._triple(row, str(n)) for n, row in enumerate(rows)), (), "made")  # type: ignore[misc]
    scores = np.array([[3, 1, 2], [3, 3, 1], [1, 2, 3], [2, 1, 0], [1, 2, 2], [5, 1, 1.0]])
    found = metric.score(triples, scores, data="made", scorer="x")
    # nurse0: prefers 1, 0 (tie), 0; knows 1/2, 1, 0. nurse1: 1 and 1. Race: nurse2 0 and 0 (tie), nurse1 1 and 1/2.
    assert found["ss"]["gender"].value == pytest.approx(100 * (1 / 3 + 1) / 2)
    assert found["lms"]["gender"].value == pytest.approx(100 * (1 / 2 + 1) / 2)
    assert found["ss"]["race"].value == pytest.approx(50) and found["lms"]["race"].value == pytest.approx(25)
    assert "margin" not in found
    # Margins +.3 -.1 +.2 of nurse0 and -.4 of nurse1: over terms (.2 + .4) / 2, whichever way they point.
    margins = np.array([0.3, -0.1, 0.2, -0.4, 1.0, -2.0])
    found = metric.score(triples, scores, data="made", scorer="x", margins=margins)
    assert found["margin"]["gender"].value == pytest.approx(0.3) and found["margin"]["race"].value == pytest.approx(1.5)
    assert (found["margin"]["gender"].ideal, found["margin"]["gender"].direction) == (0.0, "lower")
    # Overall over the three terms, not over the two types; nurse1 has a row in each.
    assert found["ss"]["overall"].value == pytest.approx(100 * (1 / 3 + 1 + 0) / 3)
    assert found["lms"]["overall"].value == pytest.approx(100 * (1 / 2 + 3 / 4 + 0) / 3)
    ss, lms = found["ss"]["overall"].value, found["lms"]["overall"].value
    assert found["icat"]["overall"].value == pytest.approx(lms * min(ss, 100 - ss) / 50)
    assert (found["ss"]["overall"].ideal, found["lms"]["overall"].direction) == (50, "higher")
    with pytest.raises(SurgeryError, match=r"got shape \(2, 3\), expected \(6, 3\)"):
        metric.score(triples, scores[:2], data="made", scorer="x")


@pytest.mark.parametrize("form", ["jsonl", "official", "list", "shortcut"])
def test_the_forms_give_the_same_triples(form: str, tmp_path: Path) -> None:
    rows = [raw(number) for number in range(20)]
    full = [official(row, number) for number, row in enumerate(rows)]
    if form == "jsonl":
        path = write(tmp_path / "a.jsonl", rows)
    elif form == "official":
        path = write(tmp_path / "a.json", {"version": "1", "data": {"intrasentence": full, "intersentence": []}})  # type: ignore[arg-type]
    elif form == "list":
        path = write(tmp_path / "a.json", full)
    else:
        cut = [
            {key: row[key] for key in ("id", "target", "bias_type", "context")}
            | {"data": {cell["gold_label"]: {"sentence": cell["sentence"]} for cell in row["sentences"]}}
            for row in full
        ]
        path = write(tmp_path / "a.json", cut)
    found = stereoset.load(path)
    assert found.skipped == () and len(found.rows) == 20
    first = found.rows[0]
    assert first.sentences == ("The nurse0 is kind.", "The nurse0 is rude.", "The nurse0 is blue.")
    assert (first.target, first.bias_type, first.kind) == ("nurse0", "gender", "intrasentence")


def test_the_hubs_form_from_a_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    numbers = {"anti-stereotype": 0, "stereotype": 1, "unrelated": 2}
    lines = ["---", "configs:"]
    for kind in stereoset.KINDS:
        rows = []
        for number in range(20):
            row = official(raw(number, kind=kind), number)
            rows.append(
                row
                | {
                    "sentences": {
                        "sentence": [cell["sentence"] for cell in row["sentences"]],
                        "id": [cell["id"] for cell in row["sentences"]],
                        "labels": [{"label": [1, 1, 3], "human_id": ["a", "b", "c"]} for _ in row["sentences"]],
                        "gold_label": [numbers[cell["gold_label"]] for cell in row["sentences"]],
                    }
                }
            )
        (tmp_path / "hub" / kind).mkdir(parents=True)
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / "hub" / kind / "validation-00000-of-00001.parquet")
        lines += [f"- config_name: {kind}", "  data_files:", "  - split: validation", f"    path: {kind}/validation-*"]
    (tmp_path / "hub" / "README.md").write_text("\n".join([*lines, "---", ""]))
    found = stereoset.load(tmp_path / "hub", kind="all")
    assert [row.kind for row in found.rows] == ["intrasentence"] * 20 + ["intersentence"] * 20
    assert found.rows[21].sentences == ("The nurse1 is kind.", "The nurse1 is rude.", "The nurse1 is blue.")
    assert not found.skipped
    (tmp_path / "empty").mkdir()
    with pytest.raises(SurgeryError, match="datasets cannot load its 'intrasentence' validation split"):
        stereoset.load(tmp_path / "empty")


BAD = {
    "anti-stereotype is missing": lambda row: row.pop("anti-stereotype"),
    "unrelated is '  ', expected text": lambda row: row.update(unrelated="  "),
    "has no BLANK": lambda row: row.update(context="The nurse is here."),
    "two of the three sentences are the same": lambda row: row.update(unrelated=row["stereotype"]),
    "type is 'other', expected": lambda row: row.update(type="other"),
    "target is missing": lambda row: row.update(target=None),
    "bias type 'age' has 1 intrasentence rows, fewer than 20": lambda row: row.update(bias_type="age"),
}


@pytest.mark.parametrize("reason", BAD)
def test_a_bad_row_is_skipped_by_file_line_and_reason(reason: str, tmp_path: Path) -> None:
    rows = [raw(number) for number in range(21)]
    BAD[reason](rows[6])
    found = stereoset.load(write(tmp_path / "a.jsonl", rows))
    assert len(found.rows) == 20 and len(found.skipped) == 1
    assert found.skipped[0].startswith(f"{tmp_path / 'a.jsonl'}, line 7: ") and reason in found.skipped[0]


def test_bad_labels_are_named_and_swapped_ones_found(tmp_path: Path) -> None:
    full = [official(raw(number), number) for number in range(23)]
    full[3]["sentences"][0]["gold_label"] = "related"
    full[4]["sentences"][0]["gold_label"] = "stereotype"
    votes = {"stereotype": ["anti-stereotype"] * 3 + ["stereotype"], "anti-stereotype": ["stereotype"] * 3}
    full[5] = official(raw(5), 5, votes)
    full[6] = official(raw(6), 6, votes | {"anti-stereotype": ["anti-stereotype"]})
    found = stereoset.load(write(tmp_path / "a.json", full))
    assert len(found.rows) == 20
    assert ["row 4: " in found.skipped[0], "row 5: " in found.skipped[1], "row 6: " in found.skipped[2]] == [True] * 3
    assert "'related' is unknown" in found.skipped[0] and "two sentences are labelled stereotype" in found.skipped[1]
    assert "its labels are swapped" in found.skipped[2]
    # An official sentence id under the opposite label: the whole file is swapped (BiasEdit's gender_test.json).
    known = next(iter(stereoset.STEREOTYPES)) + "532fa360d37c25e918546f57"
    swapped = official(raw(0))
    swapped["sentences"][2]["id"] = known
    with pytest.raises(SurgeryError, match=f"sentence {known} is labelled anti-stereotype.*labels are swapped"):
        stereoset.load(write(tmp_path / "b.json", [swapped, *full]))
    swapped["sentences"][2]["id"], swapped["sentences"][1]["id"] = "x", known
    assert len(stereoset.load(write(tmp_path / "b.json", [swapped, *full])).rows) == 21


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"type": ', r"a.jsonl, line 1: got .*expected a JSON object"),
        ("a.jsonl", "", "no intrasentence triple to use"),
        ("a.jsonl", json.dumps(raw(1, kind="intersentence")), "1 rows are of another kind"),
        ("a.jsonl", json.dumps(raw(1)), "line 1: bias type 'gender' has 1 intrasentence rows, fewer than 20"),
        ("a.json", "{", "a.json: malformed"),
        ("a.json", '{"data": []}', "expected .*intrasentence"),
        ("b.json", "", "no such file"),
    ],
)
def test_files_that_cannot_be_used_are_one_clear_error(name: str, content: str, message: str, tmp_path: Path) -> None:
    if name != "b.json":
        (tmp_path / name).write_text(content)
    with pytest.raises(SurgeryError, match=message):
        stereoset.load(tmp_path / name)
    with pytest.raises(SurgeryError, match="kind: got 'both'"):
        stereoset.load(tmp_path / name, kind="both")  # type: ignore[arg-type]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    both = [raw(number, kind=kind) for kind in stereoset.KINDS for number in range(30)]
    race = [raw(number, "race") for number in range(30)]
    write(tmp_path / "data" / stereoset.FILE, [*both, *race, {"type": "intrasentence"}])
    return tmp_path / "data"


def test_evaluate_measures_a_model_and_says_what_it_skipped(
    tiny: Any, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from surgery.progress import Progress

    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    options = {"stereoset": {"scorer": "bos", "kind": "all"}}
    found = evaluate_suites(model, tokenizer, ["stereoset"], folder, progress=Progress(), options=options)
    said = capsys.readouterr().err
    assert "measure stereoset: 270 in" in said and "1 rows skipped" in said and "line 91: " in said
    scores = plain(found)["stereoset"]
    assert list(scores) == ["ss", "lms", "icat", "margin", "skipped"] and len(scores["skipped"]) == 1
    assert {keys for keys, _ in leaves(scores)} == {
        (key, group) for key in ("ss", "lms", "icat", "margin") for group in ("gender", "race", "overall")
    }
    one = scores["ss"]["overall"]
    assert one["n"] == 90 and "bos" in one["scorer"] and "stereoset_dev.jsonl all" in one["data"]
    few = metric.evaluate(model, tokenizer, folder, limit=11, seed=3)
    assert few["ss"]["overall"].n == 11 and "11 of 60 with seed 3" in few["ss"]["overall"].data
    assert few == metric.evaluate(model, tokenizer, folder, limit=11, seed=3)
    with pytest.raises(SurgeryError, match=r"suite: got 'stereose', expected some of genbias.*stereoset"):
        evaluate_suites(model, tokenizer, ["stereose"], folder)


def test_intersentence_contexts_are_closed_and_biasedit_has_two_scores(tiny: Any) -> None:
    from surgery.metrics.sentences import sentence_scores

    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    row = stereoset._triple(raw(1, kind="intersentence") | {"context": "The nurse is here "}, "x")
    triples = stereoset.Triples((row,), (), "made")  # type: ignore[arg-type]
    main, related, means = metric.triple_scores(model, tokenizer, triples)
    context = ["The nurse is here."] * 3
    assert main[0] == pytest.approx(sentence_scores(model, tokenizer, row.sentences, contexts=context))  # type: ignore[union-attr]
    assert (main == related).all() and main == pytest.approx(np.exp(means))
    main, related, means = metric.triple_scores(model, tokenizer, triples, scorer="legacy-biasedit")
    assert related[0] == pytest.approx(
        sentence_scores(model, tokenizer, row.sentences, scorer="no-start", contexts=context)  # type: ignore[union-attr]
    )
    assert related == pytest.approx(np.exp(means))
    assert (main > related).all()  # the arithmetic mean is above the geometric one


def test_a_row_longer_than_the_context_is_skipped_by_file_and_line(tiny: Any, folder: Path) -> None:
    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    rows = [raw(number) for number in range(21)]
    rows[4]["unrelated"] = "nurse " * 128  # with a start token 129 of 128
    path = write(folder / "long.jsonl", rows)
    found = metric.evaluate(model, tokenizer, path)
    assert found["ss"]["gender"].n == 20
    assert found["skipped"] == [f"{path}, line 5: 129 tokens with a start token, the model takes 128"]
    write(path, [row | {"unrelated": "nurse " * 128} for row in rows])
    with pytest.raises(SurgeryError, match=r"no row fits .*line 1: 129 tokens"):
        metric.evaluate(model, tokenizer, path)
