"""A GGUF file as it lies on disk: its keys, where each tensor's bytes are, and the numbers in them, without torch.

The format (ggml's docs/gguf.md): the magic, version, counts; keys with typed values; per tensor its name, sizes
(fastest first), type and offset; then the data, every tensor at a multiple of `general.alignment`. The `gguf` library
gives the types and their arithmetic; it reads headers so slowly (seconds for a vocabulary) that they are read here.
"""

import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.safetensors_io import check_name, open_regular, read_exactly

MAX_HEADER_BYTES = 512 * 2**20
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# What the library can write, by how many bits a weight takes; F64 and integers are no weights.
WRITABLE = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "F16", "BF16", "F32")
# The smallest of them that is not worse, for a type that the library reads and nothing here writes
# (surgery.files.k_quants has Q4_K, Q5_K and Q6_K).
SUBSTITUTE = dict.fromkeys(("Q2_K", "Q3_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), "Q4_0")
SUBSTITUTE |= dict.fromkeys(("TQ1_0", "TQ2_0"), "Q4_0")
SUBSTITUTE |= dict.fromkeys(("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4"), "Q5_0")


@dataclass(frozen=True)
class GgufTensor:
    """shape: rows first, as numpy has it. begin, end: in the file. at: where its type (u32) and offset (u64) stand."""

    name: str
    type: str
    shape: tuple[int, ...]
    begin: int
    end: int
    at: int

    @property
    def row_bytes(self) -> int:
        return (self.end - self.begin) // max(1, self.rows)

    @property
    def rows(self) -> int:
        return int(np.prod(self.shape[:-1]))


@dataclass(frozen=True)
class GgufFile:
    """A checked header: the keys' values (arrays of strings left out) and the tensors in the order of their bytes."""

    path: Path
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    alignment: int
    data: int
    size: int

    @property
    def architecture(self) -> str:
        return str(self.keys["general.architecture"])

    @cached_property
    def rooms(self) -> dict[str, int]:
        """Where the room of each tensor ends: at the next one, or with the file; behind its bytes are zeros."""
        begins = [tensor.begin for tensor in self.tensors.values()]
        return dict(zip(self.tensors, [*begins[1:], self.size], strict=True))

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Its keys under the names of `surgery.files.architecture.facts`; rope_theta on its own."""

        def key(name: str) -> Any:
            return self.keys.get(f"{self.architecture}.{name}")

        eps = key("attention.layer_norm_rms_epsilon")
        found = {
            "hidden_size": key("embedding_length"),
            "layers": key("block_count"),
            "heads": key("attention.head_count"),
            "kv_heads": key("attention.head_count_kv"),
            "head_dim": key("attention.key_length"),
            "intermediate_size": key("feed_forward_length"),
            "norm_eps": key("attention.layer_norm_epsilon") if eps is None else eps,
            "experts": key("expert_count") or None,
            "tied": "output.weight" not in self.tensors,
        }
        return {name: value for name, value in found.items() if isinstance(value, bool | int | float)}


class _Cursor:
    """Reads little-endian values in order. Raises: SurgeryError at the end of the file."""

    def __init__(self, fd: int, size: int, path: Path) -> None:
        self._fd, self._path, self.size = fd, path, size
        self._raw, self._start, self.at = b"", 0, 0

    def take(self, count: int) -> bytes:
        if count > self.size - self.at or self.at + count > MAX_HEADER_BYTES:
            raise SurgeryError(f"{self._path}: its header runs past byte {self.at}; truncated or no GGUF, get it again")
        if self.at + count > self._start + len(self._raw) or self.at < self._start:
            self._raw = read_exactly(self._fd, self.at, min(max(count, 2**22), self.size - self.at), self._path)
            self._start = self.at
        first = self.at - self._start
        self.at += count
        return self._raw[first : first + count]

    def one(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        raw = self.take(self.one("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise SurgeryError(f"{self._path}: text that is not UTF-8 at byte {self.at}; the file is broken") from None

    def value(self, kind: int) -> Any:
        """A key's value; of an array of strings only that it is one (None), since vocabularies are not needed."""
        if kind in _SCALARS:
            return self.one(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            raise SurgeryError(f"{self._path}: a key of the unknown type {kind}; broken, or of a newer version")
        inner, count = self.one("I"), self.one("Q")
        if inner in _SCALARS:
            code = _SCALARS[inner]
            return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
        for _ in range(count):
            if inner == _STRING:
                self.take(self.one("Q"))
            else:
                self.value(inner)
        return None


def open_gguf(path: Path | str) -> GgufFile:
    """Read and check the header of a GGUF file; reads no weights.

    Raises:
        SurgeryError: no GGUF, truncated, big-endian, one part of a split model, an unknown tensor type, tensors
            that are not aligned, overlap or lie outside the file.
    """
    path = Path(path)
    fd = open_regular(path)
    try:
        cursor = _Cursor(fd, os.fstat(fd).st_size, path)
        if cursor.size < 24 or cursor.take(4) != b"GGUF":
            raise SurgeryError(
                f"{path}: no GGUF file, or truncated ({cursor.size} bytes; expected 24 or more, GGUF first); "
                "get it again"
            )
        version, count, pairs = cursor.one("I"), cursor.one("Q"), cursor.one("Q")
        if version not in (2, 3):
            raise SurgeryError(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian); convert it again")
        keys: dict[str, Any] = {}
        for _ in range(pairs):
            name = cursor.text()
            keys[name] = cursor.value(cursor.one("I"))
        infos = [_info(cursor, path) for _ in range(count)]
    finally:
        os.close(fd)
    if not isinstance(keys.get("general.architecture"), str):
        raise SurgeryError(f"{path}: has no key general.architecture; the file is broken")
    if int(keys.get("split.count") or 1) > 1:
        raise SurgeryError(
            f"{path}: one of {keys['split.count']} parts of a split model; join them: gguf-split --merge"
        )
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 8 or alignment & (alignment - 1) or alignment > 2**20:
        raise SurgeryError(f"{path}: general.alignment is {alignment!r}, expected a power of two; the file is broken")
    data = -(-cursor.at // alignment) * alignment
    return GgufFile(path, keys, _placed(infos, data, alignment, cursor.size, path), alignment, data, cursor.size)


def _info(cursor: _Cursor, path: Path) -> tuple[str, tuple[int, ...], int, int, int]:
    """(name, shape with rows first, type number, offset, position of the type field)."""
    name = cursor.text()
    check_name(name, str(path))
    dimensions = cursor.one("I")
    if not 0 < dimensions <= 4:
        raise SurgeryError(f"{path}: {name!r} has {dimensions} dimensions, expected 1 to 4; the file is broken")
    sizes = [cursor.one("Q") for _ in range(dimensions)]
    at = cursor.at
    kind, offset = cursor.one("I"), cursor.one("Q")
    return name, tuple(reversed(sizes)), kind, offset, at


def _placed(
    infos: list[tuple[str, tuple[int, ...], int, int, int]], data: int, alignment: int, size: int, path: Path
) -> dict[str, GgufTensor]:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    tensors: dict[str, GgufTensor] = {}
    position = data
    for name, shape, kind, offset, at in sorted(infos, key=lambda info: info[3]):
        try:
            known = GGMLQuantizationType(kind)
        except ValueError:
            raise SurgeryError(f"{path}: {name!r} is of type {kind}, unknown to the gguf library; update it") from None
        block, stored = GGML_QUANT_SIZES[known]
        elements = 1
        for extent in shape:
            elements *= extent
        begin, end = data + offset, data + offset + elements // block * stored
        if shape[-1] % block:
            raise SurgeryError(
                f"{path}: {name!r} has rows of {shape[-1]}, no multiple of {known.name}'s {block}; get it again"
            )
        if offset % alignment or begin < position or end > size or name in tensors:
            problem = f"is not aligned to {alignment}" if offset % alignment else "overlaps another or leaves the file"
            raise SurgeryError(f"{path}: {name!r} lies at byte {begin} to {end} of {size}: it {problem}; get it again")
        tensors[name] = GgufTensor(name, known.name, shape, begin, end, at)
        position = end
    return tensors


def read_rows(file: GgufFile, fd: int, tensor: GgufTensor, start: int, stop: int) -> tuple[bytes, np.ndarray]:
    """(stored bytes, fp32 [stop - start, columns]) of some rows.

    Raises:
        SurgeryError: the library cannot dequantise the type.
    """
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    size = tensor.row_bytes
    raw = read_exactly(fd, tensor.begin + start * size, (stop - start) * size, file.path)
    try:
        numbers = dequantize(
            np.frombuffer(raw, np.uint8).reshape(stop - start, size), GGMLQuantizationType[tensor.type]
        )
    except NotImplementedError:
        raise SurgeryError(
            f"{file.path}: {tensor.name!r} is {tensor.type}, which the gguf library cannot read; "
            "take a file of another type"
        ) from None
    return raw, numbers.astype(np.float32, copy=False).reshape(stop - start, tensor.shape[-1])


def row_groups(tensor: GgufTensor, elements: int = 2**18) -> Iterator[tuple[int, int]]:
    """The rows (start, stop) of a tensor, about `elements` numbers at a time: few enough for a processor's cache."""
    step = max(1, elements // tensor.shape[-1])
    for start in range(0, tensor.rows, step):
        yield start, min(start + step, tensor.rows)
