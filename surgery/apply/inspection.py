"""Look at a delta: what it changes and by how much, and how it would fit a checkpoint, without writing
anything."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.plan import Tied, Vocabulary, check_architecture, make_plan
from surgery.delta.format import Delta, DeltaFile, open_delta
from surgery.delta.metadata import MODULE
from surgery.errors import SurgeryError
from surgery.rounding import refuse_not_finite
from surgery.stored import open_stored


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


@dataclass(frozen=True)
class Inspection:
    """A delta file; with a checkpoint to compare, `verdict` is same, related, distant, unrelated or refused."""

    path: Path
    bytes: int
    sha256: str
    kind: str
    base: str
    recipe: str
    seed: int
    tool: str
    architecture: dict[str, Any]
    parents: tuple[dict[str, Any], ...]
    measured: dict[str, Any]
    module: dict[str, Any] | None  # type and settings of the new part, with kind "module"
    tensors: tuple[TensorView, ...]
    parameters: int
    against: Path | None
    verdict: str | None
    distance: float | None
    refusal: str | None
    notes: tuple[str, ...]


def inspect(
    path: Path | str,
    against: Path | str | None = None,
    *,
    rename: tuple[str, str] | None = None,
    tied: Tied | None = None,
    vocabulary: Vocabulary = "refuse",
) -> Inspection:
    """Describe the delta file `path`; with `against`, its distances to that checkpoint and the verdict of
    `apply`.

    A checkpoint that the delta does not fit is no error here: the reason stands in `refusal`.

    Raises:
        SurgeryError: the delta itself is broken, or `against` is no readable checkpoint.
    """
    delta = open_delta(path)
    distances: Mapping[str, float] = {}
    verdict: str | None = None
    gap: float | None = None
    refusal: str | None = None
    notes: tuple[str, ...] = ()
    if against is not None:
        stored = open_stored(against)
        try:
            if not delta.shapes:  # a module alone fits all weights of its architecture
                check_architecture(delta, stored)
                verdict, gap = "same architecture", None
            else:
                plan = make_plan(
                    delta, stored, rename=rename, tied=tied, vocabulary=vocabulary, judge=False, module=True
                )
                verdict, gap, notes = plan.verdict, plan.distance, plan.notes
                distances = {name: edit.distance for edit in plan.edits for name in edit.sources}
        except SurgeryError as error:
            verdict, refusal = "refused", str(error)
    data = delta.metadata
    views = describe(delta, distances)
    return Inspection(
        delta.path, delta.header.file_bytes, delta.sha256, data["kind"], data["base"], data["recipe"],
        data["seed"], data["tool"], data["architecture"], tuple(data["parents"]), data["measured"],
        data.get("module"), views, sum(math.prod(view.shape) for view in views),
        Path(against) if against is not None else None,
        verdict, gap, refusal, notes,
    )  # fmt: skip


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
