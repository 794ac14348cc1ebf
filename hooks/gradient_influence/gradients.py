"""One backward pass of a batch, which hands every layer's input and output gradient over while it runs.

The gradient of a linear layer's weight is sum over tokens of g_t x_t^T, so it is known per text from the layer's
input and its output's gradient. Autograd forms no weight gradient at all: the cost is one forward pass and the
gradients of the activations, down to the lowest layer that is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.anatomy import find
from hooks.batching import context_limit, why_alone
from hooks.errors import HookError
from hooks.gradient_influence.examples import Batch
from hooks.gradient_influence.layers import Layer, Preconditioner, find_layers, left_out

MATERIALISED = 2**25  # entries of per-text gradients that are held at a time
VISIT = 16  # what reading or writing one entry of memory costs, in multiply-adds
LOGITS = 2**23  # entries of logits that are held at a time on a CPU


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradients of one layer's weight for the units of a batch, unmultiplied.

    inputs, outputs: what the layer read, and the loss's gradient at what it wrote; zero where there is padding.
    """

    layer: Layer
    inputs: Float[Tensor, "unit token in"]
    outputs: Float[Tensor, "unit token out"]
    preconditioner: Preconditioner

    def matrix(self) -> Float[Tensor, "unit out in"]:
        """Multiplied out, in float32, after the optimiser."""
        return self.preconditioner.apply(self.layer, _product(self.outputs.mT, self.inputs))

    def chunks(self) -> Iterator[Gradient]:
        """The same in portions of units whose matrices fit into memory."""
        size = max(1, MATERIALISED // (self.layer.shape[0] * self.layer.shape[1]))
        for start in range(0, len(self.inputs), size):
            part = slice(start, start + size)
            yield Gradient(self.layer, self.inputs[part], self.outputs[part], self.preconditioner)

    def dots_and_square(
        self, vectors: Float[Tensor, "probe out in"]
    ) -> tuple[Float[Tensor, "unit probe"], Float[Tensor, " unit"]]:
        """Dot products with the probes, and the squared norm: by the cheaper of two exact ways."""
        out, into = self.layer.shape
        tokens, count = self.inputs.shape[1], len(vectors)
        multiplied_out = out * into * (2 * tokens + VISIT * (2 + count))
        by_tokens = 2 * tokens * tokens * (out + into) + 2 * tokens * out * into * count
        if self.preconditioner.kind == "none" and by_tokens < multiplied_out:
            return self.by_token(vectors).sum(1), self._gram()
        dots, squares = [], []
        for part in self.chunks():
            flat = part.matrix().flatten(1)
            dots.append(flat @ vectors.flatten(1).T)
            squares.append(torch.linalg.vector_norm(flat, dim=1).square())
        return torch.cat(dots), torch.cat(squares)

    def by_token(self, vectors: Float[Tensor, "probe out in"]) -> Float[Tensor, "unit token probe"]:
        """g_t^T P x_t of each token: what sums to the dot product of the raw gradient with P."""
        found = self.inputs.new_empty((*self.inputs.shape[:2], len(vectors)), dtype=torch.float32)
        for number, vector in enumerate(vectors):
            found[..., number] = (_product(self.inputs, vector.T) * self.outputs.float()).sum(-1)
        return found

    def _gram(self) -> Float[Tensor, " unit"]:
        """The squared norm without the matrix: sum over t, s of (x_t . x_s)(g_t . g_s)."""
        x, g = self.inputs, self.outputs
        return (_product(x, x.mT) * _product(g, g.mT)).sum((1, 2)).clamp(min=0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    if b.ndim == 2:
        return torch.mm(a.flatten(0, 1), b.to(a.dtype), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return torch.bmm(a, b.to(a.dtype), out_dtype=torch.float32)


@dataclass(frozen=True, eq=False)
class Job:
    """A model, the layers that are looked at, and how the loss of a text is reduced over its tokens."""

    model: nn.Module
    layers: tuple[Layer, ...]
    blocks: tuple[str, ...]
    head: str
    limit: int | None
    loss: Literal["mean", "sum"]
    checkpointing: bool
    plain_head: bool
    note: str | None = None  # which weights of the blocks have no part

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    def budget(self, batch_tokens: int) -> int:
        """Tokens a batch: as asked, or 1, so that each unit goes alone, where rows must not share a batch."""
        return 1 if why_alone(self.model) else batch_tokens


def job(
    model: nn.Module,
    *,
    targets: Sequence[str] | None = None,
    loss: Literal["mean", "sum"] = "mean",
    checkpointing: bool = False,
) -> Job:
    """Look the model over once. See `find_layers` for targets.

    Raises HookError for a model that is no causal language model with a head.
    """
    if loss not in ("mean", "sum"):
        raise HookError(f"loss is {loss!r}; expected 'mean' or 'sum' over the tokens of a text")
    anatomy, core = find(model), probe.pretrained(model)
    kind = type(core).__name__
    if anatomy.head is None or len(anatomy.stacks) > 1 or "MaskedLM" in kind:
        raise HookError(f"{kind} is no causal language model with a head; load it with AutoModelForCausalLM")
    layers = find_layers(model, anatomy, targets)
    limit = context_limit(model)
    blocks = tuple(block.name for block in anatomy.blocks)
    note = None if targets else left_out(model, anatomy, [layer.name for layer in layers])
    return Job(model, layers, blocks, anatomy.head, limit, loss, checkpointing, _plain_head(model, anatomy.head), note)


def _plain_head(model: nn.Module, name: str) -> bool:
    """Whether the model's logits are what its head gives, without a soft cap, scale or bias behind it."""
    core, head = probe.pretrained(model), model.get_submodule(name)
    seen: list[Tensor] = []
    with probe.unchanged(model), ExitStack() as stack:
        stack.callback(head.register_forward_hook(lambda m, args, out: seen.append(out)).remove)
        logits = core(**model_inputs(model, torch.arange(3, 7)[None]), **_no_cache(core)).logits
    return type(head) is nn.Linear and len(seen) == 1 and torch.equal(seen[0].float(), logits.float())


def _no_cache(core: Any) -> dict[str, bool]:
    return {"use_cache": False} if "use_cache" in probe.forward_arguments(core) else {}


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
    model, core = work.model, probe.pretrained(work.model)
    found = [row for unit in batch for row in unit]
    if len(found) > 1 and why_alone(model):
        raise HookError(
            f"texts {found[0].place} and {found[1].place} are of one unit, and this model cannot run two rows at once "
            f"({why_alone(model)}); take units of one text, and no contrast"
        )
    group, width = len(batch[0]), max(len(row.ids) for row in found)
    given = list(weights) if weights is not None else [1.0 / group] * group
    given = given if len(given) == len(found) else given * len(batch)
    ids = torch.tensor([row.ids + (0,) * (width - len(row.ids)) for row in found])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in found])
    inputs = model_inputs(model, {"input_ids": ids, "attention_mask": mask})
    device = inputs["input_ids"].device
    # The logits at place t - 1 predict token t.
    at = torch.tensor([n * width + t - 1 for n, row in enumerate(found) for t in range(row.start, len(row.ids))])
    owner = torch.tensor([n for n, row in enumerate(found) for _ in range(row.targets)])
    share = torch.tensor([1.0 / row.targets if work.loss == "mean" else 1.0 for row in found])
    at, owner, share = at.to(device), owner.to(device), share.to(device)
    wanted = inputs["input_ids"].flatten()[at + 1]
    scale = (share * torch.tensor(given, device=device))[owner]
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
        anchor = torch.zeros((), device=device, requires_grad=True)
        for layer in work.layers:
            hook = partial(_tap, anchor, partial(receive, layer))
            stack.callback(model.get_submodule(layer.name).register_forward_hook(hook).remove)
        stream = stack.enter_context(_head_input(work, at))
        output = core(**inputs, **_no_cache(core))
        if work.plain_head:
            nll, back = _head_loss(model.get_submodule(work.head), stream[0].detach(), wanted, scale)
            torch.autograd.backward(stream[0], back)
        else:
            # Flattened: with (batch vocab pos) the gradient is off by 3e-3 on a CPU.
            nll = functional.cross_entropy(output.logits.float(), wanted.to(output.logits.device), reduction="none")
            (nll * scale.to(nll.device)).sum().backward()
    missing = [layer.name for layer in work.layers if layer.name not in reached]
    if missing:
        raise HookError(f"{missing[0]} has no part in the loss (is its adapter merged or off?); leave it out")
    nll = nll.detach().to(device)
    losses = torch.zeros(len(found), device=device).index_add_(0, owner, nll * share[owner])
    if not bool(torch.isfinite(losses).all()):
        place = found[int((~torch.isfinite(losses)).int().argmax())].place
        raise HookError(f"the loss of text {place} is not finite; check the weights, or use float32 or bfloat16")
    return losses


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
