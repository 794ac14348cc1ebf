"""A model looked over once: the layers whose gradients are taken, its head, and how a text's loss is reduced."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.anatomy import find
from hooks.batching import context_limit, remembered, unhooked, why_alone
from hooks.errors import HookError
from hooks.gradient_influence.layers import Layer, find_layers, left_out


@dataclass(frozen=True, eq=False)
class Job:
    """A model, the layers that are looked at, and how the loss of a text is reduced over its tokens."""

    model: nn.Module
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    head: str
    limit: int | None
    loss: Literal["mean", "sum"]
    checkpointing: bool
    plain_head: bool
    note: str | None = None  # which weights of the blocks have no part

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def budget(self, batch_tokens: int) -> int:
        """Tokens a batch: as asked, or 1, so that each unit goes alone, where rows must not share a batch."""
        return 1 if why_alone(self.model) else batch_tokens


def job(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    loss: Literal["mean", "sum"] = "mean",
    checkpointing: bool = False,
) -> Job:
    """Look the model over once. See `find_layers` for targets.

    Raises HookError for a model that is no causal language model with a head.
    """
    if loss not in ("mean", "sum"):
        raise HookError(f"loss is {loss!r}; expected 'mean' or 'sum' over the tokens of a text")
    anatomy, core = find(model), probe.pretrained(model)
    kind = type(core).__name__
    if anatomy.head is None or len(anatomy.stacks) > 1 or "MaskedLM" in kind:
        raise HookError(f"{kind} is no causal language model with a head; load it with AutoModelForCausalLM")
    layers = find_layers(model, anatomy, targets)
    limit = context_limit(model)
    blocks = tuple(block.name for block in anatomy.blocks)
    note = None if targets else left_out(model, anatomy, [layer.name for layer in layers])
    return Job(model, layers, blocks, anatomy.head, limit, loss, checkpointing, plain_head(model, anatomy.head), note)


def plain_head(model: nn.Module, name: str) -> bool:
    """Whether the model's logits are what its head gives, without a soft cap, scale or bias behind it."""
    core, head = probe.pretrained(model), model.get_submodule(name)

    def find() -> bool:
        seen: list[Tensor] = []
        with probe.unchanged(model), unhooked(model), ExitStack() as stack:
            stack.callback(head.register_forward_hook(lambda m, args, out: seen.append(out)).remove)
            logits = core(**model_inputs(model, torch.arange(3, 7)[None]), **no_cache(core)).logits
        return len(seen) == 1 and torch.equal(seen[0].float(), logits.float())

    return type(head) is nn.Linear and bool(remembered(model, f"plain head {name}", find))


def no_cache(core: Any) -> dict[str, bool]:
    """The argument that leaves the KV cache out, for models that take it."""
    return {"use_cache": False} if "use_cache" in probe.forward_arguments(core) else {}
