"""How far a tensor is from a base that is not there: a linear sketch of 64 signed sums.

Every element is multiplied by a random sign and added to one of 64 buckets (count sketch: Charikar, Chen and
Farach-Colton 2002; Alon, Matias and Szegedy 1996). The sketch is linear, so the squared length of the
difference of two sketches estimates the squared length of the difference of the tensors, with a relative
standard deviation of sqrt(2 / 64) = 18 % on the square. Signs and buckets depend on the element's index only.
"""

import math
from collections.abc import Mapping
from functools import cache

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.rounding import hash64

BUCKETS = 64
BLOCK = 2**16  # elements that share one table of signs and buckets; a block as a whole is signed and rotated anew

# Distances as `distance` defines them, judged on the largest over the delta's matrices.
SAME = 0.005
RELATED = 0.5
DISTANT = 1.0


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    counter = np.arange(BLOCK, dtype=np.uint64)
    order = np.argsort(hash64(counter + np.uint64(1)), kind="stable")
    signs = np.where(hash64(counter + np.uint64(1 << 32)) & np.uint64(1), 1.0, -1.0).astype(np.float32)
    return order, signs


class Sketcher:
    """Feed fp32 elements in order, in pieces of any size; then read `sums` (float64 [64]) and `norm`."""

    def __init__(self) -> None:
        self._sums = np.zeros(BUCKETS)
        self._square = 0.0
        self._rest = np.empty(0, np.float32)
        self._block = 0

    def feed(self, values: np.ndarray) -> None:
        """values: fp32 [n], the next elements of the tensor."""
        if self._rest.size:
            values = np.concatenate([self._rest, values])
        whole = values.size - values.size % BLOCK
        for start in range(0, whole, BLOCK):
            self._add(values[start : start + BLOCK])
        self._rest = values[whole:].copy()

    def _add(self, block: np.ndarray) -> None:
        order, signs = _tables()
        number = int(hash64(np.array([self._block], dtype=np.uint64) + np.uint64(1 << 33))[0])
        sums = (block.take(order) * signs).reshape(BUCKETS, -1).sum(axis=1, dtype=np.float64)
        self._sums += np.roll(sums if number & 1 else -sums, (number >> 1) % BUCKETS)
        self._square += float(np.square(block, dtype=np.float64).sum())
        self._block += 1

    def finish(self) -> tuple[np.ndarray, float]:
        """(signed bucket sums float32 [64], Euclidean norm); call once, after the last element."""
        if self._rest.size:
            self._add(np.concatenate([self._rest, np.zeros(BLOCK - self._rest.size, np.float32)]))
            self._rest = np.empty(0, np.float32)
        return self._sums.astype(np.float32), math.sqrt(self._square)


def distance(target: np.ndarray, target_norm: float, base: np.ndarray, base_norm: float) -> float:
    """Estimate of ||target - base|| / sqrt((||target||^2 + ||base||^2) / 2) from two sketches [64] and the norms.

    A child has nearly its base's norm, where this is ||target - base|| / ||base||. Unrelated tensors lie at
    sqrt(2) whatever their norms; divided by ||base|| alone, freshly initialised weights, which are small, would
    lie at 1, no farther than a very distant child.
    """
    gap = float(np.linalg.norm(target.astype(np.float64) - base.astype(np.float64)))
    size = math.hypot(target_norm, base_norm) / math.sqrt(2)
    return gap / size if size else 0.0


def verdict(value: float) -> str:
    """same, related, distant (only with force) or unrelated (refused)."""
    if value <= SAME:
        return "same"
    if value <= RELATED:
        return "related"
    return "distant" if value <= DISTANT else "unrelated"


def judged(distances: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, float]:
    """(tensor, distance) of the largest distance over the matrices; over the vectors where there are no
    matrices.

    Norm weights and biases are few numbers near 1 or 0: another model's norms look related, a tuned bias
    does not.
    """
    matrices = {name: value for name, value in distances.items() if len(shapes[name]) > 1} or dict(distances)
    name = max(sorted(matrices), key=lambda key: matrices[key])
    return name, matrices[name]


def refuse_unrelated(
    distances: Mapping[str, float], shapes: Mapping[str, tuple[int, ...]], where: str, force: bool
) -> None:
    """Raises: SurgeryError when the target is unrelated, or distant and not forced."""
    name, value = judged(distances, shapes)
    found = verdict(value)
    what = f"{where}: {name} lies {value:.2f} of its norm away from the delta's base"
    if found == "unrelated":
        raise SurgeryError(f"{what} (1.4 is chance): these are other weights; use a checkpoint made from the base")
    if found == "distant" and not force:
        raise SurgeryError(f"{what} (related is at most {RELATED}): repeat with --force if you know that it is a child")
