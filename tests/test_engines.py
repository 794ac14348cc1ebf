"""hooks.record: torch hooks, TransformerLens and nnsight give the same tensors; the model stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import HookError
from tests.families import build, demo, state

pytest.importorskip("transformer_lens")
pytest.importorskip("nnsight")

SITES = ["*.hook_resid_*", "*.attn.hook_*", "*.hook_attn_out", "*.hook_mlp_out", "ln_final.*", "hook_embed"]


def padded() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0  # on the left, where a missing position shows
    return {"input_ids": ids, "attention_mask": mask}


def worst(mine: dict[str, Tensor], other: dict[str, Tensor], mask: Tensor) -> float:
    """Largest relative difference at real tokens (of patterns: at the queries that are real tokens)."""
    assert set(mine) == set(other)
    errors = []
    for site, value in mine.items():
        assert value.shape == other[site].shape, site
        real = mask.bool()
        a, b = (x.transpose(1, 2)[real] if "pattern" in site else x[real] for x in (value, other[site]))
        errors.append(float((a - b).abs().max() / a.abs().max()))
    return max(errors)


@pytest.mark.parametrize("engine", ["transformer_lens", "nnsight"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "opt", "falcon_old"])
def test_engines_agree(name: str, engine: Any) -> None:
    model, batch = build(name), padded()
    reference = hooks.record(model, batch, SITES)
    before = state(model)
    got = hooks.record(model, batch, SITES, engine=engine)
    assert state(model) == before
    assert len(got) == (22 if name == "falcon_old" else 25)
    assert worst(reference, got, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("engine", ["torch", "transformer_lens", "nnsight"])
def test_a_model_in_training_mode_is_read_without_dropout(engine: Any) -> None:
    model, batch = build("gpt2", resid_pdrop=0.5).train(), padded()
    hooks.anatomy.find(model)
    before = state(model)
    got = hooks.record(model, batch, "blocks.*.hook_resid_post", engine=engine)
    assert state(model) == before
    reference = hooks.record(build("gpt2"), batch, "blocks.*.hook_resid_post")
    assert worst(reference, got, batch["attention_mask"]) < 1e-5


@pytest.mark.parametrize("name", ["bert", "t5", "falcon_new", "bloom", "gpt_neo"])
def test_nnsight_reads_families_in_any_order_of_execution(name: str) -> None:
    model, batch = build(name), padded()
    before = state(model)
    reference = hooks.record(model, batch, "*.hook_*")
    got = hooks.record(model, batch, "*.hook_*", engine="nnsight")
    assert state(model) == before
    encoder = {k: v for k, v in reference.items() if not k.startswith("decoder")}
    assert list(got) == list(reference)
    assert worst(encoder, {k: got[k] for k in encoder}, batch["attention_mask"]) < 1e-5


def test_models_the_user_already_has() -> None:
    import nnsight
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model, batch = build("gpt2"), padded()
    wanted = ["blocks.*.hook_resid_post", "blocks.1.attn.hook_z"]
    reference = hooks.record(model, batch, wanted)
    bridge = build_bridge_from_module(copy.deepcopy(model), "GPT2LMHeadModel", hf_config=copy.deepcopy(model.config))
    wrapped = nnsight.NNsight(copy.deepcopy(model))
    for theirs in (bridge, wrapped):
        assert worst(reference, hooks.record(theirs, batch, wanted), batch["attention_mask"]) < 1e-5
    with pytest.raises(HookError, match="engine is 'nnsight', but the model is a TransformerBridge"):
        hooks.record(bridge, batch, wanted, engine="nnsight")
    with pytest.raises(HookError, match=r"no site 'blocks\.9\.hook_resid_post'.*nearest are"):
        hooks.record(bridge, batch, "blocks.9.hook_resid_post")


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_direct_logit_attribution_is_that_of_transformer_lens(name: str) -> None:
    """Known answer: what every attention and MLP, and every head, adds to a logit difference."""
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

    model = build(name)
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(2))
    this, that = 11, 23
    bridge = build_bridge_from_module(copy.deepcopy(model), type(model).__name__, hf_config=copy.deepcopy(model.config))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    mine = hooks.record(model, ids, SITES)
    found = hooks.anatomy.find(model)
    norm = model.get_submodule(found.final_norm)
    direction = norm.weight * (model.lm_head.weight[this] - model.lm_head.weight[that])
    stream = mine["ln_final.hook_in"]
    scale = stream.norm(dim=-1) / mine["ln_final.hook_normalized"].norm(dim=-1)
    if name == "gpt2":  # LayerNorm also takes the mean away
        scale = (stream - stream.mean(-1, keepdim=True)).norm(dim=-1) / mine["ln_final.hook_normalized"].norm(dim=-1)
        direction = direction - direction.mean()
    for i, block in enumerate(found.blocks):
        z, theirs = mine[f"blocks.{i}.attn.hook_z"], cache[f"blocks.{i}.attn.hook_z"]
        torch.testing.assert_close(z, theirs, rtol=1e-4, atol=1e-4)
        pattern = f"blocks.{i}.attn.hook_pattern"
        torch.testing.assert_close(mine[pattern], cache[pattern], rtol=1e-4, atol=1e-4)
        weight = model.get_submodule(block.attention_writer).weight
        weight = weight if name == "gpt2" else weight.T
        heads = torch.einsum("bphd,hdm->bphm", z, weight.reshape(4, 8, 32))
        by_lens = torch.einsum("bphd,hdm->bphm", theirs, bridge.W_O[i])
        torch.testing.assert_close(heads @ direction, by_lens @ direction, rtol=1e-4, atol=1e-4)
    parts = [mine["blocks.0.hook_resid_pre"]]
    parts += [mine[f"blocks.{i}.{part}"] for i in range(3) for part in ("hook_attn_out", "hook_mlp_out")]
    attributed = torch.stack(parts) @ direction / scale
    bias = 0.0 if name == "llama" else (norm.bias @ (model.lm_head.weight[this] - model.lm_head.weight[that])).item()
    with torch.no_grad():
        logits = bridge(ids)
    difference = logits[..., this] - logits[..., that]
    torch.testing.assert_close(attributed.sum(0) + bias, difference, rtol=1e-4, atol=1e-4)
    bridge.enable_compatibility_mode()  # folds the norm into the unembedding, for logit_attrs
    with torch.no_grad():
        _, cache = bridge.run_with_cache(ids)
    stack = torch.stack([cache[f"blocks.{i}.{part}"] for i in range(3) for part in ("hook_attn_out", "hook_mlp_out")])
    theirs = cache.logit_attrs(stack, tokens=this, incorrect_tokens=that, has_batch_dim=True)
    torch.testing.assert_close(attributed[1:], theirs, rtol=1e-4, atol=1e-4)


def test_where_transformer_lens_means_something_else() -> None:
    batch = padded()
    with pytest.raises(HookError, match=r"hook_embed: what TransformerLens calls so differs"):
        hooks.record(build("bloom"), batch, "hook_embed", engine="transformer_lens")
    with pytest.raises(HookError, match=r"hook_attn_out: what TransformerLens calls so differs"):
        hooks.record(build("bert"), batch, "blocks.0.hook_attn_out", engine="transformer_lens")
    with pytest.raises(HookError, match="TransformerLens cannot read a ModernBertForMaskedLM"):
        hooks.record(build("modernbert"), batch, "blocks.0.hook_resid_post", engine="transformer_lens")


@pytest.mark.parametrize("engine", ["torch", "transformer_lens", "nnsight"])
def test_unknown_site_in_every_engine(engine: Any) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(HookError, match=r"nearest are .*blocks\.\*\.hook_resid_post"):
        hooks.record(model, padded(), "blocks.*.hook_resid_pots", engine=engine)
    assert state(model) == before


def test_wrong_engine_and_remote() -> None:
    model = build("llama")
    with pytest.raises(HookError, match="engine is 'jax'"):
        hooks.record(model, padded(), "*", engine="jax")  # type: ignore[arg-type]
    with pytest.raises(HookError, match="remote=True needs engine='nnsight'"):
        hooks.record(model, padded(), "*", engine="torch", remote=True)
    with pytest.raises(HookError, match="names its checkpoint"):
        hooks.record(model, padded(), "*", engine="nnsight", remote="local")


def test_a_forward_of_the_users_own_survives_nnsight() -> None:
    model, batch = build("llama"), padded()
    norm = model.model.norm
    original = type(norm).forward
    norm.forward = own = lambda x: 2.0 * original(norm, x)
    reference = hooks.record(model, batch, "ln_final.hook_out")
    got = hooks.record(model, batch, "ln_final.hook_out", engine="nnsight")
    assert norm.forward is own and "__nnsight__" not in norm.__dict__
    assert worst(reference, got, batch["attention_mask"]) < 1e-5


def test_nnsight_leaves_nothing_after_an_exception() -> None:
    model = build("llama")
    hooks.anatomy.find(model)
    before = state(model)
    bad = {"input_ids": torch.full((1, 3), 10_000)}  # beyond the vocabulary
    for engine in ("torch", "nnsight"):
        with pytest.raises(IndexError):
            hooks.record(model, bad, "*", engine=engine)  # type: ignore[arg-type]
    assert state(model) == before


@pytest.mark.parametrize("engine", ["transformer_lens", "nnsight"])
def test_engines_agree_on_the_demo_model(engine: Any) -> None:
    model, tokenizer = demo()
    prompts = ["The nurse smiled because", "The very tall engineer went to bed because"]
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    wanted = ["*.hook_resid_*", "*.attn.hook_pattern", "*.attn.hook_z"]
    batch = {"input_ids": ids, "attention_mask": mask}
    reference = hooks.record(model, batch, wanted)
    assert worst(reference, hooks.record(model, batch, wanted, engine=engine), mask) < 1e-5


def test_rehearsal_of_remote_execution_on_the_demo_model() -> None:
    import nnsight

    model, _ = demo()
    import surgery

    wrapped = nnsight.TransformersModel(
        str(surgery.checkpoint_dir("demo")), task="text-generation", dispatch=True, dtype=torch.float32
    )
    ids = torch.tensor([[504, 28084, 26384, 975]])
    wanted = ["blocks.*.hook_resid_post", "blocks.3.attn.hook_z"]
    got = hooks.record(wrapped, ids, wanted, remote="local")
    assert worst(hooks.record(model, ids, wanted), got, torch.ones_like(ids)) < 1e-5
