"""A delta onto a GGUF file: llama.cpp's own library writes the files, and transformers and the library read them."""

import filecmp
import struct

import deltakit as kit
import gguf
import numpy as np
import pytest
import torch

from surgery import SurgeryError
from surgery import delta as deltas
from surgery.apply.gguf import RECORD, apply_gguf
from surgery.apply.gguf_undo import undo_gguf
from surgery.files.gguf import SUBSTITUTE, WRITABLE, open_gguf
from surgery.files.gguf_codes import quantise

WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "vocab_size": 40}
WIDE = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 64, "vocab_size": 40}
SIZE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 40}
K = "model.layers.0.self_attn.k_proj.weight"
GATE = "model.layers.1.mlp.gate_proj.weight"
NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def permuted(matrix: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's convert_hf_to_gguf.py, LlamaModel.permute."""
    return matrix.reshape(heads, 2, matrix.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(matrix.shape)


def write(
    path, tensors, kind="Q4_1", *, interleaved=True, arch="llama", alignment=None, experts=None, given=None, **keys
):
    """What llama.cpp's converter would write of a llama with 4 heads and 2 key heads; vectors stay F32."""
    writer = gguf.GGUFWriter(path, arch)
    if alignment:
        writer.add_custom_alignment(alignment)
    numbers = {"block_count": 2, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
               "attention.head_count_kv": 2, "attention.key_length": 16} | keys  # fmt: skip
    for key, value in numbers.items():
        writer.add_uint32(key if "split" in key else f"{arch}.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{n}" for n in range(40)])
    for name, tensor in tensors.items():
        matrix = tensor.float().numpy()
        stem = name.removesuffix(".weight")
        if interleaved and ("q_proj" in name or "k_proj" in name):
            matrix = permuted(matrix, 4 if "q_proj" in name else 2)
        flat = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
        if stem in flat:
            target = flat[stem]
        else:
            _, _, layer, part = stem.split(".", 3)
            target = f"blk.{layer}.{NAMES[part]}"
        raw = gguf.GGMLQuantizationType.F32 if matrix.ndim == 1 else gguf.GGMLQuantizationType[kind]
        if name in (given or {}):  # bytes of a type that the library does not write
            stored, own = given[name]
            writer.add_tensor(f"{target}.weight", stored, raw_dtype=gguf.GGMLQuantizationType[own])
            continue
        writer.add_tensor(f"{target}.weight", gguf.quantize(matrix, raw), raw_dtype=raw)
    if experts is not None:
        raw = gguf.GGMLQuantizationType[kind]
        stored = gguf.quantize(experts.float().numpy(), raw)
        writer.add_tensor("blk.1.ffn_gate_exps.weight", stored, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def read(path):
    """{name: fp32 array} through the library."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        found[tensor.name] = gguf.dequantize(np.array(tensor.data), tensor.tensor_type)
    return found


@pytest.fixture
def base(tmp_path):
    tensors = kit.weights(**SIZE)
    return kit.save(tmp_path / "base", tensors, **SIZE), tensors


TOUCHED = {kit.Q: "blk.1.attn_q", K: "blk.0.attn_k", GATE: "blk.1.ffn_gate", kit.NORM: "blk.1.attn_norm"}


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q5_1", "Q4_1", "Q5_0", "Q4_0"])
@pytest.mark.parametrize("interleaved", [True, False])
def test_touched_tensors_are_what_the_library_makes_of_the_sum(tmp_path, base, kind, interleaved):
    folder, tensors = base
    source = write(tmp_path / "m.gguf", tensors, kind, interleaved=interleaved)
    delta = kit.edit(folder, tuple(TOUCHED), size=0.3)
    report = apply_gguf(delta, source, tmp_path / "e.gguf", rounding="nearest")
    before, after = read(source), read(tmp_path / "e.gguf")
    for name, place in TOUCHED.items():
        difference = delta.tensors[name]
        if interleaved and name in (kit.Q, K):
            difference = permuted(difference, 4 if name == kit.Q else 2)
        stored = gguf.GGMLQuantizationType.F32 if difference.ndim == 1 else gguf.GGMLQuantizationType[kind]
        old = before[f"{place}.weight"]
        wanted = gguf.dequantize(gguf.quantize(old + difference.reshape(old.shape), stored), stored)
        assert np.array_equal(after[f"{place}.weight"], wanted), name
    assert report.bytes == report.bytes_before and not report.notes
    touched = {f"{place}.weight" for place in TOUCHED.values()}
    assert all(np.array_equal(after[name], before[name]) for name in before.keys() - touched)
    old, new = source.read_bytes(), (tmp_path / "e.gguf").read_bytes()
    for name, tensor in open_gguf(source).tensors.items():
        if name in touched:
            old, new = (raw[: tensor.begin] + raw[tensor.end :].rjust(len(raw) - tensor.begin) for raw in (old, new))
    assert old == new, "a byte outside the touched tensors changed"
    undo_gguf(tmp_path / "e.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False)


@pytest.mark.parametrize(("kind", "chosen"), [("Q4_1", "Q8_0"), ("F16", "Q4_0"), ("Q4_0", "F32")])
@pytest.mark.parametrize("alignment", [None, 256])
def test_another_type_moves_what_stands_behind(tmp_path, base, kind, chosen, alignment):
    folder, tensors = base
    source = write(tmp_path / "m.gguf", tensors, kind, alignment=alignment)
    delta = kit.edit(folder, (GATE, kit.NORM))
    report = apply_gguf(delta, source, tmp_path / "e.gguf", touched_type=chosen, rounding="nearest")
    before, after = read(source), read(tmp_path / "e.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "e.gguf").tensors}
    assert types["blk.1.ffn_gate.weight"] == chosen and types["blk.1.attn_norm.weight"] == "F32"
    wanted = gguf.GGMLQuantizationType[chosen]
    total = before["blk.1.ffn_gate.weight"] + delta.tensors[GATE]
    assert np.array_equal(after["blk.1.ffn_gate.weight"], gguf.dequantize(gguf.quantize(total, wanted), wanted))
    others = before.keys() - {"blk.1.ffn_gate.weight", "blk.1.attn_norm.weight"}
    assert all(np.array_equal(after[name], before[name]) for name in others)
    assert f"becomes {chosen}" in report.notes[0]
    assert report.bytes == (tmp_path / "e.gguf").stat().st_size
    undo_gguf(tmp_path / "e.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False)


def iq4_nl(matrix: np.ndarray) -> np.ndarray:
    """IQ4_NL by its definition (ggml: fp16 d, then 32 codes of a table, low nibbles first), which the library reads."""
    blocks, table = matrix.reshape(-1, 32), np.array(gguf.quants.IQ4_NL.kvalues, np.float32)
    step = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    codes = np.abs(blocks[..., None] / step[..., None].astype(np.float32) - table).argmin(axis=-1).astype(np.uint8)
    packed = codes[:, :16] | (codes[:, 16:] << 4)
    return np.concatenate([step.view(np.uint8), packed], axis=1).reshape(matrix.shape[0], -1)


def test_a_type_that_is_not_written_is_named_with_its_cost(tmp_path, base, monkeypatch):
    folder, tensors = base
    assert set(SUBSTITUTE.values()) <= set(WRITABLE)
    library = gguf.quantize
    monkeypatch.setattr(
        gguf, "quantize", lambda data, kind: iq4_nl(data) if kind.name == "IQ4_NL" else library(data, kind)
    )
    source = write(tmp_path / "m.gguf", tensors, "IQ4_NL")
    delta = kit.edit(folder, (GATE,))
    report = apply_gguf(delta, source, tmp_path / "e.gguf", rounding="nearest")
    assert report.notes == (
        "blk.1.ffn_gate.weight: IQ4_NL becomes Q5_0, since the gguf library cannot write IQ4_NL (+768 bytes)",
    )
    total = read(source)["blk.1.ffn_gate.weight"] + delta.tensors[GATE]
    wanted = gguf.dequantize(library(total, gguf.GGMLQuantizationType.Q5_0), gguf.GGMLQuantizationType.Q5_0)
    assert np.array_equal(read(tmp_path / "e.gguf")["blk.1.ffn_gate.weight"], wanted)
    undo_gguf(tmp_path / "e.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False)


@pytest.mark.parametrize("kind", ["Q4_K", "Q5_K", "Q6_K"])
def test_k_quants_get_new_codes_under_their_own_scales(tmp_path, kind):
    generator, stored = np.random.default_rng(0), gguf.GGMLQuantizationType[kind]
    raw = generator.integers(0, 256, (256, gguf.GGML_QUANT_SIZES[stored][1]), dtype=np.uint8)
    for at in (208,) if kind == "Q6_K" else (0, 2):
        raw[:, at : at + 2] = np.array([0.0004], np.float16).view(np.uint8)
    tensors = kit.weights(**WIDE) | {GATE: torch.from_numpy(gguf.dequantize(raw, stored))}
    folder = kit.save(tmp_path / "base", tensors, **WIDE)
    keys = {"embedding_length": 256, "feed_forward_length": 256, "attention.key_length": 64}
    source = write(tmp_path / "m.gguf", tensors, "F16", given={GATE: (raw, kind)}, **keys)
    difference = (0.001 * (1 + generator.random((256, 256)))).astype(np.float32)
    difference[::2] = 0
    delta = deltas.make({GATE: difference}, folder, base="b", recipe="", seed=0)
    report = apply_gguf(delta, source, tmp_path / "e.gguf")
    assert report.bytes == report.bytes_before and not report.notes and report.tensors[0].after == kind
    before, after = (read(path)["blk.1.ffn_gate.weight"] for path in (source, tmp_path / "e.gguf"))
    # Some parts have a scale of 0, and a sixteenth of random 4-bit codes cannot rise.
    assert not (after - before)[::2].any()
    assert (after - before)[1::2].mean() == pytest.approx(0.0015, rel=0.25)
    near = apply_gguf(delta, source, tmp_path / "n.gguf", rounding="nearest")
    assert near.tensors[0].changed < 0.8 * report.tensors[0].changed
    undo_gguf(tmp_path / "e.gguf", tmp_path / "back.gguf")
    assert filecmp.cmp(source, tmp_path / "back.gguf", shallow=False)
    large = deltas.make({GATE: np.full((256, 256), 3.0, np.float32)}, folder, base="b", recipe="", seed=0)
    with pytest.raises(SurgeryError, match=r"beyond what the scales of its .* --touched-type Q8_0"):
        apply_gguf(large, source, tmp_path / "no.gguf")


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_codes_rounded_by_chance_are_right_on_average(kind):
    generator = np.random.default_rng(0)
    values = generator.standard_normal((1, 320)).astype(np.float32)
    stored = gguf.GGMLQuantizationType[kind]
    drawn = [
        gguf.dequantize(quantise(values, kind, generator.random(values.shape, np.float32)), stored) for _ in range(600)
    ]
    blocks = values.reshape(-1, 32)
    size, largest = np.ptp(blocks, axis=1, keepdims=True), np.abs(blocks).max(axis=1, keepdims=True)
    step = {"Q4_0": largest / 8, "Q5_0": largest / 16, "Q8_0": largest / 127, "Q4_1": size / 15, "Q5_1": size / 31}[
        kind
    ]
    # The short side of Q4_0 and Q5_0 ends one step early: what lies beyond it is cut off, by chance or not.
    inside = (np.abs(blocks) <= largest - step) | (kind not in ("Q4_0", "Q5_0"))
    error = np.abs(np.mean(drawn, axis=0).reshape(-1, 32) - blocks)
    assert np.all((error < 0.12 * step)[inside]) and inside.mean() > 0.8


def test_refusals_come_before_anything_is_written(tmp_path, base):
    folder, tensors = base
    delta = kit.edit(folder, (GATE,))
    plain = write(tmp_path / "m.gguf", tensors)
    other = kit.weights(seed=7, **SIZE)
    raw = plain.read_bytes()
    offset = open_gguf(plain).tensors["blk.1.ffn_gate.weight"].at
    cases = {
        "other.gguf": ({"tensors": other}, r"1\.\d+ of its norm away"),
        "split.gguf": ({"tensors": tensors, "split.count": 3}, "one of 3 parts of a split model"),
        "arch.gguf": ({"tensors": tensors, "arch": "qwen2"}, "holds a 'qwen2' model, the delta's base is 'llama'"),
        "heads.gguf": ({"tensors": tensors, "attention.head_count": 8}, "heads: the delta's base has 4, the target 8"),
    }
    for name, (how, text) in cases.items():
        write(tmp_path / name, **how)
        with pytest.raises(SurgeryError, match=text):
            apply_gguf(delta, tmp_path / name, tmp_path / "result.gguf")
    broken = {
        "short.gguf": (raw[:-100], "overlaps another or leaves the file"),
        "head.gguf": (raw[:900], "truncated"),
        "magic.gguf": (b"GGML" + raw[4:], "no GGUF file"),
        "type.gguf": (raw[:offset] + struct.pack("<I", 250) + raw[offset + 4 :], "type 250, unknown"),
        "odd.gguf": (raw[: offset + 4] + struct.pack("<Q", 8) + raw[offset + 12 :], "is not aligned to 32"),
        "big.gguf": (raw[:4] + struct.pack(">I", 3) + raw[8:], "expected 2 or 3"),
    }
    for name, (content, text) in broken.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SurgeryError, match=text):
            apply_gguf(delta, tmp_path / name, tmp_path / "result.gguf")
    with pytest.raises(SurgeryError, match="touched type 'Q4_K'"):
        apply_gguf(delta, plain, tmp_path / "result.gguf", touched_type="Q4_K")
    assert not [path for path in tmp_path.iterdir() if "result" in path.name]


def test_undo_refuses_what_was_changed_since(tmp_path, base):
    folder, tensors = base
    source = write(tmp_path / "m.gguf", tensors)
    apply_gguf(kit.edit(folder, (GATE,)), source, tmp_path / "e.gguf")
    edited = tmp_path / "e.gguf"
    place = open_gguf(edited).tensors["blk.1.ffn_gate.weight"]
    raw = bytearray(edited.read_bytes())
    raw[place.begin] ^= 1
    edited.write_bytes(raw)
    with pytest.raises(SurgeryError, match=r"ffn_gate.weight' was changed after the edit"):
        undo_gguf(edited, tmp_path / "back.gguf")
    with pytest.raises(SurgeryError, match=f"no m.gguf{RECORD} lies beside it"):
        undo_gguf(source, tmp_path / "back.gguf")
    assert not (tmp_path / "back.gguf").exists()


def test_a_file_that_holds_the_delta_is_refused_without_force(tmp_path, base):
    folder, tensors = base
    delta, source = kit.edit(folder, (GATE,)), write(tmp_path / "m.gguf", tensors)
    apply_gguf(delta, source, tmp_path / "e.gguf")
    with pytest.raises(SurgeryError, match="holds this delta already"):
        apply_gguf(delta, tmp_path / "e.gguf", tmp_path / "twice.gguf")
    assert not (tmp_path / "twice.gguf").exists()
    apply_gguf(delta, source, tmp_path / "own.gguf", seed=delta.metadata["seed"])
    apply_gguf(delta, source, tmp_path / "seed.gguf", seed=delta.metadata["seed"] + 1)
    drawn = [(tmp_path / f"{name}.gguf").read_bytes() for name in ("e", "own", "seed")]
    assert drawn[0] == drawn[1] != drawn[2]  # unsaid, the seed is the delta's
    apply_gguf(delta, tmp_path / "e.gguf", tmp_path / "minus.gguf", scale=-1.0)
    apply_gguf(delta, tmp_path / "e.gguf", tmp_path / "forced.gguf", force=True)
    apply_gguf(kit.edit(folder, (GATE,), seed=9), tmp_path / "e.gguf", tmp_path / "other.gguf")


def test_deltas_of_single_experts_go_into_the_tensor_that_holds_all(tmp_path):
    size = {"num_local_experts": 4, "num_experts_per_tok": 2}
    name = "model.layers.1.block_sparse_moe.experts.{}.w1.weight"
    own = {name.format(n): torch.randn(96, 64, generator=torch.Generator().manual_seed(n)) * 0.05 for n in range(4)}
    tensors = {k: v for k, v in kit.weights(**SIZE).items() if ".mlp." not in k}
    base = kit.save(tmp_path / "base", tensors | own, **SIZE, **size, model_type="mixtral")
    path = write(tmp_path / "m.gguf", tensors, experts=torch.stack(list(own.values())), expert_count=4)
    delta = kit.edit(base, (name.format(1), name.format(3)), size=0.002)
    for kind in (None, "Q8_0"):
        out = tmp_path / f"{kind}.gguf"
        report = apply_gguf(delta, path, out, touched_type=kind)
        (change,) = report.tensors
        assert (
            change.name == "blk.1.ffn_gate_exps.weight" and change.after == (kind or "Q4_1") and change.distance < 0.2
        )
        before, after = read(path)[change.name], read(out)[change.name]
        step = np.ptp(before) / 15 if kind is None else 0.01
        for expert in range(4):
            moved = after[expert] - before[expert]
            wanted = delta.read(name.format(expert), 0, 96 * 64) if expert in (1, 3) else np.zeros(1)
            assert np.abs(moved.mean() - wanted.mean()) < 0.002 and np.abs(moved).max() <= step + 0.01
            assert kind is not None or moved.any() == (expert in (1, 3))
        undo_gguf(out, tmp_path / f"{kind}-back.gguf")
        assert filecmp.cmp(path, tmp_path / f"{kind}-back.gguf", shallow=False)
    more = write(tmp_path / "few.gguf", tensors, experts=torch.stack(list(own.values())[:3]))
    with pytest.raises(SurgeryError, match=r"holds 3 experts, so there is no .*experts\.3\.w1"):
        apply_gguf(delta, more, tmp_path / "no.gguf")
    swapped = write(tmp_path / "swapped.gguf", tensors, experts=torch.stack(list(own.values())[::-1]))
    with pytest.raises(SurgeryError, match="these are other weights"):
        apply_gguf(delta, swapped, tmp_path / "no.gguf")
