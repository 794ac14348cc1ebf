"""One pass over prompts or texts: next-token probabilities, token losses, and the streams kept on the way."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from hooks.activations import Reducer, capture
from hooks.block_importance import BlockImportance, BmiReducer, ranked
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, Ids, batches_for, logit_budget, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.residual_cache import ResidualCache, shortcut, usable
from surgery.forward.trees import PACK, as_batch, trees_for
from surgery.processes import count, gathered, joined, mine

Step = Callable[[int], None]


@dataclass(frozen=True)
class Watch:
    """A running statistic: its sites, what it does with (rows of the batch, site, tensor, mask), which positions."""

    sites: tuple[str, ...]
    feed: Callable[[Sequence[int], str, Tensor, Tensor], None]
    positions: Literal["last", "all"]


@dataclass(frozen=True)
class Observation:
    """What one pass over the prompts gave.

    ``probabilities`` are those of the compared words as the next token, over the full vocabulary;
    ``prefixes`` maps a block to the stream that enters it.
    """

    probabilities: Float[np.ndarray, "prompts words"]
    prefixes: dict[int, ResidualCache]


def next_words(
    model: PreTrainedModel,
    ids: Ids,
    words: Sequence[int],
    *,
    keep: Sequence[int] = (),
    prefix: ResidualCache | None = None,
    watch: Watch | None = None,
    step: Step | None = None,
    shortcuts: bool = True,
    stems: bool = True,
    seen: Callable[[Sequence[int], Float[Tensor, "batch vocab"]], None] | None = None,
) -> Observation:
    """P(word | prompt) of the token ids ``words`` as the next token, softmax over the full vocabulary.

    ``keep`` names blocks whose entering stream is kept; ``prefix`` starts from such a stream instead of from the
    tokens, where the model takes that (``residual_cache.usable``); ``watch`` is a running statistic that rides along;
    ``step`` is told of finished prompts.
    What prompts begin alike runs once, but under ``watch`` and without ``stems``: to rounding the same.
    ``shortcuts=False`` is the plain forward pass (every position through every block and the head). The model is in
    evaluation mode inside and as it was afterwards. ``seen`` is given each batch: the numbers of its prompts, and the
    log-probabilities of all tokens.

    Raises ``SurgeryError`` when a probability is not finite.
    """
    found = np.zeros((len(ids), len(words)))
    kept = Kept(ids, keep, model.device)
    with evaluating(model), ExitStack() as stack:
        prefix = usable(model, prefix, ids)
        packed = trees_for(model, ids) if shortcuts and stems and watch is None else None
        batches: list[Any] = mine(packed or batches_for(model, ids))
        run = stack.enter_context(shortcut(model, start=prefix.block if prefix else 0, last=shortcuts))
        if batches:  # what is looked at must come by
            kept.attach(model, stack)
        if watch is not None and batches:
            feed = watch.feed
            reducer: Reducer = lambda *seen: feed(kept.rows, *seen)  # noqa: E731
            stack.enter_context(capture(model, watch.sites, reducer=reducer, positions=watch.positions))
        for given in batches:
            batch = _batch(model, ids, given, prefix, packed=packed is not None)
            rows = list(batch.rows)
            kept.expect(batch)
            logits = run(batch)
            logs = (logits if shortcuts else batch.at_last(logits)).float().log_softmax(-1)
            found[rows] = logs[:, list(words)].cpu().double().exp().numpy()  # float32 has no chance below e-103
            if seen:
                seen(rows, logs)
            if step:
                step(len(rows))
    found = joined(found)
    _refuse_not_finite(found, model)
    return Observation(found, kept.prefixes())


def _batch(model: PreTrainedModel, ids: Ids, given: Any, prefix: ResidualCache | None, *, packed: bool) -> Batch:
    """The packs or the rows ``given`` as a batch, with their stream where there is one."""
    if packed:
        return prefix.trees(model, given) if prefix else as_batch(model, given)
    return prefix.batch(given) if prefix else pad(ids, given, model.device)


def _refuse_not_finite(found: Float[np.ndarray, "prompts words"], model: PreTrainedModel) -> None:
    if not np.isfinite(found).all():
        where = int(np.flatnonzero(~np.isfinite(found).all(axis=1))[0])
        raise SurgeryError(
            f"{type(model).__name__}: next-token probabilities of prompt {where} are not finite; "
            f"expected numbers in 0..1; the weights or the dtype ({model.dtype}) are broken, try float32"
        )


def token_losses(
    model: PreTrainedModel,
    ids: Ids,
    *,
    keep: Sequence[int] = (),
    prefix: ResidualCache | None = None,
    step: Step | None = None,
) -> tuple[Float[np.ndarray, " texts"], Float[np.ndarray, " texts"], dict[int, ResidualCache]]:
    """Per text: summed negative log-likelihood (nats) of its tokens after the first, and how many these are.

    ``keep``, ``prefix`` and ``step`` as in ``next_words``; the streams are of what was run. In token trees that is the
    texts without their last tokens, which are only predicted; elsewhere all of them, since in models whose tokens see
    later ones it counts.

    Raises ``SurgeryError`` for a text of a single token, which has nothing to predict.
    """
    short = [row for row, tokens in enumerate(ids) if len(tokens) < 2]
    if short:
        raise SurgeryError(f"text {short[0]} has one token; perplexity needs at least 2; remove it")
    sums, counts = np.zeros(len(ids)), np.array([len(row) - 1 for row in ids], dtype=np.float64)
    with evaluating(model), ExitStack() as stack:
        most, ahead = logit_budget(model), [row[:-1] for row in ids]
        packed = trees_for(model, ahead, tokens=most) if max(counts) <= PACK else None  # longer ones share little
        read = ahead if packed else ids
        kept = Kept(read, keep, model.device)
        prefix = usable(model, prefix, read)
        batches: list[Any] = mine(packed or batches_for(model, read, tokens=most))
        run = stack.enter_context(shortcut(model, start=prefix.block if prefix else 0, last=False))
        if batches:
            kept.attach(model, stack)
        for given in batches:
            batch = _batch(model, read, given, prefix, packed=packed is not None)
            kept.expect(batch)
            losses = _losses(run(batch).flatten(0, 1), batch, ids)
            sums += np.bincount(np.repeat(batch.rows, counts[list(batch.rows)].astype(int)), losses, len(ids))
            if step:
                step(len(batch.rows))
    return joined(sums), counts, kept.prefixes()


def _losses(logits: Float[Tensor, "nodes vocab"], batch: Batch, ids: Ids) -> Float[np.ndarray, " tokens"]:
    """The negative log-likelihood of every token but the first of the rows of ``batch``, one row after the other."""
    # A few places at a time, of which what is computed on the way stays in a CPU's cache.
    totals = torch.cat([few.float().logsumexp(-1) for few in logits.split(64)])
    at = np.concatenate([own[: len(ids[row]) - 1] for row, own in zip(batch.rows, batch.places(), strict=True)])
    tokens = np.concatenate([ids[row][1:] for row in batch.rows])
    node, token = torch.from_numpy(np.stack([at, tokens])).to(logits.device)
    return (totals[node] - logits[node, token].float()).double().cpu().numpy()


@dataclass(frozen=True)
class Located:
    """Block rankings, the streams kept on the way, and per ranking the mean variance of A.1 (5 draws of 100)."""

    importance: BlockImportance
    prefixes: dict[int, ResidualCache]
    variances: dict[str, float]


def rank_blocks(
    model: PreTrainedModel,
    ids: Ids,
    words: Sequence[int],
    *,
    positions: Literal["last", "all"] = "last",
    aggregate: Literal["mean", "sum"] = "mean",
    keep: Sequence[int] = (),
    step: Step | None = None,
) -> Located:
    """BMI of every block (LFTF Eq. 4) in the same pass that keeps streams, with its robustness (LFTF A.1).

    The paper draws 100 of the training prompts with seeds 1 to 5 and averages each block's variance (of the mean)
    over them; here the five draws are taken from the one pass.
    """
    reducer = BmiReducer.of(model, positions=positions)
    entering: list[Tensor] = []
    own: dict[tuple[str, int], list[Tensor]] = {}  # each prompt's BMI, by ranking and block, in the order of the pass
    order: list[int] = []  # the prompts of this process

    def feed(rows: Sequence[int], site: str, stream: Tensor, mask: Tensor) -> None:
        block = int(site.split(".")[1])
        if site.endswith("hook_resid_pre"):
            entering[:] = [stream if positions == "last" else stream.clone()]
            return
        each = reducer.score(block, entering.pop(), stream, mask if positions == "all" else None)
        for column, values in zip(("raw", "final_norm"), each, strict=True):
            own.setdefault((column, block), []).append(values)
        if block == 0:
            order.extend(rows)

    # The shortcut cuts the last block to the last position, where nothing else is looked at.
    watch = Watch(("blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"), feed, positions)
    seen = next_words(model, ids, words, keep=keep, watch=watch, step=step, shortcuts=positions == "last")
    tables = {name: np.zeros((len(ids), reducer.blocks)) for name in ("raw", "final_norm")}
    for (name, block), values in own.items():
        tables[name][order, block] = torch.cat(values).double().cpu().numpy()
    tables = {name: joined(table) for name, table in tables.items()}
    size = min(100, len(ids))
    draws = [np.random.default_rng(seed).choice(len(ids), size=size, replace=False) for seed in range(1, 6)]
    variances = {
        name: float(np.var([table[draw].mean(axis=0) for draw in draws], axis=0, ddof=1).mean())
        for name, table in tables.items()
    }
    lengths = np.array([[len(row) if positions == "all" else 1] for row in ids])
    sums = {name: (table, table**2, table * lengths, (table * lengths) ** 2) for name, table in tables.items()}
    columns = {name: np.stack([each.sum(0) for each in four], 1) for name, four in sums.items()}
    importance = ranked(columns, len(ids), positions, aggregate, "training prompts")
    return Located(importance, seen.prefixes, variances)


class Kept:
    """Collects the stream entering some blocks, batch by batch, into one tensor a block."""

    def __init__(self, ids: Ids, blocks: Sequence[int], device: torch.device) -> None:
        self.ids, self.device = tuple(tuple(row) for row in ids), device
        self.starts = np.cumsum([0, *map(len, self.ids)])
        self.flat: dict[str, Tensor | None] = {f"blocks.{block}.hook_resid_pre": None for block in blocks}
        self.rows: tuple[int, ...] = ()
        self.places: list[tuple[int, ...]] = []
        """Of the batch that is under way: its rows, and where their tokens stand in it."""

    def expect(self, batch: Batch, first: int = 0) -> None:
        """The next pass is of ``batch``, whose rows are counted from ``first``."""
        self.rows = tuple(first + row for row in batch.rows)
        self.places = batch.places() if self.flat else []

    def attach(self, model: PreTrainedModel, stack: ExitStack) -> None:
        """Keep what enters the blocks in the passes until ``stack`` closes."""
        if self.flat:
            stack.enter_context(capture(model, list(self.flat), reducer=self._take))

    def _take(self, site: str, stream: Tensor, mask: Tensor) -> None:
        flat = self.flat[site]
        if flat is None:
            flat = self.flat[site] = stream.new_zeros(int(self.starts[-1]) + 1, stream.shape[-1])
        here = np.concatenate(self.places)
        there = np.concatenate([self.starts[row] + np.arange(len(self.ids[row])) for row in self.rows])
        chosen, into = (torch.from_numpy(index).to(stream.device) for index in (here, there))
        flat[into] = stream.flatten(0, 1)[chosen]

    def prefixes(self) -> dict[int, ResidualCache]:
        """The streams of all prompts, also of those that other processes computed."""
        made = {}
        for site, flat in self.flat.items():
            block = int(site.split(".")[1])
            if count() > 1:
                about = gathered(None if flat is None else (flat.shape, flat.dtype))
                shape, dtype = next(each for each in about if each is not None)
                flat = joined(torch.zeros(shape, dtype=dtype, device=self.device) if flat is None else flat)
            assert flat is not None
            made[block] = ResidualCache(block, self.ids, flat)
        return made
