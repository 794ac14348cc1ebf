"""Which modules of a block are its attention, mixer, MLP, writers and norms, by what they did in the traced pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hooks.trace_modules import Event

_FIELDS = (
    *("attention", "attention_writer", "attention_out", "pattern", "pattern_index", "n_heads"),
    *("cross_attention", "cross_writer", "cross_pattern", "cross_pattern_index"),
    *("mixer", "mixer_writer", "mixer_out", "mlp", "mlp_writer", "mlp_out", "mid"),
)


def read(block: Event, inner: list[Event], mixing: frozenset[str] = frozenset()) -> dict[str, Any]:
    """The fields of `anatomy.Block` below its site and name; `missing` holds the reason for each part not found.

    block: the event of the block; inner: the events of the modules inside, by order of completion. mixing: modules
    beside attention whose output depends on earlier positions.
    """
    found: dict[str, Any] = dict.fromkeys(_FIELDS)
    found["missing"] = {}
    own: list[tuple[Event, int]] = []
    cross: list[tuple[Event, int]] = []
    for event in inner:
        index = _pattern_index(event)
        if index is not None:
            queries, keys = event.extra[index].shape[-2:]
            (own if queries == keys else cross).append((event, index))
    matrices = _matrices(inner)
    _read_attention(block, inner, matrices, own, cross, found)
    taken = [name for name in (found["attention"], found["cross_attention"]) if name is not None]
    outside = [e for e in matrices if not any(_inside(e.name, s) or e.name == s for s in taken)]
    mixers = [scope for scope in _scopes(block, inner, outside, taken) if scope in mixing]
    if mixers:
        own_matrices = [e for e in outside if e.name == mixers[0] or _inside(e.name, mixers[0])]
        outside = [e for e in outside if e not in own_matrices]
        writer = _last_writer(own_matrices, block)
        found["mixer"] = mixers[0]
        if writer is not None:
            whole = next(e for e in inner if e.name == mixers[0])
            found["mixer_writer"], found["mixer_out"] = writer.name, _follow(_added(writer, whole), inner).name
    _read_mlp(block, inner, outside, found, shifted=bool(mixers[1:]))
    heads = tuple(pairs[0][0].name + "." for pairs in (own, cross) if pairs)  # QK-norms are not the stream's
    wide = [e.name for e in inner if _is_norm(e.module) and e.input is not None and _same_size(e.input, block)]
    found["norms"] = tuple(name for name in wide if not name.startswith(heads))
    found["mid"] = _mid(block, inner, found)
    found["additive"] = _additive(block, inner, found)
    if not found["additive"]:
        last = next((e.name for e in inner if e.output is block.output and _named_norm(e.module)), None)
        scaled = "what its parts write is scaled, gated or normed before it is added, or a part was not found"
        found["missing"]["additive"] = f"{last} normalises the stream itself" if last else scaled
    return found


def unexplained(block: Event, inner: list[Event], found: dict[str, Any]) -> list[str]:
    """Modules outside attention that may mix positions: asked of blocks that attention and MLP do not explain."""
    if found["attention"] is not None and found["additive"]:
        return []
    taken = [name for name in (found["attention"], found["cross_attention"]) if name is not None]
    outside = [e for e in _matrices(inner) if not any(_inside(e.name, s) or e.name == s for s in taken)]
    return _scopes(block, inner, outside, taken)


def _read_attention(
    block: Event,
    inner: list[Event],
    matrices: list[Event],
    own: list[tuple[Event, int]],
    cross: list[tuple[Event, int]],
    found: dict[str, Any],
) -> None:
    scope = _outermost(own)
    if scope is None:
        found["missing"]["attention"] = "no module returned one 4-D tensor of weights whose rows sum to 1"
    else:
        innermost, index = own[0]  # completion order: what is inside completes first
        found |= {"attention": scope.name, "pattern": innermost.name, "pattern_index": index}
        found["n_heads"] = innermost.extra[index].shape[1]
        writer = _last_writer([e for e in matrices if _inside(e.name, scope.name)], block)
        if writer is None:
            found["missing"]["attention_writer"] = f"no matrix inside {scope.name} writes the stream's width"
        else:
            found["attention_writer"] = writer.name
            found["attention_out"] = _follow(_added(writer, innermost), inner).name
    cross_scope = _outermost(cross)
    if cross_scope is not None:
        found["cross_attention"] = cross_scope.name
        found |= {"cross_pattern": cross[0][0].name, "cross_pattern_index": cross[0][1]}
        writer = _last_writer([e for e in matrices if _inside(e.name, cross_scope.name)], block)
        found["cross_writer"] = None if writer is None else writer.name


def _read_mlp(block: Event, inner: list[Event], outside: list[Event], found: dict[str, Any], *, shifted: bool) -> None:
    """shifted: the MLP itself looks at the position before (RWKV), so no module of it acts on one position alone."""
    found["mlp_modules"] = tuple(dict.fromkeys(e.name for e in outside))
    writer = _last_writer(outside, block)
    if writer is None:
        found["missing"]["mlp_writer"] = "no matrix outside attention writes the stream's width"
        return
    container = _ancestor(list(found["mlp_modules"]), block.name)
    fused = any(p.ndim > 2 for e in outside for p in e.module._parameters.values() if p is not None)
    found["mlp"] = None if shifted else container
    found["mlp_writer"] = container if fused and container else writer.name
    whole = next((e for e in inner if e.name == container), writer)
    found["mlp_out"] = _follow(whole if fused else _added(writer, whole), inner).name


def _matrices(inner: list[Event]) -> list[Event]:
    found = [e for e in inner if _is_matrix(e.module)]
    return [e for e in found if not any(_inside(e.name, other.name) for other in found)]


def _scopes(block: Event, inner: list[Event], matrices: list[Event], taken: list[str]) -> list[str]:
    """The outermost modules that were called inside the block, hold some of `matrices`, and none of `taken`."""
    called = {e.name for e in inner}
    found: dict[str, None] = {}
    for matrix in matrices:
        path = matrix.name.split(".")
        for length in range(block.name.count(".") + 2, len(path) + 1):
            name = ".".join(path[:length])
            if name in called and not any(_inside(scope, name) for scope in taken):
                found[name] = None
                break
    return list(found)


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


def _named_norm(module: nn.Module) -> bool:
    return _is_norm(module) and "norm" in type(module).__name__.lower()  # and no mere scale


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
    """The first module after attention (or the mixer in its place) that receives stream in + what that wrote."""
    out = next((e for e in inner if e.name == (found["attention_out"] or found["mixer_out"])), None)
    if out is None or out.output is None or block.input_copy is None:
        return None
    total = block.input_copy + out.output_copy.reshape(block.input_copy.shape)
    scope = found["attention"] or found["mixer"]
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
    """Whether the stream leaving is the stream entering plus what attention, mixer and MLP give."""
    if block.input_copy is None or block.output_copy is None:
        return False
    total = block.input_copy
    outs = {e.name: e for e in inner}
    for part in ("attention_out", "cross_writer", "mixer_out", "mlp_out"):
        event = outs.get(found[part]) if found[part] else None
        if event is not None:
            if event.output_copy is None or event.output_copy.numel() != total.numel():
                return False
            total = total + event.output_copy.reshape(total.shape)
    return _close(block.output_copy, total)
