"""A checkpoint as it lies on disk: the headers of all its shards, its config, and where each tensor's bytes
are."""

import hashlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.architecture import facts, read_json
from surgery.files.quantised import Layer
from surgery.files.quantised_layouts import quantisation
from surgery.files.rounding import STORED, WORDS, refuse_not_finite, widen
from surgery.files.safetensors_io import Entry, Header, open_regular, read_exactly, read_header
from surgery.files.tensor_names import is_vocabulary
from surgery.files.weight_fingerprint import Sketcher

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint directory whose headers were all read and agree with each other.

    `files` are all files below the directory (relative, sorted), `shards` the checked headers by file name,
    `places` the file that holds each tensor.
    """

    path: Path
    config: dict[str, Any]
    files: tuple[str, ...]
    shards: dict[str, Header]
    places: dict[str, str]
    layers: dict[str, Layer] = field(default_factory=dict)
    """Quantised matrices, where the checkpoint was opened for them."""

    @cached_property
    def matrices(self) -> dict[str, str]:
        """{name as a model has it: the stored tensor that an edit of it changes}; scales and the like are left out."""
        hidden = (
            {
                name
                for layer in self.layers.values()
                for name in self.places
                if name.startswith((layer.name, layer.scale))
            }
            if self.layers
            else set()
        )
        return {name: name for name in self.places if name not in hidden} | {
            name: layer.codes for name, layer in self.layers.items()
        }

    @cached_property
    def facts(self) -> dict[str, Any]:
        return facts(self.config)

    def entry(self, name: str) -> Entry:
        return self.shards[self.places[name]].tensors[name]

    @cached_property
    def tied(self) -> bool:
        """True when the head is the embedding: the config says so, and no other head is stored beside it."""
        return self.tied_by(False)

    def tied_by(self, unsaid: bool) -> bool:
        """`tied`, where a config that says nothing of it means `unsaid`."""
        matrices = [name for name in self.places if is_vocabulary(name)]
        return bool(self.facts.get("tied", unsaid)) and all(
            same_bytes(self, matrices[0], self, name) for name in matrices[1:]
        )


def open_checkpoint(path: Path | str, *, quantised_too: bool = False) -> CheckpointFiles:
    """Read every header of the checkpoint directory `path`; reads no weights.

    With `quantised_too` a quantised checkpoint is not refused; `surgery.files.quantised_rows` finds its matrices.

    Raises:
        SurgeryError: not a directory of safetensors weights; quantised; a broken file; a tensor in two
            shards; an index that names a file outside the directory or disagrees with the shards.
    """
    path = Path(path)
    if not path.is_dir():
        raise SurgeryError(f"{path}: no such checkpoint directory; give the folder that holds config.json")
    files = tuple(sorted(list_files(path)))
    if "config.json" not in files:
        raise SurgeryError(f"{path}: holds no config.json, so the architecture cannot be checked; add the model's own")
    config = read_json(path / "config.json")
    if not isinstance(config, dict):
        raise SurgeryError(f"{path / 'config.json'}: not a JSON object; the file is broken")
    if not quantised_too:
        _refuse_quantised(path, config)
    names = _shard_names(path, files)
    shards: dict[str, Header] = {}
    places: dict[str, str] = {}
    for name in names:
        shards[name] = read_header(path / name)
        for tensor in shards[name].tensors:
            if tensor in places:
                raise SurgeryError(f"{path}: {tensor!r} stands in both {places[tensor]} and {name}; remove one of them")
            places[tensor] = name
    if INDEX in files:
        _check_index(path, shards, places)
    return CheckpointFiles(path, config, files, shards, places)


def check_shards(path: Path) -> None:
    """Read the headers of the weights in `path`, where they are safetensors files. Raises: SurgeryError when broken."""
    try:
        files = tuple(sorted(os.listdir(path)))
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be read ({error.strerror}); check its rights") from None
    if INDEX in files or SINGLE in files:
        for name in _shard_names(path, files):
            read_header(path / name)


def list_files(path: Path, prefix: str = "") -> list[str]:
    """All files below `path`, relative. Links to files are followed (a hub cache is made of them).

    Raises:
        SurgeryError: a link to a directory, a dangling link, or a special file such as a pipe.
    """
    found: list[str] = []
    if not os.access(path, os.R_OK | os.X_OK):
        raise SurgeryError(f"{path}: cannot be read; check its rights")
    with os.scandir(path) as entries:
        for entry in entries:
            relative = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                found += list_files(Path(entry.path), relative + "/")
                continue
            try:
                mode = entry.stat().st_mode
            except OSError as error:
                raise SurgeryError(f"{entry.path}: cannot be read ({error.strerror}); repair or remove it") from None
            if not stat.S_ISREG(mode):
                raise SurgeryError(f"{entry.path}: neither a file nor a plain folder; copy the checkpoint without it")
            found.append(relative)
    return found


def _refuse_quantised(path: Path, config: dict[str, Any]) -> None:
    found = quantisation(config)
    if found is not None:
        method = str(found.get("quant_method", "unnamed"))[:40]
        raise SurgeryError(f"{path}: holds weights quantised by {method}; expected a checkpoint that is not quantised")


def _shard_names(path: Path, files: tuple[str, ...]) -> list[str]:
    if INDEX in files and SINGLE in files:
        raise SurgeryError(f"{path}: holds both {SINGLE} and {INDEX}; remove the one that is not the model")
    if INDEX not in files:
        if SINGLE in files:
            return [SINGLE]
        other = [name for name in files if name.endswith((".bin", ".pt", ".gguf", ".safetensors"))]
        raise SurgeryError(
            f"{path}: holds neither {SINGLE} nor {INDEX} (found {', '.join(other[:3]) or 'no weights'}); "
            "save it with save_pretrained first"
        )
    names = sorted(set(_weight_map(path).values()))
    for name in names:
        if name not in files:
            inside = not ("/" in name or "\\" in name or name in ("", ".", ".."))
            problem = "is missing" if inside else "lies outside the directory"
            raise SurgeryError(f"{path / INDEX}: the shard {name[:80]!r} {problem}; get the checkpoint again")
    return names


def _weight_map(path: Path) -> dict[str, str]:
    content = read_json(path / INDEX)
    weights = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weights, dict) or not weights or not all(isinstance(v, str) for v in weights.values()):
        raise SurgeryError(f"{path / INDEX}: has no weight_map from tensors to files; the file is broken")
    return weights


def _check_index(path: Path, shards: dict[str, Header], places: dict[str, str]) -> None:
    for tensor, file in _weight_map(path).items():
        if tensor not in shards[file].tensors:
            raise SurgeryError(
                f"{path / INDEX}: says that {tensor[:80]!r} is in {file}, which does not hold it; "
                "get the checkpoint again"
            )


CHUNK_BYTES = 4 * 2**20  # of stored bytes at a time: memory stays flat, and mmap would inflate the resident size


@dataclass(frozen=True)
class Measured:
    """What one pass over a stored tensor finds: sha256 of its bytes, sketch fp32 [64], Euclidean norm."""

    sha256: str
    sketch: np.ndarray
    norm: float


def chunks(entry: Entry, elements: int | None = None) -> Iterator[tuple[int, int]]:
    """The element ranges (start, stop) of the first `elements` of a tensor, CHUNK_BYTES of stored bytes each."""
    total = entry.elements if elements is None else elements
    step = CHUNK_BYTES // WORDS[entry.dtype].itemsize
    for start in range(0, total, step):
        yield start, min(start + step, total)


def measure(
    stored: CheckpointFiles, name: str, elements: int | None = None, *, known: str | None = None
) -> Measured | None:
    """Hash and sketch the first `elements` of a tensor on disk; None when its sha256 is `known` (the base's).

    The bytes are hashed first, and sketched in a second pass only if they are not the base's.

    Raises:
        SurgeryError: the tensor is no plain float, or holds NaN or infinity.
    """
    entry = stored.entry(name)
    path = stored.path / stored.places[name]
    require_float(entry.dtype, name, path)
    digest, sketcher = hashlib.sha256(), Sketcher()
    size = STORED[entry.dtype].itemsize
    fd = open_regular(path)
    try:
        for sketching in (False, True):
            for start, stop in chunks(entry, elements):
                raw = read_exactly(fd, entry.begin + size * start, size * (stop - start), path)
                if sketching:
                    values = widen(np.frombuffer(raw, STORED[entry.dtype]), entry.dtype)
                    refuse_not_finite(values, name, str(path))
                    sketcher.feed(values)
                    continue
                digest.update(raw)
            if digest.hexdigest() == known:
                return None
    finally:
        os.close(fd)
    sums, norm = sketcher.finish()
    return Measured(digest.hexdigest(), sums, norm)


def values(stored: CheckpointFiles, name: str, start: int, stop: int) -> np.ndarray:
    """Elements start..stop of a stored tensor, widened to fp32. Raises: SurgeryError (dtype, truncated)."""
    entry, path = stored.entry(name), stored.path / stored.places[name]
    require_float(entry.dtype, name, path)
    size = STORED[entry.dtype].itemsize
    fd = open_regular(path)
    try:
        raw = read_exactly(fd, entry.begin + size * start, size * (stop - start), path)
    finally:
        os.close(fd)
    return widen(np.frombuffer(raw, STORED[entry.dtype]), entry.dtype)


def same_bytes(left: CheckpointFiles, name: str, right: CheckpointFiles, other: str) -> bool:
    """True when both tensors have one dtype, one shape and the same bytes."""
    pair = [(stored, stored.entry(tensor), stored.places[tensor]) for stored, tensor in ((left, name), (right, other))]
    if (pair[0][1].dtype, pair[0][1].shape) != (pair[1][1].dtype, pair[1][1].shape):
        return False
    files = [open_regular(stored.path / file) for stored, _, file in pair]
    try:
        size = pair[0][1].end - pair[0][1].begin
        return all(
            len(
                {
                    read_exactly(fd, entry.begin + at, min(CHUNK_BYTES, size - at), stored.path / file)
                    for fd, (stored, entry, file) in zip(files, pair, strict=True)
                }
            )
            == 1
            for at in range(0, size, CHUNK_BYTES)
        )
    finally:
        for fd in files:
            os.close(fd)


def require_float(dtype: str, name: str, where: Path) -> None:
    """Raises: SurgeryError unless the dtype is one that an edit can be written to."""
    if dtype not in STORED:
        raise SurgeryError(
            f"{where}: {name!r} is stored as {dtype}; a difference needs F32, F16 or BF16 (not quantised)"
        )
