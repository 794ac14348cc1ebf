"""A cross-attention module by itself, and as a delta file."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from surgery.edits.cross_attention.modeling_crawd import CrossAttention
from surgery.errors import SurgeryError

if TYPE_CHECKING:
    from surgery.delta import Delta


@dataclass(frozen=True)
class Weights:
    """A module by itself: the settings that make it (`CrossAttention.settings`) and its tensors, float32 on the CPU.

    Among the tensors is `reference`, the states of the reference words. Other settings of Eq. 2 for trained weights:
    `dataclasses.replace(weights, settings={**weights.settings, "decay": 0.5})`.
    """

    settings: Mapping[str, Any]
    tensors: Mapping[str, Tensor]


def weights_of(module: CrossAttention) -> Weights:
    """A copy of the module as it is now, with the reference states of the model's present weights."""
    with torch.no_grad():
        module.states()
    tensors = {name: tensor.detach().float().cpu().clone() for name, tensor in module.state_dict().items()}
    return Weights(module.settings, tensors)


def to_delta(
    weights: Weights,
    checkpoint: Path | str,
    *,
    base: str,
    recipe: str,
    seed: int,
    differences: Mapping[str, Tensor | np.ndarray] | None = None,
    measured: Mapping[str, Any] | None = None,
) -> "Delta":
    """The module as a delta of kind "module", with what training changed in the base (`Trained.differences`), if any.

    differences: LoRA factors `NAME.lora_B` and `NAME.lora_A`, or whole differences, under the model's names. The other
    arguments, and what it raises, are those of `surgery.delta.make`.
    """
    from surgery.delta import make

    own = {f"module.{name}": tensor for name, tensor in weights.tensors.items()}
    settings = {"type": "cross_attention", **weights.settings}
    return make(
        {**(differences or {}), **own},
        checkpoint,
        base=base,
        recipe=recipe,
        seed=seed,
        kind="module",
        module=settings,
        measured=measured,
    )


def from_delta(delta: "Delta") -> Weights:
    """The module in a delta. Raises SurgeryError for a delta of another kind."""
    if delta.kind != "module":
        raise SurgeryError(f"this delta is of kind {delta.kind!r}, expected 'module': it has no cross-attention")
    settings = {key: value for key, value in delta.metadata["module"].items() if key != "type"}
    return Weights(settings, {name: torch.from_numpy(array.copy()) for name, array in delta.module.items()})
