"""Sites fire exactly once in a forward pass, or one clear error: compiled, checkpointed, skipped, shared blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hooks
from hooks import HookError
from tests.families import build, state

IDS = torch.arange(3, 12)[None]
ZERO = {"blocks.1.hook_mlp_out": torch.zeros_like}


def logits(model: Any, edited: bool) -> Tensor:
    with torch.no_grad():
        if not edited:
            return model(input_ids=IDS).logits
        with hooks.edit(model, ZERO):
            return model(input_ids=IDS).logits


@pytest.mark.parametrize("used", [False, True])
def test_a_compiled_model_is_edited_and_read_as_a_plain_one(used: bool) -> None:
    model = build("llama")
    plain, right = logits(model, False), logits(model, True)
    assert (plain - right).abs().max() > 0.01
    compiled = torch.compile(model, backend="eager")
    if used:
        logits(compiled, False)
    torch.testing.assert_close(logits(compiled, True), right)
    with torch.no_grad(), hooks.capture(compiled, "blocks.*.hook_resid_post") as store:
        compiled(input_ids=IDS)
    expected = hooks.record(model, IDS, "blocks.*.hook_resid_post")
    assert len(store) == 3 and all(torch.equal(store[site], value) for site, value in expected.items())
    torch.testing.assert_close(logits(compiled, False), plain)  # the compiled graph kept no hook


def test_checkpointed_blocks_are_handed_out_once_and_edited_again() -> None:
    def gradient(checkpointed: bool) -> tuple[Tensor, list[str]]:
        model = build("llama").train()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        seen: list[str] = []
        with (
            hooks.edit(model, {"blocks.1.hook_mlp_out": lambda x: 2 * x}),
            hooks.capture(model, "blocks.*.hook_mlp_out", reducer=lambda site, *_: seen.append(site)),
        ):
            model(input_ids=IDS, labels=IDS).loss.backward()
        return model.model.layers[0].mlp.down_proj.weight.grad, seen

    (plain, once), (checkpointed, again) = gradient(False), gradient(True)
    assert once == again == [f"blocks.{i}.hook_mlp_out" for i in range(3)]
    torch.testing.assert_close(checkpointed, plain)


def test_blocks_skipped_by_layerdrop_are_named() -> None:
    model = build("opt", layerdrop=1.0).train()
    before = state(model)
    message = r"blocks\.0\.hook_resid_post.*not reached.*model\.decoder\.layers\.0.*model\.eval\(\)"
    for context in (
        lambda: hooks.capture(model, "blocks.*.hook_resid_post"),
        lambda: hooks.edit(model, {"blocks.0.hook_resid_post": torch.zeros_like}),
    ):
        with pytest.raises(HookError, match=message), context():
            model(input_ids=IDS)
    before["random"] = state(model)["random"]
    assert state(model) == before
    with hooks.capture(model.eval(), "blocks.*.hook_resid_post") as store, torch.no_grad():
        model(input_ids=IDS)
    assert len(store) == 3


def test_a_part_that_blocks_share_has_no_site_of_its_own() -> None:
    model = build("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    assert len(hooks.record(model, IDS, "blocks.*.hook_resid_post")) == 3
    with pytest.raises(HookError, match=r"blocks\.1\.hook_mlp_out: .* runs several times .*share"):
        hooks.record(model, IDS, "blocks.1.hook_mlp_out")
    with pytest.raises(HookError, match="runs several times"), hooks.edit(model, ZERO):
        model(input_ids=IDS)


def test_a_model_that_never_runs_inside_is_noticed() -> None:
    model = build("llama")
    before = state(model)
    message = r"hooks\.capture: no forward pass .* blocks\.0\.hook_mlp_out"
    with pytest.raises(HookError, match=message), hooks.capture(model, "blocks.*.hook_mlp_out"):
        pass
    with pytest.raises(HookError, match=r"hooks\.edit: no forward pass"), hooks.edit(model, ZERO):
        build("llama")(input_ids=IDS)  # another one
    assert state(model) == before


def test_copies_in_threads_are_refused() -> None:
    model = build("llama")
    model._is_replica = True  # as nn.DataParallel marks its copies
    with pytest.raises(HookError, match="DataParallel"), hooks.capture(model, "hook_embed"):
        model(input_ids=IDS)


@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_generation_with_a_cache_is_a_row_of_passes(name: str) -> None:
    model = build(name)
    ids, mask = torch.tensor([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12]]), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    encoder = model.config.is_encoder_decoder
    masks: list[Tensor] = []
    sites: list[str] = []

    def keep(site: str, tensor: Tensor, mask: Tensor) -> None:
        sites.append(site.split(".")[0])
        masks.append(mask.clone())

    prefix = "*" if encoder else ""
    with torch.no_grad(), hooks.capture(model, f"{prefix}blocks.0.hook_resid_post", reducer=keep):
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert sites == (["encoder_blocks"] + ["decoder_blocks"] * 3 if encoder else ["blocks"] * 3)
    assert torch.equal(masks[0], mask.bool())


def test_a_pass_that_ends_early_leaves_the_outer_context_ready() -> None:
    model = build("llama")
    with torch.no_grad(), hooks.edit(model, {"blocks.0.hook_mlp_out": torch.zeros_like}):
        with hooks.capture(model, "blocks.0.hook_mlp_out", stop_after=0) as store:
            model(input_ids=IDS)
        hooks.run_base(model, {"input_ids": IDS})  # a pass of the base model alone
    assert store["blocks.0.hook_mlp_out"].abs().max() == 0.0


def test_masks_reach_a_decoder_that_the_model_calls_past_its_base() -> None:
    """BartForCausalLM calls the decoder inside its base model directly."""
    from transformers import BartConfig, BartForCausalLM

    torch.manual_seed(0)
    config = BartConfig(d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, vocab_size=96)
    model = BartForCausalLM(config).eval()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ids = torch.randint(4, 90, (2, 5))
    with torch.no_grad(), hooks.capture(model, "blocks.1.hook_resid_post", positions="last") as last:
        model(input_ids=ids, attention_mask=mask)
    with torch.no_grad(), hooks.capture(model, "blocks.1.hook_resid_post") as every:
        model(input_ids=ids, attention_mask=mask)
    right = torch.stack([every["blocks.1.hook_resid_post"][0, 2], every["blocks.1.hook_resid_post"][1, 4]])
    assert torch.equal(last["blocks.1.hook_resid_post"], right)
