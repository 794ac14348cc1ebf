"""One backward pass of a batch, which hands every layer's input and output gradient over while it runs.

Autograd forms no weight gradient at all: the cost is one forward pass and the gradients of the activations, down to
the lowest layer that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.batching import why_alone
from hooks.errors import HookError
from hooks.gradient_influence.examples import Batch, Row
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.jobs import Job, no_cache
from hooks.gradient_influence.layers import Layer, Preconditioner

LOGITS = 2**23  # entries of logits that are held at a time on a CPU


class _Tap(torch.autograd.Function):
    """The identity on a layer's output; on the way back it hands over the layer's input and this gradient.

    The input is saved the way autograd saves, so that checkpointing recomputes it instead of keeping it.
    """

    @staticmethod
    def forward(ctx: Any, read: Tensor, wrote: Tensor, anchor: Tensor, take: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(read)
        ctx.take = take
        return wrote.detach()  # the same memory, and no view: Falcon changes what a layer wrote in place

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        ctx.take(ctx.saved_tensors[0], gradients[0])
        return None, gradients[0], None, None


@dataclass(frozen=True, eq=False)
class _Targets:
    """The tokens of a batch that have a loss, row after row.

    at: the places of the logits that predict them, in (row * pos). owner: each one's row. share: by row, what one
    token's loss counts in the row's.
    """

    at: Int[Tensor, " target"]
    owner: Int[Tensor, " target"]
    wanted: Int[Tensor, " target"]
    share: Float[Tensor, " row"]

    def losses(self, nll: Float[Tensor, " target"], found: Sequence[Row]) -> Float[Tensor, " row"]:
        """The loss of each row. Raises HookError for one that is not finite."""
        each = nll.detach().to(self.owner.device) * self.share[self.owner]
        # Added up on the processor: an accelerator adds in no fixed order, and an index would differ in its last bits.
        losses = torch.zeros(len(found)).index_add_(0, self.owner.cpu(), each.cpu())
        if not bool(torch.isfinite(losses).all()):
            place = found[int((~torch.isfinite(losses)).int().argmax())].place
            raise HookError(f"the loss of text {place} is not finite; check the weights, or use float32 or bfloat16")
        return losses.to(self.owner.device)


def differentiate(
    work: Job,
    batch: Batch,
    take: Callable[[Gradient], None],
    *,
    preconditioner: Preconditioner,
    weights: Sequence[float] | None = None,
) -> Float[Tensor, " row"]:
    """Run the batch forwards and backwards; `take` gets each layer's gradients as they come. Returns the losses.

    weights: one for each row of a unit (1 and -1 for twins) or for each row of the batch; without them a unit's loss
    is the mean over its rows. The model is in evaluation mode, frozen, and afterwards as it was.

    Raises HookError for a layer that runs several times in one pass, or not at all, and for a loss or a gradient
    that is not finite.
    """
    found = [row for unit in batch for row in unit]
    group, width = len(batch[0]), max(len(row.ids) for row in found)
    inputs, targets = _inputs_and_targets(work, found, width)
    given = list(weights) if weights is not None else [1.0 / group] * group
    given = given if len(given) == len(found) else given * len(batch)
    scale = (targets.share * torch.tensor(given, device=targets.share.device))[targets.owner]
    reached: set[str] = set()

    def receive(layer: Layer, read: Tensor, gradient: Tensor) -> None:
        if layer.name in reached:
            raise HookError(f"{layer.name} runs several times in one forward pass; leave it out with targets")
        reached.add(layer.name)
        if read.shape[:-1].numel() != len(found) * width:
            raise HookError(
                f"{layer.name} reads {tuple(read.shape)}, expected ({len(found)}, {width}, {layer.shape[1]}): it does "
                "not see every token of every text (a mixture's expert); leave it out with targets"
            )
        # rows of a unit stand one behind the other: (unit, row * token, width)
        x, g = (tensor.reshape(len(batch), group * width, -1) for tensor in (read, gradient))
        take(Gradient(layer, x, g, preconditioner))

    with _frozen(work), ExitStack() as stack:
        anchor = torch.zeros((), device=scale.device, requires_grad=True)
        for layer in work.layers:
            hook = partial(_tap, anchor, partial(receive, layer))
            stack.callback(work.model.get_submodule(layer.name).register_forward_hook(hook).remove)
        nll = _run(work, inputs, targets, scale)
    missing = [layer.name for layer in work.layers if layer.name not in reached]
    if missing:
        raise HookError(f"{missing[0]} has no part in the loss (is its adapter merged or off?); leave it out")
    return targets.losses(nll, found)


def _inputs_and_targets(work: Job, found: Sequence[Row], width: int) -> tuple[dict[str, Any], _Targets]:
    """The rows padded on the right to `width`, and what is to be predicted in them."""
    if len(found) > 1 and why_alone(work.model):
        raise HookError(
            f"texts {found[0].place} and {found[1].place} are of one unit, and this model cannot run two rows at once "
            f"({why_alone(work.model)}); take units of one text, and no contrast"
        )
    ids = torch.tensor([row.ids + (0,) * (width - len(row.ids)) for row in found])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in found])
    inputs = model_inputs(work.model, {"input_ids": ids, "attention_mask": mask})
    device = inputs["input_ids"].device
    # The logits at place t - 1 predict token t.
    at = torch.tensor([n * width + t - 1 for n, row in enumerate(found) for t in row.counted])
    owner = torch.tensor([n for n, row in enumerate(found) for _ in range(row.targets)])
    share = torch.tensor([1.0 / row.targets if work.loss == "mean" else 1.0 for row in found])
    at = at.to(device)
    wanted = inputs["input_ids"].flatten()[at + 1]
    return inputs, _Targets(at, owner.to(device), wanted, share.to(device))


def _run(
    work: Job, inputs: dict[str, Any], targets: _Targets, scale: Float[Tensor, " target"]
) -> Float[Tensor, " target"]:
    """-log P of the targets, after the backward pass of their scaled sum."""
    core = probe.pretrained(work.model)
    with _head_input(work, targets.at) as stream:
        output = core(**inputs, **no_cache(core))
        if work.plain_head:
            nll, back = _head_loss(work.model.get_submodule(work.head), stream[0].detach(), targets.wanted, scale)
            torch.autograd.backward(stream[0], back)
        else:
            # Flattened: with (batch vocab pos) the gradient is off by 3e-3 on a CPU.
            wanted = targets.wanted.to(output.logits.device)
            nll = functional.cross_entropy(output.logits.float(), wanted, reduction="none")
            (nll * scale.to(nll.device)).sum().backward()
    return nll


def _tap(anchor: Tensor, take: Callable[..., None], module: nn.Module, args: Any, output: Tensor) -> Any:
    return _Tap.apply(args[0], output, anchor.to(output.device), take)


@contextmanager
def _frozen(work: Job) -> Iterator[None]:
    """Evaluation mode with gradients for activations only; all is given back."""
    flags = [(parameter, parameter.requires_grad) for parameter in work.model.parameters()]
    with probe.unchanged(work.model), torch.enable_grad(), ExitStack() as stack:
        try:
            for parameter, _ in flags:
                parameter.requires_grad_(False)
            for name in work.blocks if work.checkpointing else ():
                stack.enter_context(_recomputed(work.model.get_submodule(name)))
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def _recomputed(block: nn.Module) -> Iterator[None]:
    """Inside, the block keeps its input only. transformers' own checkpointing is off in evaluation mode."""
    from torch.utils.checkpoint import checkpoint

    had, before, own = "forward" in block.__dict__, block.__dict__.get("forward"), block.forward
    block.forward = lambda *args, **kwargs: checkpoint(
        own, *args, use_reentrant=False, preserve_rng_state=False, **kwargs
    )
    try:
        yield
    finally:
        if had:
            block.forward = before  # type: ignore[assignment]
        else:
            del block.__dict__["forward"]


@contextmanager
def _head_input(work: Job, at: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the head reads the places `at` only; with a plain head one of them, and what it would read is kept."""
    kept: list[Tensor] = []

    def cut(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        kept.append(args[0].flatten(0, 1)[at.to(args[0].device)])
        return (args[0][:1, :1] if work.plain_head else kept[0], *args[1:])

    handle = work.model.get_submodule(work.head).register_forward_pre_hook(cut)
    try:
        yield kept
    finally:
        handle.remove()


@torch.no_grad()
def _head_loss(
    head: Any, stream: Float[Tensor, "place d_model"], wanted: Tensor, scale: Tensor
) -> tuple[Float[Tensor, " place"], Float[Tensor, "place d_model"]]:
    """-log P of the wanted tokens, and the gradient of the scaled sum at the head's input.

    A few rows at a time: the logits of all places over the vocabulary are the largest tensors of a plain pass. The
    gradient at the logits is softmax - one-hot, so at the head's input it is (sum of e^z W) / (sum of e^z) - W[wanted].
    """
    wanted, scale = wanted.to(stream.device), scale.to(stream.device)
    weight = head.weight
    size = max(1, LOGITS * (1 if stream.device.type == "cpu" else 64) // len(weight))
    nll, back = torch.empty(len(stream), device=stream.device), torch.empty_like(stream)
    for start in range(0, len(stream), size):
        part = slice(start, start + size)
        logits = functional.linear(stream[part], weight, head.bias).float()
        picked = logits.gather(1, wanted[part, None])[:, 0]
        top = logits.amax(1, keepdim=True)
        total = logits.sub_(top).exp_().sum(1)
        nll[part] = total.log() + top[:, 0] - picked
        mean = (logits.to(weight.dtype) @ weight).float() / total[:, None]
        back[part] = ((mean - weight[wanted[part]].float()) * scale[part, None]).to(stream.dtype)
    return nll, back
