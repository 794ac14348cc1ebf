"""The effect of swapping one unit's activation between two runs: by doing it, or from one gradient."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from hooks.activations import capture, run_base
from hooks.anatomy import find, require
from hooks.logit_difference import Changes, Prompts, logit_difference

PatchUnit = Literal["block", "attention", "mlp", "head", "stream"]
Positions = Literal["all", "changed", "last", "each"]
SITES = {
    "block": "hook_resid_post",  # and what entered: a block's unit is what it adds
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "head": "attn.hook_z",
    "stream": "hook_resid_post",
}


_PARTS = {"attention": "attention_out", "mlp": "mlp_out", "head": "n_heads"}  # fields of `anatomy.Block`


def places_of(first: Prompts, second: Prompts, positions: Positions) -> list[Bool[Tensor, "batch pos"]]:
    """The positions to patch: one mask, or with "each" one mask a position."""
    mask = first.inputs["attention_mask"].bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    if positions == "each":
        return [mask & (columns == column) for column in columns]
    if positions == "changed":
        return [mask & (first.inputs["input_ids"] != second.inputs["input_ids"])]
    return [mask & (columns == first.ends[:, None])] if positions == "last" else [mask]


def _clean(model: nn.Module, batch: Prompts, unit: PatchUnit) -> dict[str, Tensor]:
    """Block site -> the unit's activation in the clean run."""
    stack = find(model).stacks[0]
    if unit in _PARTS:
        require(stack, _PARTS[unit], f"patching of unit {unit!r}")
    sites = [block.site for block in stack.blocks]
    wanted = [f"{site}.{SITES[unit]}" for site in sites]
    wanted += [f"{site}.hook_resid_pre" for site in sites] if unit == "block" else []
    with torch.no_grad(), capture(model, wanted) as store:
        run_base(model, batch.inputs)
    found = {site: store[f"{site}.{SITES[unit]}"] for site in sites}
    return {s: x - store[f"{s}.hook_resid_pre"] for s, x in found.items()} if unit == "block" else found


def patched(
    model: nn.Module, first: Prompts, second: Prompts, tokens: list[int], unit: PatchUnit, places: list[Tensor]
) -> Tensor:
    """patched - corrupted for each pair: (batch block [head] [pos]); one forward pass each."""
    clean = _clean(model, first, unit)
    base = logit_difference(model, second, tokens, {})
    columns = []
    for site, activation in clean.items():
        heads = list(range(activation.shape[2])) if unit == "head" else [None]
        for head in heads:
            for place in places:
                changes = _swap(site, activation, unit, head, place)
                columns.append(logit_difference(model, second, tokens, changes) - base)
    moved = torch.stack(columns, 1).reshape(len(base), len(clean), -1, len(places))
    moved = moved if unit == "head" else moved[:, :, 0]
    return moved if len(places) > 1 else moved[..., 0]


def _swap(site: str, clean: Tensor, unit: PatchUnit, head: int | None, place: Tensor) -> Changes:
    entering: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        entering[:] = [tensor.clone()]
        return tensor

    def change(tensor: Tensor) -> Tensor:
        where = place.to(tensor.device)[..., None]
        if head is not None:
            new = tensor.clone()
            new[:, :, head] = torch.where(where, clean[:, :, head], tensor[:, :, head])
            return new
        return torch.where(where, entering[0] + clean if unit == "block" else clean, tensor)

    changes: Changes = {f"{site}.hook_resid_pre": note} if unit == "block" else {}
    return changes | {f"{site}.{SITES[unit]}": change}


def attributed(
    model: nn.Module, first: Prompts, second: Prompts, tokens: list[int], unit: PatchUnit, places: list[Tensor]
) -> Tensor:
    """The same to first order, all units from one backward pass: (batch block [head] [pos])."""
    clean = _clean(model, first, unit)
    entering: dict[str, Tensor] = {}
    at_hand: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    changes: Changes = {}
    for site in clean:

        def note(tensor: Tensor, site: str = site) -> Tensor:
            entering[site] = tensor.detach().clone()
            return tensor

        def watch(tensor: Tensor, site: str = site) -> Tensor:
            at_hand[site] = tensor.detach().clone()
            added[site] = torch.zeros_like(tensor, requires_grad=True)
            return tensor + added[site]

        changes |= {f"{site}.hook_resid_pre": note} if unit == "block" else {}
        changes[f"{site}.{SITES[unit]}"] = watch
    with torch.enable_grad():
        value = logit_difference(model, second, tokens, changes)
        gradients = torch.autograd.grad(value.sum(), [added[site] for site in clean])
    columns = []
    for gradient, (site, activation) in zip(gradients, clean.items(), strict=True):
        corrupted = at_hand[site] - entering[site] if unit == "block" else at_hand[site]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        product = (gradient.to(wide) * (activation - corrupted)).sum(-1)  # (batch pos [head])
        chosen = [place.reshape(*place.shape, *[1] * (product.ndim - 2)) for place in places]
        columns.append(torch.stack([(product * c.to(product.device)).sum(1) for c in chosen], -1))
    moved = torch.stack([c.to(columns[0].device) for c in columns], 1)  # (batch block [head] place)
    return moved if len(places) > 1 else moved[..., 0]
