"""Q4_K, which the gguf library reads and does not write: fp32 rows to the bytes that llama.cpp's reference makes.

A block is 256 weights: two fp16 numbers d and dmin, eight 6-bit scales and eight 6-bit minima for its eight parts of 32
weights, and 4-bit codes, so that a weight is d * scale * code - dmin * minimum. Scale and minimum of each part are
searched as in ggml-quants.c (make_qkx2_quants and quantize_row_q4_K_ref, without an importance matrix).
"""

import numpy as np
from jaxtyping import Float

BLOCK = 256
_PARTS, _SIZE, _CODES = 8, 32, 15
_STEPS, _FIRST, _STEP = 21, -1.0, 0.1  # the scales tried: (15 - 1 + 0.1 n) / (largest - smallest)
_AT_ONCE = 2**15  # parts held at once, so that they stay in the cache


def quantise_q4_k(values: Float[np.ndarray, "rows columns"]) -> np.ndarray:
    """The stored bytes (uint8 [rows, columns / 256 * 144]) of fp32 rows whose length is a multiple of 256."""
    rows, columns = values.shape
    parts = np.ascontiguousarray(values, np.float32).reshape(-1, _SIZE)
    scales, minima = np.empty(len(parts), np.float32), np.empty(len(parts), np.float32)
    for start in range(0, len(parts), _AT_ONCE):
        chosen = slice(start, start + _AT_ONCE)
        scales[chosen], minima[chosen] = _scale_and_minimum(parts[chosen])
    scale, whole = _six_bits(scales.reshape(-1, _PARTS))
    minimum, least = _six_bits(minima.reshape(-1, _PARTS))
    d, dmin = whole.astype(np.float16), least.astype(np.float16)
    step = (d.astype(np.float32) * scale).reshape(-1, 1)
    lowest = (dmin.astype(np.float32) * minimum).reshape(-1, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        codes = np.where(step == 0, 0, np.clip(np.rint((parts + lowest) / step), 0, _CODES)).astype(np.uint8)
    halves = codes.reshape(-1, _PARTS // 2, 2, _SIZE)
    packed = (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(-1, BLOCK // 2)
    stored = np.hstack([d.view(np.uint8), dmin.view(np.uint8), _packed(scale, minimum), packed])
    return stored.reshape(rows, columns // BLOCK * stored.shape[1])


def _scale_and_minimum(
    x: Float[np.ndarray, "parts 32"],
) -> tuple[Float[np.ndarray, " parts"], Float[np.ndarray, " parts"]]:
    """Scale and (negated) minimum of each part with the least weighted square error among those tried."""
    weights = np.abs(x) + np.sqrt(np.square(x).mean(axis=1, keepdims=True))
    low, high = np.minimum(x.min(axis=1), 0), x.max(axis=1)
    flat = high == low
    w, wx = weights.sum(axis=1, dtype=np.float64), np.einsum("ij,ij->i", weights, x).astype(np.float64)
    wxx = np.einsum("ij,ij,ij->i", weights, x, x).astype(np.float64)
    best = np.full(len(x), np.inf)
    scale, least = np.zeros(len(x)), low.astype(np.float64)
    for step in range(-1, _STEPS):  # -1: from the smallest to the largest, whatever that costs
        # As in ggml, each step starts from the best minimum so far.
        start = least.astype(np.float32)
        width = np.where(flat, 1, high - start)
        factor = (_CODES if step < 0 else _CODES + np.float32(_FIRST + _STEP * step)) / width
        codes = np.rint((x - start[:, None]) * factor[:, None])
        np.clip(codes, 0, _CODES, out=codes)
        weighted = weights * codes
        wl, wll = weighted.sum(axis=1, dtype=np.float64), np.einsum("ij,ij->i", weighted, codes).astype(np.float64)
        wxl = np.einsum("ij,ij->i", weighted, x).astype(np.float64)
        if step < 0:
            tried, minimum, usable = 1 / factor.astype(np.float64), low.astype(np.float64), np.ones(len(x), bool)
        else:
            determinant = w * wll - wl * wl
            usable = determinant > 0
            safe = np.where(usable, determinant, 1)
            tried, minimum = (w * wxl - wx * wl) / safe, (wll * wx - wl * wxl) / safe
            above_zero = minimum > 0
            tried = np.where(above_zero, wxl / np.maximum(wll, 1e-300), tried)
            minimum = np.where(above_zero, 0, minimum)
        error = tried**2 * wll + minimum**2 * w + wxx + 2 * (tried * minimum * wl - tried * wxl - minimum * wx)
        better = usable & (error < best)
        best, scale, least = (np.where(better, a, b) for a, b in ((error, best), (tried, scale), (minimum, least)))
    scale[flat], least[flat] = 0, low[flat]
    return scale.astype(np.float32), -least.astype(np.float32)


def _six_bits(numbers: Float[np.ndarray, "blocks 8"]) -> tuple[np.ndarray, Float[np.ndarray, "blocks 1"]]:
    """(integers 0 to 63, what one of them is worth) for the eight numbers of each block."""
    largest = numbers.max(axis=1, keepdims=True)
    with np.errstate(divide="ignore"):
        factor = np.where(largest > 0, 63 / largest, 0).astype(np.float32)
    whole = np.clip(np.rint(factor * numbers), 0, 63).astype(np.uint8)
    return whole, (np.maximum(largest, 0) / 63).astype(np.float32)


def _packed(scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
    """Twelve bytes for eight scales and eight minima of six bits: the last four give their upper two to the first."""
    first = scale[:, :4] | ((scale[:, 4:] >> 4) << 6)
    second = minimum[:, :4] | ((minimum[:, 4:] >> 4) << 6)
    third = (scale[:, 4:] & 15) | ((minimum[:, 4:] & 15) << 4)
    return np.hstack([first, second, third]).astype(np.uint8)
