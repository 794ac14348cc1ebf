"""Read activations of a live model by TransformerLens site names, inside a context manager."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.anatomy import Anatomy, find
from hooks.batching import takes_positions
from hooks.errors import HookError
from hooks.forward_pass import abandon, watched

Reducer = Callable[[str, Tensor, Tensor], None]


class _Stop(BaseException):
    """Ends a forward pass early; not an Exception, so that no model code catches it."""


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

    A compiled model runs uncompiled inside. Blocks that gradient checkpointing runs again are not handed out again.

    Raises HookError for an unknown site (before any hook is registered); from the model's call where a site is not
    reached in it, or twice; and on leaving where none was reached at all, and for NaN or infinite activations at
    real tokens, naming the first site that had them.
    """
    anatomy = find(model)
    wanted = sites.expand(anatomy, sites_wanted)
    if positions not in ("all", "last"):
        raise HookError(f"positions is {positions!r}; expected 'all' or 'last'")
    if stop_after is not None and not 0 <= stop_after < len(anatomy.blocks):
        raise HookError(f"stop_after is {stop_after}; the model has blocks 0 to {len(anatomy.blocks) - 1}")
    store: dict[str, Tensor] = {}
    faults: dict[str, Tensor] = {}

    def take(site: sites.Site, module: nn.Module, tensor: Tensor) -> None:
        if not state.reach(site):
            return
        value = site.canonical(tensor.detach(), state.batch_pos_of(site, tensor), module)
        mask = state.mask(site.stack, value.device)
        last = state.last(site.stack, value.device) if positions == "last" else None
        value, bad = _handed_out(site, value, mask, last)
        faults[site.name] = faults.get(site.name, torch.zeros((), dtype=torch.bool, device=bad.device)) | bad
        if reducer is not None:
            reducer(site.name, value, mask)
        else:  # a copy, since some models go on to change what they returned in place (Falcon)
            store[site.name] = value if positions == "last" else value.clone()

    with ExitStack() as stack:
        before = [site for site in wanted if stop_after is None or not _behind(anatomy, site, stop_after)]
        state = stack.enter_context(watched(model, anatomy, before, "hooks.capture"))
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
            state.refuse_unreached(before)
            abandon(model)
    _refuse_first(faults)


def _handed_out(site: sites.Site, value: Tensor, mask: Tensor, last: Tensor | None) -> tuple[Tensor, Tensor]:
    """The activation, at the tokens `last` (batch) where given, and whether a real token's is NaN or infinite."""
    pattern = site.kind == "pattern"
    if last is not None:
        rows = torch.arange(len(value), device=value.device)
        value = value[rows, :, last] if pattern else value[rows, last]
        return value, (~torch.isfinite(value)).any()
    bad = ~torch.isfinite(value)
    return value, ((bad.any(3).any(1) if pattern else bad.flatten(2).any(2)) & mask).any()


def _refuse_first(faults: Mapping[str, Tensor]) -> None:
    for name, fault in faults.items():  # in the order of the pass
        if bool(fault):
            raise HookError(
                f"{name} holds NaN or infinite values, and no site captured before it does; "
                "expected finite activations: check the weights and the dtype"
            )


def _behind(anatomy: Anatomy, site: sites.Site, block: int) -> bool:
    """Whether the site is reached after `block` of the last stack, or not at all where the pass ends there."""
    if site.stack < len(anatomy.stacks) - 1 or site.kind == "embed":
        return False
    return site.block is None or anatomy.blocks.index(site.block) > block


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise _Stop


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


def model_inputs(model: nn.Module, batch: Tensor | Mapping[str, Any]) -> dict[str, Any]:
    """The batch with what makes padding sides agree: `position_ids` from the mask where rows are padded on the left.

    batch: ids (batch pos) or what a tokenizer returns. Keys the model does not take (token_type_ids of some
    tokenizers) are left out; an encoder-decoder without decoder_input_ids gets its start token.
    Rows that begin in the first column get no positions, and the model derives its own. On the left it is found out
    whether the model needs them (`hooks.batching.takes_positions`): some begin elsewhere (RoBERTa), or derive them from
    the mask. Raises HookError for padding on the left of a model that gives other values then, such as a recurrent one.
    """
    core = probe.pretrained(model)
    accepted = probe.forward_arguments(probe.body(model))
    device = probe.input_device(core)
    given = {"input_ids": batch} if isinstance(batch, Tensor) else dict(batch)
    accepted |= {"attention_mask"}  # xLSTM names none in its signature; which tokens are real is for the hooks to know
    inputs = {key: value.to(device) for key, value in given.items() if isinstance(value, Tensor) and key in accepted}
    if "input_ids" not in inputs:
        raise HookError(f"the batch has {', '.join(given) or 'nothing'}; expected input_ids as a (batch, pos) tensor")
    ids = inputs["input_ids"]
    mask = inputs.setdefault("attention_mask", torch.ones_like(ids))
    if "position_ids" not in inputs and _padded_left(mask) and takes_positions(model):
        inputs["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0)
    if core.config.is_encoder_decoder and "decoder_input_ids" not in inputs:
        start = decoder_start(core)
        inputs["decoder_input_ids"] = torch.full((len(ids), 1), start, dtype=ids.dtype, device=device)
    return inputs


def _padded_left(mask: Tensor) -> bool:
    """Whether some real token has padding before it."""
    return mask.device.type != "meta" and mask.ndim == 2 and bool((mask[:, 1:] > mask[:, :-1]).any())


def decoder_start(core: Any) -> int:
    """The token that an encoder-decoder's answers begin with, by its configs or else as it shifts labels itself.

    Raises HookError where nothing says it.
    """
    for holder in (core.config, getattr(core, "generation_config", None)):
        token = getattr(holder, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    if hasattr(core, "prepare_decoder_input_ids_from_labels"):
        with suppress(AttributeError, ValueError):  # T5 asks its config again
            return int(core.prepare_decoder_input_ids_from_labels(torch.full((1, 2), 3))[0, 0])
    if core.config.pad_token_id is not None:
        return int(core.config.pad_token_id)
    raise HookError(f"{core.config.model_type}: its config has no decoder_start_token_id; give decoder_input_ids")


def run_base(model: nn.Module, inputs: Mapping[str, Any]) -> None:
    """One forward pass without the head over the vocabulary and without a KV cache, for what hooks see of it.

    Logits and cache are what costs memory, not hooks: without them the peak above the weights is a fifth.
    """
    learned = [c for c in getattr(model, "peft_config", {}).values() if getattr(c, "is_prompt_learning", False)]
    body = probe.body(model)
    runner = model if learned else body  # virtual tokens are only added by the wrapper
    accepted = probe.forward_arguments(body)
    runner(**inputs, **({"use_cache": False} if "use_cache" in accepted else {}))
