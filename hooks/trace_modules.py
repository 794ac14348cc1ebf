"""One short forward pass with every module watched; the model is left exactly as it was."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hooks.attention_kernels import without_plans
from hooks.errors import HookError

LENGTH = 7  # tokens of the probe; a decoder gets 5, so that cross-attention is known by its key length
_DECODER_LENGTH = 5


@dataclass
class Event:
    """One call of one module: first tensor in, everything out, and copies from before any in-place change."""

    name: str
    module: nn.Module
    start: int
    end: int = 0
    input: Tensor | None = None
    input_copy: Tensor | None = None
    output: Any = None  # the first tensor of a tuple
    output_copy: Any = None
    extra: tuple[Any, ...] = ()  # the whole tuple; () where the module returned a tensor
    named: bool = False  # the tuple's fields have names (Reformer's two streams)

    @property
    def maps_stream(self) -> bool:
        """Takes (batch, pos, width) and gives the same shape."""
        same = self.input is not None and self.output is not None and self.input.shape == self.output.shape
        return same and not self.named and self.output.ndim == 3 and self.output.shape[1] in (LENGTH, _DECODER_LENGTH)


def pretrained(model: nn.Module) -> Any:
    """The Hugging Face model inside `model` (itself, or what PEFT wraps). Raises HookError without one."""
    from transformers import PreTrainedModel

    if isinstance(model, nn.Module) and not type(model).__module__.startswith(("transformer_lens", "nnsight")):
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                return module
    raise HookError(
        f"got a {type(model).__module__}.{type(model).__qualname__}, expected a Hugging Face model; "
        "hooks.record also reads a TransformerBridge or an nnsight model"
    )


def fingerprint(model: nn.Module) -> int:
    """Another number once a module of `model` is another, or stands elsewhere.

    Every step of a training asks a dozen times; torch's own walk over all modules takes six times as long.
    """
    found: list[nn.Module | None] = [model]
    names: list[str] = []
    for module in found:  # which grows on the way
        if module is not None:
            names.extend(module._modules)
            found.extend(module._modules.values())
    return hash((*names, *map(id, found)))


def body(model: nn.Module) -> Any:
    """The Hugging Face model without its head; the model itself where its base takes no ids (BartForCausalLM)."""
    core = pretrained(model)
    return core.base_model if "input_ids" in forward_arguments(core.base_model) else core


def forward_arguments(module: Any) -> set[str]:
    """Names that a model's forward takes (that of its class: accelerate and PEFT wrap the bound one)."""
    return set(inspect.signature(type(module).forward).parameters)


def input_device(core: Any) -> torch.device:
    """Where the ids go: the device of the embeddings, or the one that offloaded weights execute on."""
    embeddings = core.get_input_embeddings()
    device = next(embeddings.parameters()).device
    hook = getattr(embeddings, "_hf_hook", None)
    if device.type == "meta" and hook is not None and hook.execution_device is not None:
        return torch.device(hook.execution_device)
    return device


def nearest(name: str, known: Iterable[str]) -> str:
    """The `known` names that are most like `name`, as the end of a sentence; nothing where none is."""
    close = difflib.get_close_matches(name, list(known), n=4, cutoff=0.4)
    return f"; the nearest are {', '.join(close)}" if close else ""


def no_such(name: str, known: Iterable[str], kind: str = "module") -> str:
    """That a name of a mapping is not in the model, and which are near it."""
    return f"mapping: the model has no {kind} {name!r}{nearest(name, known)}"


@contextmanager
def eager(model: nn.Module) -> Iterator[None]:
    """Eager attention (which returns its weights) inside; each config gets back exactly what it had."""
    core = pretrained(model)
    configs = {id(config): config for module in model.modules() for config in _configs(module)}.values()
    before = [(config, config._attn_implementation) for config in configs]
    try:
        if core._can_set_attn_implementation():
            core.set_attn_implementation("eager")
        for (
            config,
            _,
        ) in before:  # Falcon refuses the setter, and under sdpa leaves the causal mask out of its weights
            config._attn_implementation_internal = "eager"
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation  # the public setter would recurse


def _configs(module: nn.Module) -> Iterator[Any]:
    from transformers import PretrainedConfig, PreTrainedModel

    todo = [module.config] if isinstance(module, PreTrainedModel) else []
    while todo:
        config = todo.pop()
        yield config
        children = [getattr(config, key, None) for key in config.sub_configs]
        todo += [child for child in children if isinstance(child, PretrainedConfig)]


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients inside; mode, random state and hooks come back.

    transformers installs permanent hooks on the first `output_*` request (utils/output_capturing.py). They
    and their mark are taken away again, or they would sit in front of hooks that the user registers later.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    known = [set(module._forward_hooks) for module in modules]
    mark = "_output_capturing_hooks_installed"
    marked = [mark in module.__dict__ for module in modules]
    try:
        with torch.no_grad(), without_plans(), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            for module in modules:
                module.training = False
            yield
    finally:
        for module, mode, before, had_mark in zip(modules, training, known, marked, strict=True):
            module.training = mode
            for key in [key for key in module._forward_hooks if key not in before]:
                del module._forward_hooks[key]
            if not had_mark:
                module.__dict__.pop(mark, None)


def run(model: nn.Module) -> list[Event]:
    """Every module call of a forward pass over a few tokens, by order of completion; names are those of
    `model`.

    Only the base model runs: no head, no labels, so classifiers and headless models need no special case.
    Raises HookError if the model cannot run (the reason is in the line).
    """
    core = body(model)
    device = next(core.parameters()).device
    events: list[Event] = []
    pending: dict[int, list[Event]] = {}
    count = 0

    def kept(tensor: Tensor) -> Tensor:  # those of a model on several devices are compared with each other
        return tensor.clone() if tensor.is_meta or device.type == "meta" else tensor.to(device, copy=True)

    def before(name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal count
        tensor = first_tensor(args, kwargs)
        copy = None if tensor is None else kept(tensor)
        pending.setdefault(id(module), []).append(Event(name, module, count, 0, tensor, copy))
        count += 1

    def after(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal count
        event = pending[id(module)].pop()
        event.end, count = count, count + 1
        event.extra = tuple(output) if isinstance(output, (tuple, list)) else ()
        event.named = hasattr(output, "_fields")
        head = event.extra[0] if event.extra else output
        event.output = head if isinstance(head, Tensor) else None
        event.output_copy = None if event.output is None else kept(event.output)
        events.append(event)

    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        stack.enter_context(eager(model))
        for name, module in model.named_modules():
            pre = module.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: before(name, m, args, kwargs), with_kwargs=True
            )
            stack.callback(pre.remove)
            stack.callback(module.register_forward_hook(after).remove)
        try:
            core(**_inputs(core))
        except HookError:
            raise
        except Exception as error:
            line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise HookError(
                f"{core.config.model_type}: a forward pass over {LENGTH} tokens failed "
                f"({type(error).__name__}: {line}); expected a model that takes input_ids"
            ) from error
    broken = [event for event in events if _broken(event.output_copy)]
    if broken and _broken(next(e.output_copy for e in reversed(events) if e.output_copy is not None)):
        raise HookError(  # what is masked away again does no harm (CPM-Ant's softmax over padding)
            f"{core.config.model_type}: in a forward pass over {LENGTH} tokens the first NaN or infinite "
            f"value comes out of {broken[0].name or 'the model'}; expected finite ones: check the weights"
        )
    return events


def _broken(out: Tensor | None) -> bool:
    return out is not None and out.is_floating_point() and out.device.type != "meta" and not bool(out.isfinite().all())


def mixing(model: nn.Module, names: Iterable[str]) -> frozenset[str]:
    """Which of these modules give another output at later positions when the input at the first one is another.

    One more forward pass: each module runs twice in it, on what it reads and on that with the channels of the first
    position moved by one place. Nothing is known of a model on "meta".
    """
    core = body(model)
    found: set[str] = set()
    if input_device(core).type == "meta":
        return frozenset()

    def compare(name: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        read, wrote = first_tensor(args, kwargs), _first(output)
        if read is None or wrote is None or _positions(read) != LENGTH or _positions(wrote) != LENGTH:
            return
        moved = read.clone()
        moved.reshape(-1, read.shape[-1])[0] = read.reshape(-1, read.shape[-1])[0].roll(1)
        given = [moved if value is read else value for value in args]
        named = {key: moved if value is read else value for key, value in kwargs.items()}
        again = _first(module.forward(*given, **named))  # forward: the hooks of this pass stay out
        if again is None or again.shape != wrote.shape:
            return
        later, other = (tensor.reshape(LENGTH, -1)[1:].float() for tensor in (wrote, again))
        noise = 1e-5 if wrote.dtype == torch.float32 else 1e-2  # experts group the rows in another way
        if bool((later - other).abs().max() > noise * later.abs().max()):
            found.add(name)

    with ExitStack() as stack:
        stack.enter_context(unchanged(model))
        for name in dict.fromkeys(names):
            hook = partial(compare, name)
            stack.callback(model.get_submodule(name).register_forward_hook(hook, with_kwargs=True).remove)
        core(**_inputs(core))
    return frozenset(found)


def _first(output: Any) -> Tensor | None:
    head = output[0] if isinstance(output, (tuple, list)) and output else output
    return head if isinstance(head, Tensor) else None


def _positions(tensor: Tensor) -> int:
    """How many positions a tensor of one text holds: (1, pos, width), or flattened (pos, width)."""
    return tensor.shape[1] if tensor.ndim == 3 and tensor.shape[0] == 1 else tensor.shape[0] if tensor.ndim == 2 else 0


def first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The stream that a module receives: first positional, or `hidden_states`, or the first tensor."""
    if args:
        return args[0] if isinstance(args[0], Tensor) else None
    if isinstance(kwargs.get("hidden_states"), Tensor):
        return kwargs["hidden_states"]
    return next((value for value in kwargs.values() if isinstance(value, Tensor)), None)


def _inputs(core: Any) -> dict[str, Any]:
    accepted = forward_arguments(core)
    if "input_ids" not in accepted:
        raise HookError(f"{core.config.model_type}: forward takes no input_ids; only text models are supported")
    config = core.config.get_text_config()
    special = {getattr(config, key, None) for key in ("pad_token_id", "bos_token_id", "eos_token_id")}
    vocabulary = core.get_input_embeddings().weight.shape[0]
    ids = [i for i in range(min(vocabulary, 64)) if i not in special][:LENGTH]
    device = input_device(core)
    inputs: dict[str, Any] = {"input_ids": torch.tensor([ids], device=device)}
    if "decoder_input_ids" in accepted and core.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([ids[:_DECODER_LENGTH]], device=device)
    optional = {"output_attentions": True}
    if device.type != "meta":  # without a cache transformers looks at values, to find packed sequences
        optional["use_cache"] = False
    anything = "kwargs" in accepted
    return inputs | {key: value for key, value in optional.items() if key in accepted or anything}
