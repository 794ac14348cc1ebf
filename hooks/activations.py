"""Read activations of a live model by TransformerLens site names, inside a context manager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.anatomy import Anatomy, find
from hooks.batching import takes_positions
from hooks.errors import HookError

Reducer = Callable[[str, Tensor, Tensor], None]


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model code catches it."""


class Pass:
    """What the sites of one context need to know about the forward pass that is running."""

    def __init__(self, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.batch_pos: dict[int, tuple[int, int]] = {}
        self.given: dict[str, Tensor | None] = {}
        self._found: dict[Any, Tensor] = {}  # masks and last places of this pass, found once

    def begin(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
        named = dict(zip(names, args, strict=False)) | kwargs
        self.given = {key: named.get(key) for key in ("attention_mask", "decoder_attention_mask")}
        self.batch_pos.clear()
        self._found.clear()

    def enter_stack(self, stack: int, tensor: Tensor) -> None:
        self.batch_pos[stack] = (tensor.shape[0], tensor.shape[1])

    def mask(self, stack: int, device: torch.device) -> Bool[Tensor, "batch pos"]:
        """True at real tokens; all true where the model got no mask. With a cache, the newest positions."""
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
        if mask.ndim != 2:
            raise HookError(f"attention_mask has shape {tuple(mask.shape)}; expected (batch, pos) to find real tokens")
        return mask[:, -pos:].to(device).bool()


@contextmanager
def capture(
    model: nn.Module,
    sites_wanted: str | Iterable[str],
    *,
    reducer: Reducer | None = None,
    positions: Literal["all", "last"] = "all",
    stop_after: int | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Record activations of every forward pass inside the context.

        with hooks.capture(model, "blocks.*.hook_resid_post") as store:
            model(**hooks.model_inputs(model, batch))
        store["blocks.3.hook_resid_post"]  # (batch pos d_model)

    sites_wanted: TransformerLens names, with wildcards: `hook_embed`; `blocks.I.` and `hook_resid_pre`,
        `hook_resid_mid` (sequential blocks), `hook_resid_post`, `hook_attn_out`, `hook_mlp_out`,
        `attn.hook_z` (batch pos head d_head), `attn.hook_pattern` (batch head query key); `ln_final.hook_in`,
        `ln_final.hook_normalized`, `ln_final.hook_out`. For T5 and BART `encoder_blocks.I.`,
        `decoder_blocks.I.`.
    reducer: called as reducer(site, tensor, mask) while the pass runs; then nothing is kept and the store
        stays empty. mask is (batch pos), true at real tokens. The tensor is the model's own: do not change
        or keep it.
    positions: "last" hands out the last real token of each row, found from the mask: (batch d_model), and of
        a pattern the row of that query (batch head key).
    stop_after: end the pass after this block of the last stack: the rest is not computed, and the statements
        of the `with` body after the model's call are skipped.

    The model runs in the mode it is in: call `model.eval()` to leave dropout out.

    Tensors are detached copies. A further pass in the same context replaces what the store holds. A pattern
    makes the model use eager attention inside the context.

    Raises HookError for an unknown site (before any hook is registered), and on leaving for NaN or infinite
    activations at real tokens, naming the first site that had them.
    """
    anatomy = find(model)
    wanted = sites.expand(anatomy, sites_wanted)
    if positions not in ("all", "last"):
        raise HookError(f"positions is {positions!r}; expected 'all' or 'last'")
    if stop_after is not None and not 0 <= stop_after < len(anatomy.blocks):
        raise HookError(f"stop_after is {stop_after}; the model has blocks 0 to {len(anatomy.blocks) - 1}")
    store: dict[str, Tensor] = {}
    faults: dict[str, Tensor] = {}
    state = Pass(anatomy)

    def take(site: sites.Site, module: nn.Module, tensor: Tensor) -> None:
        value = site.canonical(tensor.detach(), batch_pos_of(state, site, tensor), module)
        mask = state.mask(site.stack, value.device)
        if positions == "last":
            rows, last = torch.arange(len(value), device=value.device), state.last(site.stack, value.device)
            value = value[rows, :, last] if site.kind == "pattern" else value[rows, last]
            bad = ~torch.isfinite(value)
        else:
            bad = ~torch.isfinite(value)
            bad = (bad.any(3).any(1) if site.kind == "pattern" else bad.flatten(2).any(2)) & mask
        faults[site.name] = faults.get(site.name, torch.zeros((), dtype=torch.bool, device=bad.device)) | bad.any()
        if reducer is not None:
            reducer(site.name, value, mask)
        else:  # a copy, since some models go on to change what they returned in place (Falcon)
            store[site.name] = value if positions == "last" else value.clone()

    with ExitStack() as stack:
        watch(model, state, stack)
        if any(site.kind == "pattern" for site in wanted):
            stack.enter_context(probe.eager(model))
        for site in wanted:
            _register(model, site, take, stack)
        if stop_after is not None:
            last = model.get_submodule(anatomy.blocks[stop_after].name)
            stack.callback(last.register_forward_hook(_stop).remove)
        try:
            yield store
        except _Stop:
            if stop_after is None:
                raise
    for name, fault in faults.items():  # in the order of the pass
        if bool(fault):
            raise HookError(
                f"{name} holds NaN or infinite values, and no site captured before it does; "
                "expected finite activations: check the weights and the dtype"
            )


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Stop


def batch_pos_of(state: Pass, site: sites.Site, tensor: Tensor) -> tuple[int, int]:
    if site.stack not in state.batch_pos:  # the embeddings run before the first block
        state.enter_stack(site.stack, tensor)
    return state.batch_pos[site.stack]


def watch(model: nn.Module, state: Pass, stack: ExitStack) -> None:
    """Note the masks of each pass, and batch and position of each stack."""
    base = probe.pretrained(model).base_model
    stack.callback(base.register_forward_pre_hook(state.begin, with_kwargs=True, prepend=True).remove)
    for number, part in enumerate(state.anatomy.stacks):
        first = model.get_submodule(part.blocks[0].name)

        def enter(module: nn.Module, args: Any, kwargs: Any, number: int = number) -> None:
            tensor = probe.first_tensor(args, kwargs)
            if tensor is not None:
                state.enter_stack(number, tensor)

        stack.callback(first.register_forward_pre_hook(enter, with_kwargs=True, prepend=True).remove)


def _register(model: nn.Module, site: sites.Site, take: Callable[..., None], stack: ExitStack) -> None:
    module = model.get_submodule(site.module)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        tensor = probe.first_tensor(args, kwargs)
        if tensor is None:
            raise HookError(f"{site.name}: {site.module} received no tensor; expected the residual stream")
        take(site, module, tensor)

    def after(module: nn.Module, args: Any, output: Any) -> None:
        value = output
        if isinstance(output, (tuple, list)):
            value = output[site.index] if len(output) > site.index else None
        if not isinstance(value, Tensor) or (site.kind == "pattern" and value.ndim != 4):
            raise HookError(f"{site.name}: {site.module} returned no tensor at index {site.index} of its output")
        take(site, module, value)

    stack.callback(ask_for_weights(model, site))
    if site.side == "in":
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
    else:
        stack.callback(module.register_forward_hook(after).remove)


def ask_for_weights(model: nn.Module, site: sites.Site) -> Callable[[], None]:
    """Make the attention of a pattern's site return its weights; returns what undoes it.

    Falcon and Bloom do so only on request, and asking the module alone, not the model, installs nothing.
    """
    module = model.get_submodule(site.module)
    if site.kind == "pattern" and "output_attentions" in probe.forward_arguments(module):
        return module.register_forward_pre_hook(_with_weights, with_kwargs=True).remove
    return lambda: None


def _with_weights(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    names = [name for name in inspect.signature(type(module).forward).parameters if name != "self"]
    place = names.index("output_attentions")
    if place < len(args):
        return (*args[:place], True, *args[place + 1 :]), kwargs
    return args, kwargs | {"output_attentions": True}


def last_token(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, " batch"]:
    """Index of each row's last real token, on either padding side. Raises HookError where there is none."""
    empty = (~mask.any(1)).nonzero().flatten().tolist()
    if empty:
        raise HookError(f"row {empty[0]} of attention_mask marks no token; expected at least one real token a row")
    return mask.shape[1] - 1 - mask.flip(1).int().argmax(1)


def model_inputs(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """The batch with what makes padding sides agree: `position_ids` from the mask where rows are padded on the left.

    batch: ids (batch pos) or what a tokenizer returns. Keys the model does not take (token_type_ids of some
    tokenizers) are left out; an encoder-decoder without decoder_input_ids gets its start token.
    Rows that begin in the first column get no positions, and the model derives its own. On the left it is found out
    whether the model needs them (`hooks.batching.takes_positions`): some begin elsewhere (RoBERTa), or derive them from
    the mask. Raises HookError for padding on the left of a model that gives other values then, such as a recurrent one.
    """
    core = probe.pretrained(model)
    accepted = probe.forward_arguments(core.base_model)
    device = probe.input_device(core)
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    inputs = {key: value.to(device) for key, value in given.items() if isinstance(value, Tensor) and key in accepted}
    if "input_ids" not in inputs:
        raise HookError(f"the batch has {', '.join(given) or 'nothing'}; expected input_ids as a (batch, pos) tensor")
    ids = inputs["input_ids"]
    mask = inputs.setdefault("attention_mask", torch.ones_like(ids))
    if "position_ids" not in inputs and _padded_left(mask) and takes_positions(model):
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if core.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        start = core.config.decoder_start_token_id
        start = core.config.pad_token_id if start is None else start
        inputs["decoder_input_ids"] = torch.full((len(ids), 1), start, dtype=ids.dtype, device=device)
    return inputs


def _padded_left(mask: Tensor) -> bool:
    """Whether some real token has padding before it."""
    return mask.device.type != "meta" and mask.ndim == 2 and bool((mask[:, 1:] > mask[:, :-1]).any())


def run_base(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One forward pass without the head over the vocabulary and without a KV cache, for what hooks see of it.

    Logits and cache are what costs memory, not hooks: without them the peak above the weights is a fifth.
    """
    core = probe.pretrained(model)
    learned = [c for c in getattr(model, "peft_config", {}).values() if getattr(c, "is_prompt_learning", False)]
    runner = model if learned else core.base_model  # virtual tokens are only added by the wrapper
    accepted = probe.forward_arguments(core.base_model)
    runner(**inputs, **({"use_cache": False} if "use_cache" in accepted else {}))
