"""Replace activations of a live model by TransformerLens site names, inside a context manager."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from hooks import sites
from hooks import trace_modules as probe
from hooks.anatomy import find
from hooks.errors import HookError
from hooks.forward_pass import Pass, watched


@contextmanager
def edit(model: nn.Module, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Replace activations inside the context.

        with hooks.edit(model, {"blocks.3.hook_mlp_out": torch.zeros_like}):
            model(**inputs)

    changes: site (wildcards allowed) -> function from the activation (in the site's shape, see `capture`) to
        the one that takes its place. What the function returns is what the model goes on with, so gradients
        with respect to it, or to the argument it was given, are those of the model.

    A later `capture` sees the edited activations. Raises HookError for an unknown site, for
    `attn.hook_pattern` (weights are a by-product that nothing reads) and `ln_final.hook_normalized`, and for
    a changed shape; from the model's call where a site is not reached in it, or twice; and on leaving where none was
    reached. A compiled model runs uncompiled inside.
    """
    anatomy = find(model)
    todo = [(site, function) for name, function in changes.items() for site in sites.expand(anatomy, name)]
    for site, _ in todo:
        if not site.editable:
            other = "attn.hook_z" if site.kind == "pattern" else "ln_final.hook_out"
            raise HookError(f"{site.name} can be read but not replaced: the model does not read it again; edit {other}")
    with ExitStack() as stack:
        state = stack.enter_context(watched(model, anatomy, [site for site, _ in todo], "hooks.edit"))
        for site, function in todo:
            _replace(model, site, function, state, stack)
        yield


def _replace(
    model: nn.Module, site: sites.Site, function: Callable[[Tensor], Tensor], state: Pass, stack: ExitStack
) -> None:
    entering: list[Tensor] = []

    def changed(module: nn.Module, tensor: Tensor) -> Tensor:
        state.reach(site)  # outside of a pass, a block that gradient checkpointing runs again is edited again
        value = site.canonical(tensor, state.batch_pos_of(site, tensor), module)
        if site.kind == "mid":  # the stream also bypasses the norm that reads it: edit what attention adds to it
            value = entering[-1] + value
        new = function(value)
        if not isinstance(new, Tensor) or new.shape != value.shape:
            got = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise HookError(f"{site.name}: the edit returned {got}, expected a tensor of shape {tuple(value.shape)}")
        new = new.to(value)
        return (new - entering.pop() if site.kind == "mid" else new).reshape(tensor.shape)

    def before(module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        old = probe.first_tensor(args, kwargs)
        if old is None:
            raise HookError(f"{site.name}: {site.module} received no tensor; expected the residual stream")
        new = changed(module, old)
        return tuple(new if a is old else a for a in args), {k: new if v is old else v for k, v in kwargs.items()}

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, Tensor):
            return changed(module, output)
        return (changed(module, output[0]), *output[1:])

    if site.kind == "mid" and site.block is not None and (site.block.attention_out or site.block.mixer_out) is not None:

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            tensor = probe.first_tensor(args, kwargs)
            if tensor is not None:
                entering[:] = [tensor]

        block = model.get_submodule(site.block.name)
        out = model.get_submodule(site.block.attention_out or site.block.mixer_out or "")
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(out.register_forward_hook(after, prepend=True).remove)
    elif site.side == "in":
        module = model.get_submodule(site.module)
        stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
    else:
        module = model.get_submodule(site.module)
        stack.callback(module.register_forward_hook(after, prepend=True).remove)
