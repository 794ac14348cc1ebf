"""hooks.anatomy: the parts of every family are found by probing, and the model stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import hooks
from hooks import HookError, anatomy
from tests.families import ENCODER_DECODER, FAMILIES, REFUSED, build, state

KNOWN = [name for name in FAMILIES if name not in REFUSED]
POST_NORM = (
    "bert",
    "roberta",
    "distilbert",
    "deberta_v2",
    "electra",
    "bart",
    "bert_classifier",
    "bart_classifier",
)
PARALLEL = ("gptj", "gpt_neox", "falcon_old", "falcon_new", "phi")


@pytest.mark.parametrize("name", KNOWN)
def test_families(name: str) -> None:
    model = build(name)
    found = anatomy.find(model)
    modules = dict(model.named_modules())
    assert len(found.stacks) == (2 if name in ENCODER_DECODER else 1)
    config = model.config
    layers = getattr(config, "num_hidden_layers", None) or config.n_layer
    assert len(found.blocks) == layers
    assert found.d_model == config.hidden_size
    assert modules[found.embeddings] is model.get_input_embeddings()
    head = model.get_output_embeddings()
    assert (modules[found.head] if found.head else None) is head
    assert (found.final_norm is None) == (name in POST_NORM)
    for stack in found.stacks:
        for block in stack.blocks:
            # the writers are the last matrices on the way to the stream: their output has its width
            for writer in (block.attention_writer, block.mlp_writer):
                assert writer is not None and writer.startswith(block.name + ".")
            assert block.n_heads == 4
            assert block.additive == (name not in POST_NORM)
            assert (block.mid is None) == (name in PARALLEL)
            assert block.norms
            assert (block.cross_attention is not None) == (stack.prefix == "decoder_blocks")


@pytest.mark.parametrize("name", KNOWN)
def test_check_silences_every_block(name: str) -> None:
    change = anatomy.check(build(name))
    if name not in POST_NORM:
        assert set(change.values()) == {0.0}
    else:  # a norm after the sum changes the stream by design
        assert min(change.values()) > 0.0


def test_check_notices_a_wrong_writer() -> None:
    model = build("llama")
    anatomy.find(model, mapping={"mlp_writer": "mlp.gate_proj"})
    assert anatomy.find(model).blocks[0].mlp_writer == "model.layers.0.mlp.gate_proj"  # remembered
    assert anatomy.check(model)["blocks.0"] == 0.0  # silencing the gate silences the MLP too
    anatomy.find(model, mapping={"attention_writer": "self_attn.q_proj"})
    with pytest.raises(HookError, match=r"blocks\.0 .*self_attn\.q_proj"):
        anatomy.check(model)


def test_albert_is_refused_by_name() -> None:
    with pytest.raises(HookError, match=r"albert: block .* ran 3 times .* share"):
        anatomy.find(build("albert"))


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "bloom", "falcon_new", "deberta_v2", "t5", "bart"])
def test_model_is_left_as_it_was(name: str) -> None:
    model = build(name).train()
    next(model.parameters()).requires_grad_(False)
    before = state(model)
    anatomy.find(model)
    anatomy.check(model)
    assert state(model) == before


def test_random_numbers_that_the_probe_draws_are_given_back() -> None:
    model = build("llama")
    model.model.norm.register_forward_hook(lambda module, args, output: output + 0 * torch.rand(1))
    before = state(model)
    anatomy.find(model)
    assert state(model) == before


def test_model_is_left_as_it_was_after_a_failure() -> None:
    model = build("llama").train()
    model.model.layers[1].mlp.forward = lambda x: 1 / 0  # type: ignore[method-assign]
    before = state(model)
    with pytest.raises(HookError, match=r"llama: a forward pass over 7 tokens failed \(ZeroDivisionError"):
        anatomy.find(model)
    assert state(model) == before


def test_output_hidden_states_before_and_after_still_work() -> None:
    model = build("llama")
    ids = torch.arange(3, 9)[None]
    with torch.no_grad():
        first = model(ids, output_hidden_states=True).hidden_states
        anatomy.find(model)
        second = model(ids, output_hidden_states=True).hidden_states
    assert len(first) == len(second) == 4
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    fresh = build("llama")
    anatomy.find(fresh)
    with torch.no_grad():
        third = fresh(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(a, b) for a, b in zip(first, third, strict=True))


def test_peft_wrapped() -> None:
    peft = pytest.importorskip("peft")
    plain = anatomy.find(build("llama"))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "o_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(build("llama"), config)
    before = state(model)
    found = anatomy.find(model)
    prefix = "base_model.model."
    for mine, reference in zip(found.blocks, plain.blocks, strict=True):
        for part in ("name", "attention", "attention_writer", "mlp", "mlp_writer", "mid", "attention_out"):
            assert getattr(mine, part) == prefix + getattr(reference, part)
    assert (found.final_norm, found.head) == (prefix + "model.norm", prefix + "lm_head")
    assert set(anatomy.check(model).values()) == {0.0}
    assert state(model) == before


def test_found_once_and_anew_when_modules_change(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("gpt2")
    first = anatomy.find(model)
    assert anatomy.find(model) is first
    model.transformer.h = nn.ModuleList(list(model.transformer.h)[:2])
    assert len(anatomy.find(model).blocks) == 2
    assert len(anatomy.find(build("gpt2")).blocks) == 3  # nothing is shared between models


def test_a_model_without_weights_is_read_by_its_shapes() -> None:
    import transformers

    kind, settings = FAMILIES["llama"]
    model_class = getattr(transformers, kind)
    with torch.device("meta"):
        model = model_class(model_class.config_class(**settings))
    found, real = anatomy.find(model), anatomy.find(build("llama"))
    for mine, reference in zip(found.blocks, real.blocks, strict=True):
        for part in (
            "attention",
            "attention_writer",
            "pattern_index",
            "mlp_writer",
            "attention_out",
            "mlp_out",
        ):
            assert getattr(mine, part) == getattr(reference, part)
    assert found.final_norm == real.final_norm


def test_table_names_every_block() -> None:
    text = anatomy.find(build("t5")).table()
    assert "encoder_blocks.0" in text and "decoder_blocks.1" in text and "layer.0.SelfAttention.o" in text


def hybrid(layers: tuple[str, ...] = ("linear_attention", "full_attention")) -> Any:
    """Qwen3-Next: some blocks hold linear attention, which has no weights to look at."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    sizes |= {"head_dim": 8, "linear_value_head_dim": 8, "vocab_size": 64, "num_experts": 0}
    torch.manual_seed(0)
    return Qwen3NextForCausalLM(Qwen3NextConfig(num_hidden_layers=2, layer_types=list(layers), **sizes)).eval()


def test_blocks_without_attention_hold_a_mixer() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model = MambaForCausalLM(MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)).eval()
    before = state(model)
    found = anatomy.find(model)
    assert state(model) == before
    assert [block.mixer for block in found.blocks] == [f"backbone.layers.{i}.mixer" for i in (0, 1)]
    assert all(block.additive and block.attention is block.mlp is None for block in found.blocks)
    with hooks.capture(model, "blocks.*") as store, torch.no_grad():
        model(torch.arange(3, 9)[None])
    written = store["blocks.1.hook_resid_post"] - store["blocks.1.hook_resid_pre"]
    torch.testing.assert_close(written, store["blocks.1.hook_mixer_out"], atol=1e-6, rtol=0)


def test_a_hybrid_has_each_part_where_it_is() -> None:
    model = hybrid()
    linear, full = anatomy.find(model).blocks
    assert linear.mixer == "model.layers.0.linear_attn" and linear.attention is None
    assert full.attention == "model.layers.1.self_attn" and full.mixer is None
    assert linear.mlp == "model.layers.0.mlp" and linear.additive and full.additive
    assert "linear_attn" in anatomy.find(model).table()


PROMPTS = [[5, 6, 7, 8, 9], [10, 11, 12]]


@pytest.mark.parametrize(
    "ask",
    [
        lambda m: hooks.patch(m, None, [PROMPTS[0]], [[5, 6, 30, 8, 9]], (20, 21), unit="attention"),
        lambda m: hooks.patch(m, None, [PROMPTS[0]], [[5, 6, 30, 8, 9]], (20, 21), unit="head"),
        lambda m: hooks.attention_to(m, None, ["a b"], ["b"]),
    ],
)
def test_what_needs_attention_names_the_blocks_without(ask: Any) -> None:
    with pytest.raises(HookError, match=r"needs attention.* blocks\.0 \(1 of 2 blocks\) .*linear_attn mixes"):
        ask(hybrid())
    with pytest.raises(HookError, match=r"blocks\.0 has no attention: .*linear_attn is in its place"):
        hooks.record(hybrid(), torch.tensor([PROMPTS[0]]), "blocks.0.attn.hook_pattern")


def test_what_needs_no_attention_works_in_a_hybrid() -> None:
    model = hybrid()
    lens = hooks.lens(model, None, PROMPTS, (20, 21))
    total = lens.embedding + lens.block.sum() + lens.rest
    assert float(total) == pytest.approx(float(lens.difference), abs=1e-5) and abs(float(lens.rest)) < 1e-5
    assert lens.attention[0] == lens.mixer[1] == 0.0 and lens.attention[1] != 0.0 and lens.mixer[0] != 0.0
    assert hooks.bmi(model, None, PROMPTS).raw.count == 2
    patched = hooks.patch(model, None, [PROMPTS[0]], [[5, 6, 30, 8, 9]], (20, 21), unit="stream")
    assert patched.effects == pytest.approx(1.0, abs=2e-3)
    assert hooks.patch(model, None, [PROMPTS[0]], [[5, 6, 30, 8, 9]], (20, 21), unit="mlp").effects.shape == (2,)


def test_the_shift_of_an_mlp_is_no_single_position() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, context_length=32)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    block = anatomy.find(model).blocks[1]
    assert block.mixer == "rwkv.blocks.1.attention" and block.mlp is None
    assert block.mlp_out == "rwkv.blocks.1.feed_forward"


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"block": "model.layers"}, "mapping has no key 'block'"),
        ({"blocks": "model.layer"}, r"no ModuleList 'model\.layer'; the nearest are model\.layers"),
        ({"mlp_writer": "mlp.down"}, r"no module 'model\.layers\.0\.mlp\.down'; the nearest are .*down_proj"),
        ({"final_norm": "model.nrm"}, r"no module 'model\.nrm'; the nearest are model\.norm"),
    ],
)
def test_wrong_mapping(mapping: dict[str, str], message: str) -> None:
    with pytest.raises(HookError, match=message):
        anatomy.find(build("llama"), mapping=mapping)


def test_uncertain_blocks_are_named() -> None:
    model = build("llama")
    model.model.extra = nn.ModuleList([nn.Linear(32, 32)])
    model.model.embed_tokens.register_forward_hook(lambda m, a, out: model.model.extra[0](out))
    with pytest.raises(HookError, match=r"blocks are uncertain: model\.extra, model\.layers"):
        anatomy.find(model)
    assert len(anatomy.find(model, mapping={"blocks": "model.layers"}).blocks) == 3


@pytest.mark.parametrize("thing", [nn.Linear(2, 2), "llama"])
def test_something_else(thing: object) -> None:
    with pytest.raises(HookError, match="expected a Hugging Face model"):
        anatomy.find(copy.copy(thing))  # type: ignore[arg-type]
