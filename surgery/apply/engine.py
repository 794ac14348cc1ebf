"""The streaming apply: check everything, copy the files, rewrite only the touched byte ranges, rename."""

import hashlib
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from surgery.apply.plan import Edit, Plan, make_plan
from surgery.apply.record import RecordWriter, next_record_name, refuse_held
from surgery.apply.report import ApplyReport, TensorChange
from surgery.apply.requantise import rewrite_layer
from surgery.apply.targets import Tied, Vocabulary
from surgery.delta.differences import Differences
from surgery.delta.format import open_delta
from surgery.delta.metadata import rounding_of
from surgery.errors import SurgeryError
from surgery.files.ahead import in_order
from surgery.files.atomic import check_outside, publish, temporary
from surgery.files.checkpoint_files import CheckpointFiles, chunks
from surgery.files.copying import Copier, OnBytes, open_writable, outline, sync_tree, write_exactly
from surgery.files.quantised_rows import open_target
from surgery.files.rounding import STORED, Rounding, add
from surgery.files.safetensors_io import open_regular, read_exactly

Undo = Literal["record", "reference", "none"]


@dataclass(frozen=True)
class _Addition:
    """What is added to a checkpoint, and how the sums are rounded."""

    delta: Differences
    plan: Plan
    stored: CheckpointFiles
    scale: float
    rounding: str
    seed: int
    codes: str  # the rounding that was asked for, of quantised matrices: their "auto" is by chance


def apply(
    delta: Differences | Path | str,
    checkpoint: Path | str,
    out: Path | str,
    *,
    scale: float = 1.0,
    rounding: Rounding = "auto",
    seed: int | None = None,
    force: bool = False,
    link: bool = False,
    undo: Undo = "record",
    rename: tuple[str, str] | None = None,
    tied: Tied | None = None,
    vocabulary: Vocabulary = "refuse",
    progress: OnBytes | None = None,
    hollow: bool = False,
) -> ApplyReport:
    """Write to the new folder `out` the checkpoint with scale * difference added, rounded once to each
    tensor's dtype.

    Args:
        delta: a `Delta`, or the path of a delta file, which is then read piece by piece.
        rounding: "auto": what the delta's metadata records of the checkpoint that was measured, so that a run's
            delta on its base gives that checkpoint byte for byte; where it records nothing, stochastic where 16
            bits are stored. Else "nearest" (ties to even) or "stochastic". seed: of stochastic rounding; None is
            the delta's own.
        force: apply also to weights at a distance of 0.5 to 1.0 from the base (farther ones are always refused), and
            to a checkpoint that holds the delta already.
        link: hard-link the shards that do not change (a later edit in place would reach the source, too).
        undo: keep the original bytes, compressed, in the result ("record"), the source's place and hashes
            ("reference"), or nothing ("none").
        rename: (old, new) prefix of the delta's tensor names.
        tied: which matrix to change where the delta's base ties embedding and head and the target does not,
            or the reverse.
        vocabulary: "first" changes the first rows of an extended vocabulary, if the tokenizers agree on them.
        progress: called with (bytes done, bytes in all), from more than one thread but never at once.
        hollow: of the weights write the headers and what changes, with holes for the rest (a quantised checkpoint is
            whole all the same), and do not wait for the disk: for a result whose changed tensors are read back and
            which is then removed.

    Raises:
        SurgeryError: refused or failed; then nothing was created and the source is as it was.
    """
    out = Path(out)
    if not math.isfinite(scale):
        raise SurgeryError(f"scale {scale}: expected a finite number")
    if undo not in get_args(Undo):
        raise SurgeryError(f"undo {undo!r}: expected one of {', '.join(get_args(Undo))}")
    if isinstance(delta, Path | str):
        delta = open_delta(delta)
    how, drawn = rounding_of(delta.metadata, rounding, seed)
    stored = open_target(checkpoint)
    check_outside(out, stored.path)
    sha256 = _hashed(delta)
    if not force:
        refuse_held(stored, sha256, scale)
    plan = make_plan(delta, stored, scale=scale, force=force, rename=rename, tied=tied, vocabulary=vocabulary)
    addition = _Addition(delta, plan, stored, scale, how, drawn, rounding)
    record = next_record_name(stored) if undo != "none" else None
    edited = {edit.file for edit in plan.edits}
    links = frozenset(set(stored.shards) - edited) if link else frozenset()
    total = sum((stored.path / name).stat().st_size for name in stored.files)
    with temporary(out, folder=True) as part:
        writer = None
        if record:
            settings = {"scale": scale, "rounding": how, "seed": drawn, "delta": sha256()}
            writer = RecordWriter(part / record, undo, stored.path, settings)
        with Copier(stored.path, part, links, total, progress, sync=not hollow) as copier:
            changes = _rewritten_copy(addition, part, copier, writer, hollow=hollow)
        if writer:
            writer.finish()
        names = [*stored.files, *([record] if record else [])]
        if not hollow:
            sync_tree(part, [name for name in names if name not in links])
        size, digest = sum((part / name).stat().st_size for name in names), sha256()
        publish(part, out)
    return ApplyReport(
        out=out,
        tensors=tuple(changes),
        files=len(names),
        bytes_before=total,
        bytes=size,
        farthest=plan.farthest,
        distance=plan.distance,
        verdict=plan.verdict,
        scale=scale,
        rounding=how,
        seed=drawn,
        delta_sha256=digest,
        undo=out / record if record else None,
        notes=plan.notes,
    )


def _hashed(delta: Differences) -> Callable[[], str]:
    """The delta's sha256, found in a thread of its own while the checkpoint is looked at and copied."""
    beside = ThreadPoolExecutor(1)
    found = beside.submit(lambda: delta.sha256)
    beside.shutdown(wait=False)
    return found.result


def _rewritten_copy(
    addition: _Addition, folder: Path, copier: Copier, writer: RecordWriter | None, *, hollow: bool
) -> list[TensorChange]:
    """Copy the checkpoint into ``folder``, the files to be changed first, and change them while the rest is copied."""
    stored, edited = addition.stored, sorted({edit.file for edit in addition.plan.edits})
    shells = set(stored.shards) if hollow and not stored.layers else set()
    for name in shells:
        outline(stored.path / name, folder / name, stored.shards[name].begin)
    copier.copy(name for name in edited if name not in shells)
    rest = [name for name in stored.files if name not in {*edited, *shells}]
    copier.start(lambda: copier.copy(rest))
    changes = []
    for edit in addition.plan.edits:
        path = folder / edit.file
        fd, source = open_writable(path), open_regular(stored.path / edit.file)
        try:
            changes.append(_rewrite(addition, edit, source, fd, path, writer))
        finally:
            os.close(fd)
            os.close(source)
    return changes


def _rewrite(
    addition: _Addition, edit: Edit, source: int, fd: int, path: Path, writer: RecordWriter | None
) -> TensorChange:
    """Change one tensor, or one quantised matrix, in the copy ``path``, open as ``fd``."""
    if writer:
        writer.begin(edit)
    if edit.layer is None:
        return _rewrite_tensor(addition, edit, source, fd, path, writer)
    how = (addition.scale, addition.codes, addition.seed)
    done = rewrite_layer(addition.delta, edit, addition.stored, fd, path, how, writer)
    kind, size = edit.layer.kind, edit.layer.elements
    return TensorChange(edit.layer.name, edit.file, kind, kind, size, *done, edit.distance)


def _rewrite_tensor(
    addition: _Addition, edit: Edit, source: int, fd: int, path: Path, writer: RecordWriter | None
) -> TensorChange:
    delta, scale = addition.delta, addition.scale
    dtype, kind = edit.entry.dtype, STORED[edit.entry.dtype]
    before, after = hashlib.sha256(), hashlib.sha256()
    changed = lost = 0

    def chunk(at: tuple[int, int]) -> tuple[bytes, np.ndarray, int, int]:
        """Add to one chunk and write it: its bytes before, its numbers now, how many changed, how many were lost."""
        start, stop = at
        offset = edit.entry.begin + start * kind.itemsize
        raw = read_exactly(source, offset, (stop - start) * kind.itemsize, path)
        old = np.frombuffer(raw, kind)
        difference = delta.read(edit.sources[0], start, stop)
        for name in edit.sources[1:]:
            difference = difference + delta.read(name, start, stop)
        # The delta's name keys the random bits: a renamed or resharded target gets the same numbers.
        drawn: Any = {"rounding": addition.rounding, "seed": addition.seed, "name": edit.sources[0], "start": start}
        new = np.ascontiguousarray(add(old, difference, dtype, scale=scale, **drawn), kind)
        same = new.view(f"<u{kind.itemsize}") == old.view(f"<u{kind.itemsize}")
        write_exactly(fd, offset, new.view(np.uint8).data)
        gone = int(np.count_nonzero(same & (difference != 0))) if scale else 0
        return raw, new, int(same.size - np.count_nonzero(same)), gone

    for raw, new, here, gone in in_order(chunk, chunks(edit.entry, edit.elements)):
        changed, lost = changed + here, lost + gone
        before.update(raw)
        if writer:
            after.update(new.view(np.uint8).data)
            writer.feed(np.frombuffer(raw, kind), new)
    if before.hexdigest() != edit.sha256:
        raise SurgeryError(f"{path.name}: {edit.target!r} changed while it was being copied; run the command again")
    if writer:
        writer.end(before.hexdigest(), after.hexdigest())
    return TensorChange(edit.target, edit.file, dtype, dtype, edit.elements, changed, lost, edit.distance)
