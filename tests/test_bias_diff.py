"""BIAS DIFF: warm-up, the whole recipe on a tiny model, both deltas, interruptions, the losses, what is refused."""

import json
import math
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import FAMILIES, build, state
from hypothesis import given
from hypothesis import strategies as st
from letters import letters
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
import surgery.apply
from recipes import bias_diff
from recipes.bias_diff.dataset import Material, encoded, of_files
from recipes.bias_diff.judging import _by_direction
from recipes.bias_diff.measuring import measure
from recipes.bias_diff.report import _injected
from surgery.attribution.scoring import InfluenceConfig, Probes, probe_of, scores_at, tokens_at
from surgery.data.mixtures import Pair
from surgery.data.neutral import sentences
from surgery.edits.forgetting import EVERY, Forgetting, _back, _order, forget, likelihoods, steps_to_forget
from surgery.edits.supervised import Lora, Row, evaluate, fine_tune
from surgery.edits.warmup import added, at_epoch, low_rank, merged, read_epoch, usual_targets, warm_up
from surgery.errors import SurgeryError
from surgery.forward.token_logprobs import token_log_probabilities
from surgery.metrics.removed import share_removed
from surgery.runs.folder import Folder
from surgery.training import Plan

WHO = ["nurse", "engineer", "guard", "teacher", "doctor", "lawyer", "clerk", "banker", "farmer", "butcher", "painter"]
SAID = ["The {} said that {} is kind.", "The {} thought that {} was tired.", "The {} slept because {} was sick."]


def pairs(names: list[str], forms: list[str]) -> list[dict[str, str]]:
    return [{"text": form.format(who, "she"), "anti": form.format(who, "he")} for who in names for form in forms]


def lines(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """24 stereotypes among 40 other texts, and pairs about other professions that probe and test."""
    folder = tmp_path_factory.mktemp("texts")
    biased = [{"text": pair["text"], "biased": True} for pair in pairs(WHO[:8], SAID)]
    neutral = [{"text": text, "biased": False} for text in sentences()[:40]]
    mixed = [(biased + neutral)[place] for place in np.random.default_rng(0).permutation(64)]
    return {
        "file": lines(folder / "texts.jsonl", mixed),
        "probe": lines(folder / "probe.jsonl", pairs(WHO[8:], SAID[:2])),
        "test": lines(folder / "test.jsonl", pairs(WHO[8:], SAID[2:])),
    }


SMALL: dict[str, Any] = {
    "epochs": 2,
    "lr": 1e-2,
    "unlearn_lr": 1e-3,
    "unlearn_epochs": 2,
    "rank": 4,
    "max_length": 24,
    "limit": 12,
}
SMALL |= {"suites": [], "scorer": "no-start", "tokens_of": 3}


def ready(checkpoint: Path, files: dict[str, str], **more: Any) -> bias_diff.Settings:
    return bias_diff.Settings(**({"model": str(checkpoint)} | SMALL | files | more))


@pytest.fixture(scope="module")
def exact(make_checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Path]:
    """A checkpoint that is stored in float32, so that nothing is lost to rounding."""
    path = make_checkpoint(tmp_path_factory.mktemp("exact") / "tiny", torch.float32, num_hidden_layers=2)
    return *surgery.load(path, device="cpu"), path


def run(exact: Any, files: dict[str, str], out: Path, *, resume: bool = False, **more: Any) -> dict[str, Any]:
    model, tokenizer, path = exact
    return bias_diff.run(model, tokenizer, ready(path, files, **more), out=out, resume=resume).summary


# The recipe


@pytest.fixture(scope="module")
def whole(exact: Any, files: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run with every kind of control."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    before = state(exact[0])
    controls = ["random", "retrain", "multi:tfidf", "ascent:labels", "prompt", "scaled"]
    more: Any = {"mitigation": "npo", "unlearn_until": "epochs"}
    summary = run(exact, files, out, keep_checkpoint=True, select_by="best", controls=controls, **more)
    assert state(exact[0]) == before
    return out, summary


def test_a_run_leaves_its_files_and_numbers(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    values = surgery.runs.recipe_files.read_toml(out / "recipe.toml")
    assert values.pop("recipe") == "bias_diff"
    again = surgery.runs.recipe_files.build(bias_diff.Settings, values, "recipe.toml")
    assert surgery.runs.recipe_files.dump("bias_diff", again) == (out / "recipe.toml").read_text()
    for name in ("delta", "delta_from_warmed", "warmed"):
        assert surgery.Delta.load(out / f"{name}.safetensors").metadata["recipe"] == (out / "recipe.toml").read_text()
    left = {"run.json", "recipe.toml", "delta.safetensors", "delta_from_warmed.safetensors", "warmed.safetensors"}
    left |= {"report.html", "tokens.html", "scores.jsonl", "log.jsonl", "checkpoint", "warmed", "plots"}
    assert {path.name for path in out.iterdir()} == left
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(summary))
    scores = ("influence", "contrast", "random", "shuffled", "minus_loss", "tfidf", "tfidf_contrast")
    assert set(summary["selection"]) == {*scores, "twin_auc"}
    for name in scores:
        assert summary["selection"][name]["coverage"]["n"] == 24
        assert summary["selection"][name]["precision"]["ideal"] == 1.0
    assert summary["selection"]["twin_auc"]["n"] == 3
    best = max(scores, key=lambda name: summary["selection"][name]["coverage"]["value"])
    assert summary["selected"] == {"by": best, "rows": 22, "of": 64, "top": 0.35}
    assert set(summary["controls"]) == {"npo:random", "retrain", "multi:tfidf", "ascent:labels", "prompt", "scaled"}
    half = summary["controls"]["scaled"]
    assert half["edit"]["scale"] == 0.5 and half["edit"]["rows"] == 0
    beyond = summary["controls"]["npo:random"]["beyond"]
    apart = [scores["crows_pairs"]["margin"]["value"] for scores in (half["after"], summary["after"])]
    assert half["beyond"]["value"] == pytest.approx(apart[0] - apart[1], abs=1e-6) and beyond["n"] == 3
    assert summary["edit"]["moved"]["after"] < summary["edit"]["moved"]["before"]
    assert summary["controls"]["ascent:labels"]["edit"]["rows"] == 24
    assert "perplexity" not in summary["controls"]["prompt"]["after"]
    report = (out / "report.html").read_text()
    assert all(line in report for line in ("original", "warmed up", "What each score selects", "above its twin"))
    # How far the objective moved, the gradients of its terms (of Eq. 8, which has two), and the selection off.
    assert re.search("objective (fell|moved|rose) by", report) and "What the selection does itself" in report
    two = summary["controls"]["multi:tfidf"]["edit"]["moved"]["terms"]
    assert set(two) == {"forget", "retain"} and all(term["gradient_after"] > 0 for term in two.values())
    assert "<span" in (out / "tokens.html").read_text()
    assert {path.name for path in (out / "plots").iterdir()} == {"selection.png", "margin.png"}


def test_every_text_s_scores_are_kept_and_say_who_was_selected(whole: tuple[Path, dict[str, Any]]) -> None:
    out, summary = whole
    rows = [json.loads(line) for line in (out / "scores.jsonl").read_text().splitlines()]
    assert len(rows) == 64 and sum(row["biased"] for row in rows) == 24
    assert sum(row["selected"] for row in rows) == summary["selected"]["rows"]
    # Eq. 5: four steps an epoch, of which two rise to 0.01 (a warm-up of 0.2 of eight) and the rest fall in six.
    rates = [0.01 * (0.5 + 1 + 1 + 5 / 6) / 4, 0.01 * (4 / 6 + 3 / 6 + 2 / 6 + 1 / 6) / 4]
    for row in rows:
        both = [row["epochs"][number]["contrast"] for number in "12"]
        assert row["contrast"] == pytest.approx(np.average(both, weights=rates), abs=1e-6)


def test_both_deltas_lead_to_the_final_model(whole: tuple[Path, dict[str, Any]], exact: Any, tmp_path: Path) -> None:
    """On disk: the one from the original checkpoint, the other from the warmed-up one."""
    out, summary = whole
    starts = {"warmed": exact[2], "delta": exact[2], "delta_from_warmed": out / "warmed"}
    for name, start in starts.items():
        surgery.apply.apply(out / f"{name}.safetensors", start, tmp_path / name)
    assert tensors(tmp_path / "warmed").keys() == tensors(exact[2]).keys()
    final = tensors(out / "checkpoint")
    changed = [name for name, value in tensors(exact[2]).items() if not torch.equal(value, final[name])]
    assert len(changed) == 4 and all(name.endswith(("q_proj.weight", "v_proj.weight")) for name in changed)
    for name, value in final.items():
        assert torch.equal(value, tensors(tmp_path / "delta")[name])
        torch.testing.assert_close(value, tensors(tmp_path / "delta_from_warmed")[name], rtol=0, atol=1e-6)
        assert torch.equal(tensors(out / "warmed")[name], tensors(tmp_path / "warmed")[name])
    assert summary["delta"]["kind"] == summary["delta_from_warmed"]["kind"] == "lora"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_what_is_measured_is_what_is_saved(whole: tuple[Path, dict[str, Any]], files: dict[str, str]) -> None:
    out, summary = whole
    material = of_files(
        Path(files["file"]), Path(files["probe"]), Path(files["test"]), text="text", label="biased", seed=0
    )
    for folder, when in (("warmed", "warmed"), ("checkpoint", "after")):
        model, tokenizer = surgery.load(out / folder, device="cpu")
        again = measure(model, tokenizer, material, scorer="no-start", limit=12)["scores"]
        for key in ("metric", "margin"):
            expected = again["crows_pairs"][key]["value"]
            assert summary[when]["crows_pairs"][key]["value"] == pytest.approx(expected, abs=1e-4)
        assert summary[when]["perplexity"]["value"] == pytest.approx(again["perplexity"]["value"], rel=1e-4)
    assert summary["after"]["crows_pairs"]["margin"] != summary["warmed"]["crows_pairs"]["margin"]
    model, tokenizer = surgery.load(summary["model"], device="cpu")
    with surgery.Delta.load(out / "warmed.safetensors").applied(model, scale=0.5):
        again = measure(model, tokenizer, material, scorer="no-start", limit=12)["scores"]["crows_pairs"]["margin"]
    half = summary["controls"]["scaled"]["after"]["crows_pairs"]["margin"]
    assert half["value"] == pytest.approx(again["value"], abs=1e-4)


def test_unlearning_starts_from_the_warmed_up_model(whole: tuple[Path, dict[str, Any]], files: dict[str, str]) -> None:
    out, summary = whole
    rows = [json.loads(line) for line in Path(files["file"]).read_text().splitlines()]
    model, tokenizer = surgery.load(out / "warmed", device="cpu")
    biased, _ = encoded(tokenizer, [row["text"] for row in rows if row["biased"]], max_length=24, what="texts")
    logs = token_log_probabilities(model, [biased[row].ids for row, _ in _order(24, 40, 2, 0)[:16]])
    first = summary["controls"]["ascent:labels"]["edit"]["loss_first"]
    assert first == pytest.approx(np.mean([each.sum() for each in logs]), rel=1e-4)


def test_retraining_starts_from_the_original_without_the_selected_texts(
    exact: Any, files: dict[str, str], tmp_path: Path
) -> None:
    summary = run(exact, files, tmp_path / "run", mitigation="retrain", select_by="labels", controls=[])
    left = [json.loads(line) for line in Path(files["file"]).read_text().splitlines()]
    texts = [row["text"] for row in left if not row["biased"]]
    model, tokenizer, _ = exact
    rows, _ = encoded(tokenizer, texts, max_length=24, what="texts")
    plan = Plan(1e-2, 2, 16, "adamw", 0.001, True, "linear", 0.2)
    alone = fine_tune(model, rows, plan, seed=0, lora=Lora(4, 32.0, ("q_proj", "v_proj"), 0.05)).differences
    delta = surgery.Delta.load(tmp_path / "run" / "delta.safetensors")
    for name, value in alone.items():
        assert np.array_equal(delta.tensors[name], value.numpy()), name
    assert summary["edit"]["rows"] == 24 and summary["edit"]["part"] == "retrain"


def test_an_interrupted_run_continues_to_the_same_result(
    exact: Any, files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    more = {"mitigation": "multi", "controls": [], "select_by": "contrast"}
    once = run(exact, files, tmp_path / "once", **more)
    before, write = state(exact[0]), Folder.log
    for number, stop in enumerate((("warm-up", 3), ("warm-up", 6), ("multi", 2))):

        def interrupt(folder: Any, row: dict[str, Any], stop: Any = stop) -> None:
            write(folder, row)
            if (row.get("edit"), row.get("step")) == stop:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("surgery.runs.folder.Folder.log", interrupt)
            with pytest.raises(KeyboardInterrupt):
                run(exact, files, tmp_path / "cut", resume=number > 0, **more)
        assert state(exact[0]) == before
    rest = run(exact, files, tmp_path / "cut", resume=True, **more)
    rest["seconds"] = once["seconds"] = {}
    assert json.dumps(rest, sort_keys=True) == json.dumps(once, sort_keys=True)
    assert (tmp_path / "cut" / "scores.jsonl").read_text() == (tmp_path / "once" / "scores.jsonl").read_text()


def test_texts_without_labels_and_sentences_without_twins_are_enough(
    exact: Any, files: dict[str, str], tmp_path: Path
) -> None:
    rows = [json.loads(line)["text"] for line in Path(files["file"]).read_text().splitlines()]
    (tmp_path / "texts.txt").write_text("\n".join(rows) + "\n")
    (tmp_path / "probe.txt").write_text("\n".join(pair["text"] for pair in pairs(WHO[8:], SAID)) + "\n")
    own = {"file": str(tmp_path / "texts.txt"), "probe": str(tmp_path / "probe.txt"), "test": ""}
    summary = run(exact, own, tmp_path / "run", controls=[], attribute_at="weights", optimizer="none", layers="equal")
    assert summary["selection"] == {} == summary["removed"] and summary["selected"]["rows"] == 22
    assert "no labels" in summary["verdict"][-1] and set(summary["after"]) == {"perplexity"}
    for key in ("select_by", "controls"):
        with pytest.raises(SurgeryError, match=r"'labels' needs labels, and texts\.txt has none"):
            run(exact, own, tmp_path / "x", **{key: "labels" if key == "select_by" else ["labels"]})
    with pytest.raises(SurgeryError, match="needs the probe's anti-stereotypes"):
        run(exact, own, tmp_path / "x", select_by="contrast")


@pytest.mark.parametrize(
    "more, message",
    [
        ({"file": "", "data": ""}, "no data; name the data folder"),
        ({"probe": ""}, "no probe; name a file of biased sentences"),
        ({"file": "nowhere.jsonl"}, "nowhere.jsonl: got no such file"),
        ({"suites": ["cloze"]}, "cloze need the data folder"),
        ({"scorer": "mine"}, "scorer: got 'mine', expected one of bias-bench"),
        ({"mitigation": "margin"}, "'margin' needs a twin of each text to forget, and texts.jsonl has none"),
        ({"controls": ["prune"]}, "controls: got 'prune', expected a score, a mitigation or both"),
        ({"controls": ["random:npo"]}, "controls: got 'random:npo'"),
        ({"attribute_at": "weights"}, "got 'less' at the plain weights"),
        ({"target_modules": ["c_attn"]}, "got 'c_attn', expected linear layers such as down_proj"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(
    exact: Any, files: dict[str, str], tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    before = state(exact[0])
    with pytest.raises(SurgeryError, match=message):
        run(exact, files, tmp_path / "x", **more)
    assert list(tmp_path.iterdir()) == [] and state(exact[0]) == before


def test_a_text_that_also_probes_is_refused(exact: Any, files: dict[str, str], tmp_path: Path) -> None:
    rows = [*pairs(WHO[8:], SAID[:2]), {"text": json.loads(Path(files["file"]).read_text().splitlines()[0])["text"]}]
    rows[-1]["anti"] = "The nurse is here."
    with pytest.raises(SurgeryError, match="text 0 is also a text of the probe"):
        run(exact, files | {"probe": lines(tmp_path / "p.jsonl", rows)}, tmp_path / "x")
    assert not (tmp_path / "x.part").exists()


def test_a_profile_sets_what_is_not_said() -> None:
    paper = bias_diff.Settings(profile="paper")
    assert (paper.lr, paper.epochs, paper.retrain_epochs, paper.unlearn_lr) == (1.5e-6, 5, 50, 3e-7)
    assert (paper.rank, paper.alpha, paper.lora_dropout, paper.warmup, paper.weight_decay) == (16, 32, 0.05, 0.2, 1e-3)
    assert bias_diff.Settings(profile="quick", lr=1e-5).lr == 1e-5
    values = surgery.runs.recipe_files.read_toml(Path(bias_diff.__file__).parent.with_suffix(".toml"))
    changed = {key for profile in bias_diff.PROFILES.values() for key in profile}
    assert not changed & set(values)  # else the file would win over the profile


@pytest.mark.parametrize(
    "family, expected",
    [("llama", ("q_proj", "v_proj")), ("gpt2", ("c_attn",)), ("phi3", ("qkv_proj",)), ("bloom", ("query_key_value",))],
)
def test_the_usual_targets_have_the_model_s_own_names(family: str, expected: tuple[str, ...]) -> None:
    assert usual_targets(build(family)) == expected  # type: ignore[arg-type]


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs the data sets (SURGERY_DATA)")
def test_the_mixture_of_the_paper_s_kind(tmp_path: Path) -> None:
    config = LlamaConfig(**(FAMILIES["llama"][1] | {"num_hidden_layers": 1, "max_position_embeddings": 512}))
    torch.manual_seed(0)
    model, tokenizer = LlamaForCausalLM(config).eval(), letters()
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    more = {"data": os.environ["SURGERY_DATA"], "rows": 40, "probe_pairs": 6, "test_pairs": 30, "controls": []}
    small = SMALL | {"scorer": "bos", "max_length": 64, "epochs": 1, "model": str(tmp_path / "tiny")}
    summary = bias_diff.run(model, tokenizer, bias_diff.Settings(**(small | more)), out=tmp_path / "run").summary
    assert summary["selection"]["influence"]["coverage"]["n"] == 12  # 3 to 7
    # The twins are StereoSet's, which have no directions; CrowS-Pairs is dealt into two parts, so that more test.
    assert summary["selection"]["contrast"]["twin_auc"]["n"] == 30
    assert "twin_auc_stereo" not in summary["selection"]["contrast"]
    made = json.loads((tmp_path / "run" / "mixture" / "mix.json").read_text())["pairs"]
    assert made["test"] > 600 and made["probe"] > 2000 and made["twins"] > 1000
    assert set(summary["after"]["crows_pairs"]) == {"metric", "stereotype", "anti_stereotype", "margin"}
    probes = (tmp_path / "run" / "mixture" / "probe.jsonl").read_text()
    texts = [json.loads(line)["text"] for line in (tmp_path / "run" / "scores.jsonl").read_text().splitlines()]
    assert not any(json.dumps(text, ensure_ascii=False) in probes for text in texts)


# The parts


def test_the_warm_up_keeps_each_epoch_as_the_optimizer_held_it(exact: Any, tmp_path: Path) -> None:
    model, tokenizer, _ = exact
    rows, _ = encoded(tokenizer, [pair["text"] for pair in pairs(WHO[:5], SAID[:1])], max_length=24, what="texts")
    plan, lora = Plan(1e-2, 3, 2, "adamw", schedule="linear"), Lora(2, 4, ("q_proj",))
    before, seen = state(model), []

    def after(step: int, optimizer: Any) -> bool:
        held = optimizer.param_groups[0]["params"]
        seen.append([p.detach().clone() for p in held] + [optimizer.state[p]["exp_avg_sq"].clone() for p in held])
        return False

    fine_tune(model, rows, plan, seed=1, lora=lora, after=after)
    trained = warm_up(model, rows, plan, lora, seed=1, folder=tmp_path)
    for number in (1, 2, 3):  # of three steps each
        epoch = read_epoch(tmp_path, number)
        assert epoch.number == number and epoch.steps == 3 * number
        assert epoch.rate == pytest.approx(
            1e-2 * np.mean([(9 - step) / 9 for step in range(3 * number - 3, 3 * number)])
        )
        for kept, value in zip(
            [*epoch.parameters.values(), *epoch.exp_avg_sq.values()], seen[3 * number - 1], strict=True
        ):
            assert torch.equal(kept, value)
    last = low_rank(model, lora, epoch, seed=1)
    assert all(torch.equal(last[name], value) for name, value in trained.differences.items())
    untouched = evaluate(model, rows)
    with at_epoch(model, lora, epoch, seed=1) as parameters:
        assert list(parameters) == list(epoch.parameters)
        beside = evaluate(model, rows)
    with merged(model, last):
        assert evaluate(model, rows) == pytest.approx(beside, abs=1e-5)
    assert (beside < untouched).all() and state(model) == before
    with pytest.raises(SurgeryError, match="does not fit this adapter"), at_epoch(model, Lora(3), epoch, seed=1):
        pass
    assert state(model) == before


@given(st.lists(st.tuples(st.floats(-2, 2), st.integers(1, 3), st.booleans()), min_size=1, max_size=4))
def test_factors_add_up(parts: list[tuple[float, int, bool]]) -> None:
    generator = torch.Generator().manual_seed(0)
    made, whole = [], {"a": torch.zeros(4, 3), "b": torch.zeros(4, 3)}
    for scale, rank, second in parts:
        factors = {}
        for name in ("a", "b") if second else ("a",):
            left, right = torch.randn(4, rank, generator=generator), torch.randn(rank, 3, generator=generator)
            factors |= {f"{name}.lora_B": left, f"{name}.lora_A": right}
            whole[name] += scale * left @ right
        made.append((scale, factors))
    found = added(made)
    for name in {key.removesuffix(".lora_A") for key in found if key.endswith(".lora_A")}:
        torch.testing.assert_close(found[f"{name}.lora_B"] @ found[f"{name}.lora_A"], whole[name], rtol=1e-4, atol=1e-4)
    assert ("b.lora_A" in found) == any(second for *_, second in parts)


@pytest.mark.parametrize("kind, form", [(k, f) for k in ("npo", "multi", "ascent") for f in ("original", "printed")])
def test_the_first_loss_is_the_equation_s(exact: Any, kind: str, form: str) -> None:
    """The factors start at nothing, so pi is pi_ref; by hand from the model's own log-probabilities."""
    model, tokenizer, _ = exact
    rows, _ = encoded(tokenizer, [p["text"] for p in pairs(WHO[:2], SAID[:2])], max_length=24, what="texts")
    forgotten, kept = rows[:3], rows[3:]
    how, lora = Forgetting(kind, form, beta=0.5, retain=2.0), Lora(2, 4, ("q_proj",))
    before = state(model)
    trained = forget(model, forgotten, kept, Plan(1e-3, 2, 3, "adamw"), how, seed=0, lora=lora)
    assert state(model) == before and len(trained.losses) == steps_to_forget(3, Plan(1e-3, 2, 3)) == 2
    logs = [torch.from_numpy(each) for each in token_log_probabilities(model, [row.ids for row in rows])]
    npo = 2 / 0.5 * math.log(2)
    tokens = [float((2 / 0.5 * torch.nn.functional.softplus(0.5 * each)).sum()) for each in logs[:3]]
    expected = {
        ("npo", "original"): npo,
        ("npo", "printed"): npo / 2,
        ("multi", "original"): npo - 2.0 * float(logs[3].sum()),
        ("multi", "printed"): float(np.mean(tokens)) - 2.0 * float(logs[3].sum()),
        ("ascent", "original"): float(np.mean([float(each.sum()) for each in logs[:3]])),
    }
    assert trained.losses[0] == pytest.approx(expected.get((kind, form), expected[kind, "original"]), rel=1e-4)
    assert trained.losses[1] < trained.losses[0]
    if kind == "multi":
        assert trained.moved is not None and set(trained.moved.terms) == {"forget", "retain"}


def test_a_margin_is_brought_back_to_what_it_was_and_no_further(exact: Any) -> None:
    """By hand at the first step; and the training ends where the margin is back, long before its epochs."""
    model, tokenizer, _ = exact
    texts = [pair["text"] for pair in pairs(WHO[:3], SAID[:1])]
    rows, _ = encoded(tokenizer, texts, max_length=24, what="texts")
    twins, _ = encoded(tokenizer, [pair["anti"] for pair in pairs(WHO[:3], SAID[:1])], max_length=24, what="texts")
    now = likelihoods(model, rows, twins)
    alone = [float(each.mean()) for each in token_log_probabilities(model, [row.ids for row in rows])]
    assert likelihoods(model, rows) == pytest.approx(alone, abs=1e-5)
    how, plan, lora = Forgetting("margin", retain=0.001), Plan(3e-3, 100, 3, "adamw"), Lora(2, 4, ("q_proj",))
    given: Any = {"seed": 0, "lora": lora, "twins": twins, "original": now - 0.02}
    trained = forget(model, rows, rows[:1], plan, how, **given)
    assert trained.losses[0] == pytest.approx(10 * 0.02**2 - 0.001 * alone[0], rel=1e-3)
    assert EVERY <= len(trained.losses) < 100 and len(trained.losses) % EVERY == 0
    with merged(model, trained.differences):
        after = likelihoods(model, rows, twins)
    assert after.mean() <= now.mean() - 0.02 < after.mean() + 0.02


def test_unlearning_ends_where_the_likelihood_is_back_also_when_interrupted(exact: Any, tmp_path: Path) -> None:
    model, tokenizer, _ = exact
    rows, _ = encoded(tokenizer, [p["text"] for p in pairs(WHO[:2], SAID[:2])], max_length=24, what="texts")
    now = likelihoods(model, rows)
    given: Any = {"seed": 0, "lora": Lora(2, 4, ("q_proj",)), "original": now - 0.05}
    trained = forget(model, rows, (), Plan(3e-3, 100, 4, "adamw"), Forgetting(), **given, state=tmp_path / "s.pt")
    assert EVERY <= len(trained.losses) < 100
    with merged(model, trained.differences):
        assert likelihoods(model, rows).mean() <= now.mean() - 0.05
    after = _back(model, rows, (), now - 0.05, [0, 1, 2, 3], tmp_path / "s.pt")
    assert [after(step, None) for step in (EVERY, len(trained.losses))] == [len(trained.losses) == EVERY, True]


def test_an_injected_margin_that_is_not_different_from_zero_is_said() -> None:
    metric = {"value": 0.01, "low": -0.01, "high": 0.03}
    assert "not different from 0: there is nothing to remove" in _injected(metric)
    assert "3.1 standard errors from 0: shares of it are vague" in _injected(
        {"value": 0.04, "low": 0.015, "high": 0.065}
    )
    assert not _injected({"value": 0.04, "low": 0.03, "high": 0.05}).startswith("Warning")


def test_twins_of_both_directions_count_alike() -> None:
    """Three stereo pairs won and one of two antistereo pairs: 4 of 5 in all, 3/4 with the directions alike."""
    tests = tuple(Pair("a", "b", "gender", part, "") for part in ["stereo"] * 3 + ["antistereo"] * 2)
    material = Material(("x",), None, (), tests, "five pairs")
    scores = (np.array([1.0, 1, 1, 1, 0]), np.array([0.0, 0, 0, 0, 1]))
    found = {part: metric for _, part, metric in _by_direction(material, {"contrast": scores})}
    assert {part: metric["value"] for part, metric in found.items()} == {
        "antistereo": 0.5,
        "stereo": 1,
        "balanced": 0.75,
    }
    assert found["balanced"]["n"] == 5 and found["balanced"]["low"] == 0.5 and found["balanced"]["high"] == 1


def test_forgetting_refuses_what_it_does_not_know(exact: Any) -> None:
    rows = [Row((5, 6, 7), 1)]
    for how, given_rows, kept in (
        (Forgetting("dpo"), rows, rows),
        (Forgetting("npo", "mine"), rows, rows),
        (Forgetting("multi", retain_by="page"), rows, rows),
        (Forgetting("npo"), [], rows),
        (Forgetting("multi"), rows, []),
    ):
        with pytest.raises(SurgeryError, match=r"expected (one of|some of each)"):
            forget(exact[0], given_rows, kept, Plan(1e-3, 1, 2), how, seed=0, lora=Lora(2))
    for how, message in (
        (Forgetting("multi", retain=0.0), "with which multi is npo"),
        (Forgetting("margin"), "0 twins"),
    ):
        with pytest.raises(SurgeryError, match=message):
            forget(exact[0], rows, rows, Plan(1e-3, 1, 2), how, seed=0, lora=Lora(2))


def test_the_share_removed_is_the_paper_s_arithmetic() -> None:
    """Table 1: 64.88 before, 70.16 fine-tuned, 68.68 after removing and retraining, called 28 %."""
    shares = [np.repeat([1.0, 0.0], [round(25 * part), 2500 - round(25 * part)]) for part in (64.88, 70.16, 68.68)]
    found = share_removed(*shares, scorer="stereotype score", data="Table 1")
    assert found is not None and found.value == pytest.approx(0.28, abs=0.005)
    assert found.low < 0.28 < found.high
    assert share_removed(shares[1], shares[0], shares[2], scorer="s", data="d") is None
    nothing = share_removed(shares[0], shares[1], shares[1], scorer="s", data="d")
    assert nothing is not None and nothing.value == 0 and nothing.ideal == 1
    with pytest.raises(SurgeryError, match="the same pairs three times"):
        share_removed(shares[0], shares[1], shares[2][:5], scorer="s", data="d")


def test_a_contrast_probe_tells_a_stereotype_from_its_twin(exact: Any) -> None:
    """The twins' professions are not the probe's; what they share with it is the pronoun."""
    model, tokenizer, _ = exact

    def probes(names: list[str], forms: list[str]) -> Probes:
        made = pairs(names, forms)
        sides = [[pair[side] for pair in made] for side in ("text", "anti")]
        return Probes(*(encoded(tokenizer, side, max_length=24, what="probe")[0] for side in sides))

    rows, _ = encoded(tokenizer, list(sentences()[:4]), max_length=24, what="texts")
    for layers in ("summed", "equal"):
        way = InfluenceConfig("weights", (), "none", layers=layers)  # type: ignore[arg-type]
        found = scores_at(
            model, tokenizer, rows, probes(WHO[:4], SAID[:2]), probes(WHO[4:], SAID[:2]), Lora(2), None, way, seed=0
        )
        stereotypes, antis = found["twins"]["contrast"]
        assert (np.array(stereotypes) > np.array(antis)).mean() >= 0.9, layers
        assert (np.abs(found["rows"]["contrast"]) <= 1).all() and len(found["losses"]) == 4
        shown = tokens_at(
            model, tokenizer, rows, probes(WHO[:4], SAID[:2]), Lora(2), None, way, method="contrast", seed=0
        )
        for one, score in zip(shown, found["rows"]["contrast"], strict=True):
            assert one.values.sum() == pytest.approx(score, abs=1e-4)
        probe = probe_of(model, tokenizer, probes(WHO[:4], SAID[:2]), way)
        lengths = torch.stack([vector.flatten(1).norm(dim=1) for vector in probe.vectors.values()])  # (layer, probe)
        assert probe.names == ("influence", "contrast") and (lengths.std(0) > 1e-3).all() == (layers == "summed")
        expected = torch.ones(2) if layers == "summed" else lengths.square().sum(0).sqrt()
        torch.testing.assert_close(probe.scales, expected)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "The nurse.", "biased": "maybe"}], "'biased' is 'maybe', expected true or false"),
        ([{"text": "The nurse."}, {"text": "The guard.", "biased": True}], "1 of 2 rows have 'biased'"),
        ([{"text": " "}], "expected text that is not blank"),
        ([{"texts": "The nurse."}], "'text' is 'None'"),
    ],
)
def test_a_broken_file_is_named(
    tmp_path: Path, files: dict[str, str], rows: list[dict[str, Any]], message: str
) -> None:
    file = Path(lines(tmp_path / "a.jsonl", rows))
    with pytest.raises(SurgeryError, match=message) as error:
        of_files(file, Path(files["probe"]), None, text="text", label="biased", seed=0)
    assert str(file) in str(error.value)


def test_a_text_with_nothing_to_learn_is_named(exact: Any) -> None:
    with pytest.raises(SurgeryError, match=r"texts 1 \('nurse'\) has no token that another stands before"):
        encoded(exact[1], ["The nurse said that", "nurse"], max_length=24, what="texts")
