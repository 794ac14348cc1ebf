"""Weights to the stored bytes of a GGUF type: as the gguf library rounds, or with codes rounded by chance."""

import numpy as np
from jaxtyping import Float, UInt8

from surgery.files.q4_k import quantise_q4_k

# Codes of a block of 32: (lowest, highest, from the smallest value upwards). Q4_0 and Q5_0 put the value that is
# largest in size at the lowest code, whatever its sign; Q4_1 and Q5_1 reach from the smallest to the largest.
_CODES = {"Q4_0": (-8, 7), "Q5_0": (-16, 15), "Q8_0": (-127, 127), "Q4_1": (0, 15), "Q5_1": (0, 31)}


def quantise(
    values: Float[np.ndarray, "rows columns"], kind: str, draw: Float[np.ndarray, "rows columns"] | None = None
) -> UInt8[np.ndarray, "rows bytes"]:
    """The stored bytes of fp32 values; without `draw` as the library (of Q4_K: llama.cpp) rounds them.

    With `draw` (uniform in [0, 1)) a block's codes are rounded up with the probability of their distance to the lower
    one, between the block's own extremes, so that small edits survive on average.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import quantize

    if kind == "Q4_K":
        return quantise_q4_k(values)
    if draw is not None and kind in _CODES:
        return _by_chance(values, kind, draw)[0]
    stored = np.ascontiguousarray(quantize(values, GGMLQuantizationType[kind]))
    return stored.view(np.uint8).reshape(values.shape[0], -1)


def requantise(
    values: Float[np.ndarray, "rows columns"], kind: str, draw: Float[np.ndarray, "rows columns"] | None = None
) -> tuple[UInt8[np.ndarray, "rows bytes"], Float[np.ndarray, "rows columns"]]:
    """As ``quantise``, and what the stored bytes mean, in fp32."""
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    if draw is not None and kind in _CODES:
        return _by_chance(values, kind, draw)
    stored = quantise(values, kind, draw)
    meant = dequantize(stored, GGMLQuantizationType[kind]).astype(np.float32, copy=False)
    return stored, meant.reshape(values.shape)


def _extreme(of: np.ufunc, values: Float[np.ndarray, "rows columns"]) -> Float[np.ndarray, "blocks 1"]:
    """The largest or smallest of each 32, by halves: seven times as fast as numpy along so short an axis."""
    found = np.ascontiguousarray(values).reshape(-1)
    for _ in range(5):
        found = of(found[0::2], found[1::2])
    return found[:, None]


def _by_chance(
    values: Float[np.ndarray, "rows columns"], kind: str, draw: Float[np.ndarray, "rows columns"]
) -> tuple[UInt8[np.ndarray, "rows bytes"], Float[np.ndarray, "rows columns"]]:
    """Codes under the step as it is stored (fp16), so that no rounding of the step moves what they mean."""
    low, high = _CODES[kind]
    blocks = values.reshape(-1, 32)
    top, bottom = _extreme(np.maximum, values), _extreme(np.minimum, values)
    if kind in ("Q4_1", "Q5_1"):
        step, smallest = ((top - bottom) / high).astype(np.float16), bottom.astype(np.float16)
        head, start = [step, smallest], smallest.astype(np.float32)
        numbers = blocks - start
    else:
        numbers, start = blocks, None
        largest = np.where(-bottom > top, bottom, top)
        step = (np.abs(largest) / high if kind == "Q8_0" else largest / low).astype(np.float16)
        head = [step]
    wide = step.astype(np.float32)
    inverse = np.divide(1, wide, out=np.zeros_like(wide), where=wide != 0)
    codes = numbers * inverse
    codes += draw.reshape(-1, 32)
    codes += np.float32(2.0**-17)  # the middle of a draw of 16 bits: what is a code already stays it
    np.floor(codes, out=codes)
    np.clip(codes, low, high, out=codes)
    meant = codes * wide
    if start is not None:
        meant += start
    stored = np.hstack([*(part.view(np.uint8) for part in head), *_packed(codes, kind, low)])
    return stored.reshape(len(values), -1), meant.reshape(values.shape)


def _packed(codes: Float[np.ndarray, "blocks 32"], kind: str, low: int) -> list[UInt8[np.ndarray, "blocks bytes"]]:
    """The codes as they are stored behind a block's step."""
    if kind == "Q8_0":
        return [codes.astype(np.int8).view(np.uint8)]
    if low:
        codes -= low
    whole = codes.astype(np.uint8)
    nibbles = (whole[:, :16] & 15) | (whole[:, 16:] << 4)
    if kind in ("Q5_0", "Q5_1"):  # the fifth bits, as one 32-bit number
        return [np.packbits(whole >> 4, axis=1, bitorder="little"), nibbles]
    return [nibbles]
