"""Sweeps and comparisons: the grid, what is skipped and resumed, the mean over seeds, and who dominates whom."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import painted
from hypothesis import given
from hypothesis import strategies as st
from test_cli import surgery

from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.runs import compare
from surgery.runs.folder import run_folder
from surgery.runs.recipe_files import dump
from surgery.runs.settings import Settings
from surgery.runs.sweep import folder_name, grid, parse_vary, sweep


class Toy(Settings):
    decay: float = 0.2
    words: list[str] = ["he"]


def metric(value: float, **more: Any) -> dict[str, Any]:
    return {
        "value": value, "low": value - 0.1, "high": value + 0.1, "n": 5, "scorer": "s", "data": "d", "ideal": 0.0,
        "direction": "lower",
    } | more  # fmt: skip


def write_run(folder: Path, settings: Toy, bias: float, cost: float, before: float = 0.9) -> Path:
    with run_folder(folder, dump("toy", settings)) as inside:
        summary = {
            "before": {"gas": {"share": metric(before)}},
            "after": {"gas": {"share": metric(bias)}, "perplexity": metric(cost, ideal=1.0)},
            "controls": {"vanilla": {"after": {"gas": {"share": metric(0.95)}, "perplexity": metric(9.0)}}},
            "pareto": ["gas.share", "perplexity"],
        }
        write_json(inside.path / "run.json", summary)
    return folder


# The grid


def test_values_are_toml_where_they_can_be_and_words_elsewhere() -> None:
    assert parse_vary(["decay=0.1, 0.2", "method=crawd,vanilla", 'reference=["he","she"],["man"]', "on=true"]) == {
        "decay": [0.1, 0.2],
        "method": ["crawd", "vanilla"],
        "reference": [["he", "she"], ["man"]],
        "on": [True],
    }
    for wrong in ("decay", "=1", "decay=", "decay=1,1", "decay=,"):
        with pytest.raises(SurgeryError, match="--vary"):
            parse_vary([wrong])
    with pytest.raises(SurgeryError, match="named twice"):
        parse_vary(["decay=1", "decay=2"])


def test_the_grid_is_every_combination() -> None:
    points = grid({"a": [1, 2], "b": ["x", "y", "z"]})
    assert len(points) == 6 and points[1] == {"a": 1, "b": "y"}
    assert folder_name({"decay": 0.1, "words": ["he", "she"], "path": "a/b"}) == "decay=0.1,words=he+she,path=a_b"


def test_finished_runs_are_skipped_and_interrupted_ones_resumed(tmp_path: Path) -> None:
    calls: list[tuple[float, bool]] = []

    def run(settings: Toy, folder: Path, resume: bool) -> None:
        calls.append((settings.decay, resume))
        with run_folder(folder, dump("toy", settings), resume=resume):
            if settings.decay == 0.3 and not resume:
                raise KeyboardInterrupt

    varied = {"decay": [0.1, 0.3, 0.5]}
    with pytest.raises(KeyboardInterrupt):
        sweep(Toy, "toy", {}, varied, tmp_path, run)
    assert calls == [(0.1, False), (0.3, False)]
    folders = sweep(Toy, "toy", {}, varied, tmp_path, run)
    assert calls[2:] == [(0.3, True), (0.5, False)] and all(folder.is_dir() for folder in folders)
    sweep(Toy, "toy", {}, varied, tmp_path, run)
    assert len(calls) == 4
    with pytest.raises(SurgeryError, match="was made with seed = 0, this sweep has 1"):
        sweep(Toy, "toy", {"seed": 1}, varied, tmp_path, run)
    assert len(calls) == 4


def test_wrong_settings_are_refused_before_the_first_run(tmp_path: Path) -> None:
    def never(settings: Toy, folder: Path, resume: bool) -> None:
        raise AssertionError

    for varied, message in (
        ({"decay": [0.1, "much"]}, "decay=much: decay: got 'much'"),
        ({"dekay": [0.1]}, "did you mean 'decay'"),
        ({}, "nothing to vary"),
        ({"model": ["a/b", "a_b"]}, "share a folder"),
    ):
        with pytest.raises(SurgeryError, match=message):
            sweep(Toy, "toy", {}, varied, tmp_path, never)
    (tmp_path / "decay=0.1").mkdir()
    with pytest.raises(SurgeryError, match="not a run's folder"):
        sweep(Toy, "toy", {}, {"decay": [0.1]}, tmp_path, never)


# Side by side


def test_seeds_are_averaged_with_student_s_interval(tmp_path: Path) -> None:
    values = [0.2, 0.3, 0.7]
    folders = [write_run(tmp_path / f"a{n}", Toy(seed=n), value, 5.0) for n, value in enumerate(values)]
    folders.append(write_run(tmp_path / "b", Toy(decay=0.4), 0.6, 4.0))
    found = compare.cases([compare.read_run(folder) for folder in folders])
    assert [(case.name, case.seeds, case.reference) for case in found] == [
        ("before", 1, True),  # equal in all four, so it stands once
        ("control vanilla", 1, True),
        ("decay 0.2", 3, False),
        ("decay 0.4", 1, False),
    ]
    one = found[2].scores["gas.share"]
    # t(0.975, 2) = 4.302653, from scipy.stats.t.ppf
    half = 4.302653 * np.std(values, ddof=1) / np.sqrt(3)
    assert one["value"] == pytest.approx(0.4)
    assert one["low"] == pytest.approx(0.4 - half, rel=1e-3) and one["high"] == pytest.approx(0.4 + half, rel=1e-3)
    assert (found[3].scores["gas.share"]["low"], found[3].scores["gas.share"]["high"]) == (0.5, 0.7)


def test_references_that_differ_are_averaged(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"{n}", Toy(seed=n), 0.1, 5.0, before=0.5 + n / 10) for n in (0, 1)]
    before = compare.cases([compare.read_run(folder) for folder in folders])[0]
    assert (
        before.runs == 2
        and before.count == "measured 2 times"
        and before.scores["gas.share"]["value"] == pytest.approx(0.55)
    )


def test_a_repeated_run_is_no_second_seed(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name, Toy(), 0.3, 5.0) for name in ("first", "again")]
    (one,) = [case for case in compare.cases([compare.read_run(folder) for folder in folders]) if not case.reference]
    assert (one.seeds, one.runs, one.count) == (1, 1, "1 seed")
    assert (one.scores["gas.share"]["low"], one.scores["gas.share"]["high"]) == pytest.approx((0.2, 0.4))
    other = write_run(tmp_path / "other", Toy(), 0.5, 5.0)  # the same seed, and yet another result
    (one,) = [
        case for case in compare.cases([compare.read_run(folder) for folder in [*folders, other]]) if not case.reference
    ]
    assert (one.runs, one.count) == (2, "2 runs, 1 seed")


def test_other_words_are_another_metric(tmp_path: Path) -> None:
    a, b = (write_run(tmp_path / name, Toy(words=[name]), 0.3, 5.0) for name in ("he", "they"))
    summary = json.loads((b / "run.json").read_text())
    summary["after"]["gas"]["share"]["scorer"] = "three words"
    write_json(b / "run.json", summary)
    found = compare.cases([compare.read_run(folder) for folder in (a, b)])
    assert [set(case.scores) - {"perplexity"} for case in found if not case.reference] == [
        {"gas.share (s, d)"},
        {"gas.share (three words, d)"},
    ]


def test_texts_drawn_by_the_run_s_seed_are_no_other_metric(tmp_path: Path) -> None:
    folders = []
    for seed in (0, 12):
        folders.append(write_run(tmp_path / f"{seed}", Toy(seed=seed), 0.3 + seed / 100, 5.0))
        summary = json.loads((folders[-1] / "run.json").read_text())
        for scores in (summary["before"], summary["after"], summary["controls"]["vanilla"]["after"]):
            scores["gas"]["share"] |= {"scorer": f"top-p 1, seed {seed}", "data": f"test part of seed {seed}"}
        write_json(folders[-1] / "run.json", summary)
    one = compare.cases([compare.read_run(folder) for folder in folders])[-1]
    assert one.seeds == 2 and one.scores["gas.share"]["value"] == pytest.approx(0.36)


def test_a_row_of_many_settings_is_named_by_its_folder(tmp_path: Path) -> None:
    names = [{f"key{n}": n + run for n in range(6)} for run in (0, 1)]
    runs = [compare.Finished(Path(f"run{n}"), keys, {"after": {}}) for n, keys in enumerate(names)]
    assert [case.name for case in compare.cases(runs)] == [
        "run0, key0 0, and 5 other settings",
        "run1, key0 1, and 5 other settings",
    ]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[int, int]]) -> None:
    kept = compare.front(points)  # type: ignore[arg-type]
    assert kept and [points[n] for n in kept] == sorted(points[n] for n in kept)
    for n, (x, y) in enumerate(points):
        dominated = any(a <= x and b <= y and (a < x or b < y) for a, b in points)
        assert (n in kept) != dominated


def test_a_metric_s_loss_follows_its_direction() -> None:
    assert compare.loss(metric(0.3)) == 0.3
    assert compare.loss(metric(0.3, direction="higher")) == -0.3
    assert compare.loss(metric(47.0, direction="nearer", ideal=50.0)) == 3.0


def test_the_commands(tmp_path: Path) -> None:
    a = write_run(tmp_path / "a", Toy(), 0.3, 5.0)
    b = write_run(tmp_path / "b", Toy(decay=0.4), 0.6, 4.0)
    (tmp_path / "old.html").write_text("")
    files = ("--html", tmp_path / "c.html", "--json", tmp_path / "c.json")
    with painted():
        code, stdout, stderr = surgery("compare", a, b, tmp_path / "old.html", *files)
    assert code == 0, stderr
    assert "decay 0.4 (1 seed)" in stdout and "control vanilla" in stdout
    page = (tmp_path / "c.html").read_text()
    assert "decay 0.4" in page and "0.6000 [0.5000, 0.7000]" in page and "<svg" in page
    assert (tmp_path / "c_pareto.png").stat().st_size > 5000
    assert len(json.loads((tmp_path / "c.json").read_text())["cases"]) == 4
    code, stdout, _ = surgery("compare", a, b, "--metric", "gas")
    assert code == 0 and "gas.share" in stdout and "perplexity" not in stdout
    for words, message in (
        ((a, "--pareto", "gas"), "expected BIAS,COST"),
        ((a, "--pareto", "gas.share,loss"), "metric 'loss': none of what was measured"),
        ((a, "--metric", "bleu"), "these runs have"),
        ((tmp_path / "nowhere",), "no finished run (run.json: No such file or directory); give the folder of"),
        ((a.parent,), f"runs in it: {a.parent}/*"),
        ((tmp_path / "old.html",), "is a file"),
    ):
        code, _, stderr = surgery("compare", *words)
        assert code == 1 and message in stderr and stderr.count("\n") == 1


def test_a_sweep_of_a_real_recipe(checkpoint: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"The {job} said that he is kind.\n" for job in ("nurse", "guard", "judge", "poet")))
    words = ["sweep", "finetune", "--model", checkpoint, "--set", f"file={texts}", "--vary", "lr=1e-3,1e-2"]
    words += ["--out", tmp_path / "runs", "--device", "cpu", "--metric", "held_out_loss"]
    code, stdout, stderr = surgery(*words)
    assert code == 0, stderr
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"lr=0.001", "lr=0.01", "compare.html"}
    assert "lr 0.01 (1 seed)" in stdout
    code, again, stderr = surgery(*words)
    assert code == 0 and again == stdout and stderr.count("finished before") == 2
    code, _, stderr = surgery("sweep", "finetune", "--out", tmp_path / "x", "--vary", "rl=1,2", "--device", "cpu")
    assert code == 1 and "unknown key 'rl'" in stderr and not (tmp_path / "x").exists()
