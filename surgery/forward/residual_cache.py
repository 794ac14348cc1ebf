"""Prompts through a model at the price of what is asked: the last position only, from the first changed block on.

Blocks before the first edited one never change, so the stream that enters it is computed once per prompt (a
``ResidualCache``) and every training step and every measurement after the edit starts there. When only the next token
is asked, the last block needs its queries, its MLP and the head at one position only.

Nothing of a block is rewritten: the model's own forward pass runs, with the blocks before the start handing their
input through, and with a few inputs cut to the last position. ``why_not`` and ``why_no_cut`` compare both ways with
the plain pass of each prompt alone.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import accumulate
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
from hooks.wider import errs_more
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, Ids, batches_for, pad
from surgery.forward.last_position import cut_to_last, headless, replaced
from surgery.forward.precision import matrix_products
from surgery.forward.trees import Pack, Trees, as_batch, most_in_one, one_tree
from surgery.forward.word_logs import word_logs


@dataclass(frozen=True)
class ResidualCache:
    """The residual stream entering ``block`` for each prompt, without padding, in the model's compute dtype.

    ``flat`` holds all tokens of all prompts, one after the other, and a row of zeros at the end for padding.
    """

    block: int
    ids: tuple[tuple[int, ...], ...]
    flat: Float[Tensor, "tokens+1 d_model"]

    @cached_property
    def starts(self) -> list[int]:
        """Where each prompt begins in ``flat``, and where the last one ends."""
        return [0, *accumulate(map(len, self.ids))]

    def refuse_others(self, ids: Ids) -> None:
        """Raises ``SurgeryError`` where this is of other prompts than ``ids``, to which its numbers would be taken."""
        if self.ids != tuple(map(tuple, ids)):
            raise SurgeryError(
                f"prefix: the stream entering block {self.block} is of {len(self.ids)} texts, not of the {len(ids)} "
                "that are asked; keep it of these, in their order"
            )

    def part(self, rows: Sequence[int]) -> "ResidualCache":
        """The same of the prompts ``rows`` alone."""
        index = [at for row in rows for at in range(self.starts[row], self.starts[row + 1])] + [len(self.flat) - 1]
        flat = self.flat[torch.tensor(index, device=self.flat.device)]
        return ResidualCache(self.block, tuple(self.ids[row] for row in rows), flat)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The prompts ``rows`` as a batch with their stream."""
        plain = pad(self.ids, rows, self.flat.device)
        width = plain.ids.shape[1]
        zero = self.flat.shape[0] - 1
        index = [
            [*range(self.starts[row], self.starts[row + 1])] + [zero] * (width - len(self.ids[row])) for row in rows
        ]
        gathered = self.flat[torch.tensor(index, device=self.flat.device)]
        return Batch(plain.rows, plain.ids, plain.mask, gathered)

    def steps(self, model: PreTrainedModel) -> Callable[[Sequence[int]], Batch]:
        """What gives some of the prompts for a step of training: as one tree where that is small, else as a batch.

        To be called while the model is as it was: whether it takes trees is found out by running it.
        """
        most = most_in_one(model, max(map(len, self.ids)))

        def step(rows: Sequence[int]) -> Batch:
            tree = one_tree([self.ids[row] for row in rows], most)
            return self.trees(model, tree, rows) if tree else self.batch(rows)

        return step

    def trees(self, model: PreTrainedModel, packed: Sequence[Pack], numbers: Sequence[int] | None = None) -> Trees:
        """Packs of these prompts, or of those ``numbers`` of them, (``trees_for``) as a batch with their stream."""
        plain = as_batch(model, packed)
        index = np.full(plain.ids.numel(), self.flat.shape[0] - 1)
        for row, path in zip(plain.rows, plain.paths, strict=True):
            first = self.starts[row if numbers is None else numbers[row]]
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
    words: Sequence[int] | None = None,
    _depth: int | None = None,
) -> Iterator[Run]:
    """Inside, ``run(batch)`` gives the model's logits, from block ``start`` on and (``last``) of the last position.

    With ``words`` (and ``last``) it gives the log-probabilities of these instead, (batch, words), which on a CPU takes
    half of the head's time where the head does not train.

    With ``start > 0`` each batch must carry the stream that enters that block (``ResidualCache.batch``). ``call`` is
    the module to call where it is not ``model`` itself (a distributed wrapper around it). With ``last`` the result is
    (batch, vocab), else (batch, pos, vocab); where a model does not take the cut (``why_no_cut``), every position is
    computed and the last one picked. The model is as before afterwards, also after an exception.
    """
    handed: list[Tensor] = []
    running: list[Batch] = []
    why_alone(model)  # found out before anything of the model is changed
    with ExitStack() as stack:
        depth = 0 if not last else cut_depth(model) if _depth is None else _depth
        cut = depth > 0
        done = cut and cut_to_last(model, running, stack, depth, words)
        parts = anatomy.find(model) if start else None
        for index in range(start):
            assert parts is not None
            block = model.get_submodule(parts.blocks[index].name)
            hand = _hand_on if index < start - 1 else lambda *_, **__: handed[-1]
            stack.enter_context(replaced(block, hand, parts.blocks[index].returns_tuple))

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
                logits = logits.to(batch.ids.device)  # from another one where a model is spread over several
                return logits if done or words is None else word_logs(logits, words)
            finally:
                handed.clear()
                running.clear()

        yield run


def cut_depth(model: PreTrainedModel) -> int:
    """How much of the last block is computed at the last position alone (``last_position.cut_to_last``)."""
    return _cutting(model)[0]


def why_no_cut(model: PreTrainedModel) -> str | None:
    """Why the last position must not be computed alone in this model, or None; compared once with rows alone."""
    return _cutting(model)[1]


def _cutting(model: PreTrainedModel) -> tuple[int, str | None]:
    """How deep to cut (``cut_to_last``; 0: not at all), and why nothing may be cut."""
    ids = short_rows(model)
    tree = one_tree(ids, most_in_one(model, max(map(len, ids))))
    plain = cache(lambda: list(_plain(model, ids)))  # only where a quick pass has run, and once for all of them

    def compared(depth: int) -> str | None:
        try:
            with shortcut(model, _depth=depth) as run:
                groups = batches_for(model, ids)
                checked = [(groups, [_logs(run(pad(ids, rows, model.device))) for rows in groups])]
                if tree:
                    batch = as_batch(model, tree)
                    checked.append(([list(batch.rows)], [_logs(run(batch))]))
        except Exception as error:  # an unknown architecture may break anywhere; the plain pass is taken
            return f"{type(error).__name__}: {error}"[:200]
        return next((reason for each in checked if (reason := _departs(model, ids, *each, plain()))), None)

    def find() -> tuple[int, str | None]:
        reason = None
        with probe.unchanged(model), unhooked(model):
            for depth in (3, 2, 1):
                reason = compared(depth)
                if reason is None:
                    return depth, None
        return 0, reason

    found: tuple[int, str | None] = remembered(model, "cut", find)
    return found


def _logs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)


def _hand_on(*args: Any, **kwargs: Any) -> Tensor:
    return args[0] if args else kwargs["hidden_states"]


def usable(model: PreTrainedModel, prefix: ResidualCache | None, ids: Ids) -> ResidualCache | None:
    """``prefix``, or None where this model must not run from it (``why_not``): found out once for each block, and said.

    What a block is given beside the stream (states, values of the first block, embeddings by layer) is lost on the way.

    Raises ``SurgeryError`` for a stream of other texts than ``ids``.
    """
    if prefix is None:
        return None
    prefix.refuse_others(ids)
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
    exact = torch.get_float32_matmul_precision() == "highest" if exact is None else exact

    groups = batches_for(model, ids)
    with matrix_products("highest"):  # whether it is the same computation, whatever a caller lets products round to
        try:
            plain, flat = _with_stream(model, ids, prefix.block)
            kept = prefix if exact else ResidualCache(prefix.block, tuple(ids), flat)
            with shortcut(model, start=prefix.block) as run:
                fast = [_logs(run(kept.batch(group))) for group in groups]
        except Exception as error:  # an unknown architecture may break anywhere; the reason goes into the log
            return f"this architecture does not run from block {prefix.block} ({type(error).__name__}: {error})"[:200]
        reason = _departs(model, ids, groups, fast, plain)
    return None if reason is None else f"log-probabilities differ from the plain forward pass: {reason}"


def _departs(
    model: PreTrainedModel,
    ids: Ids,
    groups: Sequence[Sequence[int]],
    logs: Sequence[Tensor],
    plain: Sequence[Tensor],
) -> str | None:
    """By how much the quick passes' ``logs`` of ``groups`` of prompts err more than the ``plain`` pass of each."""
    quick = dict(zip([row for group in groups for row in group], torch.cat(list(logs)), strict=True))
    return errs_more([quick[row][None] for row in range(len(ids))], plain, lambda: _plain(model, ids), model.dtype)


def _plain(model: PreTrainedModel, ids: Ids) -> Iterator[Tensor]:
    """The log-probabilities after each prompt, run alone."""
    for row in ids:
        own = torch.tensor([row], device=model.device)
        yield _logs(model(input_ids=own, use_cache=False).logits[:, -1])


def _with_stream(
    model: PreTrainedModel, ids: Ids, block: int
) -> tuple[list[Tensor], Float[Tensor, "tokens+1 d_model"]]:
    """``_plain``, and the stream that enters ``block`` in the same passes, as a ``ResidualCache`` holds it."""
    site = f"blocks.{block}.hook_resid_pre"
    plain: list[Tensor] = []
    pieces: list[Tensor] = []
    for row in ids:
        with capture(model, [site]) as seen:
            plain += _plain(model, [row])
        pieces.append(seen[site][0])
    return plain, torch.cat([*pieces, torch.zeros_like(pieces[0][:1])])
