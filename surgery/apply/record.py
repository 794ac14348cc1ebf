"""The undo record: what gives an edited checkpoint its original bytes back.

The record is a safetensors file `undo.surgery` inside the edited folder (`undo-2.surgery` after a second
edit, ...; undo takes the last). Its metadata key "surgery_undo" holds JSON with, for each edited tensor, its
file, dtype, the number of elements and the sha256 of their bytes before and after. The data of a tensor is a
zlib stream of old XOR new, cut into the chunks of `surgery.files.checkpoint_files.chunks`, with the low and high
bytes of each chunk apart: rounding keeps most high bytes as they are, so that this is a fraction of the tensor.
Adding -1 x the delta would not do: it does not restore what rounding lost.
"""

import json
import os
import re
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery import __version__
from surgery.apply.plan import Edit
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import CheckpointFiles
from surgery.files.rounding import WORDS
from surgery.files.safetensors_io import (
    Entry,
    Header,
    header_bytes,
    open_regular,
    parse_json,
    read_exactly,
    read_header,
)

KEY = "surgery_undo"
FORMAT = 1
_NAME = re.compile(r"undo(?:-([2-9]|[1-9][0-9]{1,4}))?\.surgery")


def records(stored: CheckpointFiles) -> list[int]:
    """The numbers of the undo records in the checkpoint's folder, rising."""
    matches = [_NAME.fullmatch(name) for name in stored.files]
    return sorted(int(match.group(1) or 1) for match in matches if match)


def record_name(number: int) -> str:
    """The file of the record with this number."""
    return "undo.surgery" if number == 1 else f"undo-{number}.surgery"


def next_record_name(stored: CheckpointFiles) -> str:
    """The name for the record of one more edit."""
    return record_name(max(records(stored), default=0) + 1)


def shuffle(old: np.ndarray, new: np.ndarray) -> bytes:
    """old XOR new, byte planes apart: all lowest bytes first. Both have the same 2- or 4-byte type, shape [n]."""
    size = old.dtype.itemsize
    mixed = old.view(f"<u{size}") ^ new.view(f"<u{size}")
    return mixed.view(np.uint8).reshape(-1, size).T.tobytes()


def unshuffle(mixed: bytes, new: np.ndarray) -> np.ndarray:
    """The `old` of `shuffle`, from its result and `new`."""
    size = new.dtype.itemsize
    planes = np.frombuffer(mixed, np.uint8).reshape(size, -1).T
    return np.ascontiguousarray(planes).reshape(-1).view(f"<u{size}") ^ new.view(f"<u{size}")


def refuse_held(stored: CheckpointFiles, sha256: Callable[[], str], scale: float) -> None:
    """Raises: SurgeryError when the records say that the delta was added before, in `scale`'s direction.

    `sha256` is that of the delta, asked for where there is a record.
    """
    total = 0.0
    for number in records(stored):
        with suppress(SurgeryError):  # a record that cannot undo any more tells nothing either
            settings = read_record(stored, record_name(number)).settings
            total += float(settings.get("scale", 1.0)) if settings.get("delta") == sha256() else 0.0
    if total * scale > 0:
        raise SurgeryError(
            f"{stored.path}: holds this delta already (with scale {total:g}, says its undo record); give the "
            "checkpoint as it was (surgery undo), or repeat with --force to add it once more"
        )


class RecordWriter:
    """Collects the original bytes while tensors are rewritten: begin, feed..., end per tensor, then finish."""

    def __init__(self, path: Path, mode: str, source: Path, settings: dict[str, Any], *, packed: bool = True) -> None:
        """Without ``packed`` nothing is compressed: new codes under new scales hardly shrink, and it takes long."""
        self._path = path
        self._keep, self._packed = mode == "record", packed
        self._spool = path.with_suffix(".spool")  # blobs first: the header needs their lengths
        self._metadata = {
            "format": FORMAT,
            "mode": mode,
            "source": str(source.resolve()) if mode == "reference" else None,
            "settings": settings,
            "tool": f"model-surgery {__version__}",
        }
        self._tensors: dict[str, dict[str, Any]] = {}
        self._blobs: dict[str, tuple[int, int]] = {}
        self._file = open(self._spool, "w+b")  # noqa: SIM115 (closed by finish, or with the process)

    def begin(self, edit: Edit) -> None:
        self._edit = edit
        self._start = self._file.tell()
        # The shuffled XOR is runs of zeros and noise: looking for runs only is faster and gives less than level 6.
        level = 1 if self._packed else 0
        self._stream = zlib.compressobj(level, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_RLE)

    def feed(self, old: np.ndarray, new: np.ndarray) -> None:
        if self._keep:
            self._file.write(self._stream.compress(shuffle(old, new)))

    def end(self, before: str, after: str) -> None:
        edit = self._edit
        if self._keep:
            self._file.write(self._stream.flush())
            self._blobs[edit.target] = (self._start, self._file.tell())
        self._tensors[edit.target] = {
            "file": edit.file, "dtype": edit.entry.dtype, "elements": edit.elements, "before": before,
            "after": after,
        }  # fmt: skip

    def finish(self) -> None:
        """Write the record and remove the spool."""
        text = json.dumps({**self._metadata, "tensors": self._tensors}, sort_keys=True, separators=(",", ":"))
        spec = {name: ("U8", (stop - start,)) for name, (start, stop) in self._blobs.items()}
        head, order = header_bytes(spec, {KEY: text})
        with open(self._path, "wb") as record:
            record.write(head)
            for name in order:
                start, stop = self._blobs[name]
                self._file.seek(start)
                while start < stop:
                    part = self._file.read(min(2**22, stop - start))
                    record.write(part)
                    start += len(part)
        self._file.close()
        os.unlink(self._spool)


@dataclass(frozen=True)
class Record:
    path: Path
    header: Header
    source: Path | None
    settings: dict[str, Any]
    tensors: dict[str, dict[str, Any]]


def read_record(stored: CheckpointFiles, name: str) -> Record:
    """The undo record in the file ``name``. Raises ``SurgeryError`` where it is broken or the checkpoint is another."""
    path = stored.path / name
    header = read_header(path)
    content = parse_json(header.metadata.get(KEY, "null").encode("utf-8", "surrogatepass"), str(path))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise SurgeryError(f"{path}: no undo record of format {FORMAT}; it is broken or from a newer version")
    mode, source, tensors, settings = (content.get(key) for key in ("mode", "source", "tensors", "settings"))
    reference = mode == "reference" and isinstance(source, str) and "\0" not in source
    if not (mode == "record" or reference) or not isinstance(tensors, dict) or not isinstance(settings, dict):
        raise SurgeryError(f"{path}: the undo record is incomplete; it is broken")
    for tensor, entry in tensors.items():
        fields = ("file", "dtype", "elements", "before", "after")
        if not isinstance(entry, dict) or any(field not in entry for field in fields):
            raise SurgeryError(f"{path}: the undo record of {tensor[:80]!r} is incomplete; it is broken")
        place = stored.entry(tensor) if tensor in stored.places else None
        if place is None or place.dtype != entry["dtype"] or place.dtype not in WORDS:
            raise SurgeryError(f"{stored.path}: {tensor[:80]!r} is gone or has another dtype; undo is impossible")
        elements = entry["elements"]
        if type(elements) is not int or not 0 < elements <= place.elements:
            raise SurgeryError(
                f"{stored.path}: {tensor[:80]!r} has another shape than when it was edited; undo is impossible"
            )
        if mode == "record" and tensor not in header.tensors:
            raise SurgeryError(f"{path}: the original bytes of {tensor[:80]!r} are missing; the record is broken")
    return Record(path, header, Path(str(source)) if reference else None, settings, tensors)


class Blob:
    """A zlib stream inside a file, inflated no further than was asked for."""

    def __init__(self, path: Path, entry: Entry) -> None:
        self._path, self._at, self._end = path, entry.begin, entry.end
        self._fd = open_regular(path)
        self._stream = zlib.decompressobj()
        self._input = b""

    def read(self, count: int) -> bytes:
        parts = []
        while count:
            if not self._input and self._at < self._end:
                size = min(2**20, self._end - self._at)
                self._input = read_exactly(self._fd, self._at, size, self._path)
                self._at += size
            try:
                part = self._stream.decompress(self._input, count)
            except zlib.error as error:
                raise SurgeryError(f"{self._path}: cannot be decompressed ({error}); the record is broken") from None
            self._input = self._stream.unconsumed_tail
            if not part and (self._stream.eof or (self._at >= self._end and not self._input)):
                raise SurgeryError(f"{self._path}: ends early; the record is broken")
            parts.append(part)
            count -= len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._fd)
