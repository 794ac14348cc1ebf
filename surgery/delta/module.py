"""A module (CrAWD's cross-attention, a projection) as a delta of kind "module"."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from surgery.delta.extract import make
from surgery.delta.format import Delta


class NewPart(Protocol):
    """A module by itself: ``surgery.modules.cross_attention.Weights`` or ``surgery.modules.projection.Projection``."""

    @property
    def type(self) -> str: ...
    @property
    def settings(self) -> Mapping[str, Any]: ...
    @property
    def tensors(self) -> Mapping[str, Tensor]: ...


def module_delta(
    weights: NewPart,
    checkpoint: Path | str,
    *,
    base: str,
    recipe: str,
    seed: int,
    differences: Mapping[str, Tensor | np.ndarray] | None = None,
    measured: Mapping[str, Any] | None = None,
    rounding: str = "auto",
) -> Delta:
    """The module as a delta of kind "module", with what training changed in the base (`Trained.differences`), if any.

    differences: LoRA factors `NAME.lora_B` and `NAME.lora_A`, or whole differences, under the model's names. The other
    arguments, and what it raises, are those of `surgery.delta.make`.
    """
    own = {f"module.{name}": tensor for name, tensor in weights.tensors.items()}
    settings = {"type": weights.type, **weights.settings}
    return make(
        {**(differences or {}), **own},
        checkpoint,
        base=base,
        recipe=recipe,
        seed=seed,
        kind="module",
        module=settings,
        measured=measured,
        rounding=rounding,
    )
