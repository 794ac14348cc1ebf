"""Undo: give an edited checkpoint its original bytes back, or refuse and name the tensor that was changed
since."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.record import Blob, Record, read_record, record_name, records, unshuffle
from surgery.errors import SurgeryError
from surgery.files.atomic import check_outside, publish, temporary
from surgery.files.checkpoint_files import CheckpointFiles, chunks
from surgery.files.copying import Copier, OnBytes, open_writable, sync_tree, write_exactly
from surgery.files.quantised_rows import open_target
from surgery.files.rounding import WORDS
from surgery.files.safetensors_io import open_regular, read_exactly


@dataclass(frozen=True)
class UndoReport:
    """The result of `undo`: where the original stands again, and the tensors that were restored."""

    out: Path
    tensors: tuple[str, ...]
    files: int
    bytes: int
    record: str
    settings: dict[str, Any]


def undo(checkpoint: Path | str, out: Path | str, *, progress: OnBytes | None = None) -> UndoReport:
    """Write to the new folder `out` the checkpoint as it was before the last `apply`, byte for byte.

    The record knows the tensors that were edited. Whatever else was changed since, another tensor or a file, is copied
    as it stands.

    Raises:
        SurgeryError: no record, a broken one, an edited tensor that was changed since (named), the original
            that a "reference" record points to is gone or changed; then nothing was created.
    """
    out = Path(out)
    stored = open_target(checkpoint)
    check_outside(out, stored.path)
    numbers = records(stored)
    if not numbers:
        raise SurgeryError(f"{stored.path}: holds no undo.surgery; it was not edited, or with --undo none")
    name = record_name(numbers[-1])
    record = read_record(stored, name)
    original = open_target(record.source) if record.source else None
    for tensor, entry in record.tensors.items():
        place = stored.entry(tensor)
        if _hash(stored, tensor, entry["elements"]) != entry["after"]:
            raise SurgeryError(
                f"{stored.path}: {tensor!r} was changed after the edit; undo would destroy that change, "
                f"so it is refused"
            )
        if original is not None:
            fits = tensor in original.places and original.entry(tensor).dtype == place.dtype
            if not fits or _hash(original, tensor, entry["elements"]) != entry["before"]:
                raise SurgeryError(f"{original.path}: {tensor!r} is not the original any more; undo needs its bytes")
    with temporary(out, folder=True) as part:
        names = [file for file in stored.files if file != name]
        edited = sorted({stored.places[tensor] for tensor in record.tensors})
        total = sum((stored.path / file).stat().st_size for file in names)
        with Copier(stored.path, part, frozenset(), total, progress) as copier:
            copier.copy(edited)
            rest = [file for file in names if file not in edited]
            copier.start(lambda: copier.copy(rest))
            for tensor in record.tensors:
                _restore(stored, original, record, tensor, part)
        sync_tree(part, names)
        size = sum((part / file).stat().st_size for file in names)
        publish(part, out)
    return UndoReport(out, tuple(record.tensors), len(names), size, name, record.settings)


def _hash(stored: CheckpointFiles, tensor: str, elements: int) -> str:
    entry, path = stored.entry(tensor), stored.path / stored.places[tensor]
    size = WORDS[entry.dtype].itemsize
    digest = hashlib.sha256()
    fd = open_regular(path)
    try:
        for start, stop in chunks(entry, elements):
            digest.update(read_exactly(fd, entry.begin + start * size, (stop - start) * size, path))
    finally:
        os.close(fd)
    return digest.hexdigest()


def _restore(
    stored: CheckpointFiles, original: CheckpointFiles | None, record: Record, tensor: str, folder: Path
) -> None:
    """Put the original bytes of one tensor into its fresh copy below `folder`, and check them by their hash."""
    entry, file = stored.entry(tensor), stored.places[tensor]
    elements, kind = record.tensors[tensor]["elements"], WORDS[entry.dtype]
    blob = Blob(record.path, record.header.tensors[tensor]) if original is None else None
    before = hashlib.sha256()
    fd = open_writable(folder / file)
    try:
        for start, stop in chunks(entry, elements):
            offset, count = entry.begin + start * kind.itemsize, (stop - start) * kind.itemsize
            if blob is not None:
                new = np.frombuffer(read_exactly(fd, offset, count, folder / file), kind)
                old = unshuffle(blob.read(count), new).view(np.uint8).data
            else:
                assert original is not None
                place = original.entry(tensor)
                at = place.begin + start * kind.itemsize
                source = open_regular(original.path / original.places[tensor])
                try:
                    old = memoryview(read_exactly(source, at, count, original.path))
                finally:
                    os.close(source)
            before.update(old)
            write_exactly(fd, offset, old)
    finally:
        os.close(fd)
        if blob is not None:
            blob.close()
    if before.hexdigest() != record.tensors[tensor]["before"]:
        raise SurgeryError(f"{record.path}: does not give back the original {tensor!r}; the record is broken")
