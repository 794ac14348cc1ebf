"""Undo of an edited GGUF file: its original bytes from the record beside it, or a refusal that names the tensor."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.gguf import RECORD, type_and_offset
from surgery.apply.record import FORMAT, KEY, Blob, unshuffle
from surgery.errors import SurgeryError
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.copying import OnBytes, copy_range, sync_file, write_exactly
from surgery.files.gguf import GgufFile, GgufTensor, open_gguf
from surgery.files.safetensors_io import Header, open_regular, parse_json, read_exactly, read_header

PIECE = 2**22


@dataclass(frozen=True)
class _Record:
    path: Path
    header: Header
    original: dict[str, tuple[str, int]]  # type and offset of every tensor
    size: int
    touched: dict[str, dict[str, Any]]


def undo_gguf(path: Path | str, out: Path | str, *, progress: OnBytes | None = None) -> Path:
    """Write to the new file `out` the GGUF file as it was before `apply_gguf`, byte for byte.

    Raises:
        SurgeryError: no record beside the file, or a broken one; a touched tensor that was changed since (named);
            then nothing was created.
    """
    path, out = Path(path), Path(out)
    check_destination(out)
    file = open_gguf(path)
    record = _read(file)
    fd = open_regular(path)
    try:
        for name, entry in record.touched.items():
            if _hash(fd, file.tensors[name], path) != entry["after"]:
                raise SurgeryError(
                    f"{path}: {name!r} was changed after the edit; undo would destroy that, so it is refused"
                )
        with temporary(out, folder=False) as part:
            target = os.open(part, os.O_RDWR | os.O_CLOEXEC)
            try:
                _restore(file, record, fd, target, progress)
            finally:
                os.close(target)
            sync_file(part)
            publish(part, out)
    finally:
        os.close(fd)
    return out


def _read(file: GgufFile) -> _Record:
    path = file.path.with_name(file.path.name + RECORD)
    if not path.is_file():
        raise SurgeryError(
            f"{file.path}: no {path.name} lies beside it; it was not edited, moved alone, or --undo none"
        )
    header = read_header(path)
    content = parse_json(header.metadata.get(KEY, "null").encode("utf-8", "surrogatepass"), str(path))
    try:
        layout, touched = content["settings"]["gguf"], content["tensors"]
        original = {name: (str(kind), int(offset)) for name, (kind, offset) in layout["tensors"].items()}
        size = int(layout["size"])
        fits = content["format"] == FORMAT and original.keys() == file.tensors.keys()
        fits = fits and all(
            name in original and name in header.tensors and entry["after"] for name, entry in touched.items()
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        fits = False
    if not fits:
        raise SurgeryError(f"{path}: no undo record of this GGUF file; it is broken, or belongs to another file")
    return _Record(path, header, original, size, touched)


def _hash(fd: int, tensor: GgufTensor, path: Path) -> str:
    digest = hashlib.sha256()
    for start in range(tensor.begin, tensor.end, PIECE):
        digest.update(read_exactly(fd, start, min(PIECE, tensor.end - start), path))
    return digest.hexdigest()


def _restore(file: GgufFile, record: _Record, source: int, fd: int, progress: OnBytes | None) -> None:
    done = 0

    def seen(count: int) -> None:
        nonlocal done
        done += count
        if progress:
            progress(done, record.size)

    copy_range(source, fd, file.data, seen)
    order = sorted(record.original, key=lambda name: record.original[name][1])
    ends = [*[record.original[name][1] for name in order][1:], record.size - file.data]
    for name, following in zip(order, ends, strict=True):
        kind, offset = record.original[name]
        tensor, place = file.tensors[name], file.data + offset
        write_exactly(fd, tensor.at, memoryview(type_and_offset(kind, offset)))
        room = following - offset
        if name in record.touched:
            length = int(record.touched[name]["elements"])
            _put_back(file, record, name, length, source, fd, place)
            if tensor.end - tensor.begin == length:
                copy_range(source, fd, room - length, seen, start=tensor.end, at=place + length)
            seen(length)
        else:
            copy_range(source, fd, room, seen, start=tensor.begin, at=place)
    os.ftruncate(fd, record.size)


def _put_back(file: GgufFile, record: _Record, name: str, length: int, source: int, fd: int, place: int) -> None:
    """The original bytes of one touched tensor, checked by their hash."""
    tensor, digest = file.tensors[name], hashlib.sha256()
    same = tensor.end - tensor.begin == length
    blob = Blob(record.path, record.header.tensors[name])
    try:
        for start in range(0, length, PIECE):
            count = min(PIECE, length - start)
            new = read_exactly(source, tensor.begin + start, count, file.path) if same else bytes(count)
            old = unshuffle(blob.read(count), np.frombuffer(new, np.uint8))
            digest.update(old.data)
            write_exactly(fd, place + start, old.data)
    finally:
        blob.close()
    if digest.hexdigest() != record.touched[name]["before"]:
        raise SurgeryError(f"{record.path}: does not give back the original {name!r}; the record is broken")
