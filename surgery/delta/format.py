"""`Delta` in memory, `DeltaFile` on disk, and what both share."""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.delta.differences import html_table, one_line
from surgery.delta.metadata import KEY, MODULE, base_shapes, check_metadata, encode
from surgery.errors import SurgeryError
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.rounding import STORED, Rounding, refuse_not_finite, widen
from surgery.files.safetensors_io import Header, file_parts, open_regular, parse_json, read_exactly, read_header

if TYPE_CHECKING:
    from torch import nn

# Rows of a product lora_B @ lora_A are computed in blocks of this many elements, always the same blocks, so
# that the numbers do not depend on how much of the matrix a caller asks for at a time.
PRODUCT_BLOCK = 2**20


@dataclass(frozen=True, repr=False)
class Delta:
    """The differences an edit makes, under the checkpoint's names; the file format is at the top of the
    package.

    tensors: the numbers of the file, fp32. metadata: the decoded JSON of the file's "surgery" key.
    """

    tensors: dict[str, np.ndarray]
    metadata: dict[str, Any]

    __repr__ = one_line
    _repr_html_ = html_table

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return base_shapes(self.metadata)

    @property
    def kind(self) -> str:
        return str(self.metadata["kind"])

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The difference of the base tensor `name`, elements start..stop in row-major order, fp32 [stop - start]."""
        if name not in self.tensors:
            left, right = self.tensors[name + ".lora_B"], self.tensors[name + ".lora_A"]
            return _product(lambda first, last: left[first:last], right, left.shape[0], start, stop)
        return self.tensors[name].reshape(-1)[start:stop]

    @property
    def module(self) -> dict[str, np.ndarray]:
        """The new parts of a delta of kind "module", by their names in the module; {} for the other kinds."""
        if self.kind != "module":
            return {}
        return {name.removeprefix(MODULE): a for name, a in self.tensors.items() if name.startswith(MODULE)}

    @property
    def differences(self) -> "Delta | None":
        """What of it a plain checkpoint can hold: itself; of kind "module" the rest, as "lora"; None if nothing."""
        if self.kind != "module":
            return self
        if not self.shapes:
            return None
        metadata = {key: value for key, value in self.metadata.items() if key != "module"} | {"kind": "lora"}
        return Delta({name: a for name, a in self.tensors.items() if not name.startswith(MODULE)}, metadata)

    def _parts(self) -> Iterator[bytes | memoryview]:
        check_metadata(self.metadata, {name: array.shape for name, array in self.tensors.items()}, "this delta")
        spec = {name: (_kept(array), array.shape) for name, array in self.tensors.items()}

        def data(name: str) -> Iterator[bytes | memoryview]:
            flat = np.ascontiguousarray(self.tensors[name], "<f4").reshape(-1)
            half = spec[name][0] == "BF16"
            yield ((flat.view("<u4") >> 16).astype("<u2") if half else flat).view(np.uint8).data

        yield from file_parts(spec, {KEY: encode(self.metadata)}, data)

    @property
    def sha256(self) -> str:
        """sha256 (hex) of the file that `save` writes."""
        digest = hashlib.sha256()
        for part in self._parts():
            digest.update(part)
        return digest.hexdigest()

    def save(self, path: Path | str, *, overwrite: bool = False) -> str:
        """Write the file atomically and return its sha256.

        Raises:
            SurgeryError: the destination exists (unless `overwrite`), or writing failed; nothing is left
            then.
        """
        path = Path(path)
        check_destination(path, overwrite=overwrite)
        digest = hashlib.sha256()
        with temporary(path, folder=False) as part_path:
            with open(part_path, "wb") as file, ThreadPoolExecutor(1) as beside:
                for part in self._parts():
                    hashed = beside.submit(digest.update, part)
                    file.write(part)
                    hashed.result()
                file.flush()
                os.fsync(file.fileno())
            publish(part_path, path, overwrite=overwrite)
        return digest.hexdigest()

    def record(self, path: Path) -> dict[str, Any]:
        """``save``, over what stands there, and what a run says of the file: its name, kind, bytes and sha256."""
        sha256 = self.save(path, overwrite=True)
        return {"file": path.name, "kind": self.kind, "bytes": path.stat().st_size, "sha256": sha256}

    @staticmethod
    def load(path: Path | str) -> "Delta":
        """Read a whole delta into memory.

        Raises:
            SurgeryError: not a delta, broken, or holding NaN or infinity.
        """
        opened = open_delta(path)
        tensors = {name: opened.array(name) for name in opened.header.tensors}
        for name, array in tensors.items():
            refuse_not_finite(array, name, str(path))
        return Delta(tensors, opened.metadata)

    def apply(
        self,
        model: "nn.Module",
        *,
        scale: float = 1.0,
        rounding: Rounding = "auto",
        seed: int | None = None,
        as_stored: bool = False,
        force: bool = False,
    ) -> None:
        """Add scale * difference to a live model in place, and its module; see `surgery.delta.live.apply_live`."""
        from surgery.delta.live import apply_live

        apply_live(self, model, scale=scale, rounding=rounding, seed=seed, as_stored=as_stored, force=force)

    @contextmanager
    def applied(
        self,
        model: "nn.Module",
        *,
        scale: float = 1.0,
        rounding: Rounding = "auto",
        seed: int | None = None,
        as_stored: bool = False,
        force: bool = False,
    ) -> Iterator["nn.Module"]:
        """The edited model inside `with`; afterwards, after an exception too, it is bit for bit as before."""
        from surgery.delta.live import applied_live

        options: dict[str, Any] = {"rounding": rounding, "seed": seed, "as_stored": as_stored, "force": force}
        with applied_live(self, model, scale=scale, **options):
            yield model


@dataclass(frozen=True, repr=False)
class DeltaFile:
    """A delta left on disk: metadata in memory, differences read as they are needed."""

    path: Path
    header: Header
    metadata: dict[str, Any]

    __repr__ = one_line
    _repr_html_ = html_table

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return base_shapes(self.metadata)

    @property
    def kind(self) -> str:
        return str(self.metadata["kind"])

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        with open(self.path, "rb") as file:
            while part := file.read(2**22):
                digest.update(part)
        return digest.hexdigest()

    def array(self, name: str) -> np.ndarray:
        """One tensor of the file, fp32, with its shape."""
        entry = self.header.tensors[name]
        return self._elements(name, 0, entry.elements).reshape(entry.shape)

    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The difference of the base tensor `name`, elements start..stop in row-major order, fp32 [stop - start]."""
        if name in self.header.tensors:
            return self._elements(name, start, stop)
        left, right = self.header.tensors[name + ".lora_B"], self.array(name + ".lora_A")
        rows, rank = left.shape

        def rows_of(first: int, last: int) -> np.ndarray:
            return self._elements(name + ".lora_B", first * rank, last * rank).reshape(last - first, rank)

        return _product(rows_of, right, rows, start, stop)

    def _elements(self, name: str, start: int, stop: int) -> np.ndarray:
        entry = self.header.tensors[name]
        kind = STORED[entry.dtype]
        fd = open_regular(self.path)
        try:
            raw = read_exactly(fd, entry.begin + kind.itemsize * start, kind.itemsize * (stop - start), self.path)
        finally:
            os.close(fd)
        stored = np.frombuffer(raw, kind)
        return widen(stored, "BF16") if entry.dtype == "BF16" else stored.astype(np.float32, copy=False)


def _kept(array: np.ndarray) -> str:
    """The dtype that a file keeps an array in: bf16 where that is exact for every number of it, else fp32."""
    flat = np.ascontiguousarray(array, "<f4").reshape(-1).view(np.uint32)
    for start in range(0, flat.size, 2**20):
        if (flat[start : start + 2**20] & np.uint32(0xFFFF)).any():
            return "F32"
    return "BF16" if flat.size else "F32"


def _product(left_rows: Any, right: np.ndarray, rows: int, start: int, stop: int) -> np.ndarray:
    columns = right.shape[1]
    step = max(1, PRODUCT_BLOCK // columns)
    first = start // columns // step * step
    blocks = [
        (left_rows(row, min(row + step, rows)) @ right).reshape(-1) for row in range(first, -(-stop // columns), step)
    ]
    return np.concatenate(blocks or [np.empty(0, np.float32)])[start - first * columns : stop - first * columns]


def open_delta(path: Path | str) -> DeltaFile:
    """Check a delta file's header and metadata without reading its differences.

    Raises:
        SurgeryError: not a safetensors file, not a delta, or contradicting itself; names the field.
    """
    path = Path(path)
    header = read_header(path)
    if KEY not in header.metadata:
        raise SurgeryError(
            f"{path}: a safetensors file, but no delta (no {KEY!r} in its metadata); "
            "give what surgery run, diff or import wrote"
        )
    metadata = parse_json(header.metadata[KEY].encode("utf-8", "surrogatepass"), str(path))
    for name, entry in header.tensors.items():
        if entry.dtype not in ("F32", "BF16"):
            raise SurgeryError(f"{path}: {name!r} is {entry.dtype}; differences are stored as F32 or BF16")
    check_metadata(metadata, {name: entry.shape for name, entry in header.tensors.items()}, str(path))
    return DeltaFile(path, header, metadata)
