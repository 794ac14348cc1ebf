"""Widen stored floats to fp32 and round fp32 back to fp16 or bf16, by nearest or stochastically, in numpy.

Stochastic rounding rounds up with the probability of the distance to the lower neighbour, so that the
expected value is exact: a small edit survives a coarse type on average, where round-to-nearest loses it. The
random bits come from a counter: they depend on the seed, the tensor's name and the element's index and on
nothing else, so chunk size, sharding and order of work do not change a byte.
"""

import hashlib
import math
from typing import Any, Literal

import numpy as np

from surgery.errors import SurgeryError

Rounding = Literal["nearest", "stochastic", "auto"]
ROUNDINGS = ("nearest", "stochastic", "auto")
# The dtypes an edit can be written to, as numpy sees their bytes.
STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype("<u2")}
# As whole words, whatever they mean: these, and what holds the codes of quantised matrices.
WORDS = STORED | {"F8_E4M3": np.dtype("u1"), "I8": np.dtype("u1"), "U8": np.dtype("u1"), "I32": np.dtype("<u4")}


def hash64(counter: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser over an array of counters (Steele, Lea and Flood 2014): uint64 in, uint64 out."""
    z = counter.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def random16(seed: int, name: str, start: int, count: int) -> np.ndarray:
    """16 random bits (uint16, shape [count]) for the elements `start`... of the tensor `name`."""
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little")
    first, last = start // 4, (start + count + 3) // 4  # one 64-bit number serves four elements
    counter = np.arange(first, last, dtype=np.uint64) + np.uint64(key)
    lanes = hash64(counter).astype("<u8").view("<u2")
    return lanes[start - 4 * first : start - 4 * first + count]


def widen(stored: np.ndarray, dtype: str) -> np.ndarray:
    """fp32 values of the stored numbers, exactly. `stored` has the numpy type STORED[dtype]."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)


def narrow(values: np.ndarray, dtype: str, rounding: str, seed: int, name: str, start: int) -> np.ndarray:
    """Round fp32 `values` [n], which are the elements `start`... of tensor `name`, to the stored dtype.

    `rounding` is "nearest" (ties to even), "stochastic", or "auto": stochastic for 16 bits, exact for fp32.

    Raises:
        SurgeryError: a result is not finite (overflow of the dtype).
    """
    if dtype == "F32":
        result = values
        finite = bool(np.isfinite(values).all())
    elif dtype == "BF16":
        result = _to_bf16(values, rounding, seed, name, start)
        finite = bool(((result & np.uint16(0x7F80)) != 0x7F80).all())
    else:
        result = _to_fp16(values, rounding, seed, name, start)
        finite = bool(np.isfinite(result).all())
    if not finite:
        raise SurgeryError(f"{name}: the edited value is too large for {dtype}; use a smaller --scale")
    return result


def _to_bf16(values: np.ndarray, rounding: str, seed: int, name: str, start: int) -> np.ndarray:
    bits = values.view(np.uint32)
    if rounding == "nearest":
        # Half to even: add 0x7FFF plus the lowest kept bit, then cut.
        added = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    else:
        # Adding 16 uniform bits before cutting carries with the probability of the cut remainder.
        added = random16(seed, name, start, values.size).astype(np.uint32)
    # No wrap-around: the largest finite fp32 has bits 0x7F7FFFFF; it becomes inf at most, which is refused.
    return ((bits + added) >> np.uint32(16)).astype(np.uint16)


def _to_fp16(values: np.ndarray, rounding: str, seed: int, name: str, start: int) -> np.ndarray:
    with np.errstate(over="ignore"):
        if rounding == "nearest":
            return values.astype(np.float16)
        draw = random16(seed, name, start, values.size) >> np.uint16(3)
        # As for bf16, with the 13 bits that fp16 does not keep of an fp32 number.
        kept = ((values.view(np.uint32) + draw) & np.uint32(0xFFFFE000)).view(np.float32)
        # Below 2**-14 the step of fp16 is 2**-24 everywhere: floor(x + u) is x on average, u uniform in [0, 1).
        small = np.abs(values) < np.float32(2.0**-14)
        steps = np.floor(values[small] * np.float32(2.0**24) + draw[small] * np.float32(2.0**-13))
        kept[small] = steps * np.float32(2.0**-24)
        return kept.astype(np.float16)


def add(
    stored: np.ndarray,
    difference: np.ndarray,
    dtype: str,
    *,
    scale: float,
    rounding: str,
    seed: int,
    name: str,
    start: int,
) -> np.ndarray:
    """The edited numbers: fp32(stored) + scale * difference, rounded once to `dtype`. All arrays have shape
    [n].

    The one formula behind an edit on disk and an edit of a live model, which is why both give the same bytes.
    Where the scaled difference is zero the stored bits stay as they are, -0.0 included.

    Raises:
        SurgeryError: a result overflows the dtype.
    """
    moved = difference if scale == 1.0 else difference * np.float32(scale)
    edited = narrow(widen(stored, dtype) + moved, dtype, rounding, seed, name, start)
    return edited if moved.all() else np.where(moved == 0, stored, edited)


def refuse_not_finite(values: np.ndarray, name: str, where: str) -> None:
    """Raises: SurgeryError when any value is NaN or infinite."""
    # One pass without a temporary: the sum is finite unless some value is not, or it overflows; then look
    # closely.
    with np.errstate(over="ignore", invalid="ignore"):
        total = float(values.sum(dtype=np.float64))
    if not math.isfinite(total) and not np.isfinite(values).all():
        raise SurgeryError(f"{where}: {name!r} holds NaN or infinity; the file is broken, make it again")
