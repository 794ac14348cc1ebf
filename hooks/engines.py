"""The same sites read through plain torch hooks, TransformerLens and nnsight, under the same names."""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.activations import ask_for_weights, capture, model_inputs
from hooks.anatomy import find
from hooks.errors import HookError

Engine = Literal["torch", "transformer_lens", "nnsight"]


def record(
    model: Any,
    batch: Tensor | Mapping[str, Any],
    sites_wanted: str | Iterable[str],
    engine: Engine | None = None,
    remote: bool | str = False,
) -> dict[str, Tensor]:
    """Activations of one forward pass by site name, equal from every engine.

        record(model, batch, "blocks.*.attn.hook_pattern", engine="nnsight")

    The pass runs in evaluation mode without gradients.

    model: a Hugging Face model, a `TransformerBridge`, or an nnsight model; the latter two are read by their
        own engine. The model is left as it was: TransformerLens, which rebuilds what it is given, gets a
        copy.
    batch: ids (batch pos) or what a tokenizer returns; position ids are derived from the mask for all
        engines.
    sites_wanted: names with wildcards, see `hooks.capture`, which also gives the shapes.
    remote: with nnsight, run on its remote service (True) or rehearse that here ("local"); patterns then
        need a model loaded with eager attention.

    Raises HookError for an unknown engine or site, an engine that is not installed or does not know the
    architecture, and `remote` with another engine than nnsight.
    """
    own = _engine_of(model)
    engine = engine or own
    if engine not in ("torch", "transformer_lens", "nnsight"):
        raise HookError(f"engine is {engine!r}; expected 'torch', 'transformer_lens' or 'nnsight'")
    if own != "torch" and engine != own:
        raise HookError(f"engine is {engine!r}, but the model is a {type(model).__name__}; leave engine out")
    if remote and engine != "nnsight":
        raise HookError(f"remote={remote!r} needs engine='nnsight', got {engine!r}")
    wanted = [sites_wanted] if isinstance(sites_wanted, str) else list(sites_wanted)
    if engine == "transformer_lens":
        return _transformer_lens(model, batch, wanted)
    if engine == "nnsight":
        return _nnsight(model, batch, wanted, remote)
    with probe.unchanged(model), capture(model, wanted) as store:
        model(**model_inputs(model, batch))
    return {site.name: store[site.name] for site in sites.expand(find(model), wanted)}


def _engine_of(model: Any) -> Engine:
    roots = {base.__module__.partition(".")[0] for base in type(model).__mro__}
    if "transformer_lens" in roots:
        return "transformer_lens"
    return "nnsight" if "nnsight" in roots else "torch"


def _transformer_lens(model: Any, batch: Tensor | Mapping[str, Any], wanted: list[str]) -> dict[str, Tensor]:
    own = _engine_of(model) == "transformer_lens"
    names = wanted
    if not own:  # the plain model knows its sites: an unknown one is an error before anything is copied
        names = [site.name for site in sites.expand(find(model), wanted)]
    bridge = model if own else _bridge(probe.pretrained(model))
    given = model_inputs(bridge.original_model if own else model, batch)
    inputs = {("decoder_input" if key == "decoder_input_ids" else key): value for key, value in given.items()}
    with torch.no_grad():
        _, cache = bridge.run_with_cache(inputs.pop("input_ids"), **inputs)
    found = {name: value.detach() for name, value in cache.items() if isinstance(value, Tensor)}
    result: dict[str, Tensor] = {}
    for name in names:
        matches = [name] if name in found else fnmatch.filter(found, name)
        if not matches:
            raise HookError(f"TransformerLens has no site {name!r} for this model{probe.nearest(name, found)}")
        result |= {match: found[match] for match in matches}
    if not own:
        _refuse_differences(model, given, result)
    return result


def _refuse_differences(model: nn.Module, inputs: dict[str, Any], result: dict[str, Tensor]) -> None:
    """TransformerLens runs attention by its own code and names some sites otherwise; never hand out such
    tensors.

    Seen in 4.3: Bloom's hook_embed after the norm of the embeddings; hook_attn_out of post-norm blocks (BERT)
    after the norm.
    """
    with probe.unchanged(model), capture(model, list(result)) as store:
        model(**inputs)
    mask = inputs["attention_mask"].bool()
    for name, got in result.items():
        mine, theirs = store[name], got
        if "pattern" in name:
            mine, theirs = mine.transpose(1, 2), theirs.transpose(1, 2)
        if mine.shape[:2] == mask.shape and mine.shape == theirs.shape:
            mine, theirs = mine[mask], theirs[mask]
        same = mine.shape == theirs.shape
        error = float((mine.float() - theirs.float()).abs().max() / mine.float().abs().max()) if same else torch.inf
        if not error < (1e-3 if mine.dtype == torch.float32 else 5e-2):
            raise HookError(
                f"{name}: what TransformerLens calls so differs from the model's own by {error:.1e} relative "
                f"in this {type(model).__name__}; use engine='torch' or 'nnsight'"
            )


def _bridge(core: Any) -> Any:
    """A TransformerBridge around a copy: booting replaces modules, renames weights and forces eager."""
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError as error:
        raise HookError("engine 'transformer_lens' is not installed: pip install transformer-lens") from error
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):  # some adapters draw weights first
            own = copy.deepcopy(core).eval()
            if own._can_set_attn_implementation():
                own.set_attn_implementation("eager")  # not every adapter does; without it there are no patterns
            return build_bridge_from_module(own, type(core).__name__, hf_config=own.config)
    except Exception as error:  # whatever an adapter raises for a shape that it does not know
        line = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise HookError(f"TransformerLens cannot read a {type(core).__name__}: {line}; use engine='torch'") from error


def _nnsight(model: Any, batch: Tensor | Mapping[str, Any], wanted: list[str], remote: bool | str) -> dict[str, Tensor]:
    try:
        from nnsight import NNsight
    except ImportError as error:
        raise HookError("engine 'nnsight' is not installed: pip install nnsight") from error
    own = _engine_of(model) == "nnsight"
    if remote and not (own and hasattr(model, "_remoteable_model_key")):
        raise HookError(
            "remote needs an nnsight model that names its checkpoint: nnsight.LanguageModel('hub/name'); "
            f"got a {type(model).__name__}"
        )
    plain: nn.Module = model._module if own else model
    chosen = sites.expand(find(plain), wanted)
    plan = _plan(plain, chosen)
    inputs = model_inputs(plain, batch)
    options = {"remote": remote} if remote else {}
    saved: list[Any] = []
    with ExitStack() as stack:
        stack.enter_context(probe.unchanged(plain))
        if own:
            wrapped = model
        else:
            stack.enter_context(_forwards_kept(plain))
            wrapped = NNsight(plain)
        if not remote and any(site.kind == "pattern" for site in chosen):
            stack.enter_context(probe.eager(plain))
            for site in chosen:
                stack.callback(ask_for_weights(plain, site))
        known = {id(envoy._module): envoy for envoy in wrapped.modules()}  # by path, BERT's `output` is hidden
        places = [(known[id(plain.get_submodule(path))], side) for path, side in plan]
        with wrapped.trace(**inputs, **options):
            for place, side in places:  # nnsight wants locations in the order in which the pass reaches them
                if side == "in":
                    args, kwargs = place.inputs
                    saved.append(args[0].clone() if args else kwargs["hidden_states"].clone())
                else:
                    out = place.output
                    saved.append(tuple(out) if isinstance(out, (tuple, list)) else out.clone())
    return _named(plain, chosen, dict(zip(plan, saved, strict=True)), inputs)


@contextmanager
def _forwards_kept(model: nn.Module) -> Iterator[None]:
    """Take away the forwards that nnsight leaves in a module's __dict__ for good (intervention/source.py)."""
    slots = ("forward", "__nnsight__")
    before = [(m, {k: m.__dict__[k] for k in slots if k in m.__dict__}) for m in model.modules()]
    try:
        yield
    finally:
        for module, kept in before:
            for slot in slots:
                module.__dict__.pop(slot, None)
            module.__dict__.update(kept)


def _plan(model: nn.Module, chosen: list[sites.Site]) -> list[tuple[str, str]]:
    """(module, side) of every site, each once, in the order of a forward pass, known from the probe."""
    times: dict[tuple[str, str], int] = {}
    for event in probe.run(model):
        times[event.name, "in"], times[event.name, "out"] = event.start, event.end
    return sorted({(site.module, site.side) for site in chosen}, key=lambda key: times[key])


def _named(
    model: nn.Module, chosen: list[sites.Site], saved: dict[tuple[str, str], Any], inputs: dict[str, Any]
) -> dict[str, Tensor]:
    result = {}
    for site in chosen:
        value = saved[site.module, site.side]
        if isinstance(value, tuple):
            value = value[site.index]
        if not isinstance(value, Tensor):
            raise HookError(f"{site.name}: {site.module} returned no tensor; load the model with eager attention")
        decoder = site.name.startswith("decoder_")
        shape = inputs["decoder_input_ids" if decoder else "input_ids"].shape
        module = model.get_submodule(site.module)
        result[site.name] = site.canonical(value.detach(), (shape[0], shape[1]), module)
    return result
