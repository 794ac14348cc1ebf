"""Apply a delta to a live torch model, in place or for the time of a `with` block."""

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from surgery.delta.differences import Differences, Edit
from surgery.delta.metadata import rounding_of, unpack_sketch
from surgery.delta.naming import Names, held_by
from surgery.errors import SurgeryError
from surgery.files import weight_fingerprint as sketch
from surgery.files.ahead import in_order
from surgery.files.architecture import brief, differences, facts
from surgery.files.rounding import STORED, add, narrow, refuse_not_finite, widen
from surgery.files.tensor_names import is_vocabulary
from surgery.modules import cross_attention, projection

PIECE = 2**21  # numbers that are added and rounded at a time
_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True)
class Touched:
    """What of a live model a delta changes: `parameters` by the model's names, and `names`, how they lie on disk."""

    parameters: dict[str, nn.Parameter]
    names: Names

    def read(self) -> dict[str, torch.Tensor]:
        """{base tensor name: its numbers in the model}; of what the model joins, all pieces."""
        found = {name: self.parameters[held].detach() for name, held in self.names.plain}
        for group in self.names.joined:
            found |= group.split({name: self.parameters[name].detach() for name in group.held})
        return found

    def parameters_of(self, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """{parameter: numbers} of `values`, by the base's names, as the model holds them; 0 where it joins others."""
        found = {held: values[name] for name, held in self.names.plain if name in values}
        for group in self.names.joined:
            pieces = group.split({name: self.parameters[name].detach() for name in group.held})
            if values.keys() & pieces.keys():
                found |= group.join({name: values.get(name, torch.zeros_like(piece)) for name, piece in pieces.items()})
        return found

    def write(self, values: Mapping[str, torch.Tensor]) -> None:
        """Put `values` into the model, in place; what is not among them stays."""
        with torch.no_grad():
            for name, held in self.names.plain:
                if name in values:
                    self.parameters[held].copy_(values[name])
            for group in self.names.joined:
                pieces = group.split({name: self.parameters[name].detach() for name in group.held})
                for held, whole in group.join(
                    pieces | {name: values[name] for name in pieces if name in values}
                ).items():
                    self.parameters[held].copy_(whole)


def _tied(parameters: Mapping[str, nn.Parameter], said: bool) -> bool:
    """Whether the model has one matrix for embedding and head; a config may say so of a checkpoint that has two."""
    matrices = {id(parameter) for name, parameter in parameters.items() if is_vocabulary(name)}
    return said and len(matrices) < 2


def touched(delta: Differences, model: nn.Module) -> Touched:
    """What `delta` changes in the model. Raises: SurgeryError when a name, shape or the architecture does not fit."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    config = getattr(model, "config", None)
    if config is not None:
        base, live = delta.metadata["architecture"], facts(config.to_dict())
        odd = differences(base, live)
        if odd:
            raise SurgeryError(
                f"the model is of another architecture than the delta's base: {brief(odd)}; it cannot fit"
            )
        matrices = [name for name in delta.shapes if is_vocabulary(name)]
        if matrices and bool(base.get("tied")) != _tied(parameters, bool(live.get("tied"))):
            raise SurgeryError(
                f"{matrices[0]}: embedding and head are tied in only one of the delta's base and the model; "
                "apply it to the checkpoint on disk with --tied embed, head or both"
            )
    names = held_by(model, list(delta.shapes))
    held = [held for _, held in names.plain] + [held for group in names.joined for held in group.held]
    found = Touched({name: parameters[name] for name in held}, names)
    for name, parameter in found.parameters.items():
        if parameter.device.type == "meta":
            raise SurgeryError(
                f"{name}: the model does not hold its weights (offloaded, or on the meta device), so they cannot be "
                "changed there; apply the delta to the checkpoint on disk (surgery apply) and open the result"
            )
        if parameter.dtype not in _DTYPES:
            raise SurgeryError(f"{name}: the model holds it as {parameter.dtype}; expected fp32, fp16 or bf16")
    shapes = {name: tuple(tensor.shape) for name, tensor in found.read().items()}
    for name, shape in delta.shapes.items():
        if shapes.get(name) != shape:
            raise SurgeryError(
                f"{name}: the model has shape {list(shapes.get(name, ()))}, the delta's base {list(shape)}; "
                "it cannot fit"
            )
    return found


def to_stored(tensor: torch.Tensor) -> np.ndarray:
    """The numbers of a tensor, flat, as numpy sees them on disk (bf16 as uint16). No copy on a CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.dtype == torch.bfloat16:
        return flat.view(torch.int16).numpy().view(np.uint16)
    return flat.numpy()


def from_stored(stored: np.ndarray, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `to_stored`: a CPU tensor of the dtype and shape of `like`."""
    if like.dtype == torch.bfloat16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16).reshape(like.shape)
    return torch.from_numpy(stored).reshape(like.shape)


def apply_live(
    delta: Edit,
    model: nn.Module,
    *,
    scale: float,
    rounding: str,
    seed: int | None,
    as_stored: bool,
    force: bool,
) -> None:
    """Add scale * difference to the model's parameters, in place, rounding once to the model's own dtype.

    A delta of kind "module" also puts its module into the model, what it adds multiplied by the scale.

    A model in the checkpoint's dtype then holds the same bytes that `surgery.apply` writes on disk; so do parameters
    that its family keeps in fp32 beside 16-bit ones (Ernie's and HunYuan's gates). A model that is fp32 throughout, of
    a 16-bit checkpoint, is just added to; with `as_stored` its values are also rounded to the checkpoint's dtype.
    Gradients, hooks, requires_grad and the training mode are not touched.

    `rounding` and `seed` are those of `surgery.apply.apply`: "auto" and None are what the delta records.

    Raises:
        SurgeryError: before anything changes: wrong architecture, names or shapes, an unrelated model (as
            `surgery.apply.apply` judges it), an overflow of the dtype, a scale that is not finite, a module for
            another width.
    """
    found, edited = _edited(delta, model, scale, rounding, seed, as_stored, force)
    if delta.kind == "module":
        if delta.metadata["module"]["type"] == "projection":
            projection.attach(model, projection.from_arrays(delta.module), scale=scale)  # type: ignore[arg-type]
        else:
            cross_attention.attach(model, cross_attention.from_delta(delta), scale=scale)  # type: ignore[arg-type]
    found.write(edited)


@contextmanager
def applied_live(
    delta: Edit,
    model: nn.Module,
    *,
    scale: float,
    rounding: str,
    seed: int | None,
    as_stored: bool,
    force: bool,
) -> Iterator[None]:
    """Inside, the model is as `apply_live` leaves it; then it is bit for bit as before, whatever happens."""
    found, edited = _edited(delta, model, scale, rounding, seed, as_stored, force)
    with restored(delta, model), attached(delta, model, scale=scale):
        found.write(edited)
        yield


def attached(delta: Edit, model: nn.Module, *, scale: float = 1.0) -> AbstractContextManager[object]:
    """Inside, the module of a delta of kind "module" stands in the model; nothing for the other kinds."""
    if delta.kind != "module":
        return nullcontext()
    if delta.metadata["module"]["type"] == "projection":
        return projection.attached(model, projection.from_arrays(delta.module), scale=scale)  # type: ignore[arg-type]
    return cross_attention.reattached(model, cross_attention.from_delta(delta), scale=scale)  # type: ignore[arg-type]


def _edited(
    delta: Differences, model: nn.Module, scale: float, rounding: str, seed: int | None, as_stored: bool, force: bool
) -> tuple[Touched, dict[str, torch.Tensor]]:
    """What the delta changes, and what it will hold, by the base's names; all checks of `apply_live`."""
    if not math.isfinite(scale):
        raise SurgeryError(f"scale {scale}: expected a finite number")
    how, drawn = rounding_of(delta.metadata, rounding, seed)
    found = touched(delta, model)
    held = {name: tensor for name, tensor in found.read().items() if name in delta.shapes}
    before = {name: to_stored(tensor) for name, tensor in held.items()}
    _check_related(delta, before, {name: _DTYPES[tensor.dtype] for name, tensor in held.items()}, force)
    as_stored |= any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())

    def piece(at: tuple[str, int]) -> np.ndarray:
        name, start = at
        stop = min(start + PIECE, before[name].size)
        difference = delta.read(name, start, stop)
        refuse_not_finite(difference, name, "the delta")
        dtype = _DTYPES[held[name].dtype]
        options: Any = {"rounding": how, "seed": drawn, "name": name, "start": start}
        result = add(before[name][start:stop], difference, dtype, scale=scale, **options)
        wanted = delta.metadata["tensors"][name]["dtype"]
        if as_stored and dtype == "F32" and wanted in STORED:
            result = widen(narrow(result, wanted, **options), wanted)
        return result

    after = {name: np.empty_like(numbers) for name, numbers in before.items()}
    places = [(name, start) for name, numbers in before.items() for start in range(0, numbers.size, PIECE)]
    for (name, start), numbers in zip(places, in_order(piece, places), strict=True):
        after[name][start : start + numbers.size] = numbers
    return found, {name: from_stored(after[name], tensor) for name, tensor in held.items()}


def _check_related(delta: Differences, held: Mapping[str, np.ndarray], dtypes: Mapping[str, str], force: bool) -> None:
    """held: what the model has, as `to_stored` gives it."""

    def distance(name: str) -> float:
        entry, numbers = delta.metadata["tensors"][name], held[name]
        sketcher = sketch.Sketcher()
        for start in range(0, numbers.size, PIECE):
            sketcher.feed(widen(numbers[start : start + PIECE], dtypes[name]))
        return sketch.distance(*sketcher.finish(), unpack_sketch(entry["sketch"]), entry["norm"])

    distances = dict(zip(held, in_order(distance, held), strict=True))
    if distances:
        sketch.refuse_unrelated(distances, delta.shapes, "the model", force)


@contextmanager
def restored(delta: Differences, model: nn.Module) -> Iterator[None]:
    """Keep a copy of the parameters that the delta touches and put them back at the end, whatever happens."""
    parameters = touched(delta, model).parameters
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
