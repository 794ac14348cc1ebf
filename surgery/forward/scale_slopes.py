"""How a model's answers change with the scale of each part of a delta: all scales of a batch by one backward pass.

A scale is a number of each example here, so that the gradient of the sum of a batch's answers has a row for each: what
a part adds to the output of the module that holds it is found by forward differentiation (a Jacobian-vector product
along the part, exact whatever the module computes), and multiplied by a scale that is 0.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from hooks.logit_difference import forward_as
from surgery.errors import SurgeryError
from surgery.forward.batching import Ids, batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.last_position import head_of
from surgery.forward.residual_cache import ResidualCache, shortcut, usable
from surgery.forward.word_logs import word_logs

Part = Mapping[str, Tensor]
"""{parameter: the direction in which a scale moves it}."""


def word_slopes(
    model: PreTrainedModel,
    ids: Ids,
    words: Sequence[int],
    parts: Sequence[Part],
    *,
    prefix: ResidualCache | None = None,
    step: Callable[[int], None] | None = None,
) -> tuple[Float[np.ndarray, "prompts words"], Float[np.ndarray, "parts prompts words"]]:
    """log P(word | prompt) of ``words`` as the next token, and its derivatives by the scales of ``parts``.

    ``prefix`` holds the stream that enters a block before which no part lies; without it the whole model runs. The
    model is as it was afterwards.

    Raises ``SurgeryError`` for a part that lies where no module's forward pass reads it.
    """
    head = {id(parameter) for parameter in model.get_submodule(head_of(model)).parameters()}
    named = dict(model.named_parameters(remove_duplicate=False))
    whole = any(id(named[name]) in head for part in parts for name in part)  # the words alone do not go through it
    values: list[Tensor] = [torch.empty(0)] * len(ids)
    slopes: list[Tensor] = [torch.empty(0)] * len(ids)
    prefix = usable(model, prefix, ids)
    with evaluating(model), fixed(model), torch.set_grad_enabled(bool(parts)), ExitStack() as stack:
        if any(direction.ndim > 2 for part in parts for direction in part.values()):
            stack.enter_context(plain_experts(model))
        start = prefix.block if prefix else 0
        run = stack.enter_context(shortcut(model, start=start, last=True, words=None if whole else words))
        scales_of = stack.enter_context(scales_in(model, parts))  # behind the shortcut, whose passes it goes through
        for rows in batches_for(model, ids):
            batch = prefix.batch(rows) if prefix else pad(ids, rows, model.device)
            scales = scales_of(len(rows))
            found = word_logs(run(batch), words) if whole else run(batch)  # batch, words
            each = [_by(column.sum(), scales) for column in found.unbind(1)]
            if not found.isfinite().all():
                raise SurgeryError(
                    f"{type(model).__name__}: log-probabilities of text {rows[0]} or one beside it are not finite; "
                    f"expected numbers; the weights or the dtype ({model.dtype}) are broken, try float32"
                )
            for row, value, slope in zip(rows, found.detach().cpu(), torch.stack(each, 2).cpu().unbind(1), strict=True):
                values[row], slopes[row] = value, slope
            if step:
                step(len(rows))
    return torch.stack(values).double().numpy(), torch.stack(slopes, 1).double().numpy()


def _by(total: Float[Tensor, ""], scales: Float[Tensor, "parts batch"]) -> Float[Tensor, "parts batch"]:
    if not total.requires_grad:  # no part, or none that says anything
        return torch.zeros_like(scales)
    return torch.autograd.grad(total, scales, retain_graph=True, materialize_grads=True)[0]


@contextmanager
def fixed(model: nn.Module) -> Iterator[None]:
    """Inside, no parameter takes part in a gradient."""
    training = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in training:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in training:
            parameter.requires_grad_(True)


@contextmanager
def plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Inside, experts are multiplied one by one: torch's product of all knows no forward differentiation."""
    before = model.get_experts_implementation()
    try:
        model.set_experts_implementation("eager")
        yield
    finally:
        model.set_experts_implementation(before)


@contextmanager
def scales_in(model: nn.Module, parts: Sequence[Part]) -> Iterator[Callable[[int], Float[Tensor, "parts batch"]]]:
    """Inside, ``scales_of(n)`` gives the zeros by which the next pass, of n examples, is to be differentiated."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    moved: dict[int, dict[int, Tensor]] = {}  # {parameter: {part: direction}}
    for number, part in enumerate(parts):
        for name, direction in part.items():
            moved.setdefault(id(parameters[name]), {})[number] = direction
    current: list[Tensor] = []
    reached: set[int] = set()
    if nested := _nested(model, moved.keys()):
        raise SurgeryError(f"{nested}: holds tensors of the delta itself, and modules that do; expected one of both")

    def scales_of(count: int) -> Tensor:
        device = next(iter(parameters.values())).device
        current[:] = [torch.zeros(len(parts), count, device=device, requires_grad=True)]
        return current[0]

    with ExitStack() as stack:
        for module in model.modules():
            mine: dict[int, dict[str, Tensor]] = {}  # {part: {parameter of this module: direction}}
            for name, parameter in module._parameters.items():
                for number, direction in moved.get(id(parameter), {}).items():
                    mine.setdefault(number, {})[name] = direction
            if mine:
                forward = partial(_forward, module, module.forward, mine, current, reached)
                stack.enter_context(forward_as(module, forward))
        yield scales_of
    missed = set(range(len(parts))) - reached
    if missed:
        raise SurgeryError(
            f"{next(iter(parts[min(missed)]))}: no module that holds it runs, so that the answers cannot be "
            "differentiated by its scale; expected tensors that each are read by the module which holds them"
        )


def _nested(model: nn.Module, moved: Collection[int]) -> str | None:
    """A module that has some of the parameters itself, and another one inside that has some."""
    names = [
        name for name, module in model.named_modules() if any(id(own) in moved for own in module._parameters.values())
    ]
    return next((name for name in names if any(other.startswith(f"{name}.") for other in names)), None)


def _forward(
    module: nn.Module,
    whole: Callable[..., Any],
    mine: Mapping[int, Mapping[str, Tensor]],
    current: Sequence[Tensor],
    reached: set[int],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """What ``whole`` gives, and scale times the derivative along each part: zeros that remember where they are from."""
    scales, shifts = current[0], dict[int, Tensor]()
    reached.update(mine)
    for number, directions in mine.items():
        with forward_ad.dual_level(), _along(module, directions):
            leaves, spec = pytree.tree_flatten(whole(*args, **kwargs))
            for place, leaf in enumerate(leaves):
                if not isinstance(leaf, Tensor):
                    continue
                leaves[place], tangent = forward_ad.unpack_dual(leaf)
                if tangent is not None:  # the examples come first, whether positions are folded in or not
                    moved = scales[number][:, None] * tangent.detach().reshape(scales.shape[1], -1)
                    shifts[place] = shifts.get(place, 0.0) + moved.reshape(tangent.shape)
    return pytree.tree_unflatten(
        [leaf + shifts[place] if place in shifts else leaf for place, leaf in enumerate(leaves)], spec
    )


@contextmanager
def _along(module: nn.Module, directions: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside a level of forward differentiation, the module's parameters carry these directions."""
    held = {name: module._parameters[name] for name in directions}
    try:
        for name, direction in directions.items():
            module._parameters[name] = forward_ad.make_dual(held[name], direction)
        yield
    finally:
        module._parameters.update(held)
