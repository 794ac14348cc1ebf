"""Which lists of modules are a model's blocks, by what their members did in the traced pass."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hooks import trace_modules as probe
from hooks.errors import HookError

MAPPING_HELP = (
    "pass hooks.anatomy.find(model, mapping={'blocks': 'model.layers', 'attention': 'self_attn'}), where the "
    "parts of a block are named relative to the block and None says that there is none; it is remembered"
)


def stack_lists(model: nn.Module, events: list[probe.Event], given: Any, model_type: str) -> dict[str, list[str]]:
    """Site prefix -> block names: the outermost ModuleLists whose children map the stream to itself.

    Raises `HookError` where none or several qualify, or a block runs more than once in a pass.
    """
    called: dict[str, list[probe.Event]] = {}
    for event in events:
        called.setdefault(event.name, []).append(event)
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if given is not None:
        chosen = dict(given) if isinstance(given, Mapping) else {"blocks": given}
        for name in chosen.values():
            if name not in lists:
                raise HookError(probe.no_such(name, lists, "ModuleList"))
    else:
        outer: list[str] = []
        for name, module in lists.items():
            children = [f"{name}.{i}" for i in range(len(module))]
            if not children or any(name.startswith(other + ".") for other in outer):
                continue
            if all(child in called and all(e.maps_stream for e in called[child]) for child in children):
                outer.append(name)
        if not outer:
            raise HookError(
                f"{model_type}: blocks not found: no ModuleList of it has children that all map (batch, pos, width) to "
                f"(batch, pos, width){_otherwise(lists, called)}; {MAPPING_HELP}"
            )
        outer.sort(key=lambda name: called[f"{name}.0"][0].start)
        if len(outer) == 1:
            chosen = {"blocks": outer[0]}
        elif len(outer) == 2 and probe.pretrained(model).config.is_encoder_decoder:
            chosen = {"encoder_blocks": outer[0], "decoder_blocks": outer[1]}
        else:
            raise HookError(f"{model_type}: blocks are uncertain: {', '.join(outer)} all qualify; {MAPPING_HELP}")
    result = {}
    for prefix, name in chosen.items():
        result[prefix] = [f"{name}.{i}" for i in range(len(lists[name]))]
        for child in result[prefix]:
            calls = len(called.get(child, ()))
            if calls != 1:
                raise HookError(
                    f"{model_type}: block {child} ran {calls} times in one forward pass, expected 1: layers "
                    "that share one module (as in Albert) have no site of their own and are not supported"
                )
    return result


def _otherwise(lists: Mapping[str, nn.ModuleList], called: Mapping[str, list[probe.Event]]) -> str:
    """What the longest list of modules that ran maps instead, in the traced pass over one text."""
    ran = [name for name, modules in lists.items() if len(modules) and f"{name}.0" in called]
    if not ran:
        return ""
    longest = max(ran, key=lambda name: len(lists[name]))
    for number in range(len(lists[longest])):
        child = f"{longest}.{number}"
        if child not in called:
            return f": {child} was not called"
        event = called[child][0]
        if event.named:
            return f": {child} returns several streams by name"
        if not event.maps_stream:
            read, wrote = (None if t is None else tuple(t.shape) for t in (event.input, event.output))
            return f": {child} maps {read} to {wrote}, expected (1, {probe.LENGTH}, width) twice"
    return ""
