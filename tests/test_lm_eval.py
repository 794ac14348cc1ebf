"""The wrapper around lm-eval: refusal without it, its result as our numbers, and our scorer against it."""

import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from families import build
from letters import letters
from typer.testing import CliRunner

from surgery import catalogue
from surgery.cli.app import app
from surgery.data.capability import Question
from surgery.errors import SurgeryError
from surgery.metrics import lm_eval, multiple_choice

RESULT = {
    "results": {
        "piqa": {
            "alias": "piqa",
            "acc,none": 0.6,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 0.7,
            "acc_norm_stderr,none": "N/A",
        },
        "wikitext": {"alias": "wikitext", "word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
        "gsm8k": {
            "exact_match,strict-match": 0.2,
            "exact_match_stderr,strict-match": 0.01,
            "exact_match,flexible": 0.3,
        },
    },
    "n-samples": {"piqa": {"original": 1838, "effective": 25}},
    "n-shot": {"piqa": 0, "gsm8k": 5},
    "higher_is_better": {"piqa": {"acc": True}, "wikitext": {"word_perplexity": False}},
}


def test_numbers_keep_their_errors_counts_and_directions() -> None:
    found = lm_eval.metrics_of(RESULT, "0.4")
    piqa = found["piqa"]["acc"]
    assert (piqa.value, piqa.n, piqa.data) == (0.6, 25, "piqa, 0-shot")
    assert piqa.low == pytest.approx(0.404) and piqa.high == pytest.approx(0.796)
    assert found["piqa"]["acc_norm"].low == 0.7 and "no standard error" in found["piqa"]["acc_norm"].scorer
    assert (found["wikitext"]["word_perplexity"].direction, found["wikitext"]["word_perplexity"].ideal) == ("lower", 1)
    assert set(found["gsm8k"]) == {"exact_match strict-match", "exact_match flexible"}
    with pytest.raises(SurgeryError, match="no number"):
        lm_eval.metrics_of({"results": {}}, "0.4")


def installed(monkeypatch: pytest.MonkeyPatch, evaluate: Callable[..., Any]) -> None:
    """A package of the same names as lm-eval's."""
    package, models, wrapper = (
        ModuleType("lm_eval"),
        ModuleType("lm_eval.models"),
        ModuleType("lm_eval.models.huggingface"),
    )
    package.simple_evaluate, package.__version__ = evaluate, "9.9"  # type: ignore[attr-defined]
    wrapper.HFLM = lambda **given: SimpleNamespace(**given)  # type: ignore[attr-defined]
    for module in (package, models, wrapper):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(catalogue, "find_spec", lambda name: object())


def test_the_opened_model_is_handed_over_and_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, seen = build("llama").train(), letters(), {}

    def evaluate(**given: Any) -> Any:
        assert not model.training
        seen.update(given)
        return RESULT

    installed(monkeypatch, evaluate)
    found = lm_eval.evaluate(model, tokenizer, ["piqa", "gsm8k"], limit=25, seed=3)
    assert found["piqa"]["acc"].scorer.startswith("lm-eval 9.9, acc") and model.training
    assert seen["model"].pretrained is model and seen["tasks"] == ["piqa", "gsm8k"]
    assert seen["limit"] == 25 and seen["fewshot_random_seed"] == 3 and seen["num_fewshot"] is None

    def fails(**given: Any) -> Any:
        raise KeyError("pika")

    installed(monkeypatch, fails)
    with pytest.raises(SurgeryError, match="lm-eval pika: KeyError: 'pika'"):
        lm_eval.evaluate(model, tokenizer, ["pika"])


def test_it_is_refused_in_one_line_where_it_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match=r"not installed.*pip install 'model-surgery\[lm-eval\]'"):
        lm_eval.evaluate(build("llama"), letters(), ["piqa"])
    refused = CliRunner().invoke(app, ["eval", "no-such-model", "--lm-eval", "piqa"])  # before the model is opened
    assert (
        refused.exit_code == 1 and refused.stderr.count("\n") == 1 and "lm-eval: the package is not" in refused.stderr
    )


def test_the_command_measures_the_tasks_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(monkeypatch, lambda **given: RESULT)
    words = ["eval", str(checkpoint), "--lm-eval", "piqa, gsm8k", "--json", str(tmp_path / "out.json"), "--quiet"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    numbers = json.loads((tmp_path / "out.json").read_text())
    assert numbers["lm_eval"]["piqa"]["acc"]["value"] == 0.6 and "genbias" not in numbers
    assert "lm eval piqa acc" in done.stdout


@pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs the extra lm-eval")
def test_our_scorer_agrees_with_lm_eval(tmp_path: Path) -> None:
    """The same questions as a task of lm-eval's: the same accuracy, summed and by characters."""
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "off", "to", "see", "the", "old", "sea", "again"]
    asked = [
        Question(
            " ".join(words[n % 7 : n % 7 + 4]),
            (f" {words[n % 5]} {words[n % 3]}", f" {words[-1 - n % 4]}", f" {words[n % 11]} x y"),
            n % 3,
        )
        for n in range(40)
    ]
    rows = [{"q": a.prompt, "o": [option.strip() for option in a.options], "a": a.answer} for a in asked]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    task = {
        "task": "ours",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{o}}",
        "doc_to_target": "{{a}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    for family in ("llama", "gpt2"):
        model, tokenizer = build(family, max_position_embeddings=128), letters(bos=False)
        theirs = lm_eval.evaluate(model, tokenizer, [task])["ours"]
        ours = multiple_choice.score(model, tokenizer, asked)
        assert theirs["acc"].n == 40
        assert multiple_choice.accuracy(ours, "sum", data="d").value == pytest.approx(theirs["acc"].value)
        assert multiple_choice.accuracy(ours, "characters", data="d").value == pytest.approx(theirs["acc_norm"].value)
