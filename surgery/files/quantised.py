"""A quantised matrix: what its stored codes mean, and codes for new values; a weight is code x scale.

Scales stay as they are: they belong to the scheme, and with them every weight that an edit leaves alone keeps its code.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Layer:
    """One quantised matrix.

    name: of the matrix, as a model that is not quantised has it. codes: the stored tensor that an edit changes; bits:
    of a code in it, from the lowest bit on, or with ``high_first`` from the highest half of a byte. table: what each
    code means, by its number. scale: the stored tensor of the scales; group: how many rows and columns share one (0:
    all), or of the flat matrix how many elements.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    codes: str
    bits: int
    table: tuple[float, ...]
    scale: str
    group: tuple[int, ...]
    high_first: bool = False
    divisor: float = 1.0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def row_bytes(self) -> int:
        """Of the codes; packed rows end with whole 32-bit words."""
        words = 8 if self.high_first or self.bits == 8 else 32
        return -(-self.shape[1] * self.bits // words) * words // 8

    @property
    def meant(self) -> np.ndarray:
        """What the codes mean, rising, without those that mean nothing."""
        return _sorted(self.table)[1]

    def unpack(self, raw: bytes | np.ndarray, rows: int) -> np.ndarray:
        """Code numbers uint8 [rows, columns] of the stored bytes of whole rows."""
        stored = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        if self.bits == 8:
            return stored
        low, high = stored & 15, stored >> 4
        pairs = np.stack([high, low] if self.high_first else [low, high], axis=-1)
        return pairs.reshape(rows, -1)[:, : self.shape[1]]

    def pack(self, codes: np.ndarray, raw: bytes) -> np.ndarray:
        """The stored bytes (uint8, flat) of code numbers [rows, columns]; padding keeps the bits of ``raw``."""
        if self.bits == 8:
            return np.ascontiguousarray(codes, np.uint8).reshape(-1)
        whole = self.unpack_all(raw, len(codes))
        whole[:, : self.shape[1]] = codes
        first, second = (whole[:, ::2], whole[:, 1::2])
        low, high = (second, first) if self.high_first else (first, second)
        return np.ascontiguousarray(low | (high << 4), np.uint8).reshape(-1)

    def unpack_all(self, raw: bytes, rows: int) -> np.ndarray:
        """As ``unpack``, with the padding at the end of each row."""
        stored = np.frombuffer(raw, np.uint8).reshape(rows, -1)
        pairs = (stored >> 4, stored & 15) if self.high_first else (stored & 15, stored >> 4)
        return np.stack(pairs, axis=-1).reshape(rows, -1)

    def scales(self, given: np.ndarray, start: int, stop: int) -> Float[np.ndarray, "rows columns"]:
        """The scale of each weight of some rows, from the stored scales ``given`` (flat)."""
        rows, columns = self.shape
        if len(self.group) == 1:  # blocks of the flat matrix
            first, last = start * columns, stop * columns
            return given[np.arange(first, last) // self.group[0]].reshape(-1, columns) / np.float32(self.divisor)
        tall, wide = (size or whole for size, whole in zip(self.group, self.shape, strict=True))
        grid = given.reshape(-(-rows // tall), -(-columns // wide))
        found = grid[np.arange(start, stop) // tall][:, np.arange(columns) // wide]
        return found / np.float32(self.divisor)

    def decode(self, raw: bytes | np.ndarray, scales: Float[np.ndarray, "rows columns"]) -> np.ndarray:
        """The weights, fp32 [rows, columns]."""
        return _table(self.table)[self.unpack(raw, len(scales))] * scales

    def encode(
        self,
        values: Float[np.ndarray, "rows columns"],
        scales: Float[np.ndarray, "rows columns"],
        draw: np.ndarray | None,
    ) -> np.ndarray:
        """Code numbers uint8 [rows, columns]: nearest, or with ``draw`` (uniform in [0, 1)) up or down by chance.

        By chance a value between two codes becomes the upper one with the probability of its distance to the lower
        one, so that an edit smaller than a code survives on average. Values beyond the codes get the last one.
        """
        numbers, meant = _sorted(self.table)
        with np.errstate(divide="ignore", invalid="ignore"):
            wanted = np.where(scales == 0, 0, values / scales).astype(np.float32)
        above = np.clip(np.searchsorted(meant, wanted, side="right"), 1, len(meant) - 1)
        low, high = meant[above - 1], meant[above]
        part = np.clip((wanted - low) / (high - low), 0, 1)
        # A code's own value is that code but for the last bit of the division.
        part = np.where(np.abs(part - np.rint(part)) < 1e-4, np.rint(part), part)
        up = part > (0.5 if draw is None else draw)
        return numbers[np.where(up, above, above - 1)]


@cache
def _table(table: tuple[float, ...]) -> np.ndarray:
    return np.array(table, np.float32)


@cache
def _sorted(table: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(code numbers, what they mean) by rising value, without NaN and twice the same value (FP8's -0)."""
    values = np.array(table, np.float32)
    meant, numbers = np.unique(np.where(np.isnan(values), np.inf, values) + 0.0, return_index=True)
    finite = np.isfinite(meant)
    return numbers[finite].astype(np.uint8), meant[finite]


@cache
def e4m3() -> tuple[float, ...]:
    """What the 256 codes of FP8 E4M3 mean: 4 bits of exponent (bias 7), 3 of mantissa, no infinities, two NaN."""
    found = []
    for code in range(256):
        sign, exponent, mantissa = -1.0 if code & 128 else 1.0, (code >> 3) & 15, code & 7
        size = (mantissa / 8) * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
        found.append(math.nan if exponent == 15 and mantissa == 7 else sign * size)
    return tuple(found)


def signed(bits: int, lowest: int) -> tuple[float, ...]:
    """Codes of two's complement; those below ``lowest`` are not used."""
    numbers = [code - 2**bits if code >= 2 ** (bits - 1) else code for code in range(2**bits)]
    return tuple(float(number) if number >= lowest else math.nan for number in numbers)
