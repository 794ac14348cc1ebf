"""Block Mitigating Importance (LFTF Eq. 4): how far each block turns the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from hooks.anatomy import Stack, find
from hooks.display import Readable
from hooks.errors import HookError
from hooks.forward_pass import last_token
from hooks.ranking import Ranking
from hooks.remote import anywhere
from hooks.streaming import Progress, Text, stream

Positions = Literal["last", "all"]
Aggregate = Literal["mean", "sum"]


@dataclass(frozen=True, repr=False)
class BlockImportance(Readable):
    """BMI by two conventions that differ in the last block only.

    raw: both streams as hooks see them. final_norm: the stream leaving the last block after the model's final
    norm, as in the last entry of transformers' `output_hidden_states` and so probably in the paper; the norm
    alone can make the last block rank first. A model without final norm has the same scores in both.
    """

    raw: Ranking
    final_norm: Ranking

    def table(self) -> str:
        """Plain text: each block with score and rank by both conventions."""
        ranks = [{block: rank for rank, block in enumerate(r.order(), 1)} for r in (self.raw, self.final_norm)]
        lines = [f"BMI, {self.raw.data}, n = {self.raw.count}", "block     raw  rank   final_norm  rank"]
        for block in range(len(self.raw.scores)):
            raw, norm = self.raw.scores[block], self.final_norm.scores[block]
            lines.append(f"{block:>5} {raw:>7.4f} {ranks[0][block]:>5} {norm:>12.4f} {ranks[1][block]:>5}")
        last = len(self.raw.scores) - 1
        if self.raw.top() != self.final_norm.top():
            lines.append(
                f"block {last} ranks {ranks[1][last]} only after the final norm; in the stream itself {ranks[0][last]}"
            )
        return "\n".join(lines)


class BmiReducer:
    """Running BMI of every block, fed during any forward pass; holds four numbers a block, whatever the data.

        reducer = BmiReducer.of(model)
        reducer.update(block, stream_in, stream_out, mask)  # for each block of each batch
        reducer.result(data="my prompts")                   # -> BlockImportance

    blocks: how many; positions: "last" takes the last real token of each prompt, "all" every real token;
    final_norm: the model's norm, for the second column (None where there is none).
    """

    def __init__(
        self,
        blocks: int,
        *,
        positions: Positions = "last",
        final_norm: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        if positions not in ("last", "all"):
            raise HookError(f"positions is {positions!r}; expected 'last' or 'all'")
        self.blocks, self.positions, self._norm = blocks, positions, final_norm
        self._sums: dict[int, Float[Tensor, 4]] = {}  # of prompt means, their squares, prompt sums, their squares
        self._counts: dict[int, int] = {}

    @classmethod
    def of(cls, model: nn.Module, *, positions: Positions = "last") -> BmiReducer:
        """A reducer for the stack that reads the prompt: the only one, or the encoder of T5 and BART."""
        stack = find(model).stacks[0]
        return cls(len(stack.blocks), positions=positions, final_norm=_norm(model, stack))

    def update(
        self,
        block: int,
        stream_in: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch d_model"],
        stream_out: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> None:
        """Add one batch of one block. Streams without `pos` are taken as the last tokens; without mask all count.

        Raises HookError for a block that does not exist, other shapes, and a row without a real token.
        """
        self.score(block, stream_in, stream_out, mask)  # returns nothing: a hook that returns replaces the output

    def score(
        self,
        block: int,
        stream_in: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch d_model"],
        stream_out: Float[Tensor, "batch pos d_model"] | Float[Tensor, "batch d_model"],
        mask: Bool[Tensor, "batch pos"] | None = None,
    ) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """As `update`, and gives each prompt's own BMI (the mean over its positions), raw and final_norm."""
        if not 0 <= block < self.blocks:
            raise HookError(f"BMI: block is {block}; expected 0 to {self.blocks - 1}")
        if stream_in.shape != stream_out.shape or stream_in.ndim not in (2, 3):
            raise HookError(
                f"BMI, block {block}: streams of shape {tuple(stream_in.shape)} and "
                f"{tuple(stream_out.shape)}; "
                "expected the same (batch, pos, d_model) twice"
            )
        # a model spread over devices may hand a block its input from the device before
        stream_in, stream_out = stream_in.detach().to(stream_out.device), stream_out.detach()
        if stream_in.ndim == 2:
            if self.positions == "all":
                raise HookError(f"BMI, block {block}: streams without positions, but positions='all' was asked for")
            mask = None  # nothing to search for, which on a GPU would wait for all the work before
        else:
            if mask is None:
                mask = torch.ones(stream_in.shape[:2], dtype=torch.bool, device=stream_in.device)
            mask = mask.to(stream_in.device).bool()
            if self.positions == "last":
                rows, last = torch.arange(len(mask), device=mask.device), last_token(mask)
                stream_in, stream_out, mask = stream_in[rows, last], stream_out[rows, last], None
        raw = self._add(block, stream_in, stream_out, mask)
        if block < self.blocks - 1 or self._norm is None:
            return raw, raw
        with torch.no_grad():
            normed = self._norm(stream_out)
        return raw, self._add(self.blocks, stream_in, normed.to(stream_in.device), mask)

    def _add(self, row: int, entering: Tensor, leaving: Tensor, mask: Tensor | None) -> Float[Tensor, " batch"]:
        # LFTF Eq. 4: 1 - cos(H_i, H_i+1), in float32 whatever the model computes in
        turn = 1.0 - torch.cosine_similarity(entering.float(), leaving.float(), dim=-1)
        turn = turn.to(torch.float32 if turn.device.type == "mps" else torch.float64)
        total = turn if mask is None else turn.masked_fill(~mask, 0.0).sum(1)
        mean = total if mask is None else total / mask.sum(1)
        sums = torch.stack([mean.sum(), mean.square().sum(), total.sum(), total.square().sum()])
        self._sums[row] = self._sums[row] + sums if row in self._sums else sums
        self._counts[row] = self._counts.get(row, 0) + len(total)
        return mean

    def result(self, *, aggregate: Aggregate = "mean", data: str = "prompts") -> BlockImportance:
        """The ranking so far. aggregate: "mean" over prompts of the mean over their positions, or "sum" over
        both.

        Errors are standard errors over prompts (of the mean, or of the sum), None for a single prompt.
        Raises HookError if nothing was fed, some block was fed less often than the others, or a score is NaN.
        """
        counts = {self._counts.get(block, 0) for block in range(self.blocks)}
        if len(counts) != 1 or counts == {0}:
            raise HookError(f"BMI: the blocks were fed {sorted(counts)} prompts; expected the same number each, not 0")
        count = counts.pop()
        last = self.blocks if self._norm is not None else self.blocks - 1
        rows = [self._sums[row].double().cpu().numpy() for row in range(self.blocks)]
        columns = {"raw": np.array(rows), "final_norm": np.array([*rows[:-1], self._sums[last].double().cpu().numpy()])}
        return ranked(columns, count, self.positions, aggregate, data)


def ranked(
    columns: dict[str, Float[np.ndarray, "blocks 4"]], count: int, positions: Positions, aggregate: Aggregate, data: str
) -> BlockImportance:
    """The rankings of both `columns`: of each block the sums over prompts of means over tokens, their squares, sums
    over tokens, and their squares. Raises HookError for an unknown `aggregate` and a sum that is not finite."""
    if aggregate not in ("mean", "sum"):
        raise HookError(f"aggregate is {aggregate!r}; expected 'mean' or 'sum'")
    rankings = {}
    for name, table in columns.items():
        broken = np.flatnonzero(~np.isfinite(table).all(1))
        if broken.size:
            raise HookError(
                f"BMI ({name}): the stream of block {broken[0]} holds NaN or infinite values; "
                "try float32, or get the weights again"
            )
        total, squares = (table[:, 0], table[:, 1]) if aggregate == "mean" else (table[:, 2], table[:, 3])
        scores = total / count if aggregate == "mean" else total
        errors = None
        if count > 1:
            deviation = np.sqrt(np.maximum(squares - total**2 / count, 0.0) / (count - 1))
            errors = deviation / count**0.5 if aggregate == "mean" else deviation * count**0.5
        settings = {"positions": positions, "aggregate": aggregate, "stream": name}
        rankings[name] = Ranking("bmi", "block", scores, data, count, errors, settings=settings)
    return BlockImportance(**rankings)


@anywhere
def bmi(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    positions: Positions = "last",
    aggregate: Aggregate = "mean",
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> BlockImportance:
    """Block Mitigating Importance of every block over `prompts` (LFTF Eq. 4; the paper leaves both options
    open).

    prompts: texts or token ids. positions: the last prompt token, or all. aggregate: mean or sum over
    prompts (and positions). One pass without logits and KV cache, in flat memory; the model is left as it
    was. Of T5 and BART the encoder is ranked, which reads the prompt.

    Raises HookError for no prompts, an empty prompt, and NaN activations (naming the first site).
    """
    stack = find(model).stacks[0]
    reducer = BmiReducer.of(model, positions=positions)
    number = {block.site: i for i, block in enumerate(stack.blocks)}
    entering: list[Tensor] = []

    def pair(site: str, tensor: Tensor, mask: Tensor) -> None:
        block, _, name = site.rpartition(".")
        if name == "hook_resid_pre":
            entering[:] = [tensor if positions == "last" else tensor.clone()]
        else:
            reducer.update(number[block], entering.pop(), tensor, mask)

    wanted = [f"{stack.prefix}.*.hook_resid_pre", f"{stack.prefix}.*.hook_resid_post"]
    stream(
        model,
        tokenizer,
        prompts,
        [(wanted, pair)],
        positions=positions,
        batch_tokens=batch_tokens,
        progress=progress,
    )
    return reducer.result(aggregate=aggregate, data=data)


def _norm(model: nn.Module, stack: Stack) -> Callable[[Tensor], Tensor] | None:
    # forward and not __call__: the norm is applied beside the model's own pass, whose hooks must not see it
    return None if stack.final_norm is None else model.get_submodule(stack.final_norm).forward


@dataclass(frozen=True, repr=False)
class Robustness(Readable):
    """LFTF A.1: variance of each block's BMI between random subsets, averaged over blocks (Table 7)."""

    raw: float
    final_norm: float
    runs: tuple[BlockImportance, ...]  # one a seed

    def tops(self) -> list[int]:
        """The block that each seed's raw ranking puts first."""
        return [run.raw.top()[0] for run in self.runs]


@anywhere
def robustness(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Text],
    *,
    seeds: int | Sequence[int] = 5,
    size: int = 100,
    positions: Positions = "last",
    aggregate: Aggregate = "mean",
    batch_tokens: int = 4096,
    data: str = "prompts",
) -> Robustness:
    """Stability of BMI over `size` prompts drawn without replacement, once a seed (5 stands for 1, 2, 3, 4,
    5).

    Variances are unbiased (n - 1). Raises HookError for fewer than two seeds or fewer than `size` prompts.
    """
    chosen = list(range(1, seeds + 1)) if isinstance(seeds, int) else list(seeds)
    if len(chosen) < 2 or size < 1 or size > len(prompts):
        raise HookError(
            f"robustness: {len(chosen)} seeds x {size} prompts of {len(prompts)}; expected at least 2 "
            f"seeds and a size from 1 to {len(prompts)}"
        )
    runs = []
    for seed in chosen:
        places = np.random.default_rng(seed).choice(len(prompts), size=size, replace=False)
        subset = [prompts[int(i)] for i in places]
        runs.append(
            bmi(
                model,
                tokenizer,
                subset,
                positions=positions,
                aggregate=aggregate,
                batch_tokens=batch_tokens,
                data=f"{data}, {size} drawn with seed {seed}",
            )
        )
    spread = {
        name: float(np.var([getattr(run, name).scores for run in runs], axis=0, ddof=1).mean())
        for name in ("raw", "final_norm")
    }
    return Robustness(spread["raw"], spread["final_norm"], tuple(runs))
