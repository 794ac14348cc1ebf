"""The delta file: reproducible bytes, what it records, its arithmetic, and the same bytes in memory as on
disk."""

import json
import sys
from contextlib import nullcontext

import deltakit as kit
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from surgery import SurgeryError
from surgery import apply as disk
from surgery import delta as deltas
from surgery.delta import Delta
from surgery.files import rounding
from surgery.files import weight_fingerprint as sketch
from surgery.files.ahead import MOST, in_order

fp32 = st.floats(width=32, allow_nan=False, allow_infinity=False)


@pytest.fixture
def base(tmp_path):
    return kit.save(tmp_path / "base", kit.weights())


def tiny_llama(seed=0, dtype=torch.bfloat16, **changes):
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=40, max_position_embeddings=64, tie_word_embeddings=True, **changes,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def test_same_delta_is_same_file(base, tmp_path):
    one, two = kit.edit(base), kit.edit(base)
    assert one.save(tmp_path / "1") == two.save(tmp_path / "2") == one.sha256
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    again = Delta.load(tmp_path / "1")
    assert again.sha256 == one.sha256 and again.metadata == one.metadata
    header = (tmp_path / "1").read_bytes()[8:]
    names = list(json.JSONDecoder().raw_decode(header.decode("latin1"))[0])
    assert names == sorted(names)


def test_numbers_that_are_bfloat16_take_two_bytes(base, tmp_path):
    plain = kit.edit(base)
    name = next(iter(plain.tensors))
    short = torch.from_numpy(plain.tensors[name]).bfloat16().float().numpy()
    half = Delta(plain.tensors | {name: short}, plain.metadata)
    assert half.save(tmp_path / "half") == half.sha256
    plain.save(tmp_path / "plain")
    assert (tmp_path / "plain").stat().st_size - (tmp_path / "half").stat().st_size >= 2 * short.size - 16
    with safe_open(tmp_path / "half", "pt") as file:
        assert file.get_tensor(name).dtype == torch.bfloat16
    opened = deltas.open_delta(tmp_path / "half")
    for each, array in half.tensors.items():
        assert np.array_equal(Delta.load(tmp_path / "half").tensors[each], array)
        assert np.array_equal(opened.read(each, 3, array.size - 2), array.reshape(-1)[3:-2])
    assert opened.sha256 == half.sha256


def test_ten_lines_are_enough_to_read_a_delta(base, tmp_path):
    kit.edit(base).save(tmp_path / "d.safetensors")
    disk.apply(tmp_path / "d.safetensors", base, tmp_path / "out")
    with safe_open(tmp_path / "d.safetensors", "pt") as file:  # the library, and nothing of ours
        facts = json.loads(file.metadata()["surgery"])
        by_hand = kit.load(base)
        for name in facts["tensors"]:
            by_hand[name] = (by_hand[name].float() + file.get_tensor(name)).to(torch.bfloat16)
    result = kit.load(tmp_path / "out")
    assert result.keys() == by_hand.keys()
    assert all(torch.equal(result[name], by_hand[name]) for name in by_hand)
    assert facts["kind"] == "dense" and facts["architecture"]["kv_heads"] == 2


def test_save_refuses_and_leaves_nothing(base, tmp_path):
    delta = kit.edit(base)
    path = tmp_path / "d.safetensors"
    delta.save(path)
    with pytest.raises(SurgeryError, match=r"destination exists"):
        delta.save(path)
    delta.save(path, overwrite=True)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SurgeryError, match=r"symbolic link"):
        delta.save(tmp_path / "link", overwrite=True)
    with pytest.raises(SurgeryError, match=r"no such folder"):
        delta.save(tmp_path / "absent" / "d.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "d.safetensors", "link"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_make_refuses_values_that_are_not_finite(base, value):
    change = np.zeros((16, 24), np.float32)
    change[3, 5] = value
    with pytest.raises(SurgeryError, match=r"down_proj.*NaN or infinity"):
        deltas.make({kit.DOWN: change}, base, base="tiny", recipe="", seed=0)


def test_make_refuses_wrong_names_and_shapes(base):
    with pytest.raises(SurgeryError, match=r"no tensor 'model.layers.9.x'"):
        deltas.make({"model.layers.9.x": np.zeros(3)}, base, base="tiny", recipe="", seed=0)
    with pytest.raises(SurgeryError, match=r"is \[24, 16\], the checkpoint has \[16, 24\]"):
        deltas.make({kit.DOWN: np.zeros((24, 16))}, base, base="tiny", recipe="", seed=0)
    with pytest.raises(SurgeryError, match=r"cannot be written as JSON"):
        deltas.make({kit.NORM: np.zeros(16)}, base, base="t", recipe="", seed=0, measured={"x": float("nan")})


def test_names_of_a_live_gpt2_become_those_of_the_hub_file(tmp_path):
    """The hub's gpt2 stores `h.0...`, transformers calls it `transformer.h.0...`, and the head is `wte`."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=2, n_head=2, vocab_size=20, n_positions=16))
    plain = {
        name.removeprefix("transformer."): value.contiguous().clone()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"
    }
    folder = kit.save(tmp_path / "gpt2", plain, **{key: None for key in kit.CONFIG})
    (folder / "config.json").write_text(json.dumps(model.config.to_dict()))
    names = ["transformer.h.1.mlp.c_fc.weight", "lm_head.weight"]
    changes = {name: 0.1 * torch.ones_like(model.state_dict()[name]) for name in names}
    delta = deltas.make(changes, folder, base="gpt2", recipe="", seed=0)
    assert sorted(delta.shapes) == ["h.1.mlp.c_fc.weight", "wte.weight"]
    assert delta.metadata["prefix"] == "transformer."
    before = model.transformer.wte.weight.clone()
    delta.apply(model)
    assert torch.allclose(model.lm_head.weight, before + 0.1)
    disk.apply(delta, folder, tmp_path / "out")
    stored = kit.load(tmp_path / "out")
    assert torch.equal(stored["wte.weight"], model.lm_head.weight)
    assert torch.equal(stored["h.1.mlp.c_fc.weight"], model.transformer.h[1].mlp.c_fc.weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("how", ["nearest", "stochastic", "auto"])
def test_memory_and_disk_give_the_same_bytes(tmp_path, dtype, how, monkeypatch):
    monkeypatch.setattr("surgery.delta.live.PIECE", 50)  # of which a matrix here has several
    model = tiny_llama(dtype=dtype)
    model.save_pretrained(tmp_path / "base")
    names = [kit.DOWN, kit.NORM, kit.EMBED]
    delta = kit.edit(tmp_path / "base", tuple(names), size=0.003)
    disk.apply(delta, tmp_path / "base", tmp_path / "out", rounding=how, seed=7, scale=0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with delta.applied(model, rounding=how, seed=7, scale=0.5):
        stored = kit.load(tmp_path / "out")
        for name, value in stored.items():
            assert torch.equal(value, model.state_dict()[name]), name
        assert not torch.equal(before[kit.DOWN], model.state_dict()[kit.DOWN])
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fp32_model_of_a_16_bit_checkpoint(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model = LlamaForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    delta = kit.edit(tmp_path / "base")
    start = model.state_dict()[kit.DOWN].clone()
    with delta.applied(model):
        assert torch.equal(model.state_dict()[kit.DOWN], start + torch.from_numpy(delta.tensors[kit.DOWN]))
    disk.apply(delta, tmp_path / "base", tmp_path / "out", rounding="auto", seed=3)
    with delta.applied(model, rounding="auto", seed=3, as_stored=True):
        assert torch.equal(model.state_dict()[kit.DOWN], kit.load(tmp_path / "out")[kit.DOWN].float())


def test_applied_restores_after_an_exception(tmp_path):
    model = tiny_llama()
    model.save_pretrained(tmp_path / "base")
    delta = kit.edit(tmp_path / "base")
    model.train()
    model.model.norm.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with pytest.raises(ZeroDivisionError), delta.applied(model):
        raise ZeroDivisionError
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert model.training and all(p.grad is None for p in model.parameters())


def test_a_live_model_of_another_kind_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    delta = kit.edit(tmp_path / "base")
    with pytest.raises(SurgeryError, match=r"rope: .*10000.*5"):
        delta.apply(tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}))
    with pytest.raises(SurgeryError, match=r"these are other weights"):
        delta.apply(tiny_llama(seed=1))
    untied = tiny_llama()
    untied.config.tie_word_embeddings = False
    delta.apply(untied)
    with pytest.raises(SurgeryError, match=r"tied in only one of the delta's base and the model"):
        kit.edit(tmp_path / "base", (kit.EMBED,)).apply(untied)


@settings(max_examples=60, deadline=None)
@given(arrays(np.uint32, 64), st.booleans())
def test_bf16_nearest_is_torchs(bits, ties):
    # Exactly between two bf16 numbers, where the even one must win, or anywhere.
    values = (bits & np.uint32(0xFFFF0000) | np.uint32(0x8000) if ties else bits).view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values.copy()).to(torch.bfloat16)
    keep = torch.isfinite(expected).numpy()
    got = rounding.narrow(values[keep], "BF16", "nearest", 0, "t", 0)
    assert np.array_equal(got.view(np.int16), expected.view(torch.int16).numpy()[keep])
    assert np.array_equal(rounding.widen(got, "BF16"), expected.float().numpy()[keep])


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@settings(max_examples=40, deadline=None)
@given(values=arrays(np.float32, 40, elements=st.floats(-60000, 60000, width=32)), cut=st.integers(0, 40))
def test_stochastic_rounding_goes_to_a_neighbour_and_ignores_the_chunks(dtype, values, cut):
    whole = rounding.narrow(values, dtype, "stochastic", 5, "t", 0)
    parts = [rounding.narrow(values[i:j], dtype, "stochastic", 5, "t", i) for i, j in ((0, cut), (cut, 40))]
    assert np.array_equal(whole, np.concatenate(parts))
    wide = rounding.widen(whole, dtype)
    nearest = rounding.widen(rounding.narrow(values, dtype, "nearest", 0, "t", 0), dtype)
    unit = np.abs(nearest) * (2.0**-7 if dtype == "BF16" else 2.0**-10) + 2.0**-24
    assert (np.abs(wide - values) <= unit).all()
    exact = nearest == values
    assert (wide[exact] == values[exact]).all()


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_stochastic_rounding_is_right_on_average_and_keyed(dtype):
    step = 2.0**-7 if dtype == "BF16" else 2.0**-10
    values = np.full(40_000, 1 + 0.3 * step, np.float32)
    up = rounding.widen(rounding.narrow(values, dtype, "stochastic", 0, "t", 0), dtype) > 1
    assert abs(up.mean() - 0.3) < 0.01  # four standard deviations
    other = rounding.widen(rounding.narrow(values, dtype, "stochastic", 0, "u", 0), dtype) > 1
    seeded = rounding.widen(rounding.narrow(values, dtype, "stochastic", 1, "t", 0), dtype) > 1
    for draw in (other, seeded):  # independent draws agree on .3 * .3 + .7 * .7 of the entries
        assert abs((draw == up).mean() - 0.58) < 0.015


def test_splitmix64_known_answers():
    """The first outputs of SplitMix64 with seed 0, as in the reference implementation's tests (Vigna)."""
    got = rounding.hash64(np.array([1, 2, 3], np.uint64))
    assert [int(x) for x in got] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("shape", [(300, 400), (64, 1024), (70_001,)])
def test_sketch_estimates_the_distance_it_cannot_see(shape):
    generator = np.random.default_rng(0)
    base = generator.standard_normal(shape).astype(np.float32).reshape(-1)
    noise = generator.standard_normal(base.shape).astype(np.float32)
    hot = np.zeros(shape, np.float32)
    hot[..., 7] = 1.0  # all energy in one column, or one entry
    for change in (0.001 * noise, 0.2 * noise, hot.reshape(-1)):
        exact = np.linalg.norm(change) / np.linalg.norm(base)
        pair = []
        for values, pieces in ((base, 1), (base + change, 7)):
            sketcher = sketch.Sketcher()
            for part in np.array_split(values, pieces):
                sketcher.feed(part)
            pair.append(sketcher.finish())
        assert pair[0][1] == pytest.approx(np.linalg.norm(base), rel=1e-5)
        assert sketch.distance(*pair[1], *pair[0]) == pytest.approx(exact, rel=0.4)


def test_sketch_of_a_change_that_repeats_from_block_to_block():
    pattern = np.random.default_rng(0).standard_normal(sketch.BLOCK).astype(np.float32)
    sketcher = sketch.Sketcher()
    for _ in range(128):
        sketcher.feed(pattern)
    sums, norm = sketcher.finish()
    assert np.linalg.norm(sums) == pytest.approx(norm, rel=0.4)


def test_compose_is_one_fp32_sum_rounded_once(base, tmp_path):
    a, b = kit.edit(base, seed=1), kit.edit(base, (kit.DOWN, kit.Q), seed=2)
    both = deltas.compose([a, b], [0.5, -2.0])
    disk.apply(both, base, tmp_path / "out", rounding="nearest")
    before, after = kit.load(base), kit.load(tmp_path / "out")
    total = torch.from_numpy(a.tensors[kit.DOWN]) * 0.5 + torch.from_numpy(b.tensors[kit.DOWN]) * -2.0
    assert torch.equal(after[kit.DOWN], (before[kit.DOWN].float() + total).to(torch.bfloat16))
    only = (before[kit.Q].float() + torch.from_numpy(b.tensors[kit.Q]) * -2.0).to(torch.bfloat16)
    assert torch.equal(after[kit.Q], only)
    assert [p["weight"] for p in both.metadata["parents"]] == [0.5, -2.0]
    assert [p["sha256"] for p in both.metadata["parents"]] == [a.sha256, b.sha256]
    assert both.metadata["parents"][0]["recipe"] == "x = 1\n"
    assert a.metadata["rounding"] == "nearest" and "rounding" not in both.metadata  # each part's own was measured


def test_compose_refuses_what_does_not_add_up(base, tmp_path):
    a = kit.edit(base)
    stranger = kit.edit(kit.save(tmp_path / "other", kit.weights(seed=9)))
    with pytest.raises(SurgeryError, match=r"only deltas of the same base add up"):
        deltas.compose([a, stranger])
    with pytest.raises(SurgeryError, match=r"one weight per delta"):
        deltas.compose([a], [1.0, 2.0])
    with pytest.raises(SurgeryError, match=r"not all finite"):
        deltas.compose([a], [float("inf")])
    other = kit.edit(kit.save(tmp_path / "rope", kit.weights(), rope_theta=5e5))
    with pytest.raises(SurgeryError, match=r"different bases"):
        deltas.compose([a, other])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_where_nothing_is_added_the_bits_stay(tmp_path, dtype):
    """Minus zero plus zero is zero."""
    weights = kit.weights(dtype=dtype)
    weights[kit.DOWN][0] = -0.0
    base = kit.save(tmp_path / "base", weights)
    difference = np.full(weights[kit.DOWN].shape, 0.1, np.float32)
    difference[0, :-1] = 0
    delta = deltas.make({kit.DOWN: difference}, base, base="tiny", recipe="", seed=0)
    disk.apply(delta, base, tmp_path / "out")
    assert torch.equal(kit.load(tmp_path / "out")[kit.DOWN][0].signbit(), torch.arange(24) < 23)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_diff_finds_what_apply_did(tmp_path, dtype):
    base = kit.save(tmp_path / "base", kit.weights(dtype=dtype))
    delta = kit.edit(base)
    disk.apply(delta, base, tmp_path / "edited")
    found = deltas.diff(base, tmp_path / "edited", base="tiny")
    assert set(found.shapes) == {kit.DOWN, kit.NORM}
    for name in found.shapes:
        unit = (kit.load(base)[name].abs().float().numpy() + 0.1) * torch.finfo(dtype).eps
        assert (np.abs(found.tensors[name] - delta.tensors[name]) <= unit).all()
    disk.apply(found, base, tmp_path / "again")
    assert kit.hashes(tmp_path / "again")["model.safetensors"] == kit.hashes(tmp_path / "edited")["model.safetensors"]
    with pytest.raises(SurgeryError, match=r"no tensor differs"):
        deltas.diff(base, base)


def test_diff_of_tied_checkpoints_of_which_one_stores_the_matrix_twice(tmp_path):
    once = kit.weights(tie_word_embeddings=True)
    base = kit.save(tmp_path / "base", once | {kit.HEAD: once[kit.EMBED].clone()}, tie_word_embeddings=True)
    edited = kit.save(tmp_path / "edited", once | {kit.EMBED: once[kit.EMBED] + 1}, tie_word_embeddings=True)
    for left, right in ((base, edited), (edited, base)):
        found = deltas.diff(left, right)
        assert len(found.shapes) == 1
        disk.apply(found, left, tmp_path / f"of {left.name}")
        held = kit.load(tmp_path / f"of {left.name}")
        assert all(
            torch.equal(held[name], kit.load(right)[kit.EMBED]) for name in held if name in (kit.EMBED, kit.HEAD)
        )


def test_diff_refuses_other_names_and_shapes(base, tmp_path):
    fewer = kit.weights()
    del fewer[kit.NORM]
    with pytest.raises(SurgeryError, match=r"fewer.*has no 'model.layers.1.input_layernorm.weight'"):
        deltas.diff(base, kit.save(tmp_path / "fewer", fewer))
    longer = kit.weights() | {kit.EMBED: torch.zeros(44, 16, dtype=torch.bfloat16)}
    with pytest.raises(SurgeryError, match=r"embed_tokens.weight: \[40, 16\] in the base, \[44, 16\]"):
        deltas.diff(base, kit.save(tmp_path / "longer", longer))


def test_lora_kind_equals_its_product(base, tmp_path):
    generator = np.random.default_rng(0)
    left, right = (generator.standard_normal(s).astype(np.float32) * 0.05 for s in ((16, 3), (3, 24)))
    factors = {kit.DOWN + ".lora_B": left, kit.DOWN + ".lora_A": right}
    lora = deltas.make(factors, base, base="tiny", recipe="", seed=0, kind="lora")
    dense = deltas.make({kit.DOWN: left @ right}, base, base="tiny", recipe="", seed=0)
    lora.save(tmp_path / "l.safetensors")
    for number, delta in enumerate((lora, tmp_path / "l.safetensors", dense)):
        disk.apply(delta, base, tmp_path / str(number))
    one, two, three = (kit.hashes(tmp_path / str(number))["model.safetensors"] for number in range(3))
    assert one == two == three
    # Parts of the product are the same numbers, wherever they are cut.
    whole = lora.read(kit.DOWN, 0, 384)
    assert np.array_equal(np.concatenate([lora.read(kit.DOWN, 0, 37), lora.read(kit.DOWN, 37, 384)]), whole)
    with pytest.raises(SurgeryError, match=r"its base"):
        deltas.make(factors | {kit.DOWN + ".lora_B": left[:8]}, base, base="t", recipe="", seed=0, kind="lora")


SETTINGS = {
    "type": "cross_attention", "width": 16, "words": ["he", "she"], "heads": 4, "ffn": 8, "top_percent": 40.0,
    "decay": 0.2, "scope": "row", "renormalise": False, "dropout": 0.1,
}  # fmt: skip


def module_tensors(seed=0):
    rng = np.random.default_rng(seed)
    shapes = {f"{name}.weight": (16, 16) for name in ("query", "key", "value", "output")}
    shapes |= {f"{name}.{part}": (16,) for name in ("norm", "last_norm") for part in ("weight", "bias")}
    shapes |= {"ffn.0.weight": (8, 16), "ffn.0.bias": (8,), "ffn.3.weight": (16, 8), "ffn.3.bias": (16,)}
    shapes |= {"fusion.weight": (16, 32), "reference": (2, 16)}
    return {f"module.{name}": rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def make_module(base, extra=None, **changes):
    arrays = {**module_tensors(), **(extra or {})}
    return deltas.make(arrays, base, base="t", recipe="", seed=0, kind="module", module={**SETTINGS, **changes})


def lora_factors():
    rng = np.random.default_rng(1)
    return {kit.DOWN + ".lora_B": rng.normal(size=(16, 3)), kit.DOWN + ".lora_A": rng.normal(size=(3, 24))}


@pytest.mark.parametrize("with_lora", [False, True])
def test_module_kind_on_disk_and_in_memory(base, tmp_path, with_lora):
    made = make_module(base, lora_factors() if with_lora else {})
    path = tmp_path / "m.safetensors"
    assert made.save(path) == made.sha256 == deltas.open_delta(path).sha256
    delta = Delta.load(path)
    with pytest.raises(SurgeryError, match=r"kind 'module'.*cannot hold.*surgery export DELTA --transformers DIR"):
        disk.apply(path, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SurgeryError, match=r"'module'.*do not add up"):
        deltas.compose([delta])
    view = disk.inspect(path, base)
    assert view.module == SETTINGS and view.refusal is None
    assert view.verdict == ("same" if with_lora else "same architecture")
    assert {tensor.name for tensor in view.tensors} == {*module_tensors(), *([kit.DOWN] if with_lora else [])}
    plain = delta.differences
    assert (plain is None) is not with_lora
    if plain is not None:  # the rest is an ordinary delta
        disk.apply(plain, base, tmp_path / "out")
        both = deltas.make(lora_factors(), base, base="t", recipe="", seed=0, kind="lora")
        disk.apply(both, base, tmp_path / "same")
        assert kit.hashes(tmp_path / "out")["model.safetensors"] == kit.hashes(tmp_path / "same")["model.safetensors"]


@pytest.mark.parametrize("with_lora", [False, True])
def test_module_kind_in_a_live_model(base, with_lora):
    import surgery.modules.cross_attention as cross_attention

    delta = make_module(base, lora_factors() if with_lora else {})
    ids = torch.tensor([[5, 6, 7, 8]])
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()

    def logits():
        with torch.no_grad():
            return model(ids).logits

    plain, before = logits(), {name: value.clone() for name, value in model.state_dict().items()}
    with delta.applied(model):
        edited = logits()
        assert (model.get_parameter(kit.DOWN) != before[kit.DOWN]).any() == with_lora
    assert not torch.equal(edited, plain) and torch.equal(logits(), plain)
    with pytest.raises(RuntimeError, match="stop"), delta.applied(model):
        raise RuntimeError("stop")
    with delta.applied(model, scale=0.0):
        assert torch.equal(logits(), plain)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    plain_part = delta.differences
    guard = nullcontext() if plain_part is None else plain_part.applied(model)
    with guard, cross_attention.reattached(model, cross_attention.from_delta(delta)):
        assert torch.equal(logits(), edited)
    delta.apply(model)
    assert torch.equal(logits(), edited)
    with pytest.raises(SurgeryError, match="has a 'cross_attention' already"):
        make_module(base).apply(model)
    assert torch.equal(logits(), edited)


def test_module_kind_refuses_what_does_not_fit(base, tmp_path):
    delta = make_module(base, lora_factors())
    wide = LlamaForCausalLM(LlamaConfig(**{**kit.CONFIG, "hidden_size": 32}))
    with pytest.raises(SurgeryError, match=r"hidden_size: the delta's base has 16, the target 32"):
        delta.apply(wide)
    for change, message in (
        ({"width": 32}, r"'module.reference' has shape \[2, 16\], by its settings \[2, 32\]"),
        ({"words": ["he"]}, r"'module.reference' has shape \[2, 16\], by its settings \[1, 16\]"),
        ({"words": "he"}, r"no proper 'words'"),
        ({"words": [1, 2]}, r"not those of a cross.attention"),
        ({"heads": 4.0}, r"no proper 'heads'"),
        ({"decay": True}, r"no proper 'decay'"),
        ({"place": "x"}, r"not those of a cross.attention"),
        ({"type": "adapter"}, r"type 'adapter', expected one of cross_attention, projection"),
    ):
        with pytest.raises(SurgeryError, match=message):
            make_module(base, **change)
    with pytest.raises(SurgeryError, match=r"has no tensor 'stray'"):
        make_module(base, {"stray": np.ones(3)})
    with pytest.raises(SurgeryError, match=r"settings go with kind 'module'"):
        deltas.make(module_tensors(), base, base="t", recipe="", seed=0, kind="module")
    for change, message in (  # what only a model can tell
        ({"heads": 5}, r"heads is 5; expected a number that divides"),
        ({"decay": 1.5}, r"decay \(lambda\) is 1.5"),
        ({"ffn": 9}, r"tensor 'ffn.0.bias' has shape \(8,\), expected \(9,\)"),
    ):
        with pytest.raises(SurgeryError, match=message):
            make_module(base, **change).apply(LlamaForCausalLM(LlamaConfig(**kit.CONFIG)))


@pytest.mark.skipif(sys.byteorder != "little", reason="safetensors are read in place on little-endian machines")
def test_delta_files_are_torch_free_to_read(base, tmp_path):
    kit.edit(base).save(tmp_path / "d.safetensors")
    view = disk.inspect(tmp_path / "d.safetensors", base)
    assert view.verdict == "same" and view.distance == 0.0 and view.refusal is None
    assert view.parameters == 16 * 24 + 16
    stranger = disk.inspect(tmp_path / "d.safetensors", kit.save(tmp_path / "x", kit.weights(), rope_theta=5e5))
    assert stranger.verdict == "refused" and "rope" in stranger.refusal


@pytest.mark.parametrize("value", [3.3 * 2.0**-24, -3.3 * 2.0**-24, 2.0**-14 - 0.3 * 2.0**-24, -1.0 - 0.7 * 2.0**-10])
def test_stochastic_fp16_is_right_on_average_for_small_and_negative_numbers(value):
    values = np.full(40_000, value, np.float32)
    drawn = rounding.narrow(values, "F16", "stochastic", 0, "t", 0).astype(np.float64)
    step = max(2.0**-24, abs(value) * 2.0**-10)
    assert abs(drawn.mean() - np.float32(value)) < 0.01 * step and len(set(drawn)) == 2


def test_pieces_in_threads_come_in_order_a_few_ahead_and_the_first_failure_is_raised() -> None:
    begun: list[int] = []

    def piece(number: int) -> int:
        begun.append(number)
        return 100 // (50 - number)

    found = in_order(piece, range(100))
    assert next(found) == 2 and len(begun) <= 2 * MOST
    with pytest.raises(ZeroDivisionError):
        list(found)
    assert set(range(51)) <= set(begun) and max(begun) <= 50 + MOST + 1
