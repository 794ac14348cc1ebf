"""Which tensors of a checkpoint directory hold its quantised matrices, by its config; whatever is refused, is here.

Read are FP8 (DeepSeek's and transformers' "fp8", "fbgemm_fp8", compressed-tensors' "float-quantized"; a scale for the
matrix, a row or a block), int8 (compressed-tensors' "int-quantized", bitsandbytes), packed int4 and int8
(compressed-tensors' "pack-quantized") and bitsandbytes' 4-bit codes. GPTQ and AWQ choose codes together, from
calibration texts, so that new ones of single weights would not be theirs: these are refused, as is every other layout.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.errors import SurgeryError
from surgery.files.quantised import Layer, e4m3, signed
from surgery.files.safetensors_io import Entry

TWO_WAYS = (
    "two ways remain: apply the delta to the checkpoint before it is quantised, or serve the edit as a LoRA adapter on "
    "top (surgery export DELTA --peft DIR --served)"
)
_CODES = {"F8_E4M3": "FP8", "I8": "int8"}
_BLOCKED = ("fp8", "fbgemm_fp8")
_FORMATS = ("float-quantized", "naive-quantized", "int-quantized", "pack-quantized")
Read = Callable[[str], np.ndarray]  # a stored tensor's numbers, flat


def quantisation(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """What a config says of its quantised weights; None where they are plain."""
    inner = config.get("text_config")
    for part in (config, inner if isinstance(inner, dict) else {}):
        found = part.get("quantization_config") or part.get("compression_config")
        if found:
            return found if isinstance(found, dict) else {}
    return None


def layers(config: Mapping[str, Any], entries: Mapping[str, Entry], read: Read, where: str) -> dict[str, Layer]:
    """The quantised matrices of a checkpoint by name.

    Raises:
        SurgeryError: a method or a layout that cannot take an edit exactly; a matrix without its scales.
    """
    about = quantisation(config)
    if about is None:
        return {}
    method = str(about.get("quant_method", "unnamed"))[:40]
    if method in _BLOCKED:
        block = about.get("weight_block_size")
        found = _scaled(entries, where, method, tuple(block) if block else None)
    elif method == "compressed-tensors":
        found = _compressed(about, entries, read, where)
    elif method == "bitsandbytes":
        found = _bitsandbytes(entries, read, where)
    else:
        raise SurgeryError(
            f"{where}: its weights are quantised by {method}, whose codes cannot be chosen one by one; {TWO_WAYS}"
        )
    return {layer.name: layer for layer in found}


def _scaled(entries: Mapping[str, Entry], where: str, method: str, block: tuple[int, ...] | None) -> list[Layer]:
    """FP8 and int8 codes with a scale for the matrix, each row, or each block."""
    found = []
    for name, entry in entries.items():
        if entry.dtype not in _CODES or not name.endswith(".weight"):
            continue
        scale = next((f"{name}{end}" for end in ("_scale_inv", "_scale") if f"{name}{end}" in entries), None)
        if scale is None:
            raise SurgeryError(
                f"{where}: {name!r} holds {_CODES[entry.dtype]} codes and {name}_scale is missing; get it again"
            )
        if len(entry.shape) != 2:
            raise SurgeryError(f"{where}: {name!r} has shape {list(entry.shape)}, expected a matrix; {TWO_WAYS}")
        group = _group(entry.shape, entries[scale], block, name, where)
        table = e4m3() if entry.dtype == "F8_E4M3" else signed(8, -128)
        found.append(Layer(name, f"{_CODES[entry.dtype]} ({method})", entry.shape, name, 8, table, scale, group))
    return found


def _group(
    shape: tuple[int, ...], scale: Entry, block: tuple[int, ...] | None, name: str, where: str
) -> tuple[int, int]:
    """How many rows and columns share a scale; 0: all."""
    if scale.dtype not in ("F32", "F16", "BF16"):
        raise SurgeryError(f"{where}: the scales of {name!r} are stored as {scale.dtype}, expected floats; {TWO_WAYS}")
    rows, columns = shape
    if scale.elements == 1:
        return 0, 0
    if scale.elements == rows and scale.shape[0] == rows:
        return 1, 0
    if block and scale.shape == (-(-rows // block[0]), -(-columns // block[1])):
        return int(block[0]), int(block[1])
    if len(scale.shape) == 2 and scale.shape[0] == rows and columns % scale.shape[1] == 0:
        return 1, columns // scale.shape[1]
    raise SurgeryError(
        f"{where}: {name!r} is {list(shape)} and its scales are {list(scale.shape)}; expected one for the matrix, for "
        f"each row, or for each block of {list(block or ())}; get the checkpoint again"
    )


def _compressed(about: Mapping[str, Any], entries: Mapping[str, Entry], read: Read, where: str) -> list[Layer]:
    form, block = str(about.get("format")), None
    groups = about.get("config_groups") or {}
    for one in groups.values() if isinstance(groups, dict) else ():
        weights = one.get("weights") or {}
        block = weights.get("block_structure") or block
        own = str(one.get("format") or form)
        if own not in _FORMATS:
            raise SurgeryError(
                f"{where}: compressed-tensors' format {own[:40]!r} cannot take an edit exactly; {TWO_WAYS}"
            )
        if not weights.get("symmetric", True) or weights.get("actorder"):
            what = "asymmetric codes" if not weights.get("symmetric", True) else "columns reordered by activation"
            raise SurgeryError(f"{where}: compressed-tensors with {what} cannot take an edit exactly; {TWO_WAYS}")
    for name, entry in entries.items():
        if entry.dtype in ("F32", "F16", "BF16") and name.endswith(".weight") and f"{name}_scale" in entries:
            raise SurgeryError(
                f"{where}: {name!r} is stored in {entry.dtype} beside its scales, so that it is rounded again when "
                f"it is opened; compress the checkpoint first, or: {TWO_WAYS}"
            )
    found = _scaled(entries, where, "compressed-tensors", tuple(block) if block else None)
    for packed, entry in entries.items():
        if not packed.endswith(".weight_packed"):
            continue
        name = packed.removesuffix("_packed")
        missing = next((f"{name}_{part}" for part in ("scale", "shape") if f"{name}_{part}" not in entries), None)
        if missing:
            raise SurgeryError(f"{where}: {packed!r} is there and {missing!r} is missing; get the checkpoint again")
        rows, columns = (int(size) for size in read(f"{name}_shape"))
        bits = next((bits for bits in (4, 8) if entry.shape == (rows, -(-columns * bits // 32))), None)
        if bits is None or entry.dtype != "I32" or columns * (bits or 1) % 32:
            raise SurgeryError(
                f"{where}: {packed!r} is {list(entry.shape)}, no 4- or 8-bit codes in whole words; {TWO_WAYS}"
            )
        table = tuple(float(code - 2 ** (bits - 1)) for code in range(2**bits))
        group = _group((rows, columns), entries[f"{name}_scale"], None, name, where)
        kind = f"int{bits} (compressed-tensors)"
        found.append(Layer(name, kind, (rows, columns), packed, bits, table, f"{name}_scale", group))
    return found


def _bitsandbytes(entries: Mapping[str, Entry], read: Read, where: str) -> list[Layer]:
    found = []
    for name, entry in entries.items():
        if not name.endswith(".weight") or entry.dtype not in ("I8", "U8"):
            continue
        if entry.dtype == "I8":
            scale = f"{name.removesuffix('weight')}SCB"
            if scale not in entries or entries[scale].elements != entry.shape[0]:
                raise SurgeryError(
                    f"{where}: {name!r} holds int8 codes and {scale!r} is missing; get the checkpoint again"
                )
            kind = "int8 (bitsandbytes)"
            found.append(Layer(name, kind, entry.shape, name, 8, signed(8, -127), scale, (1, 0), divisor=127.0))
            continue
        state = next((other for other in entries if other.startswith(f"{name}.quant_state.bitsandbytes__")), None)
        scale, codes = f"{name}.absmax", f"{name}.quant_map"
        missing = [part for part in (state or f"{name}.quant_state", scale, codes) if part not in entries]
        if missing or state is None:
            raise SurgeryError(
                f"{where}: {name!r} holds 4-bit codes and {missing[0]!r} is missing; get the checkpoint again"
            )
        kept = json.loads(bytes(read(state).astype(np.uint8)).decode("utf-8"))
        rows, columns = (int(size) for size in kept["shape"])
        if columns % 2:
            raise SurgeryError(f"{where}: {name!r} has rows of {columns}, an odd number of 4-bit codes; {TWO_WAYS}")
        table = tuple(float(value) for value in read(codes))
        kind = f"{kept['quant_type'].upper()} (bitsandbytes)"
        block = (int(kept["blocksize"]),)
        found.append(Layer(name, kind, (rows, columns), name, 4, table, scale, block, high_first=True))
    return found


def scales_of(layer: Layer, entries: Mapping[str, Entry], read: Read) -> Float[np.ndarray, " scales"]:
    """The stored scales, fp32, flat; bitsandbytes' that are quantised themselves are put together first."""
    found = read(layer.scale)
    nested = f"{layer.name}.nested_absmax"
    if nested not in entries:
        return found.astype(np.float32)
    state = next(other for other in entries if other.startswith(f"{layer.name}.quant_state.bitsandbytes__"))
    kept = json.loads(bytes(read(state).astype(np.uint8)).decode("utf-8"))
    codes, largest = read(f"{layer.name}.nested_quant_map"), read(nested)
    each = largest[np.arange(found.size) // int(kept["nested_blocksize"])]
    return (codes[found.astype(np.int64)] * each + np.float32(kept["nested_offset"])).astype(np.float32)
