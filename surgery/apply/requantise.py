"""A difference onto a quantised matrix on disk: codes are read as weights, changed, and written under their scales."""

import hashlib
from pathlib import Path

import numpy as np

from surgery.apply.plan import Edit
from surgery.apply.record import RecordWriter
from surgery.delta.differences import Differences
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import CheckpointFiles
from surgery.files.copying import write_exactly
from surgery.files.quantised_layouts import TWO_WAYS
from surgery.files.quantised_rows import layer_rows
from surgery.files.rounding import WORDS, random16

# Of an edit's squared norm in a matrix, what may lie beyond the codes of its scales before the edit is refused.
CLIPPED = 0.05


def rewrite_layer(
    delta: Differences,
    edit: Edit,
    stored: CheckpointFiles,
    fd: int,
    path: Path,
    how: tuple[float, str, int],
    writer: RecordWriter | None,
) -> tuple[int, int]:
    """Write new codes into the copy `path`, open as `fd`; returns how many weights changed, and how many kept theirs.

    how: scale, rounding and seed. Codes are rounded by chance unless rounding is "nearest": an edit is smaller than the
    step of a code, so that the nearest one takes most of it away. Weights without a difference keep their codes.

    Raises:
        SurgeryError: the bytes are not those that were checked; more than `CLIPPED` of the edit lies beyond the codes.
    """
    scale, rounding, seed = how
    layer = edit.layer
    assert layer is not None
    before, after = hashlib.sha256(), hashlib.sha256()
    changed = lost = first = 0
    clipped = whole = 0.0
    meant = layer.meant  # half a step beyond the last code is rounding, what lies farther is lost
    lowest, highest = meant[0] - (meant[1] - meant[0]) / 2, meant[-1] + (meant[-1] - meant[-2]) / 2
    at = edit.entry.begin
    for raw, weights, scales in layer_rows(stored, layer, fd):
        start, stop = first, first + weights.size
        parts = [delta.read(name, start, stop) for name in edit.sources]
        moved = (np.sum(parts, axis=0, dtype=np.float32) * np.float32(scale)).reshape(weights.shape)
        draw = None
        if rounding != "nearest":
            draw = random16(seed, edit.sources[0], start, weights.size).reshape(weights.shape) / np.float32(65536)
        old = layer.unpack(raw, len(weights))
        codes = np.where(moved == 0, old, layer.encode(weights + moved, scales, draw))
        edges = (lowest * scales, highest * scales)
        beyond = weights + moved - np.clip(weights + moved, np.minimum(*edges), np.maximum(*edges))
        clipped += float(np.square(beyond, dtype=np.float64).sum())
        whole += float(np.square(moved, dtype=np.float64).sum())
        same = codes == old
        changed += int(np.count_nonzero(~same))
        lost += int(np.count_nonzero(same & (moved != 0)))
        data = layer.pack(codes, raw)
        write_exactly(fd, at, data.data)
        before.update(raw)
        after.update(data.data)
        if writer:
            kind = WORDS[edit.entry.dtype]
            writer.feed(np.frombuffer(raw, kind), data.view(kind))
        first, at = stop, at + data.size
    if before.hexdigest() != edit.sha256:
        raise SurgeryError(f"{path.name}: {edit.target!r} changed while it was being copied; run the command again")
    if clipped > CLIPPED * whole:
        raise SurgeryError(
            f"{path.name}: {clipped / whole:.0%} of the edit of {layer.name!r} lies beyond what its scales hold; "
            f"{TWO_WAYS}"
        )
    if writer:
        writer.end(before.hexdigest(), after.hexdigest())
    return changed, lost
