"""Look at a delta: what it changes and by how much, and how it would fit a checkpoint, without writing
anything."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.apply.plan import check_architecture, make_plan
from surgery.apply.targets import Tied, Vocabulary
from surgery.delta.describe import TensorView, describe
from surgery.delta.format import open_delta
from surgery.errors import SurgeryError
from surgery.files.quantised_rows import open_target


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
        stored = open_target(against)
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
