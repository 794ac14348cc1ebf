"""A cross-attention module by itself, and as a delta file."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.modules.cross_attention.modeling_crawd import CrossAttention


class ModuleDelta(Protocol):
    """What is read of a delta (`surgery.delta.Delta`): its kind, metadata and the new part's arrays."""

    @property
    def kind(self) -> str: ...
    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def module(self) -> dict[str, np.ndarray]: ...


@dataclass(frozen=True)
class Weights:
    """A module by itself: the settings that make it (`CrossAttention.settings`) and its tensors, float32 on the CPU.

    Among the tensors is `reference`, the states of the reference words. Other settings of Eq. 2 for trained weights:
    `dataclasses.replace(weights, settings={**weights.settings, "decay": 0.5})`.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    type: ClassVar[str] = "cross_attention"


def weights_of(module: CrossAttention) -> Weights:
    """A copy of the module as it is now, with the reference states of the model's present weights."""
    with torch.no_grad():
        module.states()
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in module.state_dict().items()}
    return Weights(module.settings, tensors)


def from_delta(delta: ModuleDelta) -> Weights:
    """The module in a delta. Raises SurgeryError for a delta of another kind."""
    if delta.kind != "module":
        raise SurgeryError(f"this delta is of kind {delta.kind!r}, expected 'module': it has no cross-attention")
    settings = {key: value for key, value in delta.metadata["module"].items() if key != "type"}
    return Weights(settings, {name: torch.from_numpy(array.copy()) for name, array in delta.module.items()})
