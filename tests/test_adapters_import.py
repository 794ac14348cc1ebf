"""Foreign adapters: our delta does to the base what peft makes of base and adapter, or it is refused by name."""

import json
import warnings
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from surgery import SurgeryError
from surgery.adapters.importing import import_peft

IDS = torch.arange(3, 15)[None]
SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "initializer_range": 0.2}
GPT2 = {"n_embd": 16, "n_layer": 2, "n_head": 4, "vocab_size": 64, "n_positions": 32, "bos_token_id": 1}
MOE = SMALL | {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MOE |= {"num_key_value_heads": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SMALL | {"num_key_value_heads": 2, "attention_bias": True}),
    "tied": ("LlamaForCausalLM", SMALL | {"tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2 | {"eos_token_id": 2}),
    "neox": ("GPTNeoXForCausalLM", SMALL),
    "mixtral": ("MixtralForCausalLM", MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", MOE | {"head_dim": 4}),
    "bert": ("BertForMaskedLM", SMALL),
    "t5": ("T5ForConditionalGeneration", {"d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4}
           | {"vocab_size": 64, "decoder_start_token_id": 0}),
}  # fmt: skip


def build(name: str) -> transformers.PreTrainedModel:
    kind, config = MODELS[name]
    torch.manual_seed(0)
    cls = getattr(transformers, kind)
    return cls(cls.config_class(**config)).eval()


def run(model: torch.nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **more).logits


def make_adapter(folder, name, config, edit=None, **save):
    """Write base and adapter of random numbers; edit(config as saved) may change the adapter's config file."""
    build(name).save_pretrained(folder / "base")
    adapted = peft.get_peft_model(build(name), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for _, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(folder / "adapter", **save)
    if edit:
        path = folder / "adapter" / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | edit))


def compare(folder, name, kind="auto"):
    """(our distance from peft's logits, peft's distance from the base's)."""
    cls = type(build(name))
    theirs = peft.PeftModel.from_pretrained(cls.from_pretrained(folder / "base"), folder / "adapter").eval()
    wanted, untouched = run(theirs), run(cls.from_pretrained(folder / "base"))
    delta = import_peft(folder / "adapter", folder / "base", kind=kind)
    ours = cls.from_pretrained(folder / "base")
    delta.apply(ours)
    return float((run(ours) - wanted).abs().max()), float((wanted - untouched).abs().max()), delta


def lora(*targets: str, **more: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**({"r": 3, "lora_alpha": 7, "target_modules": list(targets) or None} | more))


QV = ("q_proj", "v_proj")
# name: (model, config, what becomes of it: the delta's kind, or a word of the refusal)
CASES: dict[str, tuple[str, peft.PeftConfig, str]] = {
    "plain": ("llama", lora(*QV), "lora"),
    "all-linear": ("llama", lora(target_modules="all-linear"), "lora"),
    "regex target": ("llama", lora(target_modules=r".*layers\.1\.(mlp\.up|self_attn\.k)_proj"), "lora"),
    "rslora": ("llama", lora(*QV, use_rslora=True), "lora"),
    "patterns": ("llama", lora(*QV, "up_proj", rank_pattern={r"layers\.\d+\.self_attn.q_proj": 2, "up_proj": 4},
                               alpha_pattern={r".*1.*v_proj": 3, "q_proj|up_proj": 11, "proj": 5}), "lora"),
    "layers": ("llama", lora(*QV, layers_to_transform=[1], layers_pattern="layers"), "lora"),
    "excluded": ("llama", lora(*QV, exclude_modules=r".*layers\.0.*"), "lora"),
    "gaussian": ("llama", lora(*QV, init_lora_weights="gaussian"), "lora"),
    "orthogonal": ("llama", lora(*QV, r=4, init_lora_weights="orthogonal"), "lora"),
    "random": ("llama", lora(*QV, init_lora_weights=False), "lora"),
    "pissa": ("llama", lora(*QV, init_lora_weights="pissa"), "dense"),
    "pissa by chance": ("llama", lora(*QV, init_lora_weights="pissa_niter_1"), "pissa_niter_1.*random"),
    "olora": ("llama", lora(*QV, init_lora_weights="olora"), "dense"),
    "dora": ("llama", lora(*QV, use_dora=True), "dense"),
    "dora conv1d": ("gpt2", lora("c_attn", use_dora=True, fan_in_fan_out=True), "dense"),
    "lora_bias": ("llama", lora(*QV, lora_bias=True), "dense"),
    "all biases": ("llama", lora(*QV, bias="all"), "dense"),
    "modules_to_save": ("llama", lora(*QV, modules_to_save=["lm_head", "norm"]), "dense"),
    "embedding and head": ("llama", lora("embed_tokens", "lm_head"), "dense"),
    "token rows": ("llama", lora(*QV, trainable_token_indices=[5, 9]), "dense"),
    "tied embedding": ("tied", lora("embed_tokens"), "tied"),
    "tied head": ("tied", lora("lm_head"), "tied"),
    "tied both": ("tied", lora("embed_tokens", "lm_head", ensure_weight_tying=True), "other logits"),
    "tied whole": ("tied", lora("q_proj", modules_to_save=["embed_tokens"], ensure_weight_tying=True), "dense"),
    "tied token rows": ("tied", lora("q_proj", trainable_token_indices=[5], ensure_weight_tying=True), "dense"),
    "conv1d": ("gpt2", lora("c_attn", "c_proj", "c_fc", fan_in_fan_out=True), "lora"),
    "conv1d, unsaid": ("gpt2", lora("c_attn", "mlp.c_proj"), "lora"),
    "linear, said conv1d": ("llama", lora(*QV, fan_in_fan_out=True), "lora"),
    "positions": ("gpt2", lora("wpe"), "dense"),
    "tied wte": ("gpt2", lora("wte"), "tied"),
    "neox": ("neox", lora("query_key_value", "dense_h_to_4h"), "lora"),
    "replicated layers": ("llama", lora(*QV, layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    "invocation": ("llama", lora(*QV, alora_invocation_tokens=[60, 61]), "invocation_tokens"),
    "bert": ("bert", lora("query", "dense"), "lora"),
    "bert decoder": ("bert", lora("decoder"), "tied"),
    "t5": ("t5", lora("q", "wo", "lm_head"), "tied"),
    "t5 blocks": ("t5", lora("q", "wo", task_type="SEQ_2_SEQ_LM"), "lora"),
    "mixtral attention": ("mixtral", lora(*QV), "lora"),
    "mixtral experts": ("mixtral", lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]), "dense"),
    "mixtral router": ("mixtral", lora("gate"), "dense"),
    "qwen3 experts": ("qwen3_moe", lora(target_parameters=["mlp.experts.down_proj"]), "dense"),
    "ia3": ("llama", peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            "dense"),
    "loha": ("llama", peft.LoHaConfig(r=2, target_modules=list(QV)), "dense"),
    "lokr": ("llama", peft.LoKrConfig(r=2, target_modules=list(QV)), "dense"),
    "vera": ("llama", peft.VeraConfig(r=2, target_modules=["q_proj"]), "dense"),
    "oft": ("llama", peft.OFTConfig(r=4, oft_block_size=0, target_modules=["q_proj"]), "dense"),
    "norms": ("llama", peft.LNTuningConfig(target_modules=["input_layernorm"]), "dense"),
    "adalora": ("llama", peft.AdaLoraConfig(r=3, target_modules=["q_proj"], total_step=9), "dense"),
    "prompt": ("llama", peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "before the prompt"),
    "prefix": ("llama", peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"), "before the prompt"),
    "p-tuning": ("llama", peft.PromptEncoderConfig(num_virtual_tokens=2, encoder_hidden_size=8,
                                                   task_type="CAUSAL_LM"), "before the prompt"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_peft_itself_says_what_an_adapter_does(tmp_path, case):
    name, config, outcome = CASES[case]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        make_adapter(tmp_path, name, config)
        if outcome not in ("lora", "dense"):
            with pytest.raises(SurgeryError, match=outcome) as refused:
                import_peft(tmp_path / "adapter", tmp_path / "base")
            assert "\n" not in str(refused.value)
            return
        ours, effect, delta = compare(tmp_path, name)
    assert delta.kind == outcome
    assert effect > 1e-3, "the adapter does nothing, so that the test would not see a wrong delta"
    assert ours < 1e-5


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_settings(tmp_path_factory, data):
    """Known answer from outside: peft's logits, for settings drawn together."""
    name = data.draw(st.sampled_from(["llama", "gpt2", "neox"]))
    targets = {
        "llama": ["q_proj", "v_proj", "down_proj", "layers.0.mlp.gate_proj"],
        "gpt2": ["c_attn", "mlp.c_proj", "c_fc", "h.1.attn.c_proj"],
        "neox": ["query_key_value", "dense_4h_to_h", "attention.dense"],
    }[name]
    chosen = data.draw(st.lists(st.sampled_from(targets), min_size=1, unique=True))
    patterns = st.dictionaries(
        st.sampled_from([*targets, r".*\.0\..*", "c_.*|.*_proj", "h.1", r"layers\.[01]\..*"]),
        st.integers(1, 5),
        max_size=3,
    )
    config = lora(
        *chosen,
        r=data.draw(st.integers(1, 5)),
        lora_alpha=data.draw(st.integers(1, 9)),
        rank_pattern=data.draw(patterns),
        alpha_pattern=data.draw(patterns),
        use_rslora=data.draw(st.booleans()),
        use_dora=data.draw(st.booleans()),
        bias=data.draw(st.sampled_from(["none", "all", "lora_only"])),
        layers_to_transform=data.draw(st.sampled_from([None, [0], [1]])),
        fan_in_fan_out=data.draw(st.booleans()),
        init_lora_weights=data.draw(st.sampled_from([True, False, "gaussian", "olora", "pissa"])),
    )
    folder = tmp_path_factory.mktemp("mixture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            make_adapter(folder, name, config)
        except (ValueError, RuntimeError):  # the draw names no module, or peft cannot make such a start itself
            return
        try:
            ours, _, _ = compare(folder, name)
        except RuntimeError:  # peft cannot read its own, as when saving sorts patterns of which the first wins
            with pytest.raises(SurgeryError):
                import_peft(folder / "adapter", folder / "base")
            return
    assert ours < 2e-5


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"peft_type": "NONE"}, "peft_type 'NONE'; expected a type of peft's"),
        ({"lora_alpha": "x"}, "peft cannot read it"),
        ({"target_modules": ["nowhere"]}, "not found in the base model"),
        ({"r": 5}, "size mismatch"),
        (
            {"target_modules": ["q_proj", "up_proj"]},
            r"layers.0.mlp.up_proj.lora_A.weight, which the file does not hold",
        ),
    ],
)
def test_adapters_that_do_not_fit(tmp_path, change, text):
    make_adapter(tmp_path, "llama", lora("q_proj"), change)
    with pytest.raises(SurgeryError, match=text):
        import_peft(tmp_path / "adapter", tmp_path / "base")


def test_a_tensor_that_peft_would_leave_out_without_a_word_is_refused(tmp_path):
    make_adapter(tmp_path, "llama", lora("q_proj", "v_proj"), {"target_modules": ["q_proj"]})
    with pytest.raises(SurgeryError, match=r"v_proj.lora_A.weight is read by no layer .*mend target_modules"):
        import_peft(tmp_path / "adapter", tmp_path / "base")


@pytest.mark.parametrize("whole", [False, True])
def test_an_adapter_of_another_vocabulary_is_refused(tmp_path, whole):
    config = lora("q_proj", modules_to_save=["embed_tokens", "lm_head"]) if whole else lora("embed_tokens", "lm_head")
    make_adapter(tmp_path, "llama", config)
    wider = build("llama")
    wider.resize_token_embeddings(wider.config.vocab_size + 8)
    wider.save_pretrained(tmp_path / "wider")
    with pytest.raises(SurgeryError, match=r"size mismatch for .*(embed_tokens|lm_head)"):
        import_peft(tmp_path / "adapter", tmp_path / "wider")


def test_kinds(tmp_path):
    make_adapter(tmp_path, "llama", lora("q_proj"))
    factors, dense = (import_peft(tmp_path / "adapter", tmp_path / "base", kind=kind) for kind in ("lora", "dense"))
    assert (factors.kind, dense.kind) == ("lora", "dense")
    for name, shape in dense.shapes.items():
        product = factors.read(name, 0, shape[0] * shape[1])
        assert abs(product - dense.tensors[name].reshape(-1)).max() < 1e-7
    make_adapter(tmp_path / "b", "llama", lora("q_proj", use_dora=True))
    with pytest.raises(SurgeryError, match="use_dora True, which is no plain product"):
        import_peft(tmp_path / "b" / "adapter", tmp_path / "b" / "base", kind="lora")
