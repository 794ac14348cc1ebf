"""What a delta changes, tensor by tensor, and by how much."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from surgery.delta.format import Delta, DeltaFile
from surgery.delta.metadata import MODULE
from surgery.files.rounding import refuse_not_finite


@dataclass(frozen=True)
class TensorView:
    """One base tensor: norms are Euclidean, `relative` is norm / base_norm, `nonzero` counts changed entries."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    norm: float
    base_norm: float
    relative: float
    nonzero: int
    distance: float | None


def describe(delta: Delta | DeltaFile, distances: Mapping[str, float] | None = None) -> tuple[TensorView, ...]:
    """One view per base tensor (per new tensor of a module), sorted by name.

    Raises:
        SurgeryError: a difference holds NaN or infinity.
    """
    shapes = dict(delta.shapes)
    if delta.metadata["kind"] == "module":
        arrays = delta.tensors if isinstance(delta, Delta) else delta.header.tensors
        shapes |= {name: tuple(value.shape) for name, value in arrays.items() if name.startswith(MODULE)}
    return tuple(_view(delta, name, shapes[name], (distances or {}).get(name)) for name in sorted(shapes))


def _view(delta: Delta | DeltaFile, name: str, shape: tuple[int, ...], distance: float | None) -> TensorView:
    total, square, nonzero, step = math.prod(shape), 0.0, 0, 2**20
    for start in range(0, total, step):
        values = delta.read(name, start, min(start + step, total))
        refuse_not_finite(values, name, "the delta")
        square += float(np.square(values, dtype=np.float64).sum())
        nonzero += int(np.count_nonzero(values))
    base = delta.metadata["tensors"].get(name, {})
    norm, base_norm = math.sqrt(square), float(base.get("norm", 0.0))
    relative = norm / base_norm if base_norm else math.inf
    return TensorView(name, shape, base.get("dtype", "F32"), norm, base_norm, relative, nonzero, distance)
