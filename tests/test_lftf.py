"""The whole operation on a tiny checkpoint: the folder it leaves, what its numbers mean, and what it refuses."""

import html
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import painted
from families import state
from safetensors import safe_open

import surgery
from recipes import lftf
from recipes.lftf.open_questions import FAR
from surgery.data.arithmetic import questions
from surgery.data.prompts import load_prompt_set
from surgery.edits import block
from surgery.errors import SurgeryError
from surgery.metrics.material import fewer, material
from surgery.metrics.metric import from_dict
from surgery.metrics.suite import measure, plain
from surgery.runs.folder import Folder

QUICK = {"lr": 1e-2, "epochs": 1, "batch_size": 128, "controls": [], "test_rows": 90}


def operate(tiny: Any, checkpoint: Path, out: Path, **settings: Any) -> dict[str, Any]:
    model, tokenizer = tiny
    ready = lftf.Settings(**({"model": str(checkpoint)} | QUICK | settings))
    return lftf.run(model, tokenizer, ready, out=out).summary


def untimed(summary: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in summary.items() if key != "seconds"}


@pytest.fixture(scope="module")
def finished(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """One run with everything on, shared by the tests that only look at it."""
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    before, out = state(model), tmp_path_factory.mktemp("runs") / "all"
    more = {"ablations": True, "keep_checkpoint": True, "lr": 3e-2, "epochs": 3}
    settings = lftf.Settings(model=str(checkpoint), **(QUICK | more))
    with painted():
        summary = lftf.run(model, tokenizer, settings, out=out).summary
    assert state(model) == before
    return out, summary


def test_the_folder_is_complete_and_nothing_else_is_left(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    names = {path.name for path in out.iterdir()}
    assert names == {
        "run.json", "recipe.toml", "delta.safetensors", "report.html", "plots", "log.jsonl", "checkpoint"
    }  # fmt: skip
    assert not out.with_name("all.part").exists()
    assert json.loads((out / "run.json").read_text()) == json.loads(json.dumps(summary))
    assert {path.name for path in (out / "plots").iterdir()} == {"ranking.png", "before_after.png", "controls.png"}
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert sum(row.get("edit") == "lftf" for row in steps) == summary["edit"]["steps"] == 24


def test_the_numbers_have_the_agreed_shape(finished: tuple[Path, dict[str, Any]]) -> None:
    _, summary = finished
    for when in ("before", "after"):
        for name in ("afgb", "mass", "relative_gap"):
            assert set(summary[when]["genbias"][name]) == {"word", "phrase", "sentence", "all"}
            for metric in summary[when]["genbias"][name].values():
                assert metric["low"] <= metric["value"] <= metric["high"]
        assert from_dict(summary[when]["genhint"]["ub"]).n == 90
        assert from_dict(summary[when]["perplexity"]).n == 200
    assert len(summary["ranking"]["raw"]) == len(summary["ranking"]["final_norm"]) == 4
    assert summary["ranking"]["raw"][:-1] == summary["ranking"]["final_norm"][:-1]
    assert summary["edit"]["blocks"] == [3] and summary["edit"]["parameters"] > 0
    assert summary["delta"]["bytes"] > 4 * summary["edit"]["parameters"]
    assert set(summary["controls"]) == {
        "random", "first", "middle", "fpft", "pb",
        "without_attention", "without_mlp", "without_he", "without_she",
    }  # fmt: skip
    assert summary["controls"]["random"]["edit"]["blocks"] != [3]


def test_after_is_the_checkpoint_as_saved(finished: tuple[Path, dict[str, Any]]) -> None:
    """Measured again without any cache, on the directory on disk, opened from nothing."""
    out, summary = finished
    model, tokenizer = surgery.load(out / "checkpoint", device="cpu")
    prompts = load_prompt_set()
    asked = fewer(material(model, tokenizer, prompts), {"genbias": 90, "genhint": 90})
    again = plain(measure(model, asked).scores)
    for path in (("genbias", "relative_gap", "all"), ("genbias", "afgb", "word"), ("genhint", "ub"), ("perplexity",)):
        one, two = again, summary["after"]
        for key in path:
            one, two = one[key], two[key]
        assert one["value"] == pytest.approx(two["value"], rel=1e-4), path
    with safe_open(out / "checkpoint" / "model.safetensors", "pt") as file:
        assert file.get_tensor("model.layers.0.mlp.up_proj.weight").dtype == torch.bfloat16


def test_training_the_last_block_balances_and_one_sided_losses_do_not(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    _, summary = finished
    gap = summary["after"]["genbias"]["relative_gap"]["all"]["value"]
    assert gap < 0.5 * summary["before"]["genbias"]["relative_gap"]["all"]["value"]
    for name in ("without_he", "without_she"):
        assert summary["controls"][name]["after"]["genbias"]["relative_gap"]["all"]["value"] > 0.9


def test_the_delta_says_where_it_comes_from(finished: tuple[Path, dict[str, Any]], checkpoint: Path) -> None:
    out, summary = finished
    delta = surgery.Delta.load(out / "delta.safetensors")
    assert delta.sha256 == summary["delta"]["sha256"]
    assert delta.metadata["recipe"] == (out / "recipe.toml").read_text()
    assert all(name.startswith("model.layers.3.") for name in delta.tensors)
    assert delta.metadata["base"] == str(checkpoint)


def test_the_report_stands_alone(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    page = (out / "report.html").read_text()
    assert page.count("<svg") == 3
    assert "http" not in page.replace("http-equiv", "")
    for text in ("without_mlp", "relative gap", "final_norm", "surgery run recipe.toml"):
        assert text in page


def test_the_written_recipe_gives_the_same_delta(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    first = operate(tiny, checkpoint, tmp_path / "a", block=2)
    values = surgery.runs.recipe_files.read_toml(tmp_path / "a" / "recipe.toml")
    assert values.pop("recipe") == "lftf"
    again = lftf.run(
        *tiny, surgery.runs.recipe_files.build(lftf.Settings, values, "recipe"), out=tmp_path / "b"
    ).summary
    assert first["delta"]["sha256"] == again["delta"]["sha256"]
    assert (tmp_path / "a" / "delta.safetensors").read_bytes() == (tmp_path / "b" / "delta.safetensors").read_bytes()


def test_the_prefix_cache_changes_nothing_but_time(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    fast = operate(tiny, checkpoint, tmp_path / "fast", block=2)
    slow = operate(tiny, checkpoint, tmp_path / "slow", block=2, prefix_cache=False)
    assert fast["edit"]["loss_last"] == pytest.approx(slow["edit"]["loss_last"], abs=1e-5)
    key = ("genbias", "relative_gap", "all", "value")
    assert _dig(fast["after"], key) == pytest.approx(_dig(slow["after"], key), abs=1e-3)


def test_auto_takes_the_top_of_the_chosen_ranking(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    summary = operate(tiny, checkpoint, tmp_path / "bmi", block="auto", rank_by="final_norm")
    assert summary["edit"]["blocks"] == summary["ranking"]["order"]["final_norm"][:1]
    summary = operate(tiny, checkpoint, tmp_path / "gain", block="auto", controls=["random"])
    located = summary["edit"]["located"]
    assert [located["block"]] == summary["edit"]["blocks"] == [int(np.argmax(located["ranking"]["scores"]))]
    assert "located" not in summary["controls"]["random"]["edit"]
    assert located["said"].startswith(f"Block {located['block']} was chosen of 0 to ")
    assert located["said"] in html.unescape((tmp_path / "gain" / "report.html").read_text())


def test_all_positions_and_sums(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    last = operate(tiny, checkpoint, tmp_path / "last")["ranking"]
    every = operate(tiny, checkpoint, tmp_path / "all", positions="all", aggregate="sum")["ranking"]
    assert last["raw"] != every["raw"] and min(every["raw"]) > max(last["raw"])


def test_random_blocks_are_judged_in_pairs_and_open_questions_are_measured(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.metrics.arithmetic.questions", lambda: questions(each=1))
    monkeypatch.setattr("recipes.lftf.open_questions.FAR", FAR[:1])
    more = {"controls": ["random"], "random_blocks": 3, "open_questions": True}
    summary = operate(tiny, checkpoint, tmp_path / "x", **more)
    names = ["random", "random_2", "random_3"]
    blocks = [summary["controls"][name]["edit"]["blocks"][0] for name in names]
    assert sorted(blocks) == [0, 1, 2] and summary["edit"]["blocks"] == [3]
    report = html.unescape((tmp_path / "x" / "report.html").read_text())
    for name, block_number in zip(names, blocks, strict=True):
        after = [each["after"]["genbias"]["relative_gap"]["all"] for each in (summary, summary["controls"][name])]
        pair = summary["differences"][name]["genbias.relative_gap.all"]
        assert pair["value"] == pytest.approx(after[0]["value"] - after[1]["value"])
        assert f"block {block_number} {pair['value']:+.3f} [{pair['low']:+.3f}, {pair['high']:+.3f}]" in report
    assert "of 3; blocks differ, so set random_blocks to 5 or more" in report
    for scores in (summary["before"], summary["after"], summary["controls"]["random"]["after"]):
        assert scores["arithmetic"]["exact"]["all"]["n"] == 4 and scores["far"]["relative_gap"]["n"] == 105
    assert "the tokenizer" in summary["after"]["other_biases"]["race"]["skipped"][0]  # it knows no word of that set
    assert "relative gap, three sentences before" in report and "What the place does itself" in report
    (term,) = summary["edit"]["moved"]["terms"].values()  # one, so that there is no ratio of gradients to tell
    assert "objective fell by" in report and term["gradient_before"] > 0
    with pytest.raises(SurgeryError, match="random_blocks: got 4 or more, expected at most 3 beside"):
        operate(tiny, checkpoint, tmp_path / "y", controls=["random"], random_blocks=4)


def test_other_words_are_a_setting(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    summary = operate(tiny, checkpoint, tmp_path / "they", words=["he", "she", "they"])
    assert summary["words"] == ["he", "she", "they"]
    assert len(summary["cases"][0]["before"]) == 3


def test_an_interrupted_run_continues_to_the_same_delta(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = operate(tiny, checkpoint, tmp_path / "whole", epochs=2)
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    write, taken = Folder.log, []

    def interrupt(folder: Any, row: dict[str, Any]) -> None:
        taken.append(row)
        if len(taken) == 5:
            raise KeyboardInterrupt
        write(folder, row)

    monkeypatch.setattr("surgery.runs.folder.Folder.log", interrupt)
    before = state(tiny[0])
    with pytest.raises(KeyboardInterrupt):
        operate(tiny, checkpoint, tmp_path / "cut", epochs=2)
    assert state(tiny[0]) == before
    assert (tmp_path / "cut.part").is_dir() and not (tmp_path / "cut").exists()
    settings = lftf.Settings(**({"model": str(checkpoint)} | QUICK | {"epochs": 2}))
    with pytest.raises(SurgeryError, match="--resume"):
        lftf.run(*tiny, settings, out=tmp_path / "cut")
    with pytest.raises(SurgeryError, match="another recipe"):
        lftf.run(*tiny, settings.model_copy(update={"lr": 1.0}), out=tmp_path / "cut", resume=True)
    rest = lftf.run(*tiny, settings, out=tmp_path / "cut", resume=True).summary
    assert rest["delta"]["sha256"] == whole["delta"]["sha256"]
    assert not (tmp_path / "cut.part").exists() and not (tmp_path / "cut" / "state").exists()


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"block": 9}, "blocks 0 to 3"),
        ({"block": "lst"}, "expected such numbers, or one of last"),
        ({"controls": ["rndom"]}, "expected some of last, random"),
        ({"words": ["he", "xylograph"]}, "'xylograph'"),
        ({"trained_words": ["they"]}, "expected some of he, she"),
        ({"data": "nonsense"}, "no prompt set 'nonsense'"),
        ({"neutral": "nowhere.txt"}, "nowhere.txt"),
    ],
)
def test_what_cannot_be_done_is_refused_and_nothing_is_left(
    tiny: Any, checkpoint: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SurgeryError, match=message):
        operate(tiny, checkpoint, tmp_path / "x", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_training_that_fails_keeps_what_was_measured_before(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "x"
    with pytest.raises(SurgeryError, match=r"learning rate 1e\+30.*is kept: go on with surgery run .*x --resume"):
        operate(tiny, checkpoint, out, lr=1e30)
    left = {path.name for path in (tmp_path / "x.part").rglob("*.json")}
    assert left == {"ranking.json", "before.json", "shown.json"} and not out.exists()
    monkeypatch.setattr("recipes.lftf.recipe.rank_blocks", lambda *_, **__: pytest.fail("ranked a second time"))
    with pytest.raises(SurgeryError, match="learning rate"):
        settings = lftf.Settings(**({"model": str(checkpoint)} | QUICK | {"lr": 1e30}))
        lftf.run(*tiny, settings, out=out, resume=True)


def test_a_full_disk_keeps_what_was_finished(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the summary could not be written: resuming trains, ranks and measures nothing again."""
    whole = operate(tiny, checkpoint, tmp_path / "whole", controls=["first"])

    def full(path: Path, value: Any) -> None:
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("surgery.operation.write_json", full)
        with pytest.raises(SurgeryError, match=r"No space left on device.*what was finished is kept"):
            operate(tiny, checkpoint, tmp_path / "x", controls=["first"])
    for name in ("recipes.lftf.recipe.rank_blocks", "surgery.edits.block.train", "surgery.metrics.suite.next_words"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("done a second time"))
    settings = lftf.Settings(**({"model": str(checkpoint)} | QUICK | {"controls": ["first"]}))
    assert untimed(lftf.run(*tiny, settings, out=tmp_path / "x", resume=True).summary) == untimed(whole)


def test_a_control_that_fails_does_not_repeat_the_edit(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = operate(tiny, checkpoint, tmp_path / "whole", controls=["first", "middle"])
    train, trained = block.fine_tune, []

    def second_fails(*args: Any, **options: Any) -> Any:
        trained.append(options["blocks"])
        if len(trained) == 2:
            raise RuntimeError("out of memory")
        return train(*args, **options)

    monkeypatch.setattr("surgery.edits.block.fine_tune", second_fails)
    with pytest.raises(RuntimeError, match="out of memory") as failure:
        operate(tiny, checkpoint, tmp_path / "x", controls=["first", "middle"])
    assert "what was finished is kept" in failure.value.__notes__[0]
    assert (tmp_path / "x.part" / "delta.safetensors").is_file()
    settings = lftf.Settings(**({"model": str(checkpoint)} | QUICK | {"controls": ["first", "middle"]}))
    rest = lftf.run(*tiny, settings, out=tmp_path / "x", resume=True).summary
    assert trained == [(3,), (0,), (0,), (2,)] and untimed(rest) == untimed(whole)


def test_a_destination_that_exists_is_kept(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    with pytest.raises(SurgeryError, match="exists"):
        operate(tiny, checkpoint, tmp_path / "x")
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def _dig(scores: Any, path: tuple[str, ...]) -> float:
    for key in path:
        scores = scores[key]
    return float(scores)
