"""A checkpoint directory with its quantised matrices: open it, and read their weights, some rows at a time."""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import CheckpointFiles, Measured, open_checkpoint, values
from surgery.files.quantised import Layer
from surgery.files.quantised_layouts import layers, scales_of
from surgery.files.rounding import STORED, refuse_not_finite
from surgery.files.safetensors_io import open_regular, read_exactly
from surgery.files.weight_fingerprint import Sketcher


def open_target(path: Path | str) -> CheckpointFiles:
    """As `open_checkpoint`, and where the weights are quantised, with `layers`: the matrices that can take an edit.

    Raises:
        SurgeryError: as `open_checkpoint`; a quantisation that cannot take an edit exactly, a matrix without scales.
    """
    found = open_checkpoint(path, quantised_too=True)
    entries = {name: found.entry(name) for name in found.places}
    return replace(found, layers=layers(found.config, entries, lambda name: plain(found, name), str(found.path)))


def plain(stored: CheckpointFiles, name: str) -> np.ndarray:
    """A whole stored tensor of integers or floats, flat; 16-bit floats widened. Raises: SurgeryError (truncated)."""
    entry, path = stored.entry(name), stored.path / stored.places[name]
    if entry.dtype in STORED:
        return values(stored, name, 0, entry.elements)
    kinds = {"I8": "i1", "U8": "u1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "BOOL": "u1"}
    if entry.dtype not in kinds:
        raise SurgeryError(f"{path}: {name!r} is stored as {entry.dtype}, expected integers or plain floats")
    fd = open_regular(path)
    try:
        return np.frombuffer(read_exactly(fd, entry.begin, entry.end - entry.begin, path), kinds[entry.dtype])
    finally:
        os.close(fd)


def measure_layer(stored: CheckpointFiles, layer: Layer) -> Measured:
    """Hash the codes of a quantised matrix, and sketch what they mean. Raises: SurgeryError (NaN or infinity)."""
    digest, sketcher = hashlib.sha256(), Sketcher()
    for raw, weights, _ in layer_rows(stored, layer):
        digest.update(raw)
        refuse_not_finite(weights, layer.name, str(stored.path))
        sketcher.feed(weights.reshape(-1))
    sums, norm = sketcher.finish()
    return Measured(digest.hexdigest(), sums, norm)


def layer_rows(
    stored: CheckpointFiles, layer: Layer, fd: int | None = None
) -> Iterator[tuple[bytes, np.ndarray, np.ndarray]]:
    """(stored bytes, weights fp32 [rows, columns], their scales) of a quantised matrix, some rows at a time.

    `fd`: an open copy of the file that holds its codes, to read these from instead.
    """
    entry, path = stored.entry(layer.codes), stored.path / stored.places[layer.codes]
    entries = {name: stored.entry(name) for name in stored.places if name.startswith(layer.name)}
    given = scales_of(layer, entries, lambda name: plain(stored, name))
    refuse_not_finite(given, layer.scale, str(stored.path))
    rows, columns = layer.shape
    own = open_regular(path) if fd is None else fd
    try:
        step = max(1, 2**20 // columns)
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            size = layer.row_bytes
            raw = read_exactly(own, entry.begin + start * size, (stop - start) * size, path)
            scales = layer.scales(given, start, stop)
            yield raw, layer.decode(raw, scales), scales
    finally:
        if fd is None:
            os.close(own)
