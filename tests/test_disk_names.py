"""Names on disk against names in memory: what transformers renames, joins or splits while it reads, both ways."""

import deltakit as kit
import families
import pytest
import torch
import transformers
from accelerate import cpu_offload
from safetensors.torch import load_file, save_file
from tiny_configs import tiny

from surgery import SurgeryError
from surgery import delta as deltas
from surgery.apply import apply
from surgery.checkpoints import tensors_of

_DEEPSEEK = families._BERT | {"num_key_value_heads": 4, "moe_intermediate_size": 24, "n_routed_experts": 4}
_DEEPSEEK |= {"first_k_dense_replace": 1, "num_experts_per_tok": 2, "q_lora_rank": None, "kv_lora_rank": 8}
_DEEPSEEK |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_shared_experts": 1}
JOINED = {
    "mixtral": families.FAMILIES["mixtral"],
    "qwen3_moe": families.FAMILIES["qwen3_moe"],
    "gpt_neox": families.FAMILIES["gpt_neox"],
    "deepseek_v2": ("DeepseekV2ForCausalLM", _DEEPSEEK),
    # Their gates stay in fp32 in a 16-bit model.
    "ernie4_5_moe": (
        "Ernie4_5_MoeForCausalLM",
        families._LLAMA | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24, "moe_layer_start_index": 0},
    ),
    "hunyuan_moe": ("HunYuanMoEV1ForCausalLM", families._LLAMA | families._MOE),
    "gpt_oss": ("GptOssForCausalLM", families._LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "phimoe": ("PhimoeForCausalLM", families._LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2}),
}


def saved(monkeypatch, folder, name, dtype=torch.bfloat16):
    """A tiny model of the family as a checkpoint, and opened from there."""
    monkeypatch.setitem(families.FAMILIES, name, JOINED.get(name, families.FAMILIES.get(name)))
    model = families.build(name).to(dtype)
    model.save_pretrained(folder)
    return type(model).from_pretrained(folder, dtype=dtype).eval()


def changes(model, size=0.02):
    generator = torch.Generator().manual_seed(1)
    return {name: size * torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


@pytest.mark.parametrize("name", JOINED)
def test_live_is_what_the_disk_holds(tmp_path, monkeypatch, name):
    model = saved(monkeypatch, tmp_path / "base", name)
    before = weights(model)
    deltas.check_edit(model, [name for name, _ in model.named_parameters()], tmp_path / "base", out=tmp_path)
    delta = deltas.make(changes(model), tmp_path / "base", base="tiny", recipe="", seed=3)
    assert set(delta.shapes) <= set(kit.load(tmp_path / "base"))
    apply(delta, tmp_path / "base", tmp_path / "out")
    disk = weights(type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16))
    with delta.applied(model):
        live = weights(model)
    assert same(live, disk) and same(weights(model), before)
    assert not any(torch.equal(disk[name], before[name]) for name, _ in model.named_parameters())
    with tensors_of(model, delta, tmp_path / "out"):
        assert same(weights(model), disk)
    assert same(weights(model), before)


def test_the_language_model_inside_a_model_of_pictures_takes_a_delta(tmp_path):
    """On disk its tensors lie under another prefix than in memory."""
    config = tiny(transformers.Gemma3Config)
    model = transformers.Gemma3ForConditionalGeneration(config).to(torch.bfloat16).eval()
    model.save_pretrained(tmp_path / "base")
    name = next(each for each, p in model.named_parameters() if "language_model" in each and "down_proj" in each)
    delta = deltas.make(
        {name: torch.full_like(model.get_parameter(name), 0.5)}, tmp_path / "base", base="t", recipe="", seed=0
    )
    (stored,) = delta.shapes
    assert stored in kit.load(tmp_path / "base") and stored != name
    apply(delta, tmp_path / "base", tmp_path / "out")
    disk = weights(type(model).from_pretrained(tmp_path / "out", dtype=torch.bfloat16))
    before = weights(model)
    with delta.applied(model):
        assert same(weights(model), disk)
    assert [each for each in disk if not torch.equal(disk[each], before[each])] == [name]


def test_a_part_of_what_is_joined_leaves_the_rest(tmp_path, monkeypatch):
    model = saved(monkeypatch, tmp_path / "base", "mixtral", torch.float32)
    name = "model.layers.1.mlp.experts.down_proj"
    change = changes(model)[name]
    delta = deltas.make({name: change}, tmp_path / "base", base="tiny", recipe="", seed=0)
    assert sorted(delta.shapes) == [f"model.layers.1.block_sparse_moe.experts.{n}.w2.weight" for n in range(4)]
    before = weights(model)
    with delta.applied(model):
        assert torch.equal(weights(model)[name], before[name] + change)
        assert same(
            {k: v for k, v in weights(model).items() if k != name}, {k: v for k, v in before.items() if k != name}
        )


def rename(folder, change):
    """The checkpoint's tensors under other names, in place."""
    tensors = {change(name): value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def old_bert(name):
    return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def test_old_names_and_new_ones_are_one_model(tmp_path, monkeypatch):
    model = saved(monkeypatch, tmp_path / "new", "bert")
    saved(monkeypatch, tmp_path / "old", "bert")
    rename(tmp_path / "old", old_bert)
    made = [deltas.make(changes(model), tmp_path / name, base="t", recipe="", seed=0) for name in ("new", "old")]
    for delta, folder, out in (
        (made[0], "new", "a"),
        (made[1], "old", "b"),
        (made[0], "old", "c"),
        (made[1], "new", "d"),
    ):
        apply(delta, tmp_path / folder, tmp_path / out, rounding="nearest")
    opened = [weights(type(model).from_pretrained(tmp_path / name, dtype=torch.bfloat16)) for name in "abcd"]
    assert all(same(opened[0], other) for other in opened[1:])
    with made[1].applied(model, rounding="nearest"):
        assert same(weights(model), opened[0])
    assert set(deltas.diff(tmp_path / "old", tmp_path / "a").shapes) == set(made[1].shapes)


def test_a_base_model_and_a_model_with_a_head_share_their_tensors(tmp_path, monkeypatch):
    model = saved(monkeypatch, tmp_path / "headed", "gpt2")
    saved(monkeypatch, tmp_path / "bare", "gpt2")
    rename(tmp_path / "bare", lambda name: name.removeprefix("transformer."))
    made = [deltas.make(changes(model), tmp_path / name, base="t", recipe="", seed=0) for name in ("headed", "bare")]
    for number, (delta, folder) in enumerate(((made[0], "bare"), (made[1], "headed"), (made[0], "headed"))):
        apply(delta, tmp_path / folder, tmp_path / str(number), rounding="nearest")
    opened = [weights(type(model).from_pretrained(tmp_path / str(n), dtype=torch.bfloat16)) for n in range(3)]
    assert same(opened[0], opened[2]) and same(opened[1], opened[2])
    assert len(deltas.diff(tmp_path / "bare", tmp_path / "2").shapes) == len(made[0].shapes)


def test_experts_stored_at_once_against_one_by_one(tmp_path, monkeypatch):
    model = saved(monkeypatch, tmp_path / "base", "mixtral", torch.float32)
    model.save_pretrained(tmp_path / "joined", save_original_format=False)
    delta = deltas.make(changes(model), tmp_path / "base", base="tiny", recipe="", seed=0)
    with pytest.raises(
        SurgeryError, match=r"stores its experts one by one, this one as one tensor; apply it in memory"
    ):
        apply(delta, tmp_path / "joined", tmp_path / "out")
    with delta.applied(model):
        model.save_pretrained(tmp_path / "child")
        model.save_pretrained(tmp_path / "joined_child", save_original_format=False)
        wanted = weights(model)
    for base, child in (("base", "joined_child"), ("joined", "child"), ("joined", "joined_child")):
        found = deltas.diff(tmp_path / base, tmp_path / child)
        apply(found, tmp_path / base, tmp_path / f"{base}-{child}")
        opened = type(model).from_pretrained(tmp_path / f"{base}-{child}", dtype=torch.float32)
        assert same(weights(opened), wanted)


def test_diff_leaves_out_what_no_model_learns(tmp_path):
    base = kit.save(tmp_path / "base", kit.weights())
    child = kit.weights()
    child[kit.DOWN] = child[kit.DOWN] + 1
    child["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(2)
    child["embeddings.position_ids"] = torch.arange(4)
    assert list(deltas.diff(base, kit.save(tmp_path / "child", child)).shapes) == [kit.DOWN]


def test_another_head_beside_a_tied_embedding_is_not_tied(tmp_path):
    tensors = kit.weights()  # with a head of its own
    base = kit.save(tmp_path / "base", tensors, tie_word_embeddings=True)
    delta = kit.edit(base, (kit.EMBED,))
    assert delta.metadata["architecture"]["tied"] is False
    apply(delta, base, tmp_path / "out")
    assert torch.equal(kit.load(tmp_path / "out")[kit.HEAD], tensors[kit.HEAD])


def test_a_head_under_another_name_is_not_taken_for_the_embedding(tmp_path):
    """DeepSeek V4 stores its head as head.weight, beside an embedding that it is not tied to."""
    config = tiny(transformers.DeepseekV4Config)
    model = transformers.DeepseekV4ForCausalLM(config)
    model.save_pretrained(tmp_path / "base")
    tensors = kit.load(tmp_path / "base")
    assert "head.weight" in tensors and kit.HEAD not in tensors
    change = torch.full_like(model.lm_head.weight, 0.5)
    delta = deltas.make({kit.HEAD: change}, tmp_path / "base", base="t", recipe="", seed=0)
    assert list(delta.shapes) == ["head.weight"]
    apply(delta, tmp_path / "base", tmp_path / "out")
    edited = kit.load(tmp_path / "out")
    assert [name for name in tensors if not torch.equal(tensors[name], edited[name])] == ["head.weight"]
    assert torch.equal(edited["head.weight"], tensors["head.weight"] + change)
    with delta.applied(model):
        assert torch.equal(model.lm_head.weight, edited["head.weight"])
        assert torch.equal(model.model.embed_tokens.weight, tensors[kit.EMBED])


def test_the_head_of_an_untied_model_is_not_put_on_the_embedding_of_a_model_without_one(tmp_path):
    base = kit.save(tmp_path / "base", kit.weights(dtype=torch.float32))
    headless = transformers.LlamaModel.from_pretrained(base, dtype=torch.float32)
    before = weights(headless)
    with pytest.raises(SurgeryError, match=r"no parameter 'lm_head\.weight'"):
        kit.edit(base, (kit.HEAD,)).apply(headless)
    assert same(weights(headless), before)
    del (tensors := kit.load(base))[kit.HEAD]
    lost = kit.save(tmp_path / "lost", tensors)
    with pytest.raises(SurgeryError, match=r"no tensor 'lm_head\.weight'"):
        deltas.make({kit.HEAD: torch.ones(40, 16)}, lost, base="t", recipe="", seed=0)


def test_an_offloaded_model_refuses(tmp_path, monkeypatch):
    model = saved(monkeypatch, tmp_path / "base", "llama", torch.float32)
    delta = kit.edit(tmp_path / "base", ("model.layers.1.mlp.down_proj.weight",))
    offloaded = cpu_offload(model, execution_device="cpu")
    with pytest.raises(SurgeryError, match=r"does not hold its weights \(offloaded.*surgery apply"):
        delta.apply(offloaded)
