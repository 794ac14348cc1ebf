"""hooks.patch and hooks.attribution_patch: known answers, agreement, alignment, and a model left as it was."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hooks
from hooks import HookError
from tests.families import build, state
from tests.tiny_tokenizer import tiny_tokenizer

CLEAN = [[5, 6, 7, 8, 9], [3, 4, 5, 9], [10, 11, 12, 13, 14, 15, 16]]
CORRUPTED = [[5, 6, 30, 8, 9], [3, 40, 5, 9], [10, 50, 12, 13, 14, 15, 16]]
CONTRAST = (20, 21)
FAMILIES = ["gpt2", "llama", "gemma3", "opt", "falcon_old", "bloom", "mixtral", "t5", "bert"]


def value(model: Any, prompt: list[int]) -> float:
    with torch.no_grad():
        logits = model(**hooks.model_inputs(model, torch.tensor([prompt]))).logits[0, -1]
    return float(logits[CONTRAST[0]] - logits[CONTRAST[1]])


def blocks_of(model: Any) -> str:
    return "encoder_blocks" if model.config.is_encoder_decoder else "blocks"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_whole_stream_restores_the_clean_run(name: str) -> None:
    model = build(name)
    before = state(model)
    found = hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST, unit="stream")
    assert state(model) == before
    np.testing.assert_allclose(found.effects, 1.0, atol=2e-3)
    assert found.clean == pytest.approx(np.mean([value(model, p) for p in CLEAN]), abs=2e-5)
    assert found.corrupted == pytest.approx(np.mean([value(model, p) for p in CORRUPTED]), abs=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama", "falcon_old"])
def test_patched_runs_are_those_of_a_plain_edit(name: str) -> None:
    """The interchange written out by hand for one pair, with the model's own logits."""
    model = build(name)
    clean, corrupted = CLEAN[0], CORRUPTED[0]
    span = value(model, clean) - value(model, corrupted)
    kept = hooks.record(model, torch.tensor([clean]), "blocks.1.*")
    for unit, site in {"attention": "hook_attn_out", "mlp": "hook_mlp_out"}.items():
        with hooks.edit(model, {f"blocks.1.{site}": lambda x, site=site: kept[f"blocks.1.{site}"]}):
            hand = value(model, corrupted)
        found = hooks.patch(model, None, [clean], [corrupted], CONTRAST, unit=unit)  # type: ignore[arg-type]
        expected = (hand - value(model, corrupted)) / span
        assert found.effects[1] == pytest.approx(expected, abs=1e-3)

    def one_head(z: torch.Tensor) -> torch.Tensor:
        z = z.clone()
        z[:, :, 2] = kept["blocks.1.attn.hook_z"][:, :, 2]
        return z

    with hooks.edit(model, {"blocks.1.attn.hook_z": one_head}):
        hand = value(model, corrupted)
    heads = hooks.patch(model, None, [clean], [corrupted], CONTRAST, unit="head")
    assert heads.effects.shape == (3, 4)
    assert heads.effects[1, 2] == pytest.approx((hand - value(model, corrupted)) / span, abs=1e-3)


def test_a_block_is_what_it_adds() -> None:
    """Its output minus its input, taken from the clean run, written out by hand."""
    model: Any = build("llama")
    clean, corrupted = CLEAN[:1], CORRUPTED[:1]
    kept = hooks.record(model, torch.tensor(clean), ["blocks.2.hook_resid_pre", "blocks.2.hook_resid_post"])
    added = kept["blocks.2.hook_resid_post"] - kept["blocks.2.hook_resid_pre"]
    entering = hooks.record(model, torch.tensor(corrupted), "blocks.2.hook_resid_pre")["blocks.2.hook_resid_pre"]
    with hooks.edit(model, {"blocks.2.hook_resid_post": lambda x: entering + added}):
        hand = value(model, corrupted[0])
    base = value(model, corrupted[0])
    found = hooks.patch(model, None, clean, corrupted, CONTRAST)
    assert found.effects[2] == pytest.approx((hand - base) / (value(model, clean[0]) - base), abs=1e-3)


@pytest.mark.parametrize("name", [n for n in FAMILIES if n != "mixtral"])  # its experts refuse float64
@pytest.mark.parametrize("unit", ["block", "attention", "mlp", "head", "stream"])
def test_attribution_is_patching_where_the_model_is_linear(name: str, unit: Any) -> None:
    """Prompts that differ by a tiny step of one embedding, in float64: both are the same derivative."""
    model: Any = build(name).double()
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[30] = weight[7] + 1e-3 * (weight[30] - weight[7])
    pairs = (CLEAN[:1], [[5, 6, 30, 8, 9]])
    patched = hooks.patch(model, None, *pairs, CONTRAST, unit=unit, positions="changed")
    attributed = hooks.attribution_patch(model, None, *pairs, CONTRAST, unit=unit, positions="changed")
    scale = np.abs(patched.effects).max()
    np.testing.assert_allclose(attributed.effects, patched.effects, atol=0.03 * scale)
    assert scale > 1e-3


def test_attribution_ranks_like_patching_on_a_tiny_model() -> None:
    model = build("gpt2")
    patched = hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST, unit="head")
    attributed = hooks.attribution_patch(model, None, CLEAN, CORRUPTED, CONTRAST, unit="head")
    ranks = [found.effects.ravel().argsort().argsort() for found in (patched, attributed)]
    assert np.corrcoef(*ranks)[0, 1] > 0.9  # Spearman's rank correlation
    assert patched.ranking().top() == attributed.ranking().top()


@pytest.mark.parametrize("function", [hooks.patch, hooks.attribution_patch])
def test_positions(function: Any) -> None:
    model = build("llama")
    pairs = (CLEAN[:1], CORRUPTED[:1])
    each = function(model, None, *pairs, CONTRAST, unit="stream", positions="each")
    assert each.effects.shape == (3, 5) and each.tokens == ("5", "6", "7", "8", "9")
    np.testing.assert_allclose(each.effects[:, :2], 0.0, atol=1e-5)  # before the changed token all is equal
    changed = function(model, None, *pairs, CONTRAST, unit="stream", positions="changed")
    last = function(model, None, *pairs, CONTRAST, unit="stream", positions="last")
    np.testing.assert_allclose(changed.effects, each.effects[:, 2], atol=1e-6)
    np.testing.assert_allclose(last.effects, each.effects[:, 4], atol=1e-6)
    if function is hooks.patch:
        assert last.effects[2] == pytest.approx(1.0, abs=1e-3)  # all that the head reads of the last block
    heads = function(model, None, *pairs, CONTRAST, unit="head", positions="each")
    assert heads.effects.shape == (3, 4, 5)
    with pytest.raises(HookError, match="by position"):
        each.ranking()


@pytest.mark.parametrize("function", [hooks.patch, hooks.attribution_patch])
@pytest.mark.parametrize("positions", ["all", "last"])
def test_batches_and_singles_agree(function: Any, positions: Any) -> None:
    model = build("gpt2")
    together = function(model, None, CLEAN, CORRUPTED, CONTRAST, unit="mlp", positions=positions)
    apart = function(model, None, CLEAN, CORRUPTED, CONTRAST, unit="mlp", positions=positions, batch_tokens=1)
    np.testing.assert_allclose(together.effects, apart.effects, atol=1e-4)
    np.testing.assert_allclose(together.errors, apart.errors, atol=1e-4)


def test_the_effect_is_the_slope_over_pairs() -> None:
    model = build("gpt2")
    single = [hooks.patch(model, None, [a], [b], CONTRAST).effects for a, b in zip(CLEAN, CORRUPTED, strict=True)]
    d = np.array([value(model, a) - value(model, b) for a, b in zip(CLEAN, CORRUPTED, strict=True)])
    found = hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST)
    slope = (d[:, None] ** 2 * np.array(single)).sum(0) / (d**2).sum()
    np.testing.assert_allclose(found.effects, slope, atol=1e-3)
    assert np.isfinite(found.errors).all() and found.count == 3
    assert np.isnan(hooks.patch(model, None, CLEAN[:1], CORRUPTED[:1], CONTRAST).errors).all()


def test_counterfactual_pairs() -> None:
    tokenizer = tiny_tokenizer()
    clean, corrupted = hooks.counterfactual_pairs(tokenizer, "the {} said that", [("nurse", "plumber")])
    assert clean == ["the nurse said that", "the plumber said that"] and corrupted == clean[::-1]
    found = hooks.patch(build("llama"), tokenizer, clean, corrupted, unit="stream", positions="each")
    assert found.tokens == ("the", "nurse", "said", "that") and found.contrast == ("he", "she")
    words = [("nurse", "engineer"), ("doctor", "nurse")]
    with pytest.raises(HookError, match=r"4 tokens \[the nurse said that\] against 5 \[the engin ##eer said that\]"):
        hooks.counterfactual_pairs(tokenizer, "the {} said that", words)
    kept, _ = hooks.counterfactual_pairs(tokenizer, "the {} said that", words, unaligned="skip")
    assert kept == ["the doctor said that", "the nurse said that"]
    with pytest.raises(HookError, match="expected one"):
        hooks.counterfactual_pairs(tokenizer, "the nurse", words)


def test_bad_input_and_exceptions_leave_the_model_as_it_was() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    model.requires_grad_(False)
    model.train()
    before = state(model)
    text = ["the nurse said that"]
    with pytest.raises(HookError, match=r"pair 0 cannot be aligned: 4 .*against 5 \[the engin ##eer said that\]"):
        hooks.patch(model, tokenizer, text, ["the engineer said that"])
    with pytest.raises(HookError, match="twice the same"):
        hooks.patch(model, tokenizer, text, text)
    with pytest.raises(HookError, match="one length, got 4 to 7 tokens"):
        hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST, positions="each")
    with pytest.raises(HookError, match="same length, at least 1"):
        hooks.attribution_patch(model, None, [], [], CONTRAST)
    with pytest.raises(HookError, match="unit is 'layer'"):
        hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST, unit="layer")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="no language-model head"):
        hooks.patch(build("llama_headless"), None, CLEAN, CORRUPTED, CONTRAST)

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    for function in (hooks.patch, hooks.attribution_patch):
        with pytest.raises(KeyboardInterrupt):
            function(model, None, CLEAN, CORRUPTED, CONTRAST, progress=stop)
        handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            function(model, None, CLEAN, CORRUPTED, CONTRAST)
        handle.remove()
    assert state(model) == before


def test_pairs_that_do_not_differ_in_the_contrast() -> None:
    """Both words have the same row in the head, so that their logits are always equal."""
    model: Any = build("llama")
    with torch.no_grad():
        model.lm_head.weight[CONTRAST[0]] = model.lm_head.weight[CONTRAST[1]]
    with pytest.raises(HookError, match="give the same contrast"):
        hooks.patch(model, None, CLEAN, CORRUPTED, CONTRAST)


def test_the_former_name_still_works() -> None:
    model = build("gpt2")
    with pytest.warns(DeprecationWarning, match=r"hooks\.attribution_patch"):
        old = hooks.attribute(model, None, CLEAN, CORRUPTED, CONTRAST)
    assert (old.effects == hooks.attribution_patch(model, None, CLEAN, CORRUPTED, CONTRAST).effects).all()
