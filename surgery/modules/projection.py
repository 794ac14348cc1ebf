"""An affine projection of the states that a model's head reads, such as LEACE's, as a module."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from hooks import anatomy
from hooks import trace_modules as probe
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class Projection:
    """x -> x - left (right x) + offset: the identity but for ``rank`` directions. Float32 or more, on any device."""

    left: Float[Tensor, "width rank"]
    right: Float[Tensor, "rank width"]
    offset: Float[Tensor, " width"]
    type: ClassVar[str] = "projection"

    @property
    def settings(self) -> Mapping[str, Any]:
        """What a delta of kind "module" says of it."""
        return {"width": self.left.shape[0], "rank": self.left.shape[1]}

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """What a delta of kind "module" holds of it."""
        return {"left": self.left, "right": self.right, "offset": self.offset}

    def to(self, like: Tensor) -> "Projection":
        """In the dtype and on the device of ``like``."""
        return Projection(*(tensor.to(like) for tensor in (self.left, self.right, self.offset)))

    def __call__(self, states: Float[Tensor, "*batch width"], scale: float = 1.0) -> Float[Tensor, "*batch width"]:
        """``states`` projected; ``scale`` multiplies what is taken away."""
        return states + scale * (self.offset - (states @ self.right.mT) @ self.left.mT)


def from_arrays(arrays: Mapping[str, np.ndarray]) -> Projection:
    """The projection whose ``tensors`` are the arrays."""
    return Projection(**{name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


@contextmanager
def attached(model: PreTrainedModel, projection: Projection, *, scale: float = 1.0) -> Iterator[None]:
    """Inside, the last hidden states of ``model`` go through the projection; afterwards it is as before."""
    undo = attach(model, projection, scale=scale)
    try:
        yield
    finally:
        undo()


def attach(model: PreTrainedModel, projection: Projection, *, scale: float = 1.0) -> Callable[[], None]:
    """Put the projection behind the final norm of ``model``; returns what takes it out again.

    Raises ``SurgeryError`` for a model of another width.
    """
    core = cast(PreTrainedModel, probe.pretrained(model))
    found = anatomy.find(core)
    if found.d_model != projection.left.shape[0]:
        raise SurgeryError(
            f"{type(core).__name__}: its hidden states have width {found.d_model}, the projection's have "
            f"{projection.left.shape[0]}; expected a checkpoint of the architecture that it was made on"
        )
    place = core.get_submodule(found.final_norm or found.blocks[-1].name)
    parameter = next(core.parameters())
    ready = projection.to(parameter)

    def project(module: Any, args: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        here = ready if states.device == ready.left.device and states.dtype == ready.left.dtype else ready.to(states)
        states = here(states, scale)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    # In front of other hooks, so that they see what the head sees.
    return place.register_forward_hook(project, prepend=True).remove
