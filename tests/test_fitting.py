"""surgery fit: scales of a delta's tensors on a child, by hand; what is written, and that the model stays."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltakit import edit
from test_cli import surgery

from hooks.errors import Note
from surgery.checkpoints import load
from surgery.data import genbias
from surgery.data.prompts import load_prompt_set
from surgery.delta import Delta, compose
from surgery.delta.metadata import recipes_of
from surgery.errors import SurgeryError
from surgery.metrics.judges import split_seed_of
from surgery.runs import fitting
from surgery.runs.fitting_tasks import equal_words, words_equations
from surgery.survive import kind_of, prompts_of

TWO = ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight")


def odds(*logs: float) -> np.ndarray:
    """log P(he), log P(she) by prompt, .4 together, from the logarithm of their ratio."""
    share = 1 / (1 + np.exp(-np.array(logs)))
    return np.log(0.4 * np.stack([share, 1 - share], axis=1))


def turn(where: slice, by: float) -> np.ndarray:
    """Slopes at 20 prompts of even shares at which the logarithm of the ratio grows by ``by``, the mass stays."""
    slopes = np.zeros((20, 2))
    slopes[where] = by / 2, -by / 2
    return slopes


def test_scales_by_hand() -> None:
    """One tensor shifts what is equalised, another what is held: the first goes on, the second back."""
    groups = np.arange(10)
    untouched, given = odds(*[0.5] * 10, *[0.02] * 10), odds(*[0.01] * 10, *[0.0] * 10)
    slopes = np.stack([turn(slice(10), -0.04), turn(slice(10, 20), -0.02)])  # the second took .02
    equations = words_equations(untouched, given, slopes, groups, 2.0)
    lacks = [float((each.lack**2).mean()) for each in equations]
    # .01 of the logarithm is .0025 of a share, .02 is .005; the mass is what it was.
    assert lacks == pytest.approx([0.0025**2, 0.005**2, 0.0], rel=1e-3)
    change = fitting.solve(equations, 1e-9, np.zeros(2))
    assert change == pytest.approx([0.25, -1.0], abs=0.01)  # .04 * .25 = .01; -.02 * -1 = .02
    assert fitting.choose(equations) == fitting.RIDGES[0]
    # From where they are half way already, half is left to do; a heavy ridge takes them back to 1.
    assert fitting.solve(equations, 1e9, np.array([0.5, -0.5])) == pytest.approx([-0.5, 0.5], abs=1e-3)
    # Nothing is held: the second has nothing to do and stays.
    alone = words_equations(untouched[:10], given[:10], slopes[:, :10], groups)
    assert len(alone) == 2 and fitting.solve(alone, 1e-9, np.zeros(2)) == pytest.approx([0.25, 0.0], abs=0.01)


def test_the_mass_is_held() -> None:
    """A tensor that takes mass and nothing else is turned back to where the mass was."""
    given = odds(*[0.0] * 4)
    equations = words_equations(given + 0.01, given, np.full((1, 4, 2), -0.1), np.arange(4))
    assert fitting.solve(equations, 1e-12, np.zeros(1)) == pytest.approx([-0.1], rel=0.02)


def test_a_ridge_is_chosen_on_groups_left_out() -> None:
    """What the tensors do to one profession alone is no reason to move them."""
    draw = np.random.default_rng(0)
    noise = fitting.Equation(1.0, draw.normal(size=20), 0.1 * draw.normal(size=(15, 20)), np.arange(20))
    assert fitting.choose([noise]) == fitting.RIDGES[-1]
    alike = np.tile([[0.1], [-0.1]], (1, 20))
    assert fitting.choose([fitting.Equation(1.0, np.full(20, 0.1), alike, np.arange(20))]) == fitting.RIDGES[0]


def test_the_fitted_delta_does_what_was_foretold(checkpoint: Path, tmp_path: Path) -> None:
    whole = edit(checkpoint, TWO, size=0.05)
    whole.save(tmp_path / "delta.safetensors")
    model, tokenizer = load(str(checkpoint))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert fitting.first_block(whole, model) == 1
    task = equal_words(model, tokenizer, load_prompt_set("genbias"), start=1, hold=0.0)
    found, fit = fitting.fitted(whole, model, task, components=0)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert fit.found < fit.given
    assert fit.found == pytest.approx(fit.foretold, rel=0.05)
    for name, scale in zip(whole.tensors, fit.scales, strict=True):
        assert found.tensors[name] == pytest.approx(whole.tensors[name] * np.float32(scale), rel=1e-6)
    from_the_first = equal_words(model, tokenizer, load_prompt_set("genbias"), start=0, hold=0.0)
    _, same = fitting.fitted(whole, model, from_the_first, components=0)
    assert same.scales == pytest.approx(fit.scales, abs=1e-3)

    out = tmp_path / "fitted.safetensors"
    options = ("--hold", "0", "--components", "0")
    code, stdout, stderr = surgery("fit", tmp_path / "delta.safetensors", checkpoint, "--out", out, *options)
    assert code == 0 and "2 scales" in stdout and f"{fit.found:.4f} fitted" in stdout, stderr
    assert "genbias.relative_gap.all" in stdout and "answers to 2 scales" in stderr
    assert Delta.load(out).tensors[TWO[0]] == pytest.approx(found.tensors[TWO[0]], rel=1e-5)
    code, _, stderr = surgery("fit", tmp_path / "delta.safetensors", checkpoint, "--out", out, "--quiet")
    assert code == 1 and str(out) in stderr and stderr.count("\n") == 1


def test_the_pieces_of_a_delta_are_its_strongest_components_and_the_rest(checkpoint: Path) -> None:
    """Beside numpy's singular values; a matrix of either form, vectors together, experts whole; all add up."""
    whole = edit(checkpoint, TWO, size=0.05)
    draw = np.random.default_rng(0)
    extra = {"a": draw.normal(size=5), "b": draw.normal(size=7), "experts": draw.normal(size=(2, 3, 4))}
    tensors = dict(whole.tensors) | {name: array.astype(np.float32) for name, array in extra.items()}
    cut = fitting.pieces(replace(whole, tensors=tensors), 2)
    assert [sorted(piece) for piece in cut] == [[name] for name in whole.tensors for _ in range(3)] + [
        ["experts"],
        ["a", "b"],
    ]
    for name, array in tensors.items():
        assert sum(piece[name] for piece in cut if name in piece) == pytest.approx(array, abs=1e-6)
    for turn, name in enumerate(whole.tensors):
        left, values, right = np.linalg.svd(whole.tensors[name], full_matrices=False)
        for place in range(2):
            expected = values[place] * np.outer(left[:, place], right[place])
            assert cut[3 * turn + place][name] == pytest.approx(expected, abs=1e-5)


def test_components_come_nearer_than_whole_matrices(checkpoint: Path) -> None:
    whole = edit(checkpoint, TWO, size=0.05)
    model, tokenizer = load(str(checkpoint))
    task = equal_words(model, tokenizer, load_prompt_set("genbias"), start=1, hold=0.0)
    _, few = fitting.fitted(whole, model, task, components=0)
    nearer, more = fitting.fitted(whole, model, task, components=3)
    assert len(few.scales) == 2 and len(more.scales) == 8
    assert more.given - more.found > 3 * (few.given - few.found)
    cut = fitting.pieces(whole, 3)
    for name in TWO:
        own = [scale * piece[name] for piece, scale in zip(cut, more.scales, strict=True) if name in piece]
        assert nearer.tensors[name] == pytest.approx(sum(own), abs=1e-6)


def test_what_the_delta_says_of_itself_is_heard(checkpoint: Path, tmp_path: Path) -> None:
    """Pairs have no prompts to come even; words have the set that they were trained on."""
    whole, out = edit(checkpoint, TWO), tmp_path / "fitted.safetensors"
    for name, recipe in (("pairs", 'pairs = "stereoset"'), ("words", 'prompt_set = "nowhere"')):
        replace(whole, metadata=whole.metadata | {"recipe": recipe}).save(tmp_path / f"{name}.safetensors")
    code, _, stderr = surgery("fit", tmp_path / "pairs.safetensors", checkpoint, "--out", out)
    assert code == 1 and "an edit of pairs" in stderr and "surgery dose" in stderr
    code, _, stderr = surgery("fit", tmp_path / "words.safetensors", checkpoint, "--out", out)
    assert code == 1 and "no prompt set 'nowhere'" in stderr and not out.exists()
    code, _, stderr = surgery("fit", tmp_path / "words.safetensors", checkpoint, "--out", out, "--hold", "inf")
    assert code == 1 and "--hold inf: expected a finite number" in stderr


def test_the_set_is_cut_as_the_edits_own_recipe_cut_it(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the edit has been trained on words that the scales are judged by."""
    whole = edit(checkpoint, TWO, size=0.05)
    replace(whole, metadata=whole.metadata | {"recipe": "split_seed = 7"}).save(tmp_path / "delta.safetensors")
    asked: list[int] = []

    def records(split: str, part: str, seed: int, prompts: Any) -> list[genbias.Prompt]:
        asked.append(seed)
        return cut(split, part, seed, prompts)[:4]

    cut = genbias.records
    monkeypatch.setattr("surgery.data.genbias.records", records)
    out = tmp_path / "fitted.safetensors"
    code, _, stderr = surgery("fit", tmp_path / "delta.safetensors", checkpoint, "--out", out, "--components", "0")
    assert code == 0 and asked == [7, 7], stderr
    again = compose([Delta.load(out)], [0.5])
    assert recipes_of(Delta.load(out).metadata) == recipes_of(again.metadata) == [{"split_seed": 7}]
    foreign = compose([again, edit(checkpoint, TWO)])
    assert recipes_of(foreign.metadata) == [{"split_seed": 7}, {"x": 1}] and split_seed_of(foreign.metadata) == 7
    other = replace(whole, metadata=whole.metadata | {"recipe": 'split_seed = 3\nprompt_set = "age"'})
    both = compose([compose([other, again]), foreign])  # also of what was composed
    assert [recipe.get("split_seed") for recipe in recipes_of(both.metadata)] == [3, 7, None]
    with pytest.warns(Note, match=r"split_seed 3, 7"):
        assert split_seed_of(both.metadata) == 3
    with pytest.raises(SurgeryError, match="composed of edits of age and genbias; name one of them with --data"):
        prompts_of(both.metadata)
    pairs = replace(whole, metadata=whole.metadata | {"recipe": 'pairs = "stereoset"'})
    assert kind_of(compose([other, again]).metadata) == "words"
    with pytest.raises(SurgeryError, match="of words and of pairs of sentences; name what is to be measured"):
        kind_of(compose([pairs, again]).metadata)
