"""Prompts through a model at the price of what is asked: the last position only, from the first changed block on.

Blocks before the first edited one never change, so the stream that enters it is computed once per prompt (a
``ResidualCache``) and every training step and every measurement after the edit starts there. When only the next token
is asked, the last block needs its queries, its MLP and the head at one position only.

Nothing of a block is rewritten: the model's own forward pass runs, with the blocks before the start handing their
input through, and with three inputs cut to the last position. ``why_not`` compares both ways on real prompts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from surgery.errors import SurgeryError


@dataclass(frozen=True)
class Batch:
    """Left-padded prompts on the model's device, so that the last column is every prompt's last token."""

    rows: tuple[int, ...]
    ids: Int[Tensor, "batch pos"]
    mask: Int[Tensor, "batch pos"]
    stream: Float[Tensor, "batch pos d_model"] | None = None

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model; positions are explicit, since few models derive them from the mask."""
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": positions}


@dataclass(frozen=True)
class ResidualCache:
    """The residual stream entering ``block`` for each prompt, without padding, in the model's compute dtype.

    ``flat`` holds all tokens of all prompts, one after the other, and a row of zeros at the end for padding.
    """

    block: int
    ids: tuple[tuple[int, ...], ...]
    flat: Float[Tensor, "tokens+1 d_model"]

    def batch(self, rows: Sequence[int]) -> Batch:
        """The prompts ``rows`` as a batch with their stream."""
        starts, start = [], 0
        for row in self.ids:
            starts.append(start)
            start += len(row)
        plain = pad(self.ids, rows, self.flat.device)
        width = plain.ids.shape[1]
        zero = self.flat.shape[0] - 1
        index = [
            [zero] * (width - len(self.ids[row])) + list(range(starts[row], starts[row] + len(self.ids[row])))
            for row in rows
        ]
        gathered = self.flat[torch.tensor(index, device=self.flat.device)]
        return Batch(plain.rows, plain.ids, plain.mask, gathered)


def pad(ids: Sequence[Sequence[int]], rows: Sequence[int], device: torch.device | str) -> Batch:
    """The prompts ``rows`` as one left-padded batch; padding is token 0 under mask 0."""
    width = max(len(ids[row]) for row in rows)
    filled = [[0] * (width - len(ids[row])) + list(ids[row]) for row in rows]
    masks = [[0] * (width - len(ids[row])) + [1] * len(ids[row]) for row in rows]
    return Batch(tuple(rows), torch.tensor(filled, device=device), torch.tensor(masks, device=device))


def by_length(ids: Sequence[Sequence[int]], *, tokens: int = 2048) -> list[list[int]]:
    """Rows grouped into batches of like length, each at most ``tokens`` tokens with padding (at least one row)."""
    batches: list[list[int]] = []
    for row in sorted(range(len(ids)), key=lambda row: (len(ids[row]), row)):
        # Sorted upwards, so the newest row is the longest and sets the batch's width.
        if batches and (len(batches[-1]) + 1) * len(ids[row]) <= tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


Run = Callable[[Batch], Float[Tensor, "batch vocab"]]


@contextmanager
def shortcut(
    model: PreTrainedModel, *, start: int = 0, last: bool = True, call: nn.Module | None = None
) -> Iterator[Run]:
    """Inside, ``run(batch)`` gives the model's logits, from block ``start`` on and (``last``) of the last position.

    With ``start > 0`` each batch must carry the stream that enters that block (``ResidualCache.batch``). ``call`` is
    the module to call where it is not ``model`` itself (a distributed wrapper around it). With ``last`` the result is
    (batch, vocab), else (batch, pos, vocab). The model is as before afterwards, also after an exception.
    """
    parts = anatomy.find(model)
    handed: list[Tensor] = []
    with ExitStack() as stack:
        if last:
            if parts.head is None:
                raise SurgeryError(
                    f"{type(model).__name__} has no language-model head; expected a causal language model"
                )
            # A contiguous 2-D input to the head: a 3-D slice takes a slow matrix product, 8 x slower on a CPU.
            stack.callback(_cut(model, parts.head, lambda stream: stream[:, -1]).remove)
            head = model.get_submodule(parts.head)
            if type(head) is nn.Linear and head.weight.device.type == "cpu":
                stack.enter_context(_forward(head, partial(_few_rows, head), as_tuple=False))
            for name in _last_only(parts):
                stack.callback(_cut(model, name, lambda stream: stream[:, -1:]).remove)
        for index in range(start):
            block = model.get_submodule(parts.blocks[index].name)
            hand = _hand_on if index < start - 1 else lambda *_, **__: handed[-1]
            stack.enter_context(_forward(block, hand, parts.blocks[index].returns_tuple))

        def run(batch: Batch) -> Tensor:
            if start:
                if batch.stream is None:
                    raise SurgeryError(
                        f"a run from block {start} needs the stream entering it; use ResidualCache.batch"
                    )
                handed.append(batch.stream)
            try:
                return (call or model)(**batch.inputs(), use_cache=False).logits
            finally:
                handed.clear()

        yield run


def _few_rows(head: nn.Linear, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
    """The head's own product the other way round: for a batch of rows a CPU does it, and its gradient, 1.4 x faster."""
    logits = (head.weight @ stream.T).T
    return logits if head.bias is None else logits + head.bias


def _last_only(parts: anatomy.Anatomy) -> list[str]:
    """Modules of the last block whose input may be cut to the last position.

    Their output has one position and is added to the whole stream by broadcasting: right at the last position,
    wrong and unused elsewhere. Keys and values still see every position.
    """
    block = parts.blocks[-1]
    return [name for name in (block.attention_writer, block.mlp) if name] if block.additive else []


def _cut(model: nn.Module, name: str, cut: Callable[[Tensor], Tensor]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (cut(args[0]), *args[1:])

    return model.get_submodule(name).register_forward_pre_hook(hook)


def _hand_on(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


@contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Tensor], as_tuple: bool) -> Iterator[None]:
    """Replace ``module.forward`` on this one object, and put back what stood there."""
    had, before = "forward" in module.__dict__, module.__dict__.get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = replacement(*args, **kwargs)
        return (out,) if as_tuple else out

    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before  # type: ignore[assignment]
        else:
            del module.__dict__["forward"]


@torch.no_grad()
def why_not(model: PreTrainedModel, prefix: ResidualCache, *, rows: int = 4) -> str | None:
    """Why the shortcut from ``prefix`` must not be used with this model, or None when it may.

    Compares its log-probabilities with the plain loop's on a few prompts: largest difference 1e-3 in float32 (of
    values around -10), 0.25 in 16-bit types, whose own rounding is of that order.
    """
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "dropout is on, so the stream entering a block differs from step to step"
    sample = prefix.batch(range(min(rows, len(prefix.ids))))
    try:
        with shortcut(model, start=prefix.block) as run:
            fast = run(sample).float().log_softmax(-1)
    except Exception as error:  # an unknown architecture may break anywhere; the reason goes into the log
        return f"this architecture does not run from block {prefix.block} ({type(error).__name__}: {error})"[:200]
    plain = model(**sample.inputs(), use_cache=False).logits[:, -1].float().log_softmax(-1)
    if fast.shape != plain.shape:
        return f"this architecture gives logits of shape {tuple(fast.shape)}, expected {tuple(plain.shape)}"
    gap = (fast - plain).abs().max().item()
    bound = 1e-3 if prefix.flat.dtype == torch.float32 else 0.25
    return None if gap <= bound else f"log-probabilities differ by {gap:.2g} from the plain forward pass"
