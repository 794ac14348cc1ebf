"""Classifiers: gradient reversal, what each method trains, right padding, and the recipe on a tiny encoder."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from families import state
from safetensors import safe_open
from torch import nn
from transformers import BertConfig, BertModel

import surgery
from recipes import crawd_classifier
from recipes.crawd_classifier import recipe
from recipes.crawd_classifier.settings import WEIGHTS
from surgery.edits import debiasing
from surgery.edits.classifier import (
    METHODS,
    Adversary,
    Examples,
    Method,
    fit,
    open_classifier,
    predict,
    reverse,
)
from surgery.errors import SurgeryError
from surgery.metrics.metric import from_dict
from surgery.training import Plan


@pytest.fixture(scope="module")
def encoder(word_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random BERT whose tokenizer knows the words of the shipped prompts."""
    path = tmp_path_factory.mktemp("models") / "bert"
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = BertConfig(**sizes, vocab_size=len(word_tokenizer), max_position_embeddings=64, pad_token_id=0)
    BertModel(config).save_pretrained(path)
    word_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HateCheck's columns with forty templates about two groups, and a few of Davidson's."""
    folder = tmp_path_factory.mktemp("data") / "toxicity"
    folder.mkdir()
    lines = ["test_case,label_gold,target_ident,functionality,templ_id"]
    for template in range(40):
        bad = template % 2 == 0
        for who in ("women", "men"):
            text = f"The nurse said that {who} {'lost' if bad else 'found'} the key"
            lines.append(f"{text},{'hateful' if bad else 'non-hateful'},{who},f,{template}")
    (folder / "hatecheck_test_suite_cases.csv").write_text("\n".join(lines) + "\n")
    rows = [f"{number % 3},The guard {number} said so" for number in range(30)]
    (folder / "davidson_labeled_data.csv").write_text("\n".join(["class,tweet", *rows]) + "\n")
    return folder.parent


@pytest.fixture
def tiny(encoder: Path, word_tokenizer: Any) -> tuple[Any, Any]:
    return open_classifier(encoder, 2, seed=0), word_tokenizer


@pytest.fixture
def examples(word_tokenizer: Any) -> Examples:
    """The class is told by one word, the group by another, and both go together in three of four rows."""
    ids, labels, groups = [], [], []
    for number in range(32):
        label, group = number % 2, (number % 2 if number % 8 < 6 else 1 - number % 2)
        text = f"The {('nurse', 'guard')[group]} said that {('he', 'she')[group]} is {('kind', 'old')[label]}"
        ids.append(tuple(word_tokenizer(text + " here" * (number % 3))["input_ids"]))
        labels.append(label)
        groups.append(group)
    return Examples(tuple(ids), tuple(labels), tuple(groups))


@contextmanager
def edited(model: Any, differences: dict[str, torch.Tensor]) -> Iterator[None]:
    """Inside, the differences are added to the model's parameters."""
    with torch.no_grad():
        for name, difference in differences.items():
            model.get_parameter(name).add_(difference)
        yield
        for name, difference in differences.items():
            model.get_parameter(name).sub_(difference)


def method(name: str) -> Method:
    return Method(name, ("he", "she"), WEIGHTS[name], {"heads": 4, "scope": "sequence"} if name == "crawd" else {})


def test_reversal_is_the_identity_with_a_gradient_of_the_other_sign() -> None:
    values = torch.randn(3, 4, requires_grad=True)
    out = reverse(values, 2.5)
    assert torch.equal(out, values)
    weights = torch.randn(3, 4)
    (out * weights).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(values.grad, -2.5 * weights)


def test_an_adversary_learns_while_the_features_unlearn() -> None:
    """Free features of two groups: the adversary's loss rises to that of a guess, and its accuracy falls."""
    torch.manual_seed(0)
    groups = torch.arange(64) % 2
    features = nn.Parameter(torch.randn(64, 4) + 3.0 * groups[:, None])
    adversary = Adversary(4, 2)
    optimizer = torch.optim.Adam([*adversary.parameters(), features], lr=1e-2)
    losses = []
    for _ in range(400):
        loss = nn.functional.cross_entropy(adversary(features, 1.0), groups)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert min(losses[:100]) < 0.3 < 0.5 < losses[-1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_and_leaves_the_model_alone(tiny: Any, examples: Examples, name: str) -> None:
    model, tokenizer = tiny
    before = state(model)
    fitted = fit(model, tokenizer, examples, method(name), Plan(3e-3, 20, 8, "adamw", dropout=True), seed=0)
    assert state(model) == before
    # A single batch may be an unlucky one under dropout, and an adversary's share of the sum stays: so by medians.
    # What CBE may not attend to tells the class, too.
    assert median(fitted.losses[-24:]) < (0.9 if name == "cbe" else 0.8) * median(fitted.losses[:8])
    assert set(fitted.differences) == {name for name, _ in model.named_parameters()}
    assert (fitted.module is not None) == (name == "crawd")
    own = sum(parameter.numel() for parameter in model.parameters())
    assert fitted.parameters > own if name == "crawd" else fitted.parameters == own  # an adversary is no part of it


def test_the_adversary_changes_what_is_learnt(tiny: Any, examples: Examples) -> None:
    model, tokenizer = tiny
    plan = Plan(1e-3, 2, 8)
    plain, judged = (fit(model, tokenizer, examples, method(name), plan, seed=0) for name in ("vanilla", "adversarial"))
    # The head itself is not judged; the adversary reaches the encoder behind it from the second step on.
    first = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(plain.differences[first], judged.differences[first])
    silent = replace(method("adversarial"), weight=0.0)
    alone = fit(model, tokenizer, examples, silent, plan, seed=0)
    assert torch.allclose(plain.differences[first], alone.differences[first])
    with pytest.raises(SurgeryError, match="fewer than two groups"):
        fit(model, tokenizer, replace(examples, groups=(0,) * 32), method("adversarial"), plan, seed=0)
    with pytest.raises(SurgeryError, match="got 'cbd'"):
        fit(model, tokenizer, examples, Method("cbd"), plan, seed=0)


def test_what_a_token_says_of_the_group() -> None:
    """Three rows of group 0 and one of group 1; token 5 stands in both rows of a kind, 6 in all, 7 in none."""
    energy = debiasing.bias_energy([(5, 6, 5), (5, 6), (6,), (6, 5), (8,)], (0, 0, 0, 1, -1), 9)
    guess = torch.tensor([(2 + 0.75) / 4, (1 + 0.25) / 4])
    assert energy[5] == pytest.approx(float((guess * (guess / torch.tensor([0.75, 0.25])).log()).sum()), rel=1e-4)
    assert energy[6] == pytest.approx(0, abs=1e-7) and energy[7] == energy[8] == 0
    with pytest.raises(SurgeryError, match="fewer than two groups"):
        debiasing.bias_energy([(5,), (6,)], (0, -1), 9)


def test_controlled_exposure_attends_less_to_what_tells_the_group(tiny: Any, examples: Examples) -> None:
    model, tokenizer = tiny
    energy = debiasing.bias_energy(examples.ids, examples.groups, len(tokenizer))
    ids = torch.tensor([row for row in examples.ids if len(row) == len(examples.ids[0])])

    def exposed(weight: float) -> float:
        """How much the last block attends to it after training with this weight."""
        fitted = fit(model, tokenizer, examples, Method("cbe", weight=weight), Plan(3e-3, 8, 8), seed=0)
        with edited(model, fitted.differences), torch.no_grad(), debiasing.last_attention(model) as attention:
            model(input_ids=ids)
            return float(debiasing.attention_similarity(attention(), energy[ids], torch.ones_like(ids).bool()).mean())

    assert exposed(30.0) < 0.8 * exposed(0.0)


def test_padding_does_not_change_a_prediction(tiny: Any, examples: Examples) -> None:
    model, _ = tiny
    model.train()
    together = predict(model, examples.ids)
    assert model.training
    for row in (0, 1, 2):
        np.testing.assert_allclose(together[row], predict(model, [examples.ids[row]])[0], atol=1e-6)
    np.testing.assert_allclose(together.sum(1), 1, atol=1e-6)


def test_a_new_classifier_depends_on_the_seed_alone(encoder: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    one, again, other = (open_classifier(encoder, 2, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.classifier.weight, again.classifier.weight)
    assert not torch.equal(one.classifier.weight, other.classifier.weight)
    with safe_open(encoder / "model.safetensors", "pt") as stored:
        assert torch.equal(one.bert.pooler.dense.weight, stored.get_tensor("pooler.dense.weight"))
    with pytest.raises(SurgeryError, match="no sequence classifier"):
        open_classifier(tmp_path, 2, seed=0)


# The recipe

QUICK: dict[str, Any] = {"lr": 3e-3, "epochs": 5, "batch_size": 8, "heads": 4, "reference": ["he", "she"]}


def test_the_whole_run(encoder: Path, data: Path, word_tokenizer: Any, tmp_path: Path) -> None:
    model = BertModel.from_pretrained(encoder)
    before = state(model)
    settings = crawd_classifier.Settings(model=str(encoder), data=str(data), source="both", **QUICK)
    summary = crawd_classifier.run(model, word_tokenizer, settings, out=tmp_path / "run").summary
    assert state(model) == before
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"run.json", "recipe.toml", "delta.safetensors", "report.html", "log.jsonl", "base"}
    assert summary["rows"] == {"trained": 48 + 18, "hatecheck_test": 16, "davidson_test": 6}
    assert set(summary["controls"]) == {"vanilla", "adversarial"}
    for scores in (summary["after"], *(control["after"] for control in summary["controls"].values())):
        assert set(scores) == {"accuracy", "tpr_gap", "accuracy_davidson"}
    assert summary["controls"]["vanilla"]["after"]["accuracy"]["value"] == 1.0  # one word tells the class
    # The saved files, opened from nothing, give the reported numbers.
    child, _ = surgery.load(tmp_path / "run" / "base", device="cpu", deltas=[tmp_path / "run" / "delta.safetensors"])
    test = recipe._read(word_tokenizer, settings).tests["hatecheck"]
    guessed = predict(child, test.ids).argmax(1)
    assert float((guessed == np.array(test.labels)).mean()) == from_dict(summary["after"]["accuracy"]).value


@pytest.mark.parametrize(
    "settings, message",
    [({"data": ""}, "no data"), ({"controls": ["crawd"]}, "controls: got 'crawd'")],
)
def test_what_cannot_be_done_is_refused(
    encoder: Path, data: Path, word_tokenizer: Any, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    ready = crawd_classifier.Settings(**({"model": str(encoder), "data": str(data)} | QUICK | settings))
    with pytest.raises(SurgeryError, match=message):
        crawd_classifier.run(BertModel.from_pretrained(encoder), word_tokenizer, ready, out=tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
