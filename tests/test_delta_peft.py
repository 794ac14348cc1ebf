"""Deltas as PEFT adapters: PEFT itself merges what we export, and we import what PEFT trains."""

import json

import deltakit as kit
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from surgery import SurgeryError
from surgery import delta as deltas
from surgery.delta.card import card
from surgery.delta.peft_io import export_peft, import_peft


@pytest.fixture(params=["llama", "gpt2"])
def base(request, tmp_path):
    torch.manual_seed(0)
    if request.param == "llama":
        config = LlamaConfig(
            hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, vocab_size=40, tie_word_embeddings=False,
        )  # fmt: skip
        model, names = LlamaForCausalLM(config), (kit.DOWN, kit.Q)
    else:
        model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16))
        names = ("transformer.h.1.mlp.c_fc.weight", "transformer.h.0.attn.c_attn.weight")
    model.save_pretrained(tmp_path / "base")
    return tmp_path / "base", names


def merged(base, adapter):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def test_full_rank_adapter_is_exact(base, tmp_path):
    folder, names = base
    delta = kit.edit(folder, names)
    report = export_peft(delta, tmp_path / "adapter")
    assert report.errors == dict.fromkeys(names, 0.0) and report.dropped == {}
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    for name in names:
        assert torch.equal(result[name], before[name] + torch.from_numpy(delta.tensors[name]))


def test_truncated_adapter_tells_its_error(base, tmp_path):
    folder, names = base
    delta = kit.edit(folder, names)
    report = export_peft(delta, tmp_path / "adapter", rank=3)
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    for name in names:
        got = (result[name] - before[name]).numpy()
        singular = np.linalg.svd(delta.tensors[name], compute_uv=False)
        expected = np.sqrt((singular[3:] ** 2).sum() / (singular**2).sum())
        assert report.errors[name] == pytest.approx(expected, rel=1e-3)
        found = np.linalg.norm(got - delta.tensors[name]) / np.linalg.norm(delta.tensors[name])
        assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["lora", "dense"])
def test_adapter_that_peft_made(base, tmp_path, kind):
    folder, names = base
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    modules = [name.removesuffix(".weight") for name in names]
    config = LoraConfig(r=3, lora_alpha=7, target_modules=modules, fan_in_fan_out="transformer" in names[0])
    adapted = get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(tmp_path / "adapter")
    delta = import_peft(tmp_path / "adapter", folder, base="tiny", kind=kind)
    assert delta.kind == kind
    expected, live = merged(folder, tmp_path / "adapter"), AutoModelForCausalLM.from_pretrained(folder)
    delta.apply(live)
    for name in names:
        assert torch.allclose(live.state_dict()[name], expected[name], atol=1e-6)
    again = import_peft(tmp_path / "adapter", folder, base="tiny", kind=kind)
    assert again.sha256 == delta.sha256


def test_embedding_and_head_travel_too(tmp_path):
    folder = kit.save(tmp_path / "base", {k: v.float() for k, v in kit.weights().items()})
    delta = kit.edit(folder, (kit.EMBED, kit.HEAD))
    export_peft(delta, tmp_path / "adapter", rank=None)
    back = import_peft(tmp_path / "adapter", folder, base="tiny", kind="dense", recipe="x = 1\n")
    assert all(np.array_equal(back.tensors[name], delta.tensors[name]) for name in delta.tensors)
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    for name in (kit.EMBED, kit.HEAD):
        assert torch.allclose(result[name], before[name] + torch.from_numpy(delta.tensors[name]), atol=1e-6)


def test_what_lora_cannot_hold(tmp_path):
    folder = kit.save(tmp_path / "base", kit.weights())
    delta = kit.edit(folder)
    with pytest.raises(SurgeryError, match=r"input_layernorm.weight: LoRA holds matrices only"):
        export_peft(delta, tmp_path / "adapter")
    report = export_peft(delta, tmp_path / "adapter", drop_vectors=True)
    square = {name: float((array.astype(np.float64) ** 2).sum()) for name, array in delta.tensors.items()}
    assert report.dropped == {kit.NORM: pytest.approx(square[kit.NORM] / sum(square.values()))}
    with pytest.raises(SurgeryError, match=r"destination exists"):
        export_peft(delta, tmp_path / "adapter", drop_vectors=True)
    tied = kit.save(tmp_path / "t", kit.weights(tie_word_embeddings=True), tie_word_embeddings=True)
    with pytest.raises(SurgeryError, match=r"adapters lose the tie"):
        export_peft(kit.edit(tied, (kit.EMBED,)), tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"modules_to_save": ["lm_head"]}, "holds whole weights"),
        ({"use_dora": True}, "use_dora is not a plain difference"),
        ({"bias": "all"}, "bias 'all'"),
        ({"peft_type": "IA3"}, "not a LoRA adapter"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_adapters_that_are_no_difference(tmp_path, change, text):
    folder = kit.save(tmp_path / "base", kit.weights())
    export_peft(kit.edit(folder, (kit.DOWN,)), tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SurgeryError, match=text):
        import_peft(tmp_path / "adapter", folder)


def test_card_says_what_it_is(tmp_path):
    folder = kit.save(tmp_path / "base", kit.weights())
    metric = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 90, "scorer": "next-token"}
    measured = {"before": {"afgb": {"word": metric}}, "after": {"afgb": {"word": metric | {"value": 0.1}}}}
    one = deltas.make(
        {kit.DOWN: np.full((16, 24), 0.01, np.float32)}, folder, base="tiny/base", recipe="lr = 1\n", seed=3,
        measured=measured,
    )  # fmt: skip
    text = card(one, file="debias.safetensors")
    assert text.startswith("---\nlicense: other  # FILL IN") and 'base_model: "tiny/base"' in text
    assert "| afgb.word | 0.25 [0.2, 0.3] | 0.1 [0.2, 0.3] | 90 | next-token |" in text
    assert "surgery apply debias.safetensors CHECKPOINT" in text and "lr = 1" in text and one.sha256 in text
    both = card(deltas.compose([one, one], [1.0, 2.0]))
    assert "Part: weight 2.0" in both and "Recipe of part 2" in both and "Not measured" in both
