"""Decide, before anything is created, which stored bytes a delta changes, or why it must not be applied."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np

from surgery.apply.targets import Tied, Vocabulary, elements_of, targets_of
from surgery.delta.differences import Differences
from surgery.delta.metadata import unpack_sketch
from surgery.errors import SurgeryError
from surgery.files import weight_fingerprint as sketch
from surgery.files.ahead import in_order
from surgery.files.architecture import brief, differences
from surgery.files.checkpoint_files import CheckpointFiles, Measured, measure
from surgery.files.quantised import Layer
from surgery.files.quantised_rows import measure_layer
from surgery.files.rounding import refuse_not_finite
from surgery.files.safetensors_io import Entry


@dataclass(frozen=True)
class Edit:
    """One stored tensor to change: by the differences `sources` of the delta (several are summed)."""

    target: str
    file: str
    entry: Entry
    sources: tuple[str, ...]
    elements: int  # the first so many of the tensor; all of them but for an extended vocabulary
    sha256: str  # of those elements' bytes as they were when they were checked
    distance: float  # from the delta's base; see surgery/files/weight_fingerprint.py
    layer: Layer | None = None  # where the target holds the codes of a quantised matrix


@dataclass(frozen=True)
class Plan:
    """All edits, the tensor that is farthest from its base, and what the user should know."""

    edits: tuple[Edit, ...]
    farthest: str
    distance: float
    verdict: str
    notes: tuple[str, ...]


def make_plan(
    delta: Differences,
    stored: CheckpointFiles,
    *,
    scale: float = 1.0,
    force: bool = False,
    rename: tuple[str, str] | None = None,
    tied: Tied | None = None,
    vocabulary: Vocabulary = "refuse",
    judge: bool = True,
    module: bool = False,
) -> Plan:
    """Check everything that can be checked by reading. With `judge` False, unrelated weights are not refused.

    With `module`, the differences of a delta of kind "module" are planned, instead of refusing the kind.

    Raises:
        SurgeryError: kind, architecture, names, shapes, tying, vocabulary, dtype, NaN, or relatedness; see
        the text.
    """
    where = str(stored.path)
    if tied is not None and tied not in get_args(Tied):
        raise SurgeryError(f"tied {tied!r}: expected one of {', '.join(get_args(Tied))}")
    if vocabulary not in get_args(Vocabulary):
        raise SurgeryError(f"vocabulary {vocabulary!r}: expected one of {', '.join(get_args(Vocabulary))}")
    if delta.metadata["kind"] == "module" and not module:
        raise SurgeryError(
            f"{where}: this delta is of kind 'module' (new parts such as cross-attention), which a plain checkpoint "
            "cannot hold; write one that can with surgery export DELTA --transformers DIR --checkpoint CHECKPOINT, or "
            "open it in memory: surgery.load(CHECKPOINT, deltas=[DELTA])"
        )
    check_architecture(delta, stored)
    targets = targets_of(delta, stored, rename, tied)
    sizes = {target: elements_of(delta, stored, target, sources, vocabulary) for target, sources in targets.items()}
    check_finite(delta)

    edits, moved = _looked(delta, stored, targets, sizes)
    distances = {edit.target: edit.distance for edit in edits}
    shapes = {edit.target: edit.layer.shape if edit.layer else edit.entry.shape for edit in edits}
    if judge:
        sketch.refuse_unrelated(distances, shapes, where, force)
    if judge and not force and scale > 0 and len(moved) == len(targets) and _holds(delta, moved):
        raise SurgeryError(
            f"{where}: holds this delta already (its weights lie where the delta takes its base's); give the "
            "checkpoint as it was, or repeat with --force to add it once more"
        )
    farthest, gap = sketch.judged(distances, shapes)
    edits.sort(key=lambda edit: (edit.file, edit.entry.begin))
    return Plan(tuple(edits), farthest, gap, sketch.verdict(gap), tuple(_notes(delta, stored)))


def _looked(
    delta: Differences, stored: CheckpointFiles, targets: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]
) -> tuple[list[Edit], list[tuple[str, np.ndarray]]]:
    """Reads the weights: each as an edit, and by how much the fingerprints of those that are not the base's moved."""

    def look(target: str) -> Measured | None:
        base, layer = delta.metadata["tensors"][targets[target][0]], stored.layers.get(target)
        if layer is not None:
            return measure_layer(stored, layer)
        return measure(stored, target, sizes[target], known=base["sha256"])

    edits, moved = [], []
    for (target, sources), found in zip(targets.items(), in_order(look, targets), strict=True):
        base, layer = delta.metadata["tensors"][sources[0]], stored.layers.get(target)
        gap = 0.0
        if found is not None:
            gap = sketch.distance(found.sketch, found.norm, unpack_sketch(base["sketch"]), base["norm"])
            moved.append((sources[0], found.sketch - unpack_sketch(base["sketch"])))
        sha = base["sha256"] if found is None else found.sha256
        name = stored.matrices[target]
        entry = stored.entry(name)
        count = entry.elements if layer else sizes[target]
        edits.append(Edit(name, stored.places[name], entry, sources, count, sha, gap, layer))
    return edits, moved


def check_finite(delta: Differences) -> None:
    """Raises: SurgeryError when a difference is NaN or infinite."""

    def look(at: tuple[str, int]) -> None:
        name, start = at
        stop = min(start + 2**20, math.prod(delta.shapes[name]))
        refuse_not_finite(delta.read(name, start, stop), name, "the delta")

    places = ((name, start) for name, shape in delta.shapes.items() for start in range(0, math.prod(shape), 2**20))
    for _ in in_order(look, places):
        pass


def _holds(delta: Differences, moved: list[tuple[str, np.ndarray]]) -> bool:
    """True when the target differs from the base by (nearly) the delta itself, judged on their fingerprints.

    The fingerprint is linear: that of target - base is compared with that of the difference.
    """
    own = []
    for name, _ in moved:
        sketcher, total = sketch.Sketcher(), math.prod(delta.shapes[name])
        for start in range(0, total, 2**20):
            sketcher.feed(delta.read(name, start, min(start + 2**20, total)))
        own.append(sketcher.finish()[0])
    gone, added = np.concatenate([step for _, step in moved]).astype(np.float64), np.concatenate(own).astype(np.float64)
    return bool(np.linalg.norm(gone - added) <= 0.3 * np.linalg.norm(gone))


def check_architecture(delta: Differences, stored: CheckpointFiles) -> None:
    """Raises: SurgeryError when the checkpoint's config states another architecture than the delta's base."""
    odd = differences(delta.metadata["architecture"], stored.facts, delta.metadata.get("unsaid"))
    if odd:
        where = stored.path
        raise SurgeryError(f"{where}: another architecture than the delta's base ({brief(odd)}); it cannot fit")


def _notes(delta: Differences, stored: CheckpointFiles) -> list[str]:
    notes = []
    unsaid = delta.metadata.get("unsaid", {})
    unknown = sorted(set(delta.metadata["architecture"]) - set(stored.facts) - set(unsaid))
    if unknown:
        notes.append(f"not compared, since the target's config.json does not state it: {', '.join(unknown)}")
    shadows = [
        name
        for name in stored.files
        if name.endswith((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx")) and name not in stored.shards
    ]
    if shadows:
        notes.append(f"copied as they are, though they may hold the same weights: {', '.join(shadows[:5])}")
    return notes
