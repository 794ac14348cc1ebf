"""Sequences as token trees, each shared beginning once: three prompts that begin alike share a stem.

Each tree is laid into one row of the batch (a ``Pack``); a mask lets a token see its own ancestors and nothing else,
and its position is its depth, so that every token gets what it would get in its own sequence. Sorted sequences fill
packs of equal size, hence little padding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from hooks.batching import context_limit, remembered, short_rows, unhooked, why_alone
from hooks.wider import errs_more
from surgery.forward.batching import TOKENS, Batch, Ids, batches_for, sent

TREE = 512  # tokens of a tree that holds a whole step of training: no padding, but a square of attention
PACK = 128  # tokens of a tree: more means fewer repeated stems, and a larger square of attention
FEW = 8  # packs, which are filled alike rather than one after the other
SHORTEST = 32  # a model is asked once for this length, and each power of 2 times it, whether it takes such trees


@dataclass(frozen=True)
class Pack:
    """Token trees in one row. ``parents`` are indices into ``ids``, -1 at a root.

    ``rows`` are the sequences in it. Each entry of ``wanted`` is (node, next token, sequence, place): the
    log-probability of that token after that node is the one at ``place`` of the sequence.
    """

    ids: list[int]
    parents: list[int]
    depths: list[int]
    wanted: list[tuple[int, int, int, int]]
    rows: list[int]

    def ends(self) -> list[int]:
        """Where the nodes below each node end: they follow it without a gap, since equal beginnings are neighbours."""
        found = list(range(1, len(self.ids) + 1))
        for node in range(len(self.ids) - 1, -1, -1):
            parent = self.parents[node]
            if parent >= 0:
                found[parent] = max(found[parent], found[node])
        return found


def sees(batch: Sequence[Pack], width: int, device: torch.device) -> Bool[Tensor, "batch width width"]:
    """Which node (row) of each pack sees which (column): itself and its ancestors; padding sees itself."""
    at = torch.arange(width, device=device)
    ends = [pack.ends() + list(range(len(pack.ids) + 1, width + 1)) for pack in batch]
    return (at[:, None] >= at) & (at[:, None] < sent(ends, device)[:, None])


class Plan(NamedTuple):
    """The sequences of one tree, in order; how many nodes it has, and of how many (at most) a next token is asked."""

    rows: list[int]
    nodes: int
    read: int


def plans(rows: Ids, starts: Sequence[int], *, size: int = PACK, shared: bool = True) -> list[Plan]:
    """Which sequences stand in one tree of at most ``size`` nodes (a longer one has its own); if not ``shared`` only
    those that are equal but for their last token, which is never run.

    The log-probabilities of the tokens from ``starts[i]`` (at least 1) on are wanted of sequence i.
    """
    found: list[Plan] = []
    before: tuple[int, ...] = ()  # the tokens of the previous sequence, and the first of them after which is asked
    asked = 0
    keys = [tuple(row) for row in rows]
    for row in sorted(range(len(rows)), key=keys.__getitem__):
        inputs, first = keys[row][:-1], starts[row] - 1
        common = in_common(before, inputs) if found else 0
        again = common == len(inputs) == len(before)  # the same tokens, of which another next one is asked
        if not (again or (shared and found and found[-1].nodes + len(inputs) - common <= size)):
            found.append(Plan([], 0, 0))
            common = 0
        own = len(inputs) - max(common, first) + max(0, min(common, asked) - first)
        before, asked = inputs, first
        some, nodes, read = found[-1]
        some.append(row)
        found[-1] = Plan(some, nodes + len(inputs) - common, read + own)
    return found


def filled(rows: Ids, starts: Sequence[int], some: Sequence[int]) -> Pack:
    """The tree of the sequences ``some`` of a ``Plan``."""
    pack = Pack([], [], [], [], [])
    path: list[int] = []  # the nodes of the previous sequence
    before: tuple[int, ...] = ()  # and its tokens
    for row in some:
        ids = tuple(rows[row])
        inputs = ids[:-1]
        common = in_common(before, inputs)
        nodes = range(len(pack.ids), len(pack.ids) + len(inputs) - common)
        path = path[:common]
        if nodes:
            pack.parents.extend((path[-1] if path else -1, *nodes[:-1]))
        path += nodes
        before = inputs
        pack.ids.extend(inputs[common:])
        pack.depths.extend(range(common, len(inputs)))
        pack.wanted.extend((path[at - 1], ids[at], row, at - starts[row]) for at in range(starts[row], len(ids)))
        pack.rows.append(row)
    return pack


def packs(rows: Ids, starts: Sequence[int], *, size: int = PACK, shared: bool = True) -> list[Pack]:
    """The trees of all ``plans``."""
    return [filled(rows, starts, each.rows) for each in plans(rows, starts, size=size, shared=shared)]


def in_common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens both begin with."""
    if one == two:
        return len(one)
    low, high = 0, min(len(one), len(two))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == two[low:middle] else (low, middle - 1)
    return low


@dataclass(frozen=True)
class Trees(Batch):
    """Packs as a batch whose prompts are ``rows``: ``ids`` are the nodes, and ``mask`` says which may see which."""

    mask: Float[Tensor, "batch 1 pos pos"]
    depths: Int[Tensor, "batch pos"] = field(kw_only=True)
    paths: tuple[tuple[int, ...], ...] = field(kw_only=True)
    """The nodes of each prompt, first token to last, counted through the flattened batch."""

    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments for the model."""
        return {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.depths}

    def at_last(self, tensor: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "prompts *rest"]:
        """What stands at each prompt's last token."""
        return tensor.flatten(0, 1)[torch.tensor([path[-1] for path in self.paths], device=tensor.device)]

    @cached_property
    def ends(self) -> Int[Tensor, " ends"]:
        """Where prompts end in a batch of a single tree, each place once."""
        return torch.tensor(sorted({path[-1] for path in self.paths}), device=self.ids.device)

    def only_last(self, tensor: Float[Tensor, "batch pos *rest"]) -> Float[Tensor, "batch ends *rest"]:
        """The ``ends`` of a single tree; of several all places, since not as many prompts end in each."""
        return tensor.index_select(1, self.ends.to(tensor.device)) if len(self.ids) == 1 else tensor

    def placed(self, tensor: Float[Tensor, "batch ends *rest"]) -> Float[Tensor, "batch pos *rest"]:
        """What was computed of ``only_last`` in its places, with zeros elsewhere."""
        if len(self.ids) > 1:
            return tensor
        zeros = tensor.new_zeros(1, self.ids.shape[1], *tensor.shape[2:])
        return zeros.index_copy(1, self.ends.to(tensor.device), tensor)

    def places(self) -> list[tuple[int, ...]]:
        """Where the tokens of each prompt stand in the flattened batch; what is shared stands there for each."""
        return list(self.paths)


def trees_for(model: PreTrainedModel, ids: Ids, *, tokens: int = TOKENS) -> list[list[Pack]] | None:
    """All prompts in batches of packs; None where their stems are not to be shared (``why_no_trees``)."""
    if len(ids) < 2 or why_no_trees(model, max(map(len, ids))):
        return None
    most = min(PACK, context_limit(model) or PACK)
    more = [(*row, 0) for row in ids]  # the last token of a sequence is only predicted and never run
    every = _even(more, [len(row) for row in ids], most)
    groups = batches_for(model, [pack.ids for pack in every], tokens=tokens)
    return [[every[place] for place in group] for group in groups]


def most_in_one(model: PreTrainedModel, longest: int) -> int:
    """How many nodes a step's tree of prompts of up to ``longest`` tokens may have; 0 where the model takes none."""
    return 0 if why_no_trees(model, longest) else min(TREE, context_limit(model) or TREE)


def one_tree(ids: Ids, most: int) -> list[Pack] | None:
    """The prompts as a single tree of at most ``most`` nodes, or None."""
    found = packs([(*row, 0) for row in ids], [len(row) for row in ids], size=most)
    return found if len(found) == 1 and len(found[0].ids) <= most else None


def _even(rows: Ids, starts: Sequence[int], most: int) -> list[Pack]:
    """``packs`` of at most ``most`` nodes; a few of them filled alike, where a nearly empty one would be padded."""
    found = plans(rows, starts, size=most)
    if 1 < len(found) <= FEW:
        alike = -(-sum(each.nodes for each in found) // len(found))
        others = [plans(rows, starts, size=min(most, alike + more)) for more in (2, 5, 10)]
        found = min([found, *others], key=lambda every: len(every) * max(each.nodes for each in every))
    return [filled(rows, starts, each.rows) for each in found]


def as_batch(model: PreTrainedModel, batch: Sequence[Pack]) -> Trees:
    """Packs of ``trees_for`` as one batch."""
    width = max(len(pack.ids) for pack in batch)
    seen = sees(batch, width, model.device)
    closed = torch.zeros(seen.shape, dtype=model.dtype, device=model.device)
    filled = [pack.ids + [0] * (width - len(pack.ids)) for pack in batch]
    depths = [pack.depths + [0] * (width - len(pack.ids)) for pack in batch]
    rows, paths = [], []
    for place, pack in enumerate(batch):
        for node, _, row, _ in pack.wanted:
            path = [node]
            while (parent := pack.parents[path[-1]]) >= 0:
                path.append(parent)
            rows.append(row)
            paths.append(tuple(place * width + each for each in reversed(path)))
    return Trees(
        tuple(rows),
        torch.tensor(filled, device=model.device),
        closed.masked_fill(~seen, torch.finfo(model.dtype).min)[:, None],
        depths=torch.tensor(depths, device=model.device),
        paths=tuple(paths),
    )


def why_no_trees(model: PreTrainedModel, longest: int) -> str | None:
    """Why prompts of up to ``longest`` tokens are not laid into trees in this model, or None; compared once.

    Architectures where a mask cannot say who sees whom (recurrent layers, biases by distance along the row, sliding
    windows shorter than a prompt) show when a tree of such length stands beside each of its prompts alone: at their
    last tokens, and at the first behind the stem, which of a second branch stands far from it in the row.
    """
    length = SHORTEST << max(0, math.ceil(math.log2(longest / SHORTEST)))

    def find() -> str | None:
        most = min(length, context_limit(model) or length)
        stem, one, other, apart = short_rows(model, (most // 2, most - most // 2, most // 4 or 1, most // 4 or 1))
        ids = [[*stem, *one], [*stem, *other], apart, [*stem, *one[:1]]]
        asked = [sorted({min(len(stem), len(row) - 1), len(row) - 1}) for row in ids]
        with unhooked(model), torch.no_grad():

            def plain() -> Iterator[Tensor]:
                for row, at in zip(ids, asked, strict=True):
                    own = torch.tensor([row], device=model.device)
                    yield _logs(model(input_ids=own, use_cache=False).logits[0, at])

            try:
                batch = as_batch(model, packs([(*row, 0) for row in ids], [len(row) for row in ids], size=4 * most))
                logits = model(**batch.inputs(), use_cache=False).logits.flatten(0, 1)
                paths = dict(zip(batch.rows, batch.paths, strict=True))
                quick = [_logs(logits[[paths[row][place] for place in at]]) for row, at in enumerate(asked)]
            except Exception as error:  # an unknown architecture may break anywhere; each prompt is then run alone
                return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            return errs_more(quick, list(plain()), plain, model.dtype)

    if why_alone(model):
        return "rows of this model must not share a batch"
    reason: str | None = remembered(model, f"trees {length}", find)
    return reason


def _logs(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
