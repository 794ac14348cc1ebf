"""Where the parts of a Hugging Face model are, found by what they do in one short forward pass instead of by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hooks import block_roles as parts
from hooks import trace_modules as probe
from hooks.display import Readable
from hooks.errors import HookError
from hooks.stacks import MAPPING_HELP, stack_lists

_BLOCK_KEYS = ("attention", "attention_writer", "mlp", "mlp_writer")
_MODEL_KEYS = ("blocks", "final_norm", "embeddings", "head")


@dataclass(frozen=True)
class Block:
    """The parts of one block as dotted module names of the whole model (`model.get_submodule(name)`)."""

    site: str  # how sites name the block, such as "blocks.3"
    name: str
    returns_tuple: bool  # the stream leaves as output[0] of a tuple, not as the output itself
    attention: str | None  # the module that holds all parameters of self-attention
    attention_writer: str | None  # the matrix whose output goes to the residual stream
    attention_out: str | None  # the module whose output is added: the writer's, or that of a norm after it
    pattern: str | None  # the innermost module that returns the attention weights ...
    pattern_index: int | None  # ... and where in its output tuple (2 for T5, 1 elsewhere)
    n_heads: int | None
    cross_attention: str | None
    cross_writer: str | None
    cross_pattern: str | None
    cross_pattern_index: int | None
    mixer: str | None  # what else mixes positions: a state space, a convolution, linear attention
    mixer_writer: str | None
    mixer_out: str | None
    mlp: str | None  # acts on each position alone; None where the block holds its matrices directly (OPT, BERT, BART)
    mlp_modules: tuple[str, ...]  # every matrix outside attention
    mlp_writer: str | None  # for mixtures of experts (fused 3-D weights) the MLP module itself
    mlp_out: str | None
    norms: tuple[str, ...]
    mid: str | None  # the first module that receives stream + attention; None in parallel blocks
    additive: bool  # stream out == stream in + attention, mixer and MLP out; False where they are normed or scaled
    missing: Mapping[str, str] = field(hash=False)  # part -> why it was not found


@dataclass(frozen=True, repr=False)
class Stack(Readable):
    """One residual stream: site prefix ("blocks", "encoder_blocks" or "decoder_blocks"), blocks and norm."""

    prefix: str
    blocks: tuple[Block, ...]
    final_norm: str | None


@dataclass(frozen=True, repr=False)
class Anatomy(Readable):
    """The parts of a model; `blocks` and `final_norm` are those of the last stack (T5: the decoder)."""

    model_type: str
    d_model: int
    stacks: tuple[Stack, ...]
    embeddings: str
    head: str | None

    @property
    def blocks(self) -> tuple[Block, ...]:
        return self.stacks[-1].blocks

    @property
    def final_norm(self) -> str | None:
        return self.stacks[-1].final_norm

    def table(self) -> str:
        """A plain-text table, one line a block; a part is shown by its name inside the block."""
        columns: tuple[str, ...] = (
            "site",
            "name",
            "attention",
            "attention_writer",
            "pattern",
            "mlp",
            "mlp_writer",
            "mid",
        )
        if any(block.mixer for stack in self.stacks for block in stack.blocks):
            columns += ("mixer", "mixer_writer")
        rows: list[tuple[str, ...]] = [columns]
        for stack in self.stacks:
            for block in stack.blocks:
                parts = (getattr(block, column) for column in columns[2:])
                short = ((part or "-").removeprefix(block.name + ".") for part in parts)
                rows.append((block.site, block.name, *short))
        widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        norms = ", ".join(f"{stack.prefix}: {stack.final_norm or '-'}" for stack in self.stacks)
        facts = f"{self.model_type}, width {self.d_model}; embeddings {self.embeddings}, head {self.head or '-'}"
        return "\n".join(line.rstrip() for line in (f"{facts}; final norm {norms}", *lines))


class _Cache(WeakKeyDictionary):
    """What was found, by model; sent elsewhere (`hooks.remote`), it starts empty."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Cache, ()


_cache = _Cache()


def find(model: nn.Module, mapping: Mapping[str, Any] | None = None) -> Anatomy:
    """Find the parts of `model` by what they do in one forward pass over 7 tokens; the model stays as it was.

    model: a Hugging Face model, with or without head, also wrapped by PEFT, quantised, offloaded or on
        "meta".
    mapping: your own names for what the probe cannot know: `blocks` (a ModuleList, or {"encoder_blocks": ...,
        "decoder_blocks": ...}), `final_norm`, `embeddings`, `head`, and inside each block `attention`,
        `attention_writer`, `mlp`, `mlp_writer`. It overrides the probe and is remembered for this model.

    The answer is kept per model and found anew when its modules change.

    Raises HookError naming the part that could not be found, and why.
    """
    probe.pretrained(model)
    fingerprint = probe.fingerprint(model)
    if mapping is None and model in _cache and _cache[model][0] == fingerprint:
        return _cache[model][1]
    given = dict(mapping or {})
    unknown = [key for key in given if key not in _BLOCK_KEYS + _MODEL_KEYS]
    if unknown:
        raise HookError(f"mapping has no key {unknown[0]!r}; expected some of {', '.join(_BLOCK_KEYS + _MODEL_KEYS)}")
    events = probe.run(model)
    anatomy = _assemble(model, events, given)
    _cache[model] = (fingerprint, anatomy)
    return anatomy


def check(model: nn.Module) -> dict[str, float]:
    """Self-test: with the output of every writer set to zero each block must hand its input on unchanged.

    Returns, per block, the largest change of the stream relative to its largest entry: 0.0 proves the
    writers. Blocks that normalise after adding (post-norm: BERT, OLMo 2 apart) change the stream by design.

    Raises HookError for a block that only adds to the stream in the ordinary pass and yet is no identity
    here.
    """
    anatomy = find(model)
    blocks = [block for stack in anatomy.stacks for block in stack.blocks]
    names = [w for b in blocks for w in (b.attention_writer, b.cross_writer, b.mlp_writer) if w is not None]
    handles = [model.get_submodule(name).register_forward_hook(_zero, prepend=True) for name in names]
    try:
        events = {event.name: event for event in probe.run(model)}
    finally:
        for handle in handles:
            handle.remove()
    change = {}
    for block in blocks:
        event = events[block.name]
        before, after = event.input_copy, event.output_copy
        if before is None or after is None:
            raise HookError(f"{block.site} ({block.name}) was called without a stream; {MAPPING_HELP}")
        change[block.site] = float((after - before).abs().max() / before.abs().max().clamp(min=1e-30))
        if block.additive and change[block.site] > 0.0:
            raise HookError(
                f"{block.site} ({block.name}) changes the stream by {change[block.site]:.2e} with its "
                f"writers {block.attention_writer} and {block.mlp_writer} at zero; expected 0: {MAPPING_HELP}"
            )
    return change


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, Tensor):
        return torch.zeros_like(output)
    return (torch.zeros_like(output[0]), *output[1:])


def _assemble(model: nn.Module, events: list[probe.Event], given: dict[str, Any]) -> Anatomy:
    core = probe.pretrained(model)
    model_type = core.config.model_type
    names = {name for name, _ in model.named_modules()}
    lists = stack_lists(model, events, given.get("blocks"), model_type)
    by_name = {event.name: event for event in events}
    stacks = []
    mixing = _mixing(model, events, [by_name[child] for children in lists.values() for child in children])
    for prefix, children in lists.items():
        blocks = tuple(
            _block(model, f"{prefix}.{i}", by_name[child], events, given, mixing) for i, child in enumerate(children)
        )
        if "final_norm" in given:
            norm = given["final_norm"]
        else:
            norm = parts.final_norm(by_name[children[-1]], events, children[0].rpartition(".")[0])
        stacks.append(Stack(prefix, blocks, norm))
    getters = {"embeddings": core.get_input_embeddings, "head": core.get_output_embeddings}
    found = {}
    for part, getter in getters.items():
        try:
            module = getter()
        except NotImplementedError:
            module = None
        own = [name for name, candidate in model.named_modules() if candidate is module]
        found[part] = given[part] if part in given else (own[0] if module is not None and own else None)
    if found["embeddings"] is None:
        raise HookError(f"{model_type}: the model names no input embeddings; {MAPPING_HELP}")
    for part in (found["embeddings"], found["head"], *(stack.final_norm for stack in stacks)):
        if part is not None and part not in names:
            raise HookError(probe.no_such(part, names))
    width = by_name[next(iter(lists.values()))[0]].output.shape[-1]
    return Anatomy(model_type, width, tuple(stacks), found["embeddings"], found["head"])


def _inner(block: probe.Event, events: list[probe.Event]) -> list[probe.Event]:
    return [event for event in events if event.name.startswith(block.name + ".")]


def _mixing(model: nn.Module, events: list[probe.Event], blocks: list[probe.Event]) -> frozenset[str]:
    """Modules that mix positions in blocks that attention and MLP do not explain; one more pass if there are any."""
    asked: list[str] = []
    for block in blocks:
        inner = _inner(block, events)
        asked += parts.unexplained(block, inner, parts.read(block, inner))
    return probe.mixing(model, asked) if asked else frozenset()


def _block(
    model: nn.Module,
    site: str,
    block: probe.Event,
    events: list[probe.Event],
    given: dict[str, Any],
    mixing: frozenset[str],
) -> Block:
    found = parts.read(block, _inner(block, events), mixing)
    modules = {name for name, _ in model.named_modules() if name.startswith(block.name + ".")}
    for key in _BLOCK_KEYS:
        if key in given:
            found[key] = None if given[key] is None else f"{block.name}.{given[key]}"
            found["missing"].pop(key, None)
            if found[key] is not None and found[key] not in modules:
                raise HookError(probe.no_such(found[key], modules))
    for writer, out in (("attention_writer", "attention_out"), ("mlp_writer", "mlp_out")):
        found[out] = found[out] or found[writer]  # what the probe measured stays; the mapping fills what it did not
    return Block(site=site, name=block.name, returns_tuple=bool(block.extra), **found)


def require(stack: Stack, part: str, what: str) -> None:
    """Raises HookError where some blocks of the stack have no `part`, naming them and why; `what` needs it."""
    lacking = [block for block in stack.blocks if getattr(block, part) is None]
    if not lacking:
        return
    names = ", ".join(block.site for block in lacking[:6]) + (f" and {len(lacking) - 6} more" if lacking[6:] else "")
    first = lacking[0]
    kind = "attention weights" if part in ("attention", "pattern", "n_heads") else part.replace("_", " ")
    why = first.missing.get(part) or first.missing.get("attention" if kind == "attention weights" else "mlp_writer")
    held = f"{first.mixer} mixes positions there" if first.mixer else why or "none was found"
    raise HookError(
        f"{what} needs {kind}, which {names} ({len(lacking)} of {len(stack.blocks)} blocks) do not have: {held}; "
        "take a method that reads the stream (bmi, lens, patching of blocks), or " + MAPPING_HELP
    )
