"""A delta onto a GGUF file: touched tensors are dequantised, edited and written again, every other byte is copied."""

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from surgery.apply.gguf_plan import Choice, Target, choose, look, notes
from surgery.apply.plan import Edit
from surgery.apply.record import KEY, RecordWriter
from surgery.apply.report import ApplyReport, TensorChange
from surgery.apply.requantise import CLIPPED
from surgery.apply.targets import Tied
from surgery.delta.differences import Differences
from surgery.delta.format import open_delta
from surgery.errors import SurgeryError
from surgery.files.ahead import in_order
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.copying import Beside, OnBytes, copy_range, sync_file, write_exactly
from surgery.files.gguf import GgufFile, open_gguf, read_rows, row_groups
from surgery.files.gguf_codes import requantise
from surgery.files.k_quants import KINDS, recode
from surgery.files.rounding import ROUNDINGS, random16
from surgery.files.safetensors_io import Entry, open_regular, parse_json, read_header

RECORD = ".undo.surgery"  # behind the edited file's name


def apply_gguf(
    delta: Differences | Path | str,
    path: Path | str,
    out: Path | str,
    *,
    scale: float = 1.0,
    rounding: str = "auto",
    seed: int | None = None,
    force: bool = False,
    undo: str = "record",
    tied: Tied | None = None,
    touched_type: str | None = None,
    progress: OnBytes | None = None,
) -> ApplyReport:
    """Write to the new file `out` the GGUF file with scale * difference added to the tensors that the delta touches.

    A touched tensor keeps its own type where the gguf library writes it, else takes the smallest type that is not
    worse (named in the notes); `touched_type` (such as Q8_0) chooses one for the matrices. Rounding "stochastic" (and
    "auto", wherever the type is not F32) rounds the codes of a block by chance, so that an edit smaller than a code
    survives on average: of the demo's edit Q4_1 keeps 98 % so, and 11 % by "nearest" (docs/delta.md); `seed` draws it,
    None is the delta's own. With undo "record" the original bytes stand in `out` + ".undo.surgery".

    Raises:
        SurgeryError: refused or failed; then nothing was created and the source is as it was.
    """
    path, out = Path(path), Path(out)
    if rounding not in ROUNDINGS or not math.isfinite(scale):
        raise SurgeryError(f"rounding {rounding!r}, scale {scale}: expected one of {', '.join(ROUNDINGS)}, finite")
    if undo not in ("record", "none"):
        raise SurgeryError(f"undo {undo!r}: of a GGUF file expected record or none")
    if isinstance(delta, Path | str):
        delta = open_delta(delta)
    file, seed = open_gguf(path), int(delta.metadata["seed"]) if seed is None else seed
    if not force:
        _refuse_held(path, delta, scale)
    record = out.with_name(out.name + RECORD) if undo == "record" else None
    for destination in (out, *([record] if record else [])):
        check_destination(destination)
    choices = choose(delta, file, tied=tied, touched_type=touched_type)
    settings: dict[str, Any] = {"scale": scale, "rounding": rounding, "seed": seed}
    with temporary(out, folder=True) as part:
        rewrite = _Rewriter(delta, file, scale, rounding, seed)
        writer = _record(part / RECORD, file, undo, settings) if record else None
        with _copied(file, part / out.name, choices, delta, progress) as (source, fd, places, seen):
            found, changes = look(delta, file, choices, force=force), []
            for target in found.targets:
                changes.append(rewrite.tensor(target, source, fd, places[target.tensor.name], writer))
                seen(target.bytes)
        size = (part / out.name).stat().st_size
        sync_file(part / out.name)
        if writer and record:
            settings["delta"] = delta.sha256
            writer.finish()
            sync_file(part / RECORD)
            publish(part / RECORD, record)
        publish(part / out.name, out)
    return ApplyReport(
        out=out,
        tensors=tuple(changes),
        files=1,
        bytes_before=file.size,
        bytes=size,
        farthest=found.farthest,
        distance=found.distance,
        verdict=found.verdict,
        scale=scale,
        rounding=rounding,
        seed=seed,
        delta_sha256=delta.sha256,
        undo=record,
        notes=notes(choices, touched_type is not None),
    )


def _record(path: Path, file: GgufFile, undo: str, settings: dict[str, Any]) -> RecordWriter:
    """What an undo needs, to be filled: where each tensor stood, and as what. `settings` may still be added to."""
    tensors = {name: [tensor.type, tensor.begin - file.data] for name, tensor in file.tensors.items()}
    settings["gguf"] = {"tensors": tensors, "size": file.size}
    return RecordWriter(path, undo, file.path, settings, packed=False)


def _refuse_held(path: Path, delta: Differences, scale: float) -> None:
    """Raises: SurgeryError when the record beside the file says that the delta was added, in ``scale``'s direction."""
    record = path.with_name(path.name + RECORD)
    if not record.is_file():
        return
    content = parse_json(read_header(record).metadata.get(KEY, "null").encode("utf-8", "surrogatepass"), str(record))
    settings = content.get("settings", {}) if isinstance(content, dict) else {}
    if settings.get("delta") == delta.sha256 and float(settings.get("scale", 1.0)) * scale > 0:
        raise SurgeryError(
            f"{path}: holds this delta already (with scale {settings['scale']:g}, says {record.name}); give the file "
            "as it was (surgery undo), or repeat with --force to add it once more"
        )


def _layout(file: GgufFile, sizes: dict[str, int]) -> dict[str, int]:
    """Where each tensor begins in the new file: in the old order, as close as the alignment allows."""
    places, position = {}, file.data
    for tensor in file.tensors.values():
        places[tensor.name] = position
        size = sizes.get(tensor.name, tensor.end - tensor.begin)
        same = size == tensor.end - tensor.begin
        position += file.rooms[tensor.name] - tensor.begin if same else -(-size // file.alignment) * file.alignment
    return places | {"": position}


@contextmanager
def _copied(
    file: GgufFile, out: Path, choices: Sequence[Choice], delta: Differences, progress: OnBytes | None
) -> Iterator[tuple[int, int, dict[str, int], Callable[[int], None]]]:
    """Inside, a second thread copies into ``out``, within the kernel, what lies between the tensors of ``choices``.

    Gives the descriptors of the source and of ``out``, where each tensor begins there, and what to tell of bytes that
    are done. The thread hashes the delta's file, too, while this one looks at the weights.
    """
    wanted = {one.tensor.name: one for one in choices}
    places = _layout(file, {name: one.bytes for name, one in wanted.items()})
    size = places[""]
    source = open_regular(file.path)
    fd = os.open(out, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        with Beside(size, progress) as beside:
            copy_range(source, fd, file.data, beside.seen)
            spans = []  # (first byte, byte behind the last, where it goes)
            for tensor in file.tensors.values():
                place, one, after = places[tensor.name], wanted.get(tensor.name), file.rooms[tensor.name]
                kind = one.kind if one else tensor.type
                write_exactly(fd, tensor.at, memoryview(type_and_offset(kind, place - file.data)))
                if one is None:
                    spans.append((tensor.begin, after, place))
                elif one.stays:
                    spans.append((tensor.end, after, place + one.bytes))

            def copy() -> None:
                for first, end, at in spans:
                    copy_range(source, fd, end - first, beside.seen, start=first, at=at)
                _ = delta.sha256  # a file's is kept

            beside.start(copy)
            yield source, fd, places, beside.seen
        os.ftruncate(fd, size)  # zeros up to the alignment behind a tensor that grew or shrank
    finally:
        os.close(fd)
        os.close(source)


def type_and_offset(kind: str, offset: int) -> bytes:
    """The twelve bytes of a tensor's type and offset."""
    from gguf.constants import GGMLQuantizationType

    return int(GGMLQuantizationType[kind]).to_bytes(4, "little") + offset.to_bytes(8, "little")


class _Rewriter:
    """Adds scale * difference to one tensor at a time and tells what became of it."""

    def __init__(self, delta: Differences, file: GgufFile, scale: float, rounding: str, seed: int) -> None:
        self._delta, self._file, self._scale, self._rounding, self._seed = delta, file, scale, rounding, seed

    def tensor(self, target: Target, source: int, fd: int, place: int, writer: RecordWriter | None) -> TensorChange:
        tensor, file = target.tensor, self._file
        before, after = hashlib.sha256(), hashlib.sha256()
        changed = lost = 0
        length = tensor.end - tensor.begin
        if writer:
            entry = Entry(tensor.type, tensor.shape, tensor.begin, tensor.end)
            writer.begin(
                Edit(tensor.name, file.path.name, entry, target.sources, length, target.sha256, target.distance)
            )
        move = target.difference(self._delta)

        def work(rows: tuple[int, int]) -> tuple[bytes, np.ndarray, int, int]:
            raw, old = read_rows(file, source, tensor, *rows)
            moved = move(*rows)
            if self._scale != 1.0:
                moved = moved * np.float32(self._scale)
            stored, new = self._stored(target, raw, old, moved, rows[0])
            same = new == old
            kept = int(np.count_nonzero(same & (moved != 0)))
            data = np.ascontiguousarray(stored).reshape(-1)
            write_exactly(fd, place + rows[0] * (target.bytes // tensor.rows), data.data)
            return raw, data, same.size - int(np.count_nonzero(same)), kept

        for raw, data, new, kept in in_order(work, row_groups(tensor)):
            changed, lost = changed + new, lost + kept
            before.update(raw)
            after.update(data.data)
            if writer:
                bytes_before = np.frombuffer(raw, np.uint8)
                writer.feed(bytes_before, data if target.bytes == length else np.zeros_like(bytes_before))
        if before.hexdigest() != target.sha256:
            raise SurgeryError(f"{file.path}: {tensor.name!r} changed while it was being read; run the command again")
        if writer:
            writer.end(before.hexdigest(), after.hexdigest())
        entries = math.prod(tensor.shape)
        return TensorChange(
            tensor.name, file.path.name, tensor.type, target.kind, entries, changed, lost, target.distance
        )

    def _stored(
        self, target: Target, raw: bytes, old: np.ndarray, moved: np.ndarray, start: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """(stored bytes [rows, bytes], what they mean in fp32 [rows, columns]) of some rows."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
        from gguf.quants import dequantize

        kind, draw = GGMLQuantizationType[target.kind], None
        if self._rounding != "nearest" and target.kind != "F32":
            first = start * old.shape[1]
            draw = random16(self._seed, target.sources[0], first, old.size).reshape(old.shape) / np.float32(65536)
        if target.kind in KINDS:
            stored = self._recoded(target, raw, moved, draw)
            new = dequantize(stored, kind).astype(np.float32, copy=False).reshape(old.shape)
        else:
            stored, new = requantise(old + moved, target.kind, draw)
        if target.kind == target.tensor.type and target.kind not in KINDS:
            block, size = GGML_QUANT_SIZES[kind]
            still = ~(moved.reshape(-1, block) != 0).any(axis=1)
            if still.any():  # blocks that the delta leaves alone keep their bytes
                stored, new = np.ascontiguousarray(stored), np.ascontiguousarray(new)
                stored.reshape(-1, size)[still] = np.frombuffer(raw, np.uint8).reshape(-1, size)[still]
                new.reshape(-1, block)[still] = old.reshape(-1, block)[still]
        if not np.isfinite(new).all():
            raise SurgeryError(
                f"{target.tensor.name}: the edited value is too large for {target.kind}; smaller --scale"
            )
        return stored, new

    def _recoded(self, target: Target, raw: bytes, moved: np.ndarray, draw: np.ndarray | None) -> np.ndarray:
        """New codes under the scales that the file has, for a type that the library does not write."""
        blocks = np.frombuffer(raw, np.uint8).reshape(moved.size // 256, -1)
        stored, beyond = recode(
            target.kind, blocks, moved.reshape(-1, 256), None if draw is None else draw.reshape(-1, 256)
        )
        if beyond > CLIPPED * float(np.square(moved, dtype=np.float64).sum()):
            raise SurgeryError(
                f"{target.tensor.name}: more than {CLIPPED:.0%} of the edit lies beyond what the scales of its "
                f"{target.kind} blocks hold; repeat with --touched-type Q8_0"
            )
        return stored.reshape(len(moved), -1)
