"""A direction in the residual stream that tells two kinds of prompts apart: to add while looking, or as a bias."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.anatomy import find
from hooks.display import Readable
from hooks.errors import HookError
from hooks.interventions import edit
from hooks.streaming import Text, stream


@dataclass(frozen=True, eq=False, repr=False)
class Steering(Readable):
    """A vector (d_model) that is added to what block `block` adds to the stream, at every position."""

    vector: Float[Tensor, " d_model"]
    block: int

    @contextmanager
    def added(self, model: nn.Module, scale: float = 1.0) -> Iterator[None]:
        """Inside, `scale` times the vector is added; afterwards the model is as it was.

        with steering.added(model, 2.0):
            model.generate(**inputs)
        """
        site = f"{_block(model, self.block).site}.hook_resid_post"
        with edit(model, {site: lambda x: x + scale * self.vector.to(x.device, x.dtype)}):
            yield

    def differences(self, model: nn.Module, scale: float = 1.0) -> dict[str, Tensor]:
        """The same as a change of one parameter, {its name: difference}, from which `surgery.delta.make` makes a delta.

        The MLP's last matrix needs a bias, whose output goes to the stream as it is. Raises HookError otherwise.
        """
        block = _block(model, self.block)
        name = f"{block.mlp_writer}.bias"
        if block.mlp_writer is None or block.mlp_out not in (block.mlp_writer, block.mlp) or not block.additive:
            raise HookError(
                f"steering: what {block.name}'s MLP writes passes a norm or is scaled, so no bias adds the vector; use "
                "Steering.added, or edit the weights"
            )
        bias = dict(model.named_parameters()).get(name)
        if bias is None:
            raise HookError(
                f"steering: {block.mlp_writer} has no bias (as in Llama's family), so a plain checkpoint cannot hold "
                "the vector; use Steering.added, or an edit that trains weights"
            )
        return {name: (scale * self.vector).to(bias.device, torch.float32).reshape(bias.shape)}


def steering_vector(
    model: nn.Module, tokenizer: Any, towards: Sequence[Text], away: Sequence[Text], block: int
) -> Steering:
    """Mean stream behind `block` at the last token of `towards`, minus that of `away` (Turner et al. 2023).

        steering = hooks.steering_vector(model, tokenizer, ["He is kind"], ["She is kind"], 15)

    Raises HookError for a block that does not exist and for an empty list.
    """
    site = f"{_block(model, block).site}.hook_resid_post"
    return Steering(_mean(model, tokenizer, towards, site) - _mean(model, tokenizer, away, site), block)


def _mean(model: nn.Module, tokenizer: Any, texts: Sequence[Text], site: str) -> Float[Tensor, " d_model"]:
    total: list[Tensor] = []

    def add(_: str, tensor: Tensor, mask: Tensor) -> None:
        last = mask.int().cumsum(1).argmax(1)
        rows = torch.arange(len(tensor), device=tensor.device)
        total.extend(tensor[rows, last.to(tensor.device)].double().cpu())

    stream(model, tokenizer, texts, [([site], add)])
    return torch.stack(total).mean(0).float()


def _block(model: nn.Module, block: int) -> Any:
    blocks = find(model).blocks
    if not 0 <= block < len(blocks):
        raise HookError(f"steering: block {block}; the model has 0 to {len(blocks) - 1}")
    return blocks[block]
