"""Studies: what is run, judged once and taken again, refused, and recommended."""

import fcntl
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cli import surgery
from transformers import BertConfig, BertForMaskedLM, BertModel

from surgery.cli.models import chosen_recipe
from surgery.delta import make
from surgery.errors import SurgeryError
from surgery.metrics.metric import Metric, mean_metric
from surgery.runs.recipe_files import build
from surgery.study import Method, Study, read
from surgery.study.carry_out import carry_out
from surgery.study.cells import Cell, Judged, cells
from surgery.study.judging import check, details_of, keep, kept
from surgery.study.recommendation import answer, broken, recommend
from surgery.study.settings import settings_for
from surgery.study.verdict import objections, removed, removed_between, rows

FILE = """
models = [MODEL]
seeds = [0, 1]
suites = ["genbias", "perplexity"]
rows = { perplexity = 20, genbias = 54 }

[[methods]]
name = "prompt"
preamble = "Good day . "

[[methods]]
name = "lftf"
recipe = "lftf"
settings = { block = 2, lr = 1e-2, epochs = 1, batch_size = 256, controls = [], test_rows = 54 }
about = "one block"

[[methods]]
name = "back"
delta = DELTA
scale = -1.0

[[methods]]
name = "too deep"
recipe = "lftf"
seeds = [1]
settings = { block = 99 }
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_a_study_from_the_command_line(checkpoint: Path, tmp_path: Path) -> None:
    difference = {"model.norm.weight": np.full(32, 0.1, np.float32)}
    make(difference, checkpoint, base="tiny", recipe="", seed=0).save(tmp_path / "delta.safetensors")
    text = FILE.replace("MODEL", json.dumps(str(checkpoint)))
    text = text.replace("DELTA", json.dumps(str(tmp_path / "delta.safetensors")))
    file, out = write(tmp_path / "s.toml", text), tmp_path / "out"
    words = ["study", file, "--out", out, "--device", "cpu"]
    code, stdout, stderr = surgery(*words)
    assert code == 0, stderr
    assert stdout.strip() == str(out / "study.html")
    assert stderr.count("rank the blocks") == 1, "the runs of a study share what is known of the untouched model"
    found = json.loads((out / "study.json").read_text())
    by = {(one["method"], one["seed"]): one for one in found["cells"]}
    assert set(by) == {
        ("untouched", 0), ("prompt", 0), ("lftf", 0), ("lftf", 1), ("back", 0), ("too deep", 1)
    }  # fmt: skip
    assert "block" in by["too deep", 1]["refused"] and not by["lftf", 1]["refused"]
    asked = {name: by[name, 0]["scores"]["genbias.afgb.all"] for name in ("untouched", "prompt")}
    assert asked["prompt"]["value"] != asked["untouched"]["value"] and asked["prompt"]["n"] == asked["untouched"]["n"]
    assert "perplexity" not in by["prompt", 0]["scores"] and "genbias.afgb.all" in by["prompt", 0]["scores"]
    assert by["untouched", 0]["scores"]["perplexity"]["n"] == 20
    page = (out / "study.html").read_text()
    assert "Which edit to ship" in page and "<svg" in page and "What lftf changed" in page
    # A recipe's delta, judged here, gives what its own run measured on the checkpoint as saved.
    run = json.loads(next(out.rglob("lftf/seed=0/run/run.json")).read_text())["after"]["genbias"]["afgb"]["all"]
    assert by["lftf", 0]["scores"]["genbias.afgb.all"]["value"] == pytest.approx(run["value"], rel=1e-5)
    again = surgery(*words)
    assert again[0] == 0 and again[2].count("judged before") == 5
    assert json.loads((out / "study.json").read_text()) == found
    # Other settings than those of a run that is there do not pass its numbers off as theirs.
    file.write_text(text.replace("lr = 1e-2", "lr = 2e-2"))
    code, _, stderr = surgery(*words)
    assert code == 1 and "lftf/seed=0/run: was made with other settings" in stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (("seeds = [0, 1]", "sedes = [0]"), "did you mean 'seeds'"),
        (('recipe = "lftf"\n', ""), "expected exactly one of recipe, delta, preamble"),
        (('name = "back"', 'name = "lftf"'), "'lftf' is named twice"),
        (('"perplexity"]', '"bbq"]'), "is no folder"),
        (('"perplexity"]', '"bqq"]'), "expected some of"),
        (('suites = ["genbias", "perplexity"]', 'folder = "nowhere"'), "nowhere: is no folder"),
        (("lr = 1e-2", "lrr = 1e-2"), "did you mean 'lr'"),
        (("DELTA", '"nothing.safetensors"'), "no such delta file"),
        (("controls = []", "seed = 3"), "are the study's own"),
        (("controls = []", "split_seed = 3"), "lftf: got split_seed 3, with which it learns subjects of the prompts"),
        (("controls = []", 'split = "pairs"'), "lftf: got split 'pairs', with which it learns"),
        (("DELTA", "SEEN"), "seen.safetensors: got split_seed 3, with which it learns"),
        (("scale = -1.0", "seeds = [1]"), "it names none"),
        (("seeds = [1]\n", "seeds = [1]\ndeterministic = true\n"), "seeds of what draws nothing"),
        (("{ perplexity", "{ perplexty"), "expected some of"),
        (("seeds = [0, 1]", "seeds = [1, 1]"), "got [1, 1], expected different ones"),
        (("scale = -1.0", "scale = -1.0\n[[methods]]\nname = 'two'\nrecipe = 'lftf'\nseeds = [2, 2]"), "got [2, 2]"),
    ],
)
def test_mistakes_are_named_before_anything_runs(
    change: tuple[str, str], message: str, checkpoint: Path, tmp_path: Path
) -> None:
    text = FILE.replace("MODEL", json.dumps(str(checkpoint))).replace(*change, 1)
    difference = {"model.norm.weight": np.full(32, 0.1, np.float32)}
    for name, recipe in (("DELTA", ""), ("SEEN", "split_seed = 3")):
        own = tmp_path / f"{name.lower()}.safetensors"
        make(difference, checkpoint, base="tiny", recipe=recipe, seed=0).save(own)
        text = text.replace(name, json.dumps(str(own)))
    code, _, stderr = surgery("study", write(tmp_path / "s.toml", text), "--out", tmp_path / "out")
    assert code == 1 and message in stderr and not list(tmp_path.rglob("run*"))


def test_a_number_that_nothing_measures_is_named_before_an_edit_is_made(checkpoint: Path, tmp_path: Path) -> None:
    recipes = FILE.replace("MODEL", json.dumps(str(checkpoint))).partition('[[methods]]\nname = "back"')[0]
    file = write(tmp_path / "s.toml", recipes.replace("seeds", 'bias = ["genbias.afgb.al"]\nseeds', 1))
    code, _, stderr = surgery("study", file, "--out", tmp_path / "out")
    assert code == 1 and "bias: got 'genbias.afgb.al', expected some of" in stderr and "genbias.afgb.all" in stderr
    assert not list(tmp_path.rglob("run")) and list(tmp_path.rglob("judged.json"))


def test_two_studies_in_one_folder_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    text = 'suites = ["genbias"]\nmodels = [MODEL]\n[[methods]]\nname = "p"\npreamble = "Good day . "\n'
    file = write(tmp_path / "s.toml", text.replace("MODEL", json.dumps(str(checkpoint))))
    (tmp_path / "out").mkdir()
    with open(tmp_path / "out" / "study.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)
        code, _, stderr = surgery("study", file, "--out", tmp_path / "out")
        assert code == 1 and "another study is at work in this folder" in stderr
        code, _, stderr = surgery("study", file, "--out", tmp_path / "out", "--share", "--device", "cpu")
        assert code == 0, stderr


def test_a_cell_without_memory_is_tried_again_behind_the_others(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Study(models=[str(checkpoint)], suites=["perplexity"], seeds=[0, 1])
    methods = [Method(name="a", recipe="lftf", seeds=[0]), Method(name="b", recipe="lftf")]
    order: list[tuple[str, int]] = []

    def full(cell: Cell, opened: Any, resume: bool) -> None:
        order.append((cell.name, cell.seed))
        if cell.name == "a":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.04 GiB.")
        raise SurgeryError("not here")

    carry_out(asked, methods, tmp_path / "full", full, device="cpu")
    assert order == [("a", 0), ("b", 0), ("b", 1), ("a", 0)]
    by = {one["method"]: one for one in json.loads((tmp_path / "full/study.json").read_text())["cells"]}
    assert "CUDA out of memory" in by["a"]["refused"] and by["untouched"]["scores"]

    free = iter([10, 10**12])  # bytes; of the first model to be opened there is too little room once
    monkeypatch.setattr("surgery.devices.free_memory", lambda place: next(free))
    carry_out(asked, methods[1:], tmp_path / "once", full, device="cpu")
    by = {one["method"]: one for one in json.loads((tmp_path / "once/study.json").read_text())["cells"]}
    assert by["untouched"]["scores"] and by["b"]["refused"] == "not here"


def test_what_cannot_be_opened_or_measured_is_rows_that_say_so(
    checkpoint: Path, word_tokenizer: Any, tmp_path: Path
) -> None:
    broken, headless, masked = (tmp_path / name for name in ("broken", "headless", "masked"))
    broken.mkdir()
    (broken / "config.json").write_text('{"auto_map": {}}')
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertConfig(**sizes, vocab_size=len(word_tokenizer), max_position_embeddings=64, pad_token_id=0)
    for path, kind in ((headless, BertModel), (masked, BertForMaskedLM)):
        kind(config).save_pretrained(path)
        word_tokenizer.save_pretrained(path)
    models = json.dumps([str(path) for path in (broken, headless, masked, checkpoint)])
    text = f'models = {models}\nsuites = ["genbias"]\nrows = {{ genbias = 9 }}\n[[methods]]\nname = "a"\n'
    text += 'recipe = "erase"\nsettings = { controls = [], test_rows = 9 }\n'
    file = write(tmp_path / "s.toml", text)
    code, _, stderr = surgery("study", file, "--out", tmp_path / "out", "--device", "cpu")
    assert code == 0, stderr
    found = json.loads((tmp_path / "out/study.json").read_text())
    refused = {(Path(one["model"]).name, one["method"]): one["refused"] for one in found["cells"]}
    assert "its own code" in refused["broken", "untouched"]
    assert "BertModel has no language-model head" in refused["headless", "a"] == refused["headless", "untouched"]
    assert "no site" in refused["masked", "a"] and not refused["masked", "untouched"]
    assert not refused[checkpoint.name, "a"] and "could not be measured as it is" in found["verdict"][0]


def metric(values: Any, direction: str = "lower", ideal: float = 0.0) -> Metric:
    return mean_metric(np.asarray(values, float), scorer="s", data="d", ideal=ideal, direction=direction)


def study(untouched: dict[str, Metric], **methods: dict[str, Metric]) -> list[Judged]:
    before = [Judged(Cell("m", None, 0, Path("u")), untouched)]
    return before + [
        Judged(Cell("m", Method(name=name, preamble="x"), 0, Path(name)), found) for name, found in methods.items()
    ]


def test_the_edit_to_ship_removes_most_and_spoils_nothing() -> None:
    draw = np.random.default_rng(0).uniform(0.4, 0.6, 50)
    scores = {"bias": metric(draw), "cost": metric(10 + draw), "other": metric(draw, "higher", 1.0)}
    judged = study(
        scores,
        strong={"bias": metric(draw / 10), "cost": metric(11 + draw), "other": metric(draw, "higher", 1.0)},
        gentle={"bias": metric(draw / 2), "cost": metric(10.005 + draw), "other": metric(draw - 0.1, "higher", 1.0)},
        nothing=scores,
    )
    asked = Study(bias=["bias"], cost=["cost"])
    found = {row.name: row for row in rows(judged)}
    assert removed(found["strong"], found["untouched"], ["bias"]) == pytest.approx(0.9)
    low, high = removed_between(found["gentle"], found["untouched"], ["bias"]) or (0, 0)
    assert low == pytest.approx(0.5) and high == pytest.approx(
        0.5
    )  # paired: each draw is halved, whichever rows it has
    assert removed(found["strong"], found["untouched"], ["bias", "other"]) < 0.9
    assert objections(found["strong"], ["cost"], 1) == ["cost"]
    assert objections(found["gentle"], ["cost"], 1) == []  # worse, but by half a point
    assert found["gentle"].worse() == ["other", "cost"] and found["nothing"].worse() == []
    assert found["gentle"].points("other") == pytest.approx(-10)
    assert broken(found["gentle"]) == ["other"]  # cost grew by half a point
    assert answer(list(found.values()), asked).rows == [["m", "gentle", "50 % [50, 50]", "other -10.0 points"]]
    said = " ".join(recommend(list(found.values()), asked, {"m": "To ship it: so."}))
    assert "ship gentle" in said and "removes 50 % [50, 50] of the bias (bias 0.5" in said and "ship it: so." in said
    assert "makes worse: other -10.0 points; 1 more by less; of 3 numbers" in said and "On 1 of 1 pairs" in said
    assert "strong removes 90 %, but spoils cost +100.0 points" in said and "Warning: one seed" in said
    less = [row for row in found.values() if row.name != "gentle"]
    none = " ".join(recommend(less, asked))
    assert "no method can be recommended" in none and "it spoils cost +100.0 points" in none
    nearest = "every method spoils a cost; strong (90 % [90, 90]): cost +100.0 points"
    assert answer(less, asked).rows == [["m", "nothing", "", nearest]]
    assert answer(less[:1] + less[2:], asked).rows == [["m", "nothing", "", "no method removes anything"]]


def test_seeds_that_are_missing_are_named_and_those_that_need_not_be() -> None:
    draw = np.random.default_rng(0).uniform(0.4, 0.6, 50)
    kinds: dict[str, Any] = {"drawn": {}, "fixed": {"deterministic": True}, "half": {}}
    methods = [Method(name=name, recipe="lftf", **kind) for name, kind in kinds.items()]
    asked = Study(seeds=[0, 1], bias=["bias"], cost=["bias"])
    found = [
        Judged(cell, {"bias": metric(draw if cell.method is None else draw / 2)})
        for cell in cells(asked, methods, Path("out"))
        if (cell.name, cell.seed) != ("half", 1)
    ]
    assert [(one.cell.name, one.cell.seed) for one in found if one.cell.model == "demo"] == [
        ("untouched", 0), ("drawn", 0), ("fixed", 0), ("half", 0), ("drawn", 1)
    ]  # fmt: skip
    gone = next(one for one in cells(asked, methods, Path("out")) if (one.name, one.seed) == ("half", 1))
    said = recommend(rows([*found, Judged(gone, {}, "it diverged")]), asked)
    assert "Warning: fewer than 2 seeds: half." in said
    assert "Warning: not every seed of half on demo was measured (it diverged)." in said
    assert "ship drawn" in said[0] and rows([*found, Judged(gone, {}, "it diverged")])[3].scores, "one seed is a row"
    assert "One seed stands for all where nothing is drawn: fixed." in said


def test_judgements_are_taken_again_only_for_the_same_judges(tmp_path: Path) -> None:
    scores = {"a": metric([1.0, 2.0, 4.0])}
    judges, missing = check(Study())
    assert "stereoset" in missing and "no data folder" in missing["stereoset"]
    assert "free_text" in judges.suites and "stereoset" not in judges.suites
    cell = Cell("m", Method(name="a", recipe="lftf", settings={"lr": 1e-3}, by_model={"n": {"lr": 1e-4}}), 0, tmp_path)
    keep(Judged(cell, scores), Study(), judges, {"texts": []})
    again = kept(cell, Study(), judges)
    assert again is not None and again.scores == scores and again.differences is None
    found = again.scores
    assert found["a"].samples is not None and (found["a"].samples == scores["a"].samples).all()
    limited = Study(limit=3)
    assert kept(cell, limited, check(limited)[0]) is None
    for other in ({"model": "org/n"}, {"method": None}, {"folder": tmp_path / "nowhere"}):
        assert kept(replace(cell, **other), Study(), judges) is None
    assert details_of(tmp_path) == {"texts": []} and details_of(tmp_path / "nowhere") == {}


def test_a_study_file_without_methods(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match="no methods"):
        read(write(tmp_path / "s.toml", "seeds = [1]"))


def test_the_shipped_studies_are_right() -> None:
    for path in (Path(__file__).parent.parent / "studies").glob("*.toml"):
        asked, methods = read(path)
        assert asked.models and methods
        for method in (one for one in methods if one.recipe):
            module, values, _ = chosen_recipe(method.recipe, None, [], None)
            for model in (*asked.models, *method.by_model):
                build(module.Settings, values | settings_for(method, model), f"{path}, {method.name}")
