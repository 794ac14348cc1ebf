"""Prompts through a model at the price of what is asked: the last position only, from the first changed block on.

Blocks before the first edited one never change, so the stream that enters it is computed once per prompt (a
``ResidualCache``) and every training step and every measurement after the edit starts there. When only the next token
is asked, the last block needs its queries, its MLP and the head at one position only.

Nothing of a block is rewritten: the model's own forward pass runs, with the blocks before the start handing their
input through, and with three inputs cut to the last position. ``why_not`` and ``why_no_cut`` compare both ways with
the plain pass of each prompt alone.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from hooks import trace_modules as probe
from hooks.activations import capture
from hooks.batching import remembered, short_rows, unhooked, why_alone
from hooks.errors import Note
from hooks.logit_difference import forward_as
from hooks.wider import errs_more
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, batches_for, pad
from surgery.forward.precision import matrix_products
from surgery.forward.trees import Pack, Trees, as_batch


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
            list(range(starts[row], starts[row] + len(self.ids[row]))) + [zero] * (width - len(self.ids[row]))
            for row in rows
        ]
        gathered = self.flat[torch.tensor(index, device=self.flat.device)]
        return Batch(plain.rows, plain.ids, plain.mask, gathered)

    def trees(self, model: PreTrainedModel, packed: Sequence[Pack], numbers: Sequence[int] | None = None) -> Trees:
        """Packs of these prompts, or of those ``numbers`` of them, (``trees_for``) as a batch with their stream."""
        plain = as_batch(model, packed)
        starts = np.cumsum([0, *map(len, self.ids)])
        index = np.full(plain.ids.numel(), self.flat.shape[0] - 1)
        for row, path in zip(plain.rows, plain.paths, strict=True):
            first = starts[row if numbers is None else numbers[row]]
            index[list(path)] = np.arange(first, first + len(path))
        gathered = self.flat[torch.from_numpy(index).to(self.flat.device)]
        return replace(plain, stream=gathered.view(*plain.ids.shape, -1))


Run = Callable[[Batch], Float[Tensor, "batch vocab"]]


@contextmanager
def shortcut(
    model: PreTrainedModel,
    *,
    start: int = 0,
    last: bool = True,
    call: nn.Module | None = None,
    _trusted: bool = False,
) -> Iterator[Run]:
    """Inside, ``run(batch)`` gives the model's logits, from block ``start`` on and (``last``) of the last position.

    With ``start > 0`` each batch must carry the stream that enters that block (``ResidualCache.batch``). ``call`` is
    the module to call where it is not ``model`` itself (a distributed wrapper around it). With ``last`` the result is
    (batch, vocab), else (batch, pos, vocab); where a model does not take the cut (``why_no_cut``), every position is
    computed and the last one picked. The model is as before afterwards, also after an exception.
    """
    handed: list[Tensor] = []
    running: list[Batch] = []
    why_alone(model)  # found out before anything of the model is changed
    with ExitStack() as stack:
        cut = last and (_trusted or why_no_cut(model) is None)
        if cut:
            _cut_to_last(model, running, stack)
        parts = anatomy.find(model) if start else None
        for index in range(start):
            assert parts is not None
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
            running.append(batch)
            try:
                found = (call or model)(**batch.inputs(), use_cache=False)
                if not hasattr(found, "logits"):
                    raise headless(model)
                logits: Tensor = found.logits
                logits = batch.at_last(logits) if last and not cut else logits
                return logits.to(batch.ids.device)  # from another one where a model is spread over several
            finally:
                handed.clear()
                running.clear()

        yield run


def headless(model: nn.Module) -> SurgeryError:
    """What is said of a model that gives no next word."""
    said = f"{type(model).__name__} has no language-model head, so it gives no next word"
    return SurgeryError(f"{said}; expected a causal language model")


def head_of(model: PreTrainedModel) -> str:
    """The name of the module that gives the logits. Raises ``SurgeryError`` where there is none."""
    head = anatomy.find(model).head
    if head is None:
        raise headless(model)
    return head


def _cut_to_last(model: PreTrainedModel, running: list[Batch], stack: ExitStack) -> None:
    """Until ``stack`` closes, the last block's writers and the head see each prompt's last position only."""
    parts, head_name = anatomy.find(model), head_of(model)
    # A contiguous 2-D input to the head: a 3-D slice takes a slow matrix product, 8 x slower on a CPU.
    stack.callback(_cut(model, head_name, lambda stream: running[-1].at_last(stream)).remove)
    head = model.get_submodule(head_name)
    if type(head) is nn.Linear and head.weight.device.type == "cpu":
        stack.enter_context(_forward(head, partial(_few_rows, head), as_tuple=False))
    for name in _last_only(parts):
        stack.callback(_cut(model, name, lambda stream: running[-1].only_last(stream)).remove)


def why_no_cut(model: PreTrainedModel) -> str | None:
    """Why the last position must not be computed alone in this model, or None; compared once with rows alone."""

    def find() -> str | None:
        ids = short_rows(model)

        def plain() -> Iterator[Tensor]:
            for row in ids:
                own = torch.tensor([row], device=model.device)
                yield _logs(model(input_ids=own, use_cache=False).logits[:, -1])

        with probe.unchanged(model), unhooked(model):
            try:
                with shortcut(model, _trusted=True) as run:
                    groups = batches_for(model, ids)
                    quick = {
                        rows[n]: logs
                        for rows in groups
                        for n, logs in enumerate(_logs(run(pad(ids, rows, model.device))))
                    }
            except Exception as error:  # an unknown architecture may break anywhere; the plain pass is taken
                return f"{type(error).__name__}: {error}"[:200]
            return errs_more([quick[row][None] for row in range(len(ids))], list(plain()), plain, model.dtype)

    found: str | None = remembered(model, "cut", find)
    return found


def _logs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _few_rows(head: nn.Linear, stream: Float[Tensor, "batch d_model"]) -> Float[Tensor, "batch vocab"]:
    """The head's own product the other way round: for a batch of rows a CPU does it, and its gradient, 1.4 x faster.

    With the few rows laid out as columns it takes a fifth less again.
    """
    logits = (head.weight @ stream.T.contiguous()).T
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

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = replacement(*args, **kwargs)
        return (out,) if as_tuple else out

    with forward_as(module, forward):
        yield


def usable(model: PreTrainedModel, prefix: ResidualCache | None) -> ResidualCache | None:
    """``prefix``, or None where this model must not run from it (``why_not``): found out once for each block, and said.

    What a block is given beside the stream (states, values of the first block, embeddings by layer) is lost on the way.
    """
    if prefix is None:
        return None
    exact = torch.get_float32_matmul_precision() == "highest"

    def find() -> str | None:
        reason = why_not(model, prefix, exact=exact)
        if reason:
            warnings.warn(f"{type(model).__name__}: is measured from its first block on: {reason}", Note, 2)
        return reason

    return prefix if remembered(model, f"from block {prefix.block}", find) is None else None


@torch.no_grad()
def why_not(model: PreTrainedModel, prefix: ResidualCache, *, rows: int = 4, exact: bool | None = None) -> str | None:
    """Why the shortcut from ``prefix`` must not be used with this model, or None when it may.

    Compares its log-probabilities with the plain pass over a few of the prompts, each alone: they may err no more
    than the plain pass in the model's own dtype does (``hooks.wider.errs_more``). ``exact``: whether the stream was
    kept with exact matrix products; by default whether they are now.
    """
    if model.training and any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        return "dropout is on, so the stream entering a block differs from step to step"
    ids = prefix.ids[:rows]
    exact = torch.get_float32_matmul_precision() == "highest"

    def plain() -> Iterator[Tensor]:
        for row in ids:
            own = torch.tensor([row], device=model.device)
            yield _logs(model(input_ids=own, use_cache=False).logits[:, -1])

    groups = batches_for(model, ids)
    with matrix_products("highest"):  # whether it is the same computation, whatever a caller lets products round to
        try:
            kept = prefix if exact else _entering(model, ids, prefix.block)
            with shortcut(model, start=prefix.block) as run:
                fast = [_logs(run(kept.batch(group))) for group in groups]
        except Exception as error:  # an unknown architecture may break anywhere; the reason goes into the log
            return f"this architecture does not run from block {prefix.block} ({type(error).__name__}: {error})"[:200]
        quick = dict(zip([row for group in groups for row in group], torch.cat(fast), strict=True))
        reason = errs_more([quick[row][None] for row in range(len(ids))], list(plain()), plain, model.dtype)
    return None if reason is None else f"log-probabilities differ from the plain forward pass: {reason}"


def _entering(model: PreTrainedModel, ids: Sequence[tuple[int, ...]], block: int) -> ResidualCache:
    """The stream that enters ``block``, of each prompt alone."""
    site, pieces = f"blocks.{block}.hook_resid_pre", []
    for row in ids:
        with capture(model, [site]) as seen:
            model(input_ids=torch.tensor([row], device=model.device), use_cache=False)
        pieces.append(seen[site][0])
    return ResidualCache(block, tuple(ids), torch.cat([*pieces, torch.zeros_like(pieces[0][:1])]))
