"""The forward pass that is running: its masks and shapes, and whether each site is reached exactly once in it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.anatomy import Anatomy
from hooks.errors import HookError

_OPEN: WeakKeyDictionary[nn.Module, list[Pass]] = WeakKeyDictionary()  # the contexts that watch each model


class Pass:
    """What the sites of one context need to know about the forward pass that is running.

    A pass runs from the call of the model, of its base model, or of the encoder by itself, to that call's end. What
    fires outside of it is a block that gradient checkpointing runs again on the way back.
    """

    def __init__(self, anatomy: Anatomy, wanted: Iterable[sites.Site]) -> None:
        self.anatomy = anatomy
        self.wanted = list(wanted)
        self.batch_pos: dict[int, tuple[int, int]] = {}
        self.given: dict[str, Any] = {}
        self.owner: nn.Module | None = None  # whose call the running pass is; None between passes
        self.ever: set[str] = set()  # sites that were reached in some pass
        self._reached: set[str] = set()
        self._stacks: set[int] = set()
        self._found: dict[Any, Tensor] = {}  # masks and last places of this pass, found once

    def begin(self, module: nn.Module, args: Any, kwargs: Any, stacks: Iterable[int]) -> None:
        if self.owner is not None and self.owner is not module:
            return  # the base model's call inside the model's
        if getattr(module, "_is_replica", False):
            raise HookError(
                "nn.DataParallel runs copies of the model in threads, whose activations would be mixed; expected one "
                "model: call the module inside it, or use DistributedDataParallel"
            )
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        named = dict(zip(names, args, strict=False)) | kwargs
        self.given = {key: named.get(key) for key in ("attention_mask", "decoder_attention_mask")}
        self.owner, self._stacks = module, set(stacks)
        if named.get("encoder_outputs") is not None:
            self._stacks.discard(0)
        self.batch_pos.clear()
        self._reached.clear()
        self._found.clear()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Raises HookError where a site was not reached. An output of None: an exception is on its way."""
        if self.owner is not module:
            return
        self.owner = None
        if output is not None:
            self.refuse_unreached(self.wanted)

    def refuse_unreached(self, wanted: Iterable[sites.Site]) -> None:
        lost = [site for site in wanted if site.name not in self._reached and site.stack in self._stacks]
        if lost:
            names = ", ".join(site.name for site in lost[:4]) + (f" and {len(lost) - 4} more" if lost[4:] else "")
            raise HookError(
                f"{names}: not reached, since {lost[0].module} was not called in this forward pass; expected one call: "
                "blocks are skipped by LayerDrop in training mode (call model.eval()), by an early exit, or by a fused "
                "kernel that takes the module's weights"
            )

    def reach(self, site: sites.Site) -> bool:
        """Whether the site belongs to the running pass. Raises HookError where it is reached a second time in it."""
        if self.owner is None:
            return False
        if site.name in self._reached:
            raise HookError(
                f"{site.name}: {site.module} runs several times in one forward pass (blocks share it), so it has no "
                "site of its own; expected one call: take sites of the stream, such as blocks.*.hook_resid_post"
            )
        self._reached.add(site.name)
        self.ever.add(site.name)
        return True

    def enter_stack(self, stack: int, tensor: Tensor) -> None:
        self.batch_pos[stack] = (tensor.shape[0], tensor.shape[1])

    def batch_pos_of(self, site: sites.Site, tensor: Tensor) -> tuple[int, int]:
        if site.stack not in self.batch_pos:  # the embeddings run before the first block
            self.enter_stack(site.stack, tensor)
        return self.batch_pos[site.stack]

    def mask(self, stack: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """True at real tokens; all true with no mask or one of who sees whom. With a cache, the newest positions."""
        key = (stack, device)
        if key not in self._found:
            self._found[key] = self._mask(stack, device)
        return self._found[key]

    def last(self, stack: int, device: torch.device) -> Int[Tensor, " batch"]:
        """Places of the last real tokens: searched once a pass, since it waits for the device."""
        key = ("last", stack, device)
        if key not in self._found:
            self._found[key] = last_token(self.mask(stack, device))
        return self._found[key]

    def _mask(self, stack: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        batch, pos = self.batch_pos[stack]
        decoder = len(self.anatomy.stacks) == 2 and stack == 1
        mask = self.given.get("decoder_attention_mask" if decoder else "attention_mask")
        if mask is None:
            return torch.ones(batch, pos, dtype=torch.bool, device=device)
        if mask.ndim == 4:  # who sees whom: which places are padding is the caller's to know
            return torch.ones(batch, pos, dtype=torch.bool, device=device)
        if mask.ndim != 2:
            raise HookError(f"attention_mask has shape {tuple(mask.shape)}; expected (batch, pos) to find real tokens")
        return mask[:, -pos:].to(device).bool()


@contextmanager
def watched(model: nn.Module, anatomy: Anatomy, wanted: Iterable[sites.Site], verb: str) -> Iterator[Pass]:
    """Inside, the passes of the model are followed; `wanted` are the sites that are to be reached in each.

    A compiled model runs uncompiled inside: its graph was traced without these hooks, and would keep them afterwards.

    Raises HookError on leaving where sites were wanted and no pass reached any.
    """
    core = probe.pretrained(model)
    state = Pass(anatomy, wanted)
    every = range(len(anatomy.stacks))
    calls: dict[nn.Module, Iterable[int]] = {core: every, core.base_model: every}
    if len(anatomy.stacks) == 2 and callable(getattr(core, "get_encoder", None)):
        calls.setdefault(core.get_encoder(), (0,))  # `generate` runs it by itself
    with ExitStack() as stack:
        for module, stacks in calls.items():

            def begin(module: nn.Module, args: Any, kwargs: Any, stacks: Iterable[int] = stacks) -> None:
                state.begin(module, args, kwargs, stacks)

            stack.callback(module.register_forward_pre_hook(begin, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(state.end, always_call=True).remove)
        for number, part in enumerate(anatomy.stacks):
            first = model.get_submodule(part.blocks[0].name)

            def enter(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
                tensor = probe.first_tensor(args, kwargs)
                if tensor is not None:
                    state.enter_stack(number, tensor)

            stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)
        _OPEN.setdefault(core, []).append(state)
        stack.callback(_OPEN[core].remove, state)
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield state
    if state.wanted and not state.ever:
        raise HookError(
            f"{verb}: no forward pass of the model reached {state.wanted[0].name} inside the context; expected a call "
            "of this very model there (not of a traced or exported copy of it)"
        )


def abandon(model: nn.Module) -> None:
    """The running pass ends here, in the middle, for every context that watches the model."""
    for state in _OPEN.get(probe.pretrained(model), ()):
        state.owner = None


def last_token(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Index of each row's last real token, on either padding side. Raises HookError where there is none."""
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise HookError(f"row {empty[0]} of attention_mask marks no token; expected at least one real token a row")
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)
