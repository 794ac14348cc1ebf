"""Read and write safetensors files without torch, with every header treated as hostile.

The format: 8 bytes little-endian header length N; N bytes of JSON mapping each tensor name to
`{"dtype", "shape", "data_offsets": [begin, end]}` (offsets count from byte 8 + N), with free text under
`__metadata__`; then the tensors' bytes, which cover the rest of the file without hole or overlap.
The reader never allocates by a number that the file claims before it has compared it with the file's size.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError

# Bits per element. Types below one byte exist in the format (F4); a shape of them fills whole bytes.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32, "C64": 64, "F64": 64,
    "I64": 64, "U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
# A checkpoint shard with 100,000 tensors has a header of about 12 MB. Python needs up to 25 bytes per byte of
# adversarial JSON, so that this bounds the memory a hostile header can take to a few hundred MB.
MAX_HEADER_BYTES = 16 * 2**20
MAX_DIMENSIONS = 32


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: `begin` and `end` are absolute byte positions in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name in file order, and the free `__metadata__` strings."""

    tensors: dict[str, Entry]
    metadata: dict[str, str]
    file_bytes: int

    @property
    def begin(self) -> int:
        """Where the tensors' bytes begin."""
        return min((entry.begin for entry in self.tensors.values()), default=self.file_bytes)


def parse_json(raw: bytes, where: str) -> Any:
    """JSON from untrusted bytes: duplicate keys, wrong UTF-8, NaN and absurd depth are refused.

    Raises:
        SurgeryError: the text is not such JSON.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            name = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise SurgeryError(f"{where}: the name {name[:80]!r} stands there twice; the file is broken")
        return result

    def constant(text: str) -> Any:
        raise SurgeryError(f"{where}: JSON holds {text}, which is not a number; the file is broken")

    try:
        content = json.loads(raw.decode("utf-8"), object_pairs_hook=pairs, parse_constant=constant)
        if b"\\ud" in raw or b"\\uD" in raw:  # half a surrogate pair: a string that no file can hold again
            json.dumps(content, ensure_ascii=False).encode("utf-8")
        return content
    except UnicodeError:
        raise SurgeryError(f"{where}: text that is not UTF-8; the file is broken") from None
    except RecursionError:
        raise SurgeryError(f"{where}: JSON nested too deeply; the file is broken") from None
    except ValueError as error:  # JSONDecodeError, and integers of more than 4300 digits
        raise SurgeryError(f"{where}: not JSON ({str(error)[:120]}); the file is broken") from None


def check_name(name: str, where: str) -> None:
    """Refuse tensor names that could act as a path or garble a terminal.

    Raises:
        SurgeryError: the name is empty, very long, absolute, holds `..` as a path part, or is not printable.
    """
    parts = name.replace("\\", "/").split("/")
    if not name or len(name) > 1024 or not name.isprintable() or ".." in parts or name[0] in "/\\":
        raise SurgeryError(f"{where}: {name[:80]!r} is no tensor name (a path, unprintable, or too long); get it again")


def open_regular(path: Path) -> int:
    """A read-only descriptor of a regular file (never blocks on a pipe).

    Raises:
        SurgeryError: no such file, not a regular file, or not readable.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise SurgeryError(
            f"{path}: cannot be opened ({error.strerror}); check the path, and who may read it"
        ) from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise SurgeryError(f"{path}: not a regular file; give a .safetensors file")
    return fd


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file.

    Raises:
        SurgeryError: the file is not safetensors or any field contradicts the file; names the field.
    """
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if read_exactly(fd, 0, min(size, 23), path) == b"version https://git-lfs":
            raise SurgeryError(f"{path}: a git-lfs pointer, not the file itself; fetch it with: git lfs pull")
        length = int.from_bytes(read_exactly(fd, 0, 8, path), "little") if size >= 8 else 0
        if size < 10 or not 2 <= length <= size - 8:
            raise SurgeryError(
                f"{path}: no safetensors file, or truncated ({size} bytes, header of {length}); download it again"
            )
        if length > MAX_HEADER_BYTES:
            raise SurgeryError(f"{path}: header of {length} bytes; at most {MAX_HEADER_BYTES} are read")
        raw = read_exactly(fd, 8, length, path)
    finally:
        os.close(fd)
    return parse_header(raw, size, str(path))


def parse_header(raw: bytes, size: int, where: str) -> Header:
    """Check the header's JSON `raw` of a file of `size` bytes. Raises: SurgeryError."""
    if raw[:1] != b"{":  # the format demands it; a leading space would be legal JSON
        raise SurgeryError(f"{where}: no safetensors file (the header does not start with '{{'); get it again")
    header = parse_json(raw, where)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise SurgeryError(f"{where}: __metadata__ is not a map of strings; the file is broken")
    start = 8 + len(raw)
    tensors = {name: _entry(name, value, start, size, where) for name, value in header.items()}
    position = start
    ordered = sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end))
    for name, entry in ordered:
        if entry.begin != position:
            problem = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise SurgeryError(
                f"{where}: {name!r} begins at byte {entry.begin - start}, expected {position - start}: it {problem}; "
                "get it again"
            )
        position = entry.end
    if position != size:
        raise SurgeryError(
            f"{where}: the tensors end at byte {position}, the file at {size}; truncated or with a tail, get it again"
        )
    return Header(dict(ordered), metadata, size)


def _entry(name: str, value: Any, start: int, size: int, where: str) -> Entry:
    check_name(name, where)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise SurgeryError(f"{where}: {name!r} is not described by dtype, shape and data_offsets; the file is broken")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise SurgeryError(f"{where}: {name!r} has the unknown dtype {str(dtype)[:40]!r}; broken, or update this tool")
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise SurgeryError(f"{where}: {name!r} has the impossible shape {str(shape)[:80]}; get it again")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1] <= size - start:
        raise SurgeryError(
            f"{where}: {name!r} lies at {str(offsets)[:80]}, outside the file's {size - start} bytes of data; "
            "get it again"
        )
    elements = 1
    for extent in shape:  # stop early: the product of 32 large numbers is not worth having
        elements *= extent
        if elements > 2**60:
            raise SurgeryError(f"{where}: {name!r} has the impossible shape {str(shape)[:80]}; get it again")
    if elements * DTYPE_BITS[dtype] != 8 * (offsets[1] - offsets[0]):
        raise SurgeryError(
            f"{where}: {name!r} of shape {shape} and dtype {dtype} does not fill its {offsets[1] - offsets[0]} bytes; "
            "get it again"
        )
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 2**62 for item in value)


def read_exactly(fd: int, offset: int, count: int, path: Path) -> bytes:
    """`count` bytes at `offset`. Raises: SurgeryError when the file ends before."""
    parts = []
    while count:
        part = os.pread(fd, min(count, 2**30), offset)
        if not part:
            raise SurgeryError(f"{path}: ends at byte {offset}, {count} bytes early; it changed or is truncated")
        parts.append(part)
        offset, count = offset + len(part), count - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def read_into(fd: int, view: memoryview, offset: int, path: Path) -> None:
    """Fill `view` with what stands at `offset`. Raises: SurgeryError when the file ends before."""
    while view:
        count = os.preadv(fd, [view], offset)
        if not count:
            raise SurgeryError(f"{path}: ends at byte {offset}, {len(view)} bytes early; it changed or is truncated")
        view, offset = view[count:], offset + count


def header_bytes(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, list[str]]:
    """The length, the header with sorted keys (padded to 8 bytes), and the order in which the tensors follow.

    The safetensors library writes `__metadata__` in random order; sorted, the same content is the same file.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    order = sorted(tensors)
    for name in order:
        dtype, shape = tensors[name]
        end = position + math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"data_offsets": [position, end], "dtype": dtype, "shape": list(shape)}
        position = end
    raw = json.dumps(header, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw, order


def file_parts(
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    metadata: Mapping[str, str],
    data: Callable[[str], Iterable[bytes | memoryview]],
) -> Iterable[bytes | memoryview]:
    """The bytes of a whole file, part by part; `data(name)` gives the bytes of one tensor."""
    head, order = header_bytes(tensors, metadata)
    yield head
    for name in order:
        yield from data(name)


def write_floats(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays of any shape as a file of fp32 tensors that torch's users read ("format": "pt")."""

    def data(name: str) -> list[memoryview]:
        return [np.ascontiguousarray(arrays[name], "<f4").reshape(-1).view(np.uint8).data]

    with open(path, "wb") as file:
        file.writelines(file_parts({name: ("F32", one.shape) for name, one in arrays.items()}, {"format": "pt"}, data))
