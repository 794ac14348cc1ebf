"""Which tensors of a GGUF file a delta changes, and how the file lays their rows out; whatever is refused, is here."""

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from surgery.apply.gguf_names import EXPERT, check_architecture, names_in_file
from surgery.apply.plan import check_finite
from surgery.apply.targets import Tied
from surgery.delta.differences import Differences
from surgery.delta.metadata import unpack_sketch
from surgery.errors import SurgeryError
from surgery.files import weight_fingerprint as sketch
from surgery.files.ahead import in_order
from surgery.files.gguf import SUBSTITUTE, WRITABLE, GgufFile, GgufTensor, read_rows, row_groups
from surgery.files.k_quants import KINDS
from surgery.files.rounding import refuse_not_finite
from surgery.files.safetensors_io import open_regular, read_exactly


@dataclass(frozen=True)
class Choice:
    """One tensor to change, by the delta's tensors `sources`, and the type to write; told by the header alone."""

    tensor: GgufTensor
    sources: tuple[str, ...]
    kind: str

    @property
    def bytes(self) -> int:
        return type_bytes(self.kind, self.tensor.shape)

    @property
    def stays(self) -> bool:
        """Whether it takes as many bytes as before."""
        return self.bytes == self.tensor.end - self.tensor.begin


@dataclass(frozen=True)
class Target(Choice):
    """A tensor whose weights were looked at. layout: how the file orders the base's rows (`_orders`)."""

    layout: str
    order: np.ndarray | None
    sha256: str
    distance: float
    experts: tuple[int, ...] = ()
    """Of a tensor that holds all experts of a layer: whose each of `sources` is."""

    def difference(self, delta: Differences) -> Callable[[int, int], np.ndarray]:
        """(start, stop) -> the differences fp32 [stop - start, columns] of those rows as the file orders them."""
        rows, columns = self.tensor.rows, self.tensor.shape[-1]
        if self.experts:
            return lambda start, stop: _of_experts(delta, self, start, stop)

        def read(start: int, stop: int) -> np.ndarray:
            total = delta.read(self.sources[0], start * columns, stop * columns)
            for name in self.sources[1:]:
                total = total + delta.read(name, start * columns, stop * columns)
            return total.reshape(stop - start, columns)

        if self.layout == "plain":
            return read
        whole = read(0, rows)
        whole = whole.reshape(columns, rows).T if self.layout == "transposed" else whole[self.order]
        return lambda start, stop: whole[start:stop]


def _of_experts(delta: Differences, target: Target, start: int, stop: int) -> np.ndarray:
    """The differences of some rows of a tensor [experts, rows, columns], counted through all experts."""
    size, columns = target.tensor.shape[-2:]
    found = np.zeros((stop - start, columns), np.float32)
    for expert, name in zip(target.experts, target.sources, strict=True):
        first, last = max(start, expert * size), min(stop, (expert + 1) * size)
        if first < last:
            at = [(row - expert * size) * columns for row in (first, last)]
            found[first - start : last - start] = delta.read(name, *at).reshape(-1, columns)
    return found


@dataclass(frozen=True)
class Looked:
    """The tensors to change, and the one that is farthest from its base."""

    targets: tuple[Target, ...]
    farthest: str
    distance: float
    verdict: str


def type_bytes(kind: str, shape: tuple[int, ...]) -> int:
    """The bytes of a tensor of this shape in the GGUF type ``kind``."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def choose(
    delta: Differences, file: GgufFile, *, tied: Tied | None = None, touched_type: str | None = None
) -> tuple[Choice, ...]:
    """What is to be changed; whatever the headers tell is checked here.

    Raises:
        SurgeryError: kind, architecture, names, tying, types.
    """
    if delta.metadata["kind"] == "module":
        raise SurgeryError(
            f"{file.path}: this delta is of kind 'module' (new parts), which a GGUF file cannot hold; "
            "apply it to a folder"
        )
    if touched_type is not None and touched_type not in WRITABLE:
        raise SurgeryError(f"touched type {touched_type!r}: expected one of {', '.join(WRITABLE)}")
    check_architecture(delta, file)
    found = []
    fd = open_regular(file.path)
    try:
        for name, sources in names_in_file(delta, file, tied).items():
            tensor = file.tensors[name]
            found.append(Choice(tensor, sources, _kind(tensor, touched_type, file)))
            if not found[-1].stays:
                _refuse_odd_padding(file, fd, tensor)
    finally:
        os.close(fd)
    return tuple(found)


def notes(choices: Sequence[Choice], chosen: bool) -> tuple[str, ...]:
    """What types become others, with the bytes that it costs; ``chosen`` by the user."""
    return tuple(_swap_note(one.tensor, one.kind, chosen=chosen) for one in choices if one.kind != one.tensor.type)


def look(delta: Differences, file: GgufFile, choices: Sequence[Choice], *, force: bool = False) -> Looked:
    """Read the weights that are to be changed: how they are laid out, and how far they are from the base's.

    Raises:
        SurgeryError: shapes, NaN, or weights that are not the base's.
    """
    check_finite(delta)
    fd = open_regular(file.path)

    def target(one: Choice) -> Target:
        tensor, sources = one.tensor, one.sources
        if ".experts." in sources[0] and len(tensor.shape) == 3:
            return _merged_experts(delta, file, fd, one)
        layout, order, sha, gap = _find_layout(delta, file, fd, tensor, sources[0])
        return Target(tensor, sources, one.kind, layout, order, sha, gap)

    try:
        targets = list(in_order(target, choices))
    finally:
        os.close(fd)
    distances = {target.tensor.name: target.distance for target in targets}
    shapes = {target.tensor.name: target.tensor.shape for target in targets}
    sketch.refuse_unrelated(distances, shapes, str(file.path), force)
    farthest, gap = sketch.judged(distances, shapes)
    return Looked(tuple(targets), farthest, gap, sketch.verdict(gap))


def _merged_experts(delta: Differences, file: GgufFile, fd: int, one: Choice) -> Target:
    """The target for deltas of single experts, which the file holds in one tensor [experts, rows, columns]."""
    tensor, sources = one.tensor, one.sources
    numbers = tuple(int(EXPERT.search(name)[1]) for name in sources)  # type: ignore[index]
    size = (tensor.end - tensor.begin) // tensor.shape[0]
    gaps = []
    for number, name in zip(numbers, sources, strict=True):
        if number >= tensor.shape[0]:
            raise SurgeryError(
                f"{file.path}: {tensor.name!r} holds {tensor.shape[0]} experts, so there is no {name!r}; it cannot fit"
            )
        begin = tensor.begin + number * size
        part = replace(tensor, shape=tensor.shape[1:], begin=begin, end=begin + size)
        layout, _, _, gap = _find_layout(delta, file, fd, part, name)
        if layout != "plain":
            raise SurgeryError(
                f"{file.path}: {tensor.name!r} lays out its experts in another order than {name!r}; it cannot fit"
            )
        gaps.append(gap)
    digest = hashlib.sha256()
    for start, stop in row_groups(tensor):
        raw, values = read_rows(file, fd, tensor, start, stop)
        digest.update(raw)
        refuse_not_finite(values, tensor.name, str(file.path))
    return Target(tensor, sources, one.kind, "plain", None, digest.hexdigest(), max(gaps), numbers)


def _refuse_odd_padding(file: GgufFile, fd: int, tensor: GgufTensor) -> None:
    if any(read_exactly(fd, tensor.end, file.rooms[tensor.name] - tensor.end, file.path)):
        raise SurgeryError(
            f"{file.path}: the bytes behind {tensor.name!r} are not the zeros that the format has there; it can be "
            "edited in its own type only"
        )


def _swap_note(tensor: GgufTensor, kind: str, *, chosen: bool) -> str:
    cost = type_bytes(kind, tensor.shape) - (tensor.end - tensor.begin)
    why = "" if chosen else f", since the gguf library cannot write {tensor.type}"
    return f"{tensor.name}: {tensor.type} becomes {kind}{why} ({cost:+,} bytes)"


def _kind(tensor: GgufTensor, chosen: str | None, file: GgufFile) -> str:
    vector = len(tensor.shape) == 1
    kind = chosen if chosen and not vector else tensor.type
    own = kind in WRITABLE or (kind == tensor.type and kind in KINDS)
    kind = kind if own else SUBSTITUTE.get(kind, "")
    if not kind:
        raise SurgeryError(
            f"{file.path}: {tensor.name!r} is {tensor.type}, which holds no weights that can be edited; "
            "take a file of another type"
        )
    if kind not in ("F16", "BF16", "F32") and tensor.shape[-1] % 32:
        raise SurgeryError(
            f"{file.path}: {tensor.name!r} has rows of {tensor.shape[-1]}, no multiple of 32 for {kind}; "
            "choose --touched-type F16"
        )
    return kind


def _find_layout(
    delta: Differences, file: GgufFile, fd: int, tensor: GgufTensor, source: str
) -> tuple[str, np.ndarray | None, str, float]:
    """(layout, order of the base's rows, sha256 of the stored bytes, distance): the layout that lies nearest the base.

    llama.cpp's converter interleaves the halves of each head's rows of query and key where rotary positions go in
    pairs, transposes GPT-2's Conv1D, and adds 1 to Gemma's norms; which of it was done is seen from the weights.
    """
    shape, base = delta.shapes[source], delta.metadata["tensors"][source]
    rows, columns = tensor.rows, tensor.shape[-1]
    digest, plain, shifted = hashlib.sha256(), sketch.Sketcher(), sketch.Sketcher()
    vector = len(tensor.shape) == 1
    for start, stop in row_groups(tensor):
        raw, values = read_rows(file, fd, tensor, start, stop)
        digest.update(raw)
        refuse_not_finite(values, tensor.name, str(file.path))
        plain.feed(values.reshape(-1))
        if vector:
            shifted.feed(values.reshape(-1) - 1)

    def gap(sketcher: sketch.Sketcher) -> float:
        sums, norm = sketcher.finish()
        return sketch.distance(sums, norm, unpack_sketch(base["sketch"]), base["norm"])

    candidates: list[tuple[float, str, np.ndarray | None]] = []
    if math.prod(shape) == rows * columns and (vector or shape[-1] == columns):
        candidates.append((gap(plain), "plain", None))
        if vector:
            candidates.append((gap(shifted), "plain", None))
    for layout, order in _orders(file, tensor, shape):
        if candidates and min(candidates)[0] <= sketch.RELATED:
            break
        whole = read_rows(file, fd, tensor, 0, rows)[1]
        back = whole.T if order is None else whole[np.argsort(order)]
        other = sketch.Sketcher()
        other.feed(np.ascontiguousarray(back).reshape(-1))
        candidates.append((gap(other), layout, order))
    if not candidates:
        raise SurgeryError(
            f"{file.path}: {tensor.name!r} is {list(tensor.shape)}, the delta's base {list(shape)}; it cannot fit"
        )
    distance, layout, order = min(candidates, key=lambda found: found[0])
    if vector and distance > sketch.DISTANT:
        raise SurgeryError(
            f"{file.path}: {tensor.name!r} lies {distance:.2f} of its norm from the base; not the same part"
        )
    return layout, order, digest.hexdigest(), distance


def _orders(file: GgufFile, tensor: GgufTensor, shape: tuple[int, ...]) -> list[tuple[str, np.ndarray | None]]:
    """The other layouts that may be: row i of the file is row order[i] of the base."""
    found: list[tuple[str, np.ndarray | None]] = []
    heads = file.facts.get("kv_heads" if ".attn_k." in tensor.name else "heads", 0)
    same = tuple(shape) == tensor.shape
    rotary = ".attn_q." in tensor.name or ".attn_k." in tensor.name
    if same and rotary and heads and len(shape) == 2 and shape[0] % (2 * heads) == 0:
        order = np.arange(shape[0]).reshape(heads, 2, shape[0] // heads // 2).swapaxes(1, 2).reshape(-1)
        found.append(("rope", order))
    if len(shape) == 2 and tuple(reversed(shape)) == tensor.shape:
        found.append(("transposed", None))
    return found
