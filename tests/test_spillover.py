"""The ledger of a run: what got worse first, in points, on the rows with and without the edit."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import state
from test_cli import surgery as cli

import surgery
from recipes import bias_diff
from surgery.catalogue import SUITES
from surgery.cli.models import _ledger
from surgery.metrics.judges import Judges
from surgery.metrics.ledger import BRIEF, LEDGER
from surgery.metrics.metric import Difference, difference, mean_metric, points
from surgery.progress import Progress
from surgery.runs.spillover import _table, _width, said, spillover


def metric(values: Any, direction: str, ideal: float) -> Any:
    return mean_metric(np.asarray(values, float), scorer="s", data="d", ideal=ideal, direction=direction)


@pytest.mark.parametrize(
    "value, direction, ideal, change, expected",
    [(44.0, "lower", 1.0, 4.0, 10.0), (58.0, "nearer", 50.0, -2.5, -2.5), (0.75, "higher", 1.0, -0.02, -2.0)],
)
def test_a_point_of_each_kind_of_number(
    value: float, direction: str, ideal: float, change: float, expected: float
) -> None:
    assert points(metric([value] * 3, direction, ideal).to_dict(), change) == pytest.approx(expected)


def test_what_is_worse_by_more_than_a_point_is_named() -> None:
    draw = np.random.default_rng(0).uniform(0.4, 0.6, 60)
    before = {
        "facts": metric(draw, "higher", 1.0),
        "mass": metric(draw, "same", 0.5),
        "gap": metric(draw, "lower", 0.0),
    }
    after = {
        "facts": metric(draw - 0.05, "higher", 1.0),
        "mass": metric(draw + 0.004, "same", 0.5),
        "gap": metric(draw / 2, "lower", 0.0),
    }
    pairs = {place: difference(before[place], after[place], axes=3) for place in after}
    lines = said({place: pair for place, pair in pairs.items() if pair is not None}, after)
    assert "of 3 numbers" in lines[0] and "2 worse, 1 better" in lines[0]
    assert "half of them known to within 0.0 points" in lines[0], "two of three moved by the same in every row"
    kept = {place: pair for place, pair in pairs.items() if pair is not None}
    table = _table(dict(reversed(kept.items())), before, after)
    assert [(row[0], row[1]) for row in table.rows] == [("facts", "worse"), ("mass", "worse"), ("gap", "better")]
    assert lines[1] == "Warning: worse by more than a point: facts (-5.0)."


def test_how_well_a_difference_is_known_is_in_points_of_what_the_number_was() -> None:
    pair = Difference(4.0, 2.0, 6.0, 9, "s", "d", "worse")
    assert _width(metric([44.0] * 3, "lower", 1.0), pair) == pytest.approx(5.0)  # +- 2 of a perplexity of 40
    assert _width(metric([0.75] * 3, "higher", 1.0), replace(pair, low=3.98, high=4.02)) == pytest.approx(2.0)


def test_a_run_is_measured_without_and_with_its_edit(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges = Judges(suites=("genbias", "perplexity"), rows={"genbias": 18, "perplexity": 9})
    asked: list[dict[str, Any]] = []

    def ledger(folder: str, **told: Any) -> tuple[Judges, dict[str, str]]:
        asked.append(told)
        return judges, {"bbq": "no such file"}

    monkeypatch.setattr("surgery.metrics.judges.ledger", ledger)
    out = tmp_path / "run"
    settings = ("block=2", "lr=1e-2", "epochs=1", "controls=[]", "test_rows=9", "split_seed=5")
    words = [word for each in settings for word in ("--set", each)]
    where = ["--model", checkpoint, "--out", out, "--device", "cpu", "--ledger", tmp_path]
    code, stdout, stderr = cli("run", "lftf", *where, *words)
    assert code == 0 and "ledger: without bbq: no such file" in stderr
    assert asked == [{"rows": BRIEF, "split_seed": 5}]
    found = json.loads((out / "ledger.json").read_text())
    place = "genbias.mass.all"
    moved = found["after"][place]["value"] - found["before"][place]["value"]
    assert found["before"][place]["n"] == 18 and moved != 0
    assert found["differences"][place]["value"] == pytest.approx(moved)
    assert found["verdict"][0] in stdout and "Ledger: of " in (out / "ledger.html").read_text()
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    was = state(model)
    assert spillover(model, tokenizer, out, judges, progress=Progress(quiet=True)) == found["verdict"]
    assert state(model) == was


def test_unasked_it_is_measured_where_the_run_has_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Progress(quiet=True)
    nowhere, there = bias_diff.Settings(model="m"), bias_diff.Settings(model="m", data=str(tmp_path))
    assert _ledger("", nowhere, None, said) is None and _ledger("none", there, None, said) is None
    brief = _ledger("", there, "cpu", said)
    assert brief is not None and brief.folder == str(tmp_path) and brief.suites == (*SUITES, "free_text")
    monkeypatch.setattr("surgery.devices.device_named", lambda name: torch.device("cuda"))
    quick = _ledger("", there, "cuda", said)
    assert quick is not None and all(0 < brief.rows[name] < quick.rows.get(name, 10**6) for name in brief.rows)
    assert set(brief.rows) >= set(LEDGER), "none is measured whole on a processor"


def test_a_folder_that_is_not_there_is_named_before_the_run(checkpoint: Path, tmp_path: Path) -> None:
    code, _, stderr = cli("run", "lftf", "--model", checkpoint, "--out", tmp_path / "run", "--ledger", tmp_path / "no")
    assert code == 1 and "no folder" in stderr and not list(tmp_path.glob("run*"))
