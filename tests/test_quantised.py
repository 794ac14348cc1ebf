"""Deltas onto quantised directories: each layout read, edited, undone and read back; every other refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from deltakit import hashes, load
from safetensors.torch import save_file
from torch import Tensor

from surgery import delta as deltas
from surgery.apply import apply, inspect, undo
from surgery.errors import SurgeryError
from surgery.files.quantised import e4m3
from surgery.files.quantised_rows import layer_rows, open_target

MATRIX = "model.layers.2.mlp.down_proj.weight"  # [32, 48]
NORM = "model.layers.2.input_layernorm.weight"
# bitsandbytes' codes for "fp4" (create_fp4_map) and "nf4", as it stores them in quant_map.
FP4 = (0, 0.0052083333, 0.6666667, 1, 0.33333333, 0.5, 0.16666667, 0.25)
Stored = dict[str, Tensor]


def fp8(weight: Tensor, name: str, block: tuple[int, int] | None, end: str) -> tuple[Stored, Tensor]:
    rows, columns = weight.shape
    tall, wide = block or (rows, columns)
    blocks = weight.view(rows // tall, tall, columns // wide, wide)
    scale = blocks.abs().amax(dim=(1, 3), keepdim=True) / 448
    codes = (blocks / scale).to(torch.float8_e4m3fn)
    back = (codes.float() * scale).view(rows, columns)
    stored = scale.view(rows // tall, columns // wide) if block else scale.view(())
    return {name: codes.view(rows, columns), f"{name}{end}": stored}, back


def int8(weight: Tensor, name: str) -> tuple[Stored, Tensor]:
    scale = (weight.abs().amax(dim=1, keepdim=True) / 127.5).bfloat16()
    codes = (weight / scale.float()).round().clamp(-128, 127)
    return {name: codes.to(torch.int8), f"{name}_scale": scale}, codes * scale.float()


def int4(weight: Tensor, name: str) -> tuple[Stored, Tensor]:
    rows, columns = weight.shape
    groups = weight.view(rows, columns // 16, 16)
    scale = groups.abs().amax(dim=2, keepdim=True) / 7.5
    codes = (groups / scale).round().clamp(-8, 7)
    numbers = (codes.view(rows, columns).to(torch.int64) + 8).view(rows, columns // 8, 8)
    packed = sum(numbers[..., place] << (4 * place) for place in range(8))
    packed = torch.as_tensor(packed).to(torch.int64)
    signed = torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)
    stored = {
        f"{name}_packed": signed,
        f"{name}_scale": scale.squeeze(2),
        f"{name}_shape": torch.tensor([rows, columns]),
    }
    return stored, (codes * scale).view(rows, columns)


def bnb_int8(weight: Tensor, name: str) -> tuple[Stored, Tensor]:
    most = weight.abs().amax(dim=1)
    codes = (weight * 127 / most[:, None]).round()
    stored = {name: codes.to(torch.int8), name.removesuffix("weight") + "SCB": most}
    return stored | {f"{name}_format": torch.tensor(0, dtype=torch.uint8)}, codes * most[:, None] / 127


def bnb_four(weight: Tensor, name: str, kind: str, nested: bool) -> tuple[Stored, Tensor]:
    from surgery.survive.formats import NF4

    table = torch.tensor(NF4 if kind == "nf4" else [*FP4, *(-code for code in FP4)])
    blocks = weight.reshape(-1, 64)
    most = blocks.abs().amax(dim=1)
    more: Stored = {f"{name}.absmax": most}
    about: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(weight.shape)}
    if nested:  # the largest sizes as codes of their own, about their mean
        own, middle = torch.linspace(-1, 1, 256), most.mean()
        size = (most - middle).abs().max()
        numbers = ((most - middle) / size)[:, None].sub(own).abs().argmin(dim=1)
        most = own[numbers] * size + middle
        more = {f"{name}.absmax": numbers.to(torch.uint8), f"{name}.nested_absmax": size[None]}
        more |= {f"{name}.nested_quant_map": own}
        about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": float(middle)}
    codes = (blocks / most[:, None])[..., None].sub(table).abs().argmin(dim=-1)
    pairs = codes.view(-1, 2).to(torch.uint8)
    state = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
    stored = {name: (pairs[:, 0] << 4 | pairs[:, 1])[:, None], f"{name}.quant_map": table}
    return stored | more | {f"{name}.quant_state.bitsandbytes__{kind}": state}, (table[codes] * most[:, None]).view_as(
        weight
    )


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"symmetric": True, **weights}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


KINDS: dict[str, tuple[dict[str, Any], Callable[[Tensor, str], tuple[Stored, Tensor]]]] = {
    "fp8 by block": (
        {"quant_method": "fp8", "weight_block_size": [16, 16]}, lambda w, n: fp8(w, n, (16, 16), "_scale_inv")
    ),
    "fp8 by matrix": (
        {"quant_method": "fp8", "weight_block_size": None}, lambda w, n: fp8(w, n, None, "_scale_inv")
    ),
    "fp8 by row": (
        compressed("float-quantized", num_bits=8, type="float", strategy="channel"),
        lambda w, n: fp8(w, n, (1, w.shape[1]), "_scale"),
    ),
    "int8": (compressed("int-quantized", num_bits=8, type="int", strategy="channel"), int8),
    "int4": (compressed("pack-quantized", num_bits=4, type="int", strategy="group", group_size=16), int4),
    "bitsandbytes int8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, bnb_int8),
    "bitsandbytes nf4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w, n: bnb_four(w, n, "nf4", False)
    ),
    "bitsandbytes nf4 nested": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w, n: bnb_four(w, n, "nf4", True)
    ),
    "bitsandbytes fp4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True}, lambda w, n: bnb_four(w, n, "fp4", False)
    ),
}  # fmt: skip


def quantised(base: Path, out: Path, kind: str) -> Path:
    """The checkpoint with the matrices of its blocks quantised, as the libraries store them."""
    about, store = KINDS[kind]
    shutil.copytree(base, out)
    stored: Stored = {}
    for name, tensor in load(base).items():
        inside = ".layers." in name and tensor.ndim == 2
        stored |= store(tensor.float(), name)[0] if inside else {name: tensor}
    save_file({name: tensor.contiguous() for name, tensor in stored.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": about}))
    return out


@pytest.fixture(scope="module")
def delta(checkpoint: Path) -> deltas.Delta:
    """Half a thousandth of a matrix's size in every second row, and a norm; much less than a step of any code."""
    generator = np.random.default_rng(0)
    difference = 0.003 * (1 + generator.random((32, 48))).astype(np.float32)
    difference[::2] = 0
    return deltas.make(
        {MATRIX: difference, NORM: np.full(32, 0.25, np.float32)}, checkpoint, base="tiny", recipe="", seed=0
    )


def weights_of(folder: Path, name: str = MATRIX) -> np.ndarray:
    """What the project reads of a quantised matrix."""
    stored = open_target(folder)
    return np.concatenate([weights for _, weights, _ in layer_rows(stored, stored.layers[name])])


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_directory_is_edited_and_undone(
    kind: str, checkpoint: Path, delta: deltas.Delta, tmp_path: Path
) -> None:
    folder = quantised(checkpoint, tmp_path / "q", kind)
    wanted = KINDS[kind][1](load(checkpoint)[MATRIX].float(), MATRIX)[1].numpy()
    assert np.allclose(weights_of(folder), wanted, atol=1e-6)
    before = hashes(folder)
    report = apply(delta, folder, tmp_path / "edited")
    difference = delta.read(MATRIX, 0, 32 * 48).reshape(32, 48)
    moved = weights_of(tmp_path / "edited") - weights_of(folder)
    assert not moved[::2].any() and moved[1::2].any()
    # By chance: right on average over many codes, far closer than the nearest code, which mostly stays.
    assert moved[1::2].mean() == pytest.approx(difference[1::2].mean(), rel=0.6 if "4" in kind else 0.35)
    change = next(one for one in report.tensors if one.name == MATRIX)
    assert change.entries == 32 * 48 and 0 < change.changed < 16 * 48 and change.lost == 16 * 48 - change.changed
    after = load(tmp_path / "edited")
    assert torch.equal(after[NORM], (load(folder)[NORM].float() + 0.25).to(after[NORM].dtype))
    codes = f"{MATRIX}_packed" if kind == "int4" else MATRIX
    for name, tensor in load(folder).items():
        if name not in (codes, NORM):
            assert torch.equal(*(one.reshape(-1).view(torch.uint8) for one in (tensor, after[name]))), name
    assert hashes(folder) == before
    undo(tmp_path / "edited", tmp_path / "back")
    assert hashes(tmp_path / "back") == before
    with pytest.raises(SurgeryError, match="holds this delta already"):
        apply(delta, tmp_path / "edited", tmp_path / "twice")
    again = apply(delta, tmp_path / "edited", tmp_path / "twice", force=True)
    assert again.out.is_dir()


def test_a_weight_without_a_difference_keeps_its_code_where_two_mean_the_same(
    checkpoint: Path, delta: deltas.Delta, tmp_path: Path
) -> None:
    """FP8 has a code for 0 and one for -0."""
    folder = quantised(checkpoint, tmp_path / "q", "fp8 by block")
    stored = load(folder)
    stored[MATRIX].view(torch.uint8)[:2, :5] = 128
    save_file(stored, folder / "model.safetensors")
    apply(delta, folder, tmp_path / "edited")
    codes = load(tmp_path / "edited")[MATRIX].view(torch.uint8)
    assert torch.equal(codes[::2], stored[MATRIX].view(torch.uint8)[::2])
    assert (codes[1, :5] != 128).any()


def test_the_nearest_codes_lose_what_chance_keeps(checkpoint: Path, tmp_path: Path) -> None:
    folder = quantised(checkpoint, tmp_path / "q", "int8")
    small = np.full((32, 48), 0.0005, np.float32)  # a tenth of a code
    delta = deltas.make({MATRIX: small}, checkpoint, base="tiny", recipe="", seed=0)
    near = apply(delta, folder, tmp_path / "near", rounding="nearest")
    far = apply(delta, folder, tmp_path / "chance")
    seeded = apply(delta, folder, tmp_path / "other", seed=7)
    changed = [next(one.changed for one in report.tensors if one.name == MATRIX) for report in (near, far, seeded)]
    assert changed[0] == 0 and 50 < changed[1] != changed[2] > 50


def test_e4m3_is_torch_s() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    assert np.array_equal(np.array(e4m3()), codes.view(torch.float8_e4m3fn).double().numpy(), equal_nan=True)


def test_inspect_tells_how_far_a_quantised_target_is(checkpoint: Path, delta: deltas.Delta, tmp_path: Path) -> None:
    delta.save(tmp_path / "delta.safetensors")
    folder = quantised(checkpoint, tmp_path / "q", "bitsandbytes nf4")
    found = inspect(tmp_path / "delta.safetensors", against=folder)
    assert found.verdict == "related" and found.distance is not None and 0.02 < found.distance < 0.3


def test_what_lies_beyond_the_scales_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    folder = quantised(checkpoint, tmp_path / "q", "int8")
    large = deltas.make({MATRIX: np.full((32, 48), 3.0, np.float32)}, checkpoint, base="tiny", recipe="", seed=0)
    with pytest.raises(SurgeryError, match=r"of the edit .* beyond what its scales hold; two ways remain"):
        apply(large, folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["q"]


def changed_config(folder: Path, **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= more
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("method", ["gptq", "awq", "auto-round", "hqq", "mxfp4", "torchao", "aqlm"])
def test_other_methods_are_refused_by_name(method: str, checkpoint: Path, delta: deltas.Delta, tmp_path: Path) -> None:
    folder = quantised(checkpoint, tmp_path / "q", "int8")
    changed_config(folder, quant_method=method)
    with pytest.raises(SurgeryError, match=f"quantised by {method}.*before it is quantised, or serve .* LoRA adapter"):
        apply(delta, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("int4", compressed("pack-quantized", symmetric=False), "asymmetric codes"),
        ("int4", compressed("pack-quantized", actorder="group"), "reordered by activation"),
        ("int8", compressed("marlin-24"), "format 'marlin-24'"),
    ],
)
def test_other_layouts_are_refused_by_name(
    kind: str, change: dict[str, Any], message: str, checkpoint: Path, delta: deltas.Delta, tmp_path: Path
) -> None:
    folder = quantised(checkpoint, tmp_path / "q", kind)
    changed_config(folder, **change)
    with pytest.raises(SurgeryError, match=f"{message}.*two ways remain"):
        apply(delta, folder, tmp_path / "out")


@pytest.mark.parametrize(
    "kind, missing",
    [
        ("fp8 by block", "_scale_inv"),
        ("int8", "_scale"),
        ("int4", "_scale"),
        ("bitsandbytes int8", "SCB"),
        ("bitsandbytes nf4", ".absmax"),
        ("bitsandbytes nf4", ".quant_state.bitsandbytes__nf4"),
    ],
)
def test_a_matrix_without_its_scales_is_refused(
    kind: str, missing: str, checkpoint: Path, delta: deltas.Delta, tmp_path: Path
) -> None:
    folder = quantised(checkpoint, tmp_path / "q", kind)
    stored = load(folder)
    lost = MATRIX.removesuffix("weight") + missing if missing == "SCB" else MATRIX + missing
    del stored[lost]
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(SurgeryError, match="is missing; get"):
        apply(delta, folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scales_beside_weights_that_are_not_compressed_are_refused(
    checkpoint: Path, delta: deltas.Delta, tmp_path: Path
) -> None:
    folder = quantised(checkpoint, tmp_path / "q", "int8")
    stored = load(folder)
    stored[MATRIX] = stored[MATRIX].to(torch.bfloat16)
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(SurgeryError, match="stored in BF16 beside its scales"):
        apply(delta, folder, tmp_path / "out")
