"""Deltas as PEFT adapters: peft itself merges what we export."""

import json

import deltakit as kit
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny_configs import tiny
from transformers import (
    AutoModelForCausalLM,
    DiffLlamaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MambaForCausalLM,
    Mistral3ForConditionalGeneration,
    MixtralForCausalLM,
    PhimoeForCausalLM,
)

from surgery import SurgeryError
from surgery.adapters.effect import effect
from surgery.adapters.exporting import _refuse_high, export_peft
from surgery.adapters.importing import import_peft


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


def test_embedding_and_head_travel_too(tmp_path):
    folder = kit.save(tmp_path / "base", {k: v.float() for k, v in kit.weights().items()})
    delta = kit.edit(folder, (kit.EMBED, kit.HEAD))
    export_peft(delta, tmp_path / "adapter", rank=None)
    back = import_peft(tmp_path / "adapter", folder, base="tiny", kind="dense", recipe="x = 1\n")
    assert all(np.allclose(back.tensors[name], delta.tensors[name], atol=1e-6) for name in delta.tensors)
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    for name in (kit.EMBED, kit.HEAD):
        assert torch.allclose(result[name], before[name] + torch.from_numpy(delta.tensors[name]), atol=1e-6)


def test_what_lora_cannot_hold(tmp_path):
    folder = kit.save(tmp_path / "base", kit.weights())
    delta = kit.edit(folder)
    with pytest.raises(SurgeryError, match=r"input_layernorm.weight: LoRA holds matrices of modules only"):
        export_peft(delta, tmp_path / "adapter")
    report = export_peft(delta, tmp_path / "adapter", drop_vectors=True)
    square = {name: float((array.astype(np.float64) ** 2).sum()) for name, array in delta.tensors.items()}
    assert report.dropped == {kit.NORM: pytest.approx(square[kit.NORM] / sum(square.values()))}
    with pytest.raises(SurgeryError, match=r"destination exists"):
        export_peft(delta, tmp_path / "adapter", drop_vectors=True)
    tied = kit.save(tmp_path / "t", kit.weights(tie_word_embeddings=True), tie_word_embeddings=True)
    with pytest.raises(SurgeryError, match=r"adapters lose the tie"):
        export_peft(kit.edit(tied, (kit.EMBED,)), tmp_path / "x")


def test_norms_go_whole_with_the_checkpoint_at_hand(base, tmp_path):
    folder, names = base
    norm = kit.NORM if "layers" in names[0] else "transformer.h.1.ln_1.weight"
    delta = kit.edit(folder, (*names, norm))
    report = export_peft(delta, tmp_path / "adapter", checkpoint=folder)
    assert report.dropped == {}
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    for name in (*names, norm):
        assert torch.allclose(result[name], before[name] + torch.from_numpy(delta.tensors[name]), atol=1e-6)
    back = import_peft(tmp_path / "adapter", folder, kind="dense")
    assert all(np.allclose(back.tensors[name], delta.tensors[name], atol=1e-6) for name in delta.tensors)


def test_what_servers_load(tmp_path):
    folder = kit.save(tmp_path / "base", kit.weights())
    delta = kit.edit(folder, (kit.DOWN, kit.NORM, "model.layers.1.self_attn.k_proj.weight"))
    with pytest.raises(SurgeryError, match=r"norms frozen \(--set block_part=matrices\) or add --drop-vectors"):
        export_peft(delta, tmp_path / "x", served=True, checkpoint=folder)
    export_peft(delta, tmp_path / "adapter", served=True, drop_vectors=True, rank=12)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    ranks = {value.shape[0 if ".lora_A" in name else 1] for name, value in factors.items()}
    assert ranks == {12} == {config["r"]}  # k_proj has 8 rows: its factors are padded
    assert not config["rank_pattern"] and config["modules_to_save"] is None
    name = "model.layers.1.self_attn.k_proj.weight"
    result, before = merged(folder, tmp_path / "adapter"), kit.load(folder)
    assert torch.allclose(result[name], before[name].float() + torch.from_numpy(delta.tensors[name]), atol=1e-6)
    with pytest.raises(SurgeryError, match="embedding or head"):
        export_peft(kit.edit(folder, (kit.HEAD,)), tmp_path / "x", served=True)
    with pytest.raises(SurgeryError, match=r"rank 600; servers load at most 512"):
        _refuse_high(600, tmp_path / "x")


def small(kind, folder):
    torch.manual_seed(0)
    kind(tiny(kind.config_class)).save_pretrained(folder)
    return folder


def test_experts_have_one_rank_and_peft_reads_them_back(tmp_path):
    folder = small(MixtralForCausalLM, tmp_path / "base")
    names = [name for name, value in kit.load(folder).items() if ".layers.3." in name and value.ndim == 2]
    names.append("model.embed_tokens.weight")  # its factors are padded like theirs
    delta = kit.edit(folder, tuple(names))
    with pytest.raises(SurgeryError, match="add --checkpoint"):
        export_peft(delta, tmp_path / "adapter")
    report = export_peft(delta, tmp_path / "adapter", checkpoint=folder)
    assert report.errors == dict.fromkeys(names, 0.0)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with delta.applied(model):
        wanted = {name: value.clone() for name, value in model.state_dict().items()}
    result = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload().state_dict()
    assert all(torch.allclose(result[name], wanted[name], atol=1e-6) for name in wanted)
    back = import_peft(tmp_path / "adapter", folder)  # peft asks it for factors of the other blocks, too
    assert back.shapes.keys() == delta.shapes.keys()
    assert all(np.allclose(back.tensors[name], delta.tensors[name], atol=1e-6) for name in names)
    shorten(tmp_path / "adapter", ".layers.3.mlp.gate.lora_B.weight")
    with pytest.raises(SurgeryError, match=r"missing adapter keys"):
        import_peft(tmp_path / "adapter", folder)


def shorten(adapter, ending):
    """Takes the tensor with that ending out of an adapter's file."""
    path = adapter / "adapter_model.safetensors"
    held = load_file(path)
    (lost,) = (name for name in held if name.endswith(ending))
    save_file({name: value for name, value in held.items() if name != lost}, path)


def test_a_model_that_writes_no_text_takes_its_adapter(tmp_path):
    torch.manual_seed(0)
    folder = tmp_path / "base"
    LlamaForSequenceClassification(tiny(LlamaConfig, pad_token_id=0)).save_pretrained(folder)
    delta = kit.edit(folder, ("model.layers.1.mlp.up_proj.weight", "score.weight"))
    export_peft(delta, tmp_path / "adapter", checkpoint=folder)
    back = import_peft(tmp_path / "adapter", folder, kind="dense")
    assert all(np.allclose(back.tensors[name], delta.tensors[name], atol=1e-6) for name in delta.shapes)
    assert effect(delta, tmp_path / "adapter", folder) is None  # on next tokens, of which it predicts none


def test_an_adapter_of_which_peft_makes_something_else_is_not_left_there(tmp_path):
    """peft reads experts named as in Phi-3.5-MoE without a word, and drops them."""
    folder = small(PhimoeForCausalLM, tmp_path / "base")
    names = [name for name in kit.load(folder) if ".layers.3." in name and ".experts." in name]
    with pytest.raises(SurgeryError, match=r"peft .*(--set block_part=attention)"):
        export_peft(kit.edit(folder, tuple(names)), tmp_path / "adapter", checkpoint=folder)
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_positions_travel_as_embeddings_and_matrices_of_no_module_are_refused(tmp_path):
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "gpt2")
    name = "transformer.wpe.weight"
    delta = kit.edit(tmp_path / "gpt2", (name,))
    export_peft(delta, tmp_path / "adapter", rank=None)
    result, before = merged(tmp_path / "gpt2", tmp_path / "adapter"), kit.load(tmp_path / "gpt2")
    assert torch.allclose(result[name], before[name] + torch.from_numpy(delta.tensors[name]), atol=1e-6)
    mamba = kit.edit(small(MambaForCausalLM, tmp_path / "mamba"), ("backbone.layers.1.mixer.A_log",))
    with pytest.raises(SurgeryError, match=r"A_log: LoRA holds matrices of modules only"):
        export_peft(mamba, tmp_path / "x")
    folder, of = small(DiffLlamaForCausalLM, tmp_path / "diff"), "model.layers.1.self_attn."
    vector = kit.edit(folder, (f"{of}lambda_q1", f"{of}q_proj.weight"))
    with pytest.raises(SurgeryError, match=r"lambda_q1: LoRA holds matrices of modules only"):  # no norm, to be kept
        export_peft(vector, tmp_path / "x", checkpoint=folder)


def test_a_text_model_inside_another_is_called_as_peft_sees_it(tmp_path):
    folder = small(Mistral3ForConditionalGeneration, tmp_path / "base")
    (name,) = (name for name in kit.load(folder) if name.endswith("language_model.model.layers.1.mlp.up_proj.weight"))
    report = export_peft(kit.edit(folder, (name,)), tmp_path / "adapter", checkpoint=folder)  # read back by peft
    assert report.errors == {name: 0.0}
