"""The weights of a model untouched and edited, put into it by turns; afterwards it is what it was."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.delta import Delta
from surgery.delta.live import touched
from surgery.files.ahead import in_order
from surgery.survive.formats import FORMATS, Matrix, matrices


@dataclass(frozen=True)
class States:
    """``base`` are the weights that anything changes here, ``edited`` those that the delta does; by parameter."""

    matrices: Mapping[str, Matrix]
    parameters: Mapping[str, nn.Parameter]
    base: Mapping[str, Tensor]
    edited: Mapping[str, Tensor]
    """As the checkpoint's dtype stores them."""
    exact: Mapping[str, Tensor]
    """In bfloat16 from the exact sum."""

    @property
    def whole(self) -> dict[str, Tensor]:
        """The edited model: all that anything changes, with the delta."""
        return {**self.base, **self.edited}

    @property
    def halfway(self) -> dict[str, Tensor]:
        """The mean of the two."""
        return {**self.base, **{name: (value + self.base[name]) / 2 for name, value in self.edited.items()}}

    def put(self, values: Mapping[str, Tensor]) -> None:
        """Write ``values`` into the model."""
        with torch.no_grad():
            for name, value in values.items():
                self.parameters[name].copy_(value)

    def write(self, kind: str, values: Mapping[str, Tensor]) -> None:
        """The matrices among ``values`` as the format gives them back, several at a time."""
        names = [name for name in values if name in self.matrices]
        list(in_order(lambda name: self.matrices[name].write(kind, values[name]), names))

    def add_factors(self, factors: Mapping[str, Tensor], part: float) -> None:
        """Add the product of LoRA factors times ``part`` to the weights."""
        with torch.no_grad():
            for key, left in factors.items():
                if not key.endswith(".lora_B"):
                    continue
                name = key.removesuffix(".lora_B")
                parameter = self.parameters[name]
                product = left.to(parameter.device) @ factors[f"{name}.lora_A"].to(parameter.device)
                parameter.add_((product * part).to(parameter.dtype))


@contextmanager
def held(delta: Delta, model: PreTrainedModel, *, as_stored: bool, force: bool) -> Iterator[States]:
    """Inside, the weights may change: those of before are kept, and put back whatever happens.

    Raises ``SurgeryError`` as ``Delta.applied`` does.
    """
    names, found = set(touched(delta, model).parameters), matrices(model)
    known = dict(model.named_parameters(remove_duplicate=False))
    parameters = {name: known[name] for name in known if name in names or name in found}
    base = {name: p.detach().clone() for name, p in parameters.items()}

    def now() -> dict[str, Tensor]:
        return {name: parameters[name].detach().clone() for name in names}

    with delta.applied(model, as_stored=as_stored, force=force):
        edited = now()
    with delta.applied(model, rounding="nearest", force=force):
        exact = {name: FORMATS["bf16"](value) for name, value in now().items()}
    states = States(found, parameters, base, edited, exact)
    try:
        yield states
    finally:
        states.put(base)
