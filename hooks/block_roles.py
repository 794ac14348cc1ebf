"""Which modules of a block are its attention, MLP, writers and norms, by what they did in the probe."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hooks.trace_modules import Event


def read(block: Event, inner: list[Event]) -> tuple[dict[str, Any], dict[str, str]]:
    """The fields of `anatomy.Block` below its site and name, and for each part not found the reason.

    block: the probe's event of the block; inner: the events of the modules inside, by order of completion.
    """
    found: dict[str, Any] = dict.fromkeys(
        ("attention", "attention_writer", "attention_out", "pattern", "pattern_index", "n_heads")
    )
    found |= dict.fromkeys(
        (
            "cross_attention",
            "cross_writer",
            "cross_pattern",
            "cross_pattern_index",
            "mlp",
            "mlp_writer",
            "mlp_out",
            "mid",
        )
    )
    why: dict[str, str] = {}
    own: list[tuple[Event, int]] = []
    cross: list[tuple[Event, int]] = []
    for event in inner:
        index = _pattern_index(event)
        if index is not None:
            queries, keys = event.extra[index].shape[-2:]
            (own if queries == keys else cross).append((event, index))
    matrices = [e for e in inner if _is_matrix(e.module)]
    matrices = [e for e in matrices if not any(_inside(e.name, other.name) for other in matrices)]

    scope = _outermost(own)
    if scope is None:
        why["attention"] = "no module returned one 4-D tensor of weights whose rows sum to 1"
    else:
        innermost, index = own[0]  # completion order: what is inside completes first
        found |= {"attention": scope.name, "pattern": innermost.name, "pattern_index": index}
        found["n_heads"] = innermost.extra[index].shape[1]
        writer = _last_writer([e for e in matrices if _inside(e.name, scope.name)], block)
        if writer is None:
            why["attention_writer"] = f"no matrix inside {scope.name} writes the stream's width"
        else:
            found["attention_writer"] = writer.name
            found["attention_out"] = _follow(_added(writer, innermost), inner).name
    cross_scope = _outermost(cross)
    if cross_scope is not None:
        found["cross_attention"] = cross_scope.name
        found |= {"cross_pattern": cross[0][0].name, "cross_pattern_index": cross[0][1]}
        writer = _last_writer([e for e in matrices if _inside(e.name, cross_scope.name)], block)
        found["cross_writer"] = None if writer is None else writer.name

    scopes = [s.name for s in (scope, cross_scope) if s is not None]
    outside = [e for e in matrices if not any(_inside(e.name, s) or e.name == s for s in scopes)]
    found["mlp_modules"] = tuple(dict.fromkeys(e.name for e in outside))
    writer = _last_writer(outside, block)
    if writer is None:
        why["mlp_writer"] = "no matrix outside attention writes the stream's width"
    else:
        container = _ancestor(list(found["mlp_modules"]), block.name)
        fused = any(p.ndim > 2 for e in outside for p in e.module._parameters.values() if p is not None)
        found["mlp"] = container
        found["mlp_writer"] = container if fused and container else writer.name
        whole = next((e for e in inner if e.name == container), writer)
        found["mlp_out"] = _follow(whole if fused else _added(writer, whole), inner).name

    heads = tuple(pairs[0][0].name + "." for pairs in (own, cross) if pairs)  # QK-norms are not the stream's
    wide = [e.name for e in inner if _is_norm(e.module) and e.input is not None and _same_size(e.input, block)]
    found["norms"] = tuple(name for name in wide if not name.startswith(heads))
    found["mid"] = _mid(block, inner, found)
    found["additive"] = _additive(block, inner, found)
    return found, why


def final_norm(last_block: Event, events: list[Event], stack: str) -> str | None:
    """The first module outside the stack, without matrices, that receives the last block's own tensor."""
    for event in sorted(events, key=lambda e: e.start):
        outside = not event.name.startswith(stack + ".")
        if outside and event.input is last_block.output and _is_norm(event.module) and event.maps_stream:
            return event.name
    return None


def _pattern_index(event: Event) -> int | None:
    """Where in the module's output tuple its attention weights are; sinks may take a share of a row."""
    for index, item in enumerate(event.extra):
        if not isinstance(item, Tensor) or item.ndim != 4 or not item.is_floating_point():
            continue
        if item.device.type == "meta":  # shapes only
            if event.output is not None and item.shape[2] == event.output.shape[1]:
                return index
            continue
        rows = item.float().sum(-1)
        if bool((item >= 0).all() and (rows > 0).all() and (rows < 1.02).all()):
            return index
    return None


def _is_matrix(module: nn.Module) -> bool:
    """Linear, Conv1D, quantised and LoRA layers (which have in_features), and fused experts (3-D weights)."""
    if isinstance(module, nn.Embedding):
        return False
    owns = any(p is not None and p.ndim >= 2 for p in module._parameters.values())
    return owns or hasattr(module, "in_features") or hasattr(module, "infeatures")


def _is_norm(module: nn.Module) -> bool:
    """A module whose parameters have at most one dimension, or a norm without any."""
    parameters = list(module.parameters())
    bare = not parameters and not list(module.children()) and "norm" in type(module).__name__.lower()
    return bare or (bool(parameters) and all(p.ndim <= 1 for p in parameters))


def _inside(name: str, scope: str) -> bool:
    return name.startswith(scope + ".")


def _outermost(found: list[tuple[Event, int]]) -> Event | None:
    return found[-1][0] if found else None


def _last_writer(matrices: list[Event], block: Event) -> Event | None:
    """The last matrix whose output has the stream's size (experts flatten batch and position)."""
    wide = [e for e in matrices if e.output is not None and _same_size(e.output, block)]
    return wide[-1] if wide else None


def _ancestor(names: list[str], block: str) -> str | None:
    """The innermost module that holds all of `names` and is not the block itself."""
    paths = [name.split(".") for name in names]
    shared = paths[0][:-1]
    for path in paths[1:]:
        length = 0
        while length < min(len(shared), len(path)) and shared[length] == path[length]:
            length += 1
        shared = shared[:length]
    name = ".".join(shared)
    return name if _inside(name, block) else None


def _added(writer: Event, container: Event) -> Event:
    """The container where it returns what its writer wrote; in Bloom and MPT it adds the stream itself."""
    same = container.output_copy is not None and container.output_copy.numel() == writer.output_copy.numel()
    if same and _inside(writer.name, container.name):
        if writer.output.device.type == "meta":
            return container
        if torch.equal(container.output_copy.flatten(), writer.output_copy.flatten()):
            return container
    return writer


def _same_size(tensor: Tensor, block: Event) -> bool:
    """The stream, perhaps with batch and position flattened (OPT)."""
    return tensor.shape[-1] == block.output.shape[-1] and tensor.numel() == block.output.numel()


def _follow(start: Event, inner: list[Event]) -> Event:
    """From the writer to what is added: Gemma 2 and OLMo 2 put a norm between the two."""
    current = start
    for event in sorted(inner, key=lambda e: e.start):
        after = event.start > current.start and not _inside(event.name, current.name)
        if after and event.input is current.output and _is_norm(event.module):
            current = event
    return current


def _close(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "meta" or a.device != b.device:
        return False
    tolerance = 1e-5 if a.dtype == torch.float32 else 2e-2
    return bool((a.float() - b.float()).abs().max() <= tolerance * b.float().abs().max().clamp(min=1e-30))


def _mid(block: Event, inner: list[Event], found: dict[str, Any]) -> str | None:
    """The first module after attention that receives stream in + attention out."""
    out = next((e for e in inner if e.name == found["attention_out"]), None)
    if out is None or out.output is None or block.input_copy is None:
        return None
    total = block.input_copy + out.output_copy.reshape(block.input_copy.shape)
    scope = found["attention"]
    for event in sorted(inner, key=lambda e: e.start):
        later = event.start > out.start and not _inside(event.name, out.name)
        if not later or event.input_copy is None or not _same_size(event.input_copy, block):
            continue
        if _inside(event.name, scope) and not _is_norm(event.module):
            continue
        if _close(event.input_copy.reshape(total.shape), total):
            return event.name
    return None


def _additive(block: Event, inner: list[Event], found: dict[str, Any]) -> bool:
    """Whether the stream leaving is the stream entering plus what attention and MLP give."""
    if block.input_copy is None or block.output_copy is None:
        return False
    total = block.input_copy
    outs = {e.name: e for e in inner}
    for part in ("attention_out", "cross_writer", "mlp_out"):
        event = outs.get(found[part]) if found[part] else None
        if event is not None:
            if event.output_copy is None or event.output_copy.numel() != total.numel():
                return False
            total = total + event.output_copy.reshape(total.shape)
    return _close(block.output_copy, total)
