"""TransformerLens site names of a model, and the module, side and shape behind each."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from hooks.anatomy import Anatomy, Block
from hooks.errors import HookError
from hooks.trace_modules import nearest


@dataclass(frozen=True)
class Site:
    """Where one activation is: what goes into (`side` "in") or comes out of a module of the plain model.

    kind: "stream" (batch pos d_model), "z" (batch pos head d_head), "pattern" (batch head query key),
        "mid" (a stream that is read before a norm and edited through attention's output),
        "normalized" (a stream before the final norm's weights), "embed" (batch pos d_model).
    """

    name: str
    module: str
    side: str
    kind: str = "stream"
    index: int = 0  # of the output tuple, where there is one
    stack: int = 0
    block: Block | None = None

    @property
    def editable(self) -> bool:
        return self.kind not in ("pattern", "normalized")

    def canonical(self, tensor: Tensor, batch_pos: tuple[int, int], module: nn.Module) -> Tensor:
        """The tensor in the shape of the site's kind (OPT and experts flatten batch and position)."""
        if self.kind in ("pattern", "embed"):
            return tensor
        if tensor.ndim == 2:
            if tensor.shape[0] != batch_pos[0] * batch_pos[1]:
                raise HookError(
                    f"{self.name}: {self.module} gave {tuple(tensor.shape)} for {batch_pos} texts and positions: it "
                    "does not see every token (an expert of a mixture); take sites of the stream"
                )
            tensor = tensor.reshape(*batch_pos, tensor.shape[-1])
        if self.kind == "z" and self.block is not None and self.block.n_heads is not None:
            return rearrange(tensor, "batch pos (head d_head) -> batch pos head d_head", head=self.block.n_heads)
        return normalize(module, tensor) if self.kind == "normalized" else tensor


def normalize(norm: nn.Module, stream: Tensor) -> Tensor:
    """The stream as a norm divides it, before weight and bias: TransformerLens's `hook_normalized`.

    A norm subtracts the mean (LayerNorm) if it maps a constant vector to what it maps zero to; RMS norms do
    not.

    Raises `HookError` for a norm without eps.
    """
    epsilon = next((float(getattr(norm, k)) for k in ("eps", "variance_epsilon", "epsilon") if hasattr(norm, k)), None)
    if epsilon is None:
        raise HookError(f"ln_final.hook_normalized: {type(norm).__name__} has no eps; ask for ln_final.hook_out")
    with torch.no_grad():
        constant = torch.ones_like(stream[:1, :1])  # forward: called inside a hook of the norm itself
        centred = torch.allclose(norm.forward(constant), norm.forward(torch.zeros_like(constant)), atol=1e-4)
    x = stream.float()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    return (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)).to(stream.dtype)


def all_sites(anatomy: Anatomy) -> dict[str, Site]:
    """Every site of the model, by name, in the order in which a forward pass reaches them."""
    sites: list[Site] = []
    if len(anatomy.stacks) == 1:  # an encoder-decoder calls its embeddings twice
        sites.append(Site("hook_embed", anatomy.embeddings, "out", "embed"))
    for number, stack in enumerate(anatomy.stacks):
        for block in stack.blocks:
            sites += _block_sites(block, number)
        if stack.final_norm is not None:
            norm = stack.prefix.replace("blocks", "ln_final")  # blocks -> ln_final, encoder_blocks -> encoder_ln_final
            sites.append(Site(f"{norm}.hook_in", stack.final_norm, "in", stack=number))
            sites.append(Site(f"{norm}.hook_normalized", stack.final_norm, "in", "normalized", stack=number))
            sites.append(Site(f"{norm}.hook_out", stack.final_norm, "out", stack=number))
    return {site.name: site for site in sites}


def _block_sites(block: Block, stack: int) -> list[Site]:
    parts = [
        ("hook_resid_pre", block.name, "in", "stream", 0),
        ("attn.hook_z", block.attention_writer if block.n_heads else None, "in", "z", 0),
        ("attn.hook_pattern", block.pattern, "out", "pattern", block.pattern_index),
        ("hook_attn_out", block.attention_out, "out", "stream", 0),
        ("hook_mixer_out", block.mixer_out, "out", "stream", 0),
        ("hook_resid_mid", block.mid, "in", "mid", 0),
        ("cross_attn.hook_pattern", block.cross_pattern, "out", "pattern", block.cross_pattern_index),
        ("hook_cross_attn_out", block.cross_writer, "out", "stream", 0),
        ("hook_mlp_out", block.mlp_out, "out", "stream", 0),
        ("hook_resid_post", block.name, "out", "stream", 0),
    ]
    return [
        Site(f"{block.site}.{name}", module, side, kind, index or 0, stack, block)
        for name, module, side, kind, index in parts
        if module is not None
    ]


def expand(anatomy: Anatomy, wanted: str | Iterable[str]) -> list[Site]:
    """The sites that `wanted` names; `*` stands for anything (`blocks.*.hook_resid_post`). Each site once.

    Raises HookError for a name that matches no site, with the nearest names.
    """
    known = all_sites(anatomy)
    names: dict[str, None] = {}
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        matches = fnmatch.filter(known, pattern)
        if not matches:
            stacks = ", ".join(f"{s.prefix}.0 to {s.prefix}.{len(s.blocks) - 1}" for s in anatomy.stacks)
            wild = dict.fromkeys(_wildcard(name) for name in known)
            raise HookError(
                f"no site {pattern!r} in this {anatomy.model_type} model (blocks {stacks}{_lacking(anatomy, pattern)})"
                f"{nearest(pattern, [*wild, *known])}"
            )
        names |= dict.fromkeys(matches)
    if not names:
        raise HookError("no site was asked for; expected names such as 'blocks.*.hook_resid_post'")
    return [site for name, site in known.items() if name in names]


def _lacking(anatomy: Anatomy, pattern: str) -> str:
    """Why a site of attention or of the MLP is absent, where the blocks that are meant do not have the part."""
    ending = pattern.rpartition("hook_")[2]
    part = {"pattern": "attention", "z": "attention", "attn_out": "attention", "mlp_out": "mlp_writer"}.get(ending)
    for block in (block for stack in anatomy.stacks for block in stack.blocks):
        if part and part in block.missing and fnmatch.fnmatch(f"{block.site}.hook_resid_pre", pattern[:9] + "*"):
            mixed = f", {block.mixer} is in its place" if block.mixer and part == "attention" else ""
            return f"; {block.site} has no {part.partition('_')[0]}: {block.missing[part]}{mixed}"
    return ""


def _wildcard(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
