"""Where each head's query and key come from, found by gradients of the attention weights instead of by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.activations import ask_for_weights, model_inputs, run_base
from hooks.anatomy import Block, Stack, find, require
from hooks.errors import HookError


@dataclass(frozen=True)
class QKChannels:
    """Channels of one module's output, per head; grouped-query heads name the same key channels.

    pos_axis: 1 for (batch pos ...), 2 for (batch head pos d_head), as behind Gemma 3's query norm.
    """

    module: str
    pos_axis: int
    channels: Int[Tensor, "head d_head"]

    def split(self, output: Tensor, batch_pos: tuple[int, int]) -> Float[Tensor, "batch pos head d_head"]:
        """What each head gets of the module's output."""
        return _rows(output, self.pos_axis, batch_pos)[:, :, self.channels.to(output.device)]


def find_qk_channels(model: nn.Module, stack: Stack) -> list[tuple[QKChannels, QKChannels]]:
    """Query and key of each block of `stack`, before any rotation by position.

    The attention weights of the last token depend on its own query alone and on every token's key: the
    gradient of one head's weights with respect to every module output inside attention shows which channels
    are its query, which its key, and which (values) neither. Works for separate, fused and grouped
    projections; a norm of queries and keys is included. Works on one forward pass over 11 or 13 tokens.

    Raises HookError for a block without attention, or where the channels of query and key do not match.
    """
    require(stack, "pattern", "telling queries from keys")
    core = probe.pretrained(model)
    length = 11 if stack.blocks[0].n_heads != 11 else 13
    outputs: dict[str, Tensor] = {}  # by order of completion
    patterns: dict[str, Tensor] = {}
    with ExitStack() as context:
        context.enter_context(probe.unchanged(model))
        context.enter_context(probe.eager(model))
        for block in stack.blocks:
            assert block.attention is not None and block.pattern is not None and block.pattern_index is not None
            inside = [n for n, _ in model.named_modules() if n.startswith(block.attention + ".")]
            for name in inside:
                hook = _watch(outputs, name, length)
                context.callback(model.get_submodule(name).register_forward_hook(hook).remove)
            site = sites.expand(find(model), f"{block.site}.attn.hook_pattern")[0]
            context.callback(ask_for_weights(model, site))
            keep = _keep(patterns, block.site, block.pattern_index)
            context.callback(model.get_submodule(block.pattern).register_forward_hook(keep).remove)
        with torch.enable_grad():
            size = core.get_input_embeddings().weight.shape[0]
            ids = torch.arange(3, 3 + length).remainder(size)[None]
            run_base(model, model_inputs(model, ids))
            return [_of_block(block, outputs, patterns[block.site], length) for block in stack.blocks]


def _watch(outputs: dict[str, Tensor], name: str, length: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        known = name in outputs or not isinstance(output, Tensor) or not output.is_floating_point()
        if known or _axis(output, length) is None:
            return None
        outputs[name] = torch.zeros_like(output, requires_grad=True)
        return output + outputs[name]

    return hook


def _keep(patterns: dict[str, Tensor], site: str, index: int) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        patterns[site] = output[index]

    return hook


def _axis(output: Tensor, length: int) -> int | None:
    """Which axis holds positions; None where none does. OPT flattens batch and position into the first."""
    if output.ndim == 4 and output.shape[2] == output.shape[3] == length:
        return None  # attention weights on their way through a dropout
    if output.ndim in (3, 4) and output.shape[0] == 1 and output.shape[1] == length:
        return 1
    if output.ndim == 4 and output.shape[2] == length:
        return 2
    return 1 if output.ndim == 2 and output.shape[0] == length else None


def _rows(output: Tensor, pos_axis: int, batch_pos: tuple[int, int]) -> Float[Tensor, "batch pos channel"]:
    if output.ndim == 4 and pos_axis == 2:
        return rearrange(output, "batch head pos d_head -> batch pos (head d_head)")
    return output.reshape(*batch_pos, -1)


def _of_block(block: Block, outputs: dict[str, Tensor], pattern: Tensor, length: int) -> tuple[QKChannels, QKChannels]:
    names = [name for name in outputs if name.startswith(f"{block.attention}.")]
    axes = {name: _axis(outputs[name], length) or 1 for name in names}
    found: dict[str, list[tuple[str, Tensor]]] = {"query": [], "key": []}
    for head in range(pattern.shape[1]):
        row = pattern[0, head, -1].float()
        moves: dict[str, Tensor] = {}  # name -> (pos channel), whether a gradient is other than zero
        last: dict[str, tuple[str, Tensor]] = {}
        for draw in range(4):  # in 16 bits a gradient may cancel to zero by chance
            generator = torch.Generator().manual_seed(draw)
            weights = torch.rand(length, generator=generator).to(row.device)  # a row itself always sums to 1
            gradients = torch.autograd.grad(
                row @ weights, [outputs[name] for name in names], retain_graph=True, allow_unused=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if gradient is None:
                    continue
                moved = _rows(gradient, axes[name], (1, length))[0] != 0
                moves[name] = moves[name] | moved if name in moves else moved
                key = moves[name][:-1].any(0)
                for kind, chosen in (("key", key), ("query", moves[name][-1] & ~key)):
                    if chosen.any():  # the last module on the way: a norm behind the projection
                        last[kind] = (name, chosen.nonzero().flatten().cpu())
            if len(last) == 2 and len(last["query"][1]) == len(last["key"][1]):
                break
        sizes = {kind: len(channels) for kind, (_, channels) in last.items()}
        if len(sizes) < 2 or sizes["query"] != sizes["key"]:
            raise HookError(
                f"{block.site} ({block.name}), head {head}: found {sizes or 'no'} channels that are its query "
                "and key; expected as many of each: this attention has another form than q.k"
            )
        for kind in found:
            found[kind].append(last[kind])
    sides = []
    for kind, heads in found.items():
        modules = {name for name, _ in heads}
        if len(modules) > 1 or len({len(channels) for _, channels in heads}) > 1:
            raise HookError(f"{block.site}: heads take their {kind} from {', '.join(sorted(modules))}; expected one")
        sides.append(QKChannels(heads[0][0], axes[heads[0][0]], torch.stack([c for _, c in heads])))
    return sides[0], sides[1]


@contextmanager
def reading(
    model: nn.Module, projections: list[QKChannels], batch_pos: list[tuple[int, int]]
) -> Iterator[dict[int, Float[Tensor, "batch pos head d_head"]]]:
    """Inside, each forward pass fills block number -> what its heads get; batch_pos holds the pass's shape."""
    store: dict[int, Tensor] = {}
    with ExitStack() as context:
        for number, projection in enumerate(projections):

            def hook(
                module: nn.Module, args: Any, output: Any, number: int = number, p: QKChannels = projection
            ) -> None:
                if number not in store:  # DeBERTa sends its relative positions through the same module
                    store[number] = p.split(output.detach(), batch_pos[-1])

            context.callback(model.get_submodule(projection.module).register_forward_hook(hook).remove)
        yield store
