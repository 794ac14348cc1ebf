"""hooks.lens: the real logits along the stream, contributions that add up, and equal to TransformerLens'."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import hooks
from hooks import HookError, anatomy
from tests.families import FAMILIES, REFUSED, build, state
from tests.tiny_tokenizer import tiny_tokenizer

PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5], [10, 11, 12, 13, 14, 15, 16]]
CONTRAST = (20, 21)
HEADED = [n for n in FAMILIES if n not in REFUSED and "classifier" not in n and "headless" not in n]
NO_HEAD = ["llama_classifier", "t5_classifier", "gpt2_headless"]


def real(model: nn.Module, prompts: list[list[int]] = PROMPTS) -> float:
    """The mean logit difference from the model's own plain forward pass, one prompt at a time."""
    differences = []
    with torch.no_grad():
        for prompt in prompts:
            logits = model(**hooks.model_inputs(model, torch.tensor([prompt]))).logits[0, -1]
            differences.append(float(logits[CONTRAST[0]] - logits[CONTRAST[1]]))
    return float(np.mean(differences))


@pytest.mark.parametrize("name", HEADED)
def test_difference_is_the_models_own_and_parts_add_up(name: str) -> None:
    model = build(name)
    before = state(model)
    found = hooks.lens(model, None, PROMPTS, CONTRAST)
    assert state(model) == before
    assert float(found.difference) == pytest.approx(real(model), abs=2e-5)
    assert found.cumulative[-1] == pytest.approx(float(found.difference), abs=1e-6)
    if not all(block.additive for block in anatomy.find(model).blocks):
        with pytest.raises(HookError, match="normalises the stream itself"):
            found.ranking()
        return
    total = float(found.embedding) + found.block.sum() + float(found.rest)
    assert total == pytest.approx(float(found.difference), abs=2e-5)
    parts = sum(found.values[n] for n in ("attention", "mlp", "cross_attention") if n in found.values)
    np.testing.assert_allclose(parts, found.block, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gemma2", "gemma3", "olmo2", "mpt", "t5", "qwen3_moe"])
def test_without_biases_nothing_is_left_over(name: str) -> None:
    """Final norms without bias, linear heads: the parts alone are the whole difference."""
    linear = {"final_logit_softcapping": None} if name == "gemma2" else {}
    found = hooks.lens(build(name, **linear), None, PROMPTS, CONTRAST)
    assert abs(float(found.rest)) < 2e-5
    np.testing.assert_allclose(found.head.sum(1), found.attention, atol=2e-5)  # writers without bias


def test_the_rest_is_the_biases_of_norm_and_head() -> None:
    model: Any = build("phi")
    found = hooks.lens(model, None, PROMPTS, CONTRAST)
    rows = model.lm_head.weight[CONTRAST[0]] - model.lm_head.weight[CONTRAST[1]]
    biases = rows @ model.model.final_layernorm.bias
    biases = biases + model.lm_head.bias[CONTRAST[0]] - model.lm_head.bias[CONTRAST[1]]
    assert float(found.rest) == pytest.approx(biases.item(), abs=2e-5)


def test_a_soft_cap_is_in_the_lens_and_its_bend_in_the_rest() -> None:
    model = build("gemma2", final_logit_softcapping=0.5)
    found = hooks.lens(model, None, PROMPTS, CONTRAST)
    assert float(found.difference) == pytest.approx(real(model), abs=2e-5)
    assert abs(float(found.rest)) > 1e-3


@pytest.mark.parametrize("name", ["gpt2", "llama", "bloom"])
def test_the_entry_after_a_block_is_that_of_a_model_cut_there(name: str) -> None:
    """The known answer for the cumulative lens: the blocks behind are really gone."""
    model: Any = build(name)
    found = hooks.lens(model, None, PROMPTS, CONTRAST)
    cut = copy.deepcopy(model)
    holder = cut.get_submodule(anatomy.find(cut).blocks[0].name.rpartition(".")[0].rpartition(".")[0])
    for field in ("h", "layers"):
        if hasattr(holder, field):
            setattr(holder, field, getattr(holder, field)[:1])
    assert found.cumulative[1] == pytest.approx(real(cut), abs=2e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_direct_logit_attribution_of_transformer_lens(name: str) -> None:
    """The known answer from outside: its own activations and `apply_ln_to_stack`."""
    bridges = pytest.importorskip("transformer_lens.model_bridge.sources._bridge_builder")
    model: Any = build(name)
    prompts = [p for p in PROMPTS if len(p) == 5] + [[30, 31, 32, 33, 34]]
    found = hooks.lens(model, None, prompts, CONTRAST)
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    bridge = bridges.build_bridge_from_module(own, type(model).__name__, hf_config=own.config)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor(prompts))
        rows = model.lm_head.weight[CONTRAST[0]] - model.lm_head.weight[CONTRAST[1]]
        norm = model.get_submodule(anatomy.find(model).final_norm)
        mlps = torch.stack([cache[f"blocks.{i}.hook_mlp_out"] for i in range(3)])
        attentions = torch.stack([cache[f"blocks.{i}.hook_attn_out"] for i in range(3)])
        scaled = cache.apply_ln_to_stack(torch.cat([attentions, mlps]), layer=-1)[:, :, -1]
        theirs = ((scaled * norm.weight) @ rows).mean(1).numpy()  # the bridge leaves the weight unfolded
        z = torch.stack([cache[f"blocks.{i}.attn.hook_z"] for i in range(3)])[:, :, -1]
        z = z.reshape(3, len(prompts), 4, 8)
        writers = [model.get_submodule(b.attention_writer).weight for b in anatomy.find(model).blocks]
        matrices = torch.stack([w if name == "gpt2" else w.T for w in writers]).reshape(3, 4, 8, 32)
        heads = torch.einsum("lbhd,lhdm->lhbm", z, matrices).reshape(12, len(prompts), 32)
        heads = cache.apply_ln_to_stack(heads, layer=-1, pos_slice=-1)
        head = ((heads * norm.weight) @ rows).mean(1).reshape(3, 4).numpy()
    np.testing.assert_allclose(np.concatenate([found.attention, found.mlp]), theirs, atol=1e-4)
    np.testing.assert_allclose(found.head, head, atol=1e-4)
    assert np.abs(theirs).max() > 1e-2


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bloom"])
def test_padding_batches_and_singles_agree(name: str) -> None:
    model, words = build(name), ("he", "she")
    texts = ["the nurse said that", "he was tired because", "the plumber said that the doctor was early"]
    right = hooks.lens(model, tiny_tokenizer("right"), texts, words)
    left = hooks.lens(model, tiny_tokenizer("left"), texts, words)
    single = hooks.lens(model, tiny_tokenizer(), texts, words, batch_tokens=1)
    for key, value in right.values.items():
        np.testing.assert_array_equal(value, left.values[key])
        np.testing.assert_allclose(value, single.values[key], atol=2e-5)
        np.testing.assert_allclose(right.errors[key], single.errors[key], atol=2e-5)


def test_standard_errors_are_those_over_prompts() -> None:
    model = build("llama")
    each = [float(hooks.lens(model, None, [p], CONTRAST).difference) for p in PROMPTS]
    found = hooks.lens(model, None, iter(PROMPTS), CONTRAST)
    assert float(found.errors["difference"]) == pytest.approx(np.std(each, ddof=1) / 3**0.5, rel=1e-3)
    assert found.count == 3


def test_rankings_and_table() -> None:
    found = hooks.lens(build("t5"), None, PROMPTS, CONTRAST, data="three")
    for unit in ("block", "attention", "mlp", "head"):
        ranking = found.ranking(unit)
        np.testing.assert_allclose(ranking.scores, np.abs(found.get(unit)))
        np.testing.assert_array_equal(np.array(ranking.settings["signs"]), np.sign(found.get(unit)))
        assert (ranking.method, ranking.count, ranking.data) == ("lens", 3, "three")
    assert len(found.table().splitlines()) == 2 + 1 + 2 + 1
    with pytest.raises(AttributeError):
        _ = found.nothing


def test_a_masked_model_is_read_at_its_mask() -> None:
    model, tokenizer = build("bert"), tiny_tokenizer()
    found = hooks.lens(model, tokenizer, ["the nurse said that [MASK] was tired"])
    ids = torch.tensor([tokenizer("the nurse said that [MASK] was tired")["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, 4]
    he, she = tokenizer.convert_tokens_to_ids(["he", "she"])
    assert float(found.difference) == pytest.approx(float(logits[he] - logits[she]), abs=2e-5)
    with pytest.raises(HookError, match=r"prompt 0 has 0 mask tokens.*\[MASK\]"):
        hooks.lens(model, tokenizer, ["the nurse said that"])


def test_training_mode_dropout_and_gradients_stay_out() -> None:
    model = build("gpt2", embd_pdrop=0.5, resid_pdrop=0.5).train()
    before = state(model)
    first, second = (hooks.lens(model, None, PROMPTS, CONTRAST) for _ in range(2))
    assert state(model) == before and model.training
    np.testing.assert_array_equal(first.cumulative, second.cumulative)


def test_bad_input() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    before = state(model)
    with pytest.raises(HookError, match=r"word 'nonbinary'.* into 2 tokens \['non', '##binary'\]"):
        hooks.lens(model, tokenizer, ["the nurse said that"], ("he", "nonbinary"))
    with pytest.raises(HookError, match="name each word once"):
        hooks.lens(model, tokenizer, ["the nurse"], ("he", "he"))
    with pytest.raises(HookError, match="needs a tokenizer"):
        hooks.lens(model, None, PROMPTS)
    with pytest.raises(HookError, match="data set is empty"):
        hooks.lens(model, tokenizer, [])
    with pytest.raises(HookError, match="text 1 has no tokens"):
        hooks.lens(model, tokenizer, ["the nurse", ""])
    with pytest.raises(HookError, match="learned positions for 64"):
        hooks.lens(build("gpt2"), None, [[5] * 70], CONTRAST)
    assert state(model) == before
    for name in NO_HEAD:
        with pytest.raises(HookError, match="no language-model head"):
            hooks.lens(build(name), None, PROMPTS, CONTRAST)


def test_an_exception_in_the_head_leaves_the_model_as_it_was() -> None:
    model: Any = build("llama")
    before = state(model)
    handle = model.lm_head.register_forward_hook(lambda *_: 1 / 0)  # behind the bypassed blocks
    during = state(model)
    with pytest.raises(ZeroDivisionError):
        hooks.lens(model, None, PROMPTS, CONTRAST)
    assert state(model) == during
    handle.remove()
    assert state(model) == before


def test_nan_weights_name_the_first_site() -> None:
    model: Any = build("llama")
    hooks.lens(model, None, PROMPTS, CONTRAST)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out holds NaN"):
        hooks.lens(model, None, PROMPTS, CONTRAST)
