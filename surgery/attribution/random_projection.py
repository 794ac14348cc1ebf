"""Random projections of gradients to a few thousand numbers that keep inner products, from a seed.

count_sketch: every coordinate is multiplied by a random sign and added to one of ``dim`` buckets (Charikar, Chen and
    Farach-Colton 2002). Consecutive coordinates are taken ``dim`` at a time; all blocks share one permutation and two
    rows of signs, one that turns with the permutation and one that turns by itself, and the turns of a block are a
    hash of its tensor's name and its number. So two coordinates meet with probability 1 / dim (never within a block),
    a meeting has a random sign, and three rows of length ``dim`` are all that is stored. It costs one reading of the
    gradient.
rademacher: the product with a dense matrix of +-1 / sqrt(dim), hashed in portions (as TRAK and LESS have it).

Both are linear, unbiased in the inner product, with the variance (|x|^2 |y|^2 + (x.y)^2) / dim at most, and the same
on every device, for every batch and in every process.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.files.rounding import hash64

KINDS = ("count_sketch", "rademacher")
PORTION = 2**24  # entries that one step holds: of gradients in a sketch, of signs in a dense projection

_GOLDEN, _MIX1, _MIX2 = (value - (1 << 64) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@dataclass(frozen=True)
class RandomProjection:
    """A random linear map of all tensors of a gradient together to ``dim`` numbers.

    The map of a tensor depends on ``kind``, ``dim``, ``seed``, the tensor's name and nothing else.
    """

    kind: str = "count_sketch"
    dim: int = 8192  # BIAS DIFF, table 8
    seed: int = 0
    _kept: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SurgeryError(f"projection: got {self.kind!r}, expected one of {', '.join(KINDS)}")
        if not 1 <= self.dim < 2**31 or not 0 <= self.seed < 2**63:
            raise SurgeryError(f"projection: got dim {self.dim} and seed {self.seed}; expected at least 1 and 0")

    def to_dict(self) -> dict[str, Any]:
        """What a manifest keeps."""
        return {"kind": self.kind, "dim": self.dim, "seed": self.seed}

    @torch.no_grad()
    def __call__(self, name: str, gradient: Float[Tensor, "unit ..."]) -> Float[Tensor, "unit dim"]:
        """The part that the tensor ``name`` has in the projections of ``unit`` gradients, in float32.

        The projection of a whole gradient is the sum of the parts of its tensors.
        """
        flat = gradient.flatten(1).float()
        return (self._sketch if self.kind == "count_sketch" else self._dense)(name, flat)

    def _sketch(self, name: str, flat: Float[Tensor, "unit n"]) -> Float[Tensor, "unit dim"]:
        units, size = flat.shape
        turns = self._turns(name, math.ceil(size / self.dim), flat.device)
        # Row t of the unfolded is the row turned by t, without arithmetic on indices.
        orders, signs, others = (row.unfold(0, self.dim, 1) for row in self._rows(flat.device))
        out = torch.zeros(units, self.dim, device=flat.device)
        step = max(1, PORTION // (self.dim * units))
        for first in range(0, turns.shape[1], step):
            turn, other = turns[:, first : first + step]
            at = orders[turn] + torch.arange(len(turn), device=flat.device, dtype=torch.int32)[:, None] * self.dim
            part = flat[:, first * self.dim : (first + step) * self.dim]
            if missing := at.numel() - part.shape[1]:
                part = torch.nn.functional.pad(part, (0, missing))
            part = part.index_select(1, at.flatten()).unflatten(1, at.shape)
            out += (part * (signs[turn] * others[other])).sum(1)
        return out

    def _rows(self, device: torch.device) -> tuple[Tensor, ...]:
        """The permutation and its signs, and the other signs, each twice in a row."""
        if device not in self._kept:
            counter = np.arange(3 * self.dim, dtype=np.uint64) + np.uint64(_key(self.seed, "rows"))
            numbers = hash64(counter).reshape(3, -1)
            order = np.argsort(numbers[0], kind="stable").astype(np.int32)
            rows = (order, *np.where(numbers[1:] & np.uint64(1), np.float32(1), np.float32(-1)))
            self._kept[device] = tuple(torch.from_numpy(np.tile(row, 2)).to(device) for row in rows)
        return self._kept[device]

    def _turns(self, name: str, count: int, device: torch.device) -> Int[Tensor, "2 count"]:
        numbers = hash64(np.arange(2 * count, dtype=np.uint64) + np.uint64(_key(self.seed, name)))
        return torch.from_numpy((numbers % np.uint64(self.dim)).astype(np.int64).reshape(2, -1)).to(device)

    def _dense(self, name: str, flat: Float[Tensor, "unit n"]) -> Float[Tensor, "unit dim"]:
        out = torch.zeros(len(flat), self.dim, device=flat.device)
        words = math.ceil(self.dim / 64)
        key = _key(self.seed, name) - (1 << 63)  # as a signed number: torch has no arithmetic of unsigned ones
        bits = torch.arange(64, device=flat.device)
        step = max(1, PORTION // self.dim)
        for first in range(0, flat.shape[1], step):
            part = flat[:, first : first + step]
            counter = torch.arange(first * words, (first + part.shape[1]) * words, device=flat.device)
            signs = (_hash64(counter + key)[:, None] >> bits) & 1
            signs = signs.view(part.shape[1], words * 64)[:, : self.dim]
            out += part @ (signs.float() * 2 - 1)
        return out / math.sqrt(self.dim)


def _key(seed: int, name: str) -> int:
    """63 random bits."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8], "little") >> 1


def _hash64(counter: Tensor) -> Tensor:
    """``surgery.files.rounding.hash64`` in torch, on int64 (whose products wrap around)."""
    z = counter * _GOLDEN
    z = (z ^ _right(z, 30)) * _MIX1
    z = (z ^ _right(z, 27)) * _MIX2
    return z ^ _right(z, 31)


def _right(z: Tensor, places: int) -> Tensor:
    return (z >> places) & ((1 << (64 - places)) - 1)
