"""Decide, before anything is created, which stored bytes a delta changes, or why it must not be applied."""

import math
import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from surgery.delta.differences import Differences
from surgery.delta.metadata import unpack_sketch
from surgery.errors import SurgeryError
from surgery.files import weight_fingerprint as sketch
from surgery.files.ahead import in_order
from surgery.files.architecture import brief, differences, is_embedding, is_head, tokenizer_fingerprint
from surgery.files.checkpoint_files import CheckpointFiles, Measured, measure, require_float
from surgery.files.quantised import Layer
from surgery.files.quantised_layouts import TWO_WAYS
from surgery.files.quantised_rows import measure_layer
from surgery.files.rounding import refuse_not_finite
from surgery.files.safetensors_io import Entry
from surgery.files.tensor_names import common_prefix, is_vocabulary, same_tensors, translate

Tied = Literal["embed", "head", "both"]
Vocabulary = Literal["refuse", "first"]


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
    targets = _targets(delta, stored, rename, tied)
    sizes = {target: _elements(delta, stored, target, sources, vocabulary) for target, sources in targets.items()}
    check_finite(delta)

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


def _targets(
    delta: Differences, stored: CheckpointFiles, rename: tuple[str, str] | None, tied: Tied | None
) -> dict[str, tuple[str, ...]]:
    """{stored tensor: the delta's tensors to add to it}."""
    base_tied = bool(delta.metadata["architecture"].get("tied", False))
    target_tied = stored.tied_by(bool(delta.metadata.get("unsaid", {}).get("tied", False)))
    known = stored.matrices
    names = {name: translate(name, rename) if rename else name for name in delta.shapes}
    same = same_tensors(names.values(), known)
    targets: dict[str, tuple[str, ...]] = {}
    lost = []
    for name, wanted in names.items():
        if is_vocabulary(name) and (base_tied or target_tied):
            continue
        if wanted in same:
            targets[same[wanted]] = (name,)
        else:
            lost.append(name)
    matrices = [name for name in names if is_vocabulary(name)]
    if base_tied and target_tied:
        for name in matrices:
            # Some tied checkpoints store the matrix twice, some under the head's name: change what is there.
            copies = [other for other in known if is_vocabulary(other)]
            targets.update({other: (name,) for other in copies})
            lost += [] if copies else [name]
    elif base_tied:
        targets.update(_untie(stored, matrices, tied))
    elif target_tied and matrices:
        targets.update(_tie(stored, matrices, tied))
    if lost:
        raise _no_such_names(stored, lost, list(delta.shapes))
    return targets


def _untie(stored: CheckpointFiles, matrices: list[str], tied: Tied | None) -> dict[str, tuple[str, ...]]:
    if not matrices:
        return {}
    if tied is None:
        raise SurgeryError(
            f"{stored.path}: embedding and head are separate, in the delta's base they are one tensor ({matrices[0]}); "
            "say which to change with --tied embed, head or both"
        )
    wanted = {"embed": (is_embedding,), "head": (is_head,), "both": (is_embedding, is_head)}[tied]
    chosen = [other for other in stored.matrices if is_vocabulary(other) and any(test(other) for test in wanted)]
    if len(chosen) != len(wanted):
        raise SurgeryError(
            f"{stored.path}: --tied {tied} means {len(wanted)} tensors, found {', '.join(chosen) or 'none'}"
        )
    return {other: (matrices[0],) for other in chosen}


def _tie(stored: CheckpointFiles, matrices: list[str], tied: Tied | None) -> dict[str, tuple[str, ...]]:
    if tied is None:
        raise SurgeryError(
            f"{stored.path}: embedding and head are one tensor, in the delta's base they are two, of which it changes "
            f"{' and '.join(sorted(matrices))}; say whose difference to take with --tied embed, head or both (the sum)"
        )
    wanted = {"embed": (is_embedding,), "head": (is_head,), "both": (is_embedding, is_head)}[tied]
    sources = tuple(sorted(name for name in matrices if any(test(name) for test in wanted)))
    if not sources:
        raise SurgeryError(f"{stored.path}: --tied {tied}, but the delta changes only {', '.join(sorted(matrices))}")
    return {other: sources for other in stored.matrices if is_vocabulary(other)}


def _no_such_names(stored: CheckpointFiles, lost: list[str], names: list[str]) -> SurgeryError:
    known = stored.matrices
    change = common_prefix([name for name in names if not is_vocabulary(name) or name in lost], known)
    if change is not None and change != ("", ""):
        return SurgeryError(
            f"{stored.path}: has no {lost[0]!r}; all names fit when the prefix {change[0]!r} becomes {change[1]!r}: "
            f"repeat with --rename {change[0]}={change[1]} if that is the same part of the model"
        )
    cut, whole = re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.[a-z_]+$")
    for ours, theirs, ways in (
        (cut, whole, ("one by one", "as one tensor")),
        (whole, cut, ("as one tensor", "one by one")),
    ):
        expert = next((name for name in lost if ours.search(name)), None)
        if expert and any(theirs.search(name) for name in known):
            return SurgeryError(
                f"{stored.path}: has no {expert!r}: the delta's base stores its experts {ways[0]}, this one {ways[1]}; "
                "apply it in memory: surgery.load(CHECKPOINT, deltas=[DELTA])[0].save_pretrained(OUT)"
            )
    quantised = [name for name in known if name.startswith(lost[0].removesuffix("weight")) and name != lost[0]]
    if quantised:
        return SurgeryError(
            f"{stored.path}: has no {lost[0]!r} but {quantised[0]!r}, quantised in a way that is not known; {TWO_WAYS}"
        )
    return SurgeryError(
        f"{stored.path}: has no {lost[0]!r} ({len(lost)} of {len(names)} tensors are missing) and no single change "
        "of prefix explains it; the delta belongs to another model"
    )


def _elements(
    delta: Differences, stored: CheckpointFiles, target: str, sources: tuple[str, ...], vocabulary: Vocabulary
) -> int:
    layer = stored.layers.get(target)
    if layer is not None:
        if any(delta.shapes[name] != layer.shape for name in sources):
            raise SurgeryError(
                f"{stored.path}: {target!r} is {list(layer.shape)}, the delta's base {list(delta.shapes[sources[0]])}"
            )
        return layer.elements
    entry, where = stored.entry(target), stored.path / stored.places[target]
    require_float(entry.dtype, target, where)
    for name in sources:
        base = delta.shapes[name]
        if entry.shape == base:
            continue
        longer = is_vocabulary(name) and len(base) == len(entry.shape) and entry.shape[1:] == base[1:]
        if not longer or entry.shape[0] < base[0]:
            raise SurgeryError(f"{where}: {target!r} has shape {list(entry.shape)}, the delta's base {list(base)}")
        if vocabulary == "refuse":
            raise SurgeryError(
                f"{where}: {target!r} has {entry.shape[0]} rows (tokens), the delta's base {base[0]}; if the "
                f"vocabulary was only extended, repeat with --vocabulary first to change the first {base[0]} rows"
            )
        wanted = delta.metadata["tokenizer"]
        found = tokenizer_fingerprint(stored.path, base[0])
        if wanted is None or found != wanted:
            problem = "cannot be compared (no tokenizer.json)" if wanted is None or found is None else "differ"
            raise SurgeryError(
                f"{where}: the first {base[0]} tokens of its tokenizer and of the delta's base {problem}; "
                f"the rows of {target!r} would not mean the same tokens"
            )
    return math.prod(delta.shapes[sources[0]])


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
