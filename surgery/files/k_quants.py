"""Q4_K, Q5_K and Q6_K, which the gguf library reads and does not write: new codes under the scales that a block has.

A block is 256 weights in parts that share a scale, and a weight is step * code - lowest (ggml's ggml-common.h); step
and lowest come from the block's fp16 numbers and its 6- or 8-bit scales, which stay as they are, as the size does.
"""

import numpy as np
from jaxtyping import Float, UInt8

KINDS = ("Q4_K", "Q5_K", "Q6_K")
_SIZE = {"Q4_K": 32, "Q5_K": 32, "Q6_K": 16}  # weights of a part
HIGHEST = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63}


def recode(
    kind: str,
    raw: UInt8[np.ndarray, "blocks bytes"],
    moved: Float[np.ndarray, "blocks 256"],
    draw: Float[np.ndarray, "blocks 256"] | None,
) -> tuple[UInt8[np.ndarray, "blocks bytes"], float]:
    """The blocks with the codes of their weights + ``moved``, and what of it lies beyond the codes (sum of squares).

    Codes are the nearest, or with ``draw`` (uniform in [0, 1)) up or down by chance; weights that do not move keep
    theirs. Half a step beyond the last code is rounding and does not count.
    """
    step = _steps(kind, raw)
    old = _codes(kind, raw)
    parts = (len(raw), -1, _SIZE[kind])
    with np.errstate(divide="ignore", invalid="ignore"):
        wanted = np.where(step == 0, 0, moved.reshape(parts) / step).reshape(old.shape) + old
    chosen = np.rint(wanted) if draw is None else np.floor(wanted + draw)
    codes = np.where(wanted == old, old, np.clip(chosen, 0, HIGHEST[kind])).astype(np.uint8)
    beyond = (wanted - np.clip(wanted, -0.5, HIGHEST[kind] + 0.5)).reshape(parts) * step
    lost = np.where(step == 0, moved.reshape(parts), beyond)
    return _packed(kind, raw, codes), float(np.square(lost, dtype=np.float64).sum())


def _steps(kind: str, raw: np.ndarray) -> Float[np.ndarray, "blocks parts 1"]:
    from gguf.quants import Q4_K

    if kind == "Q6_K":
        numbers = raw[:, 192:208].copy().view(np.int8).astype(np.float32)
        return (raw[:, 208:210].copy().view(np.float16).astype(np.float32) * numbers)[..., None]
    scale, _ = Q4_K.get_scale_min(np.ascontiguousarray(raw[:, 4:16]))
    return (raw[:, :2].copy().view(np.float16).astype(np.float32) * scale)[..., None]


def _codes(kind: str, raw: np.ndarray) -> UInt8[np.ndarray, "blocks 256"]:
    """The inverse of `_packed`."""
    if kind == "Q6_K":
        low, high = raw[:, :128].reshape(-1, 2, 2, 32), raw[:, 128:192].reshape(-1, 2, 1, 32)
        four = np.concatenate([low & 15, low >> 4], axis=2)
        two = np.concatenate([high >> (2 * run) & 3 for run in range(4)], axis=2)
        return (four | two << 4).reshape(-1, 256)
    low = raw[:, -128:].reshape(-1, 4, 1, 32)
    codes = np.concatenate([low & 15, low >> 4], axis=2).reshape(-1, 8, 32)
    if kind == "Q5_K":
        codes = codes | np.stack([raw[:, 16:48] >> run & 1 for run in range(8)], axis=1) << 4
    return codes.reshape(-1, 256)


def _packed(kind: str, raw: np.ndarray, codes: UInt8[np.ndarray, "blocks 256"]) -> np.ndarray:
    found = raw.copy()
    if kind == "Q6_K":  # halves of 128: four runs of 32, low bits of the first two below those of the last two
        halves = codes.reshape(len(raw), 2, 4, 32)
        low, high = halves & 15, halves >> 4
        found[:, :128] = (low[:, :, :2] | low[:, :, 2:] << 4).reshape(-1, 128)
        shifted = high << np.array([0, 2, 4, 6], np.uint8)[:, None]
        found[:, 128:192] = np.bitwise_or.reduce(shifted, axis=2).reshape(-1, 64)
        return found
    pairs = codes.reshape(len(raw), 4, 2, 32)
    low = pairs & 15
    found[:, -128:] = (low[:, :, 0] | low[:, :, 1] << 4).reshape(-1, 128)
    if kind == "Q5_K":
        runs = codes.reshape(len(raw), 8, 32) >> 4
        found[:, 16:48] = np.bitwise_or.reduce(runs << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    return found
