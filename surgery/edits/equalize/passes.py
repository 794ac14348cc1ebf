"""The logits and losses of some examples: which sequences go through the model together, and how.

On a processor every pass reads the trained weights once more, and padding costs as much as other tokens: there all
sequences of a step stand in one pass, as token trees (``surgery.forward.trees``). An accelerator takes about as long
for a few thousand tokens as for one: there the sequences of a small step stand in one padded pass. Otherwise, and for
a model that does not take trees, prompts that are read at their last token go apart from sentences, by length.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.edits.equalize.terms import Ids, Target, Term
from surgery.forward.batching import Batch, pad
from surgery.forward.last_position import head_of
from surgery.forward.residual_cache import ResidualCache, shortcut
from surgery.forward.trees import Pack, as_batch, most_in_one, one_tree, trees_for, why_no_trees

LONGER = 4.0
"""The longest sentence of a pass is at most so many times as long as its shortest."""
FEW = 8192
"""Tokens, padding included, up to which an accelerator takes a step in one pass: it costs what a smaller one does."""

Example = tuple[int, int]  # term, its example
Sequences = Sequence[tuple[int, int]]  # term, its sequence


@dataclass(frozen=True)
class Prepared:
    """All sequences of the terms, one term after the other: the targets, and the stream where training starts."""

    terms: tuple[Term, ...]
    ids: Ids
    first: tuple[int, ...]
    """The number of each term's first sequence."""
    targets: tuple[Target, ...]
    prefix: ResidualCache | None
    note: str = ""
    """Why the prefix is not used, where it could have been."""
    trees: bool = False
    """Whether the sequences of a step run as token trees."""
    accelerated: bool = False
    """Whether they run on an accelerator, where a small pass costs its launches and not its tokens."""

    def examples(self) -> list[Example]:
        """(term, example) of every example."""
        return [(number, example) for number, term in enumerate(self.terms) for example in range(term.count)]

    def part(self, terms: Sequence[Term]) -> "Prepared":
        """For ``terms`` whose sequences all stand in the term of the same name here, each with a target of its own."""
        places = {
            (term.name, tuple(row)): first + at
            for term, first in zip(self.terms, self.first, strict=True)
            for at, row in enumerate(term.ids)
        }
        rows = [places[term.name, tuple(row)] for term in terms for row in term.ids]
        first = tuple(accumulate([len(term.ids) for term in terms[:-1]], initial=0))
        ids, targets = [self.ids[row] for row in rows], tuple(self.targets[row] for row in rows)
        prefix = self.prefix.part(rows) if self.prefix else None
        return replace(self, terms=tuple(terms), ids=ids, first=first, targets=targets, prefix=prefix)


def takes_trees(model: PreTrainedModel, ids: Ids) -> bool:
    """Whether sequences such as ``ids`` should and may run as token trees (``Prepared.trees``)."""
    return model.device.type == "cpu" and why_no_trees(model, max(map(len, ids))) is None


def passes(given: Prepared, chosen: Sequence[Example]) -> list[dict[int, Example]]:
    """The examples by place in ``chosen``, those of each pass together."""
    if given.trees or _few(given, chosen):
        return [dict(enumerate(chosen))]
    last: dict[int, int] = {}
    whole: dict[int, int] = {}
    for place, (term, example) in enumerate(chosen):
        one = given.terms[term]
        rows = range(example * one.size, (example + 1) * one.size)
        only_last = all(one.places[row] == (len(one.ids[row]) - 1,) for row in rows)
        (last if only_last else whole)[place] = max(len(one.ids[row]) for row in rows)
    groups = [list(last)]
    shortest = 0
    for place in sorted(whole, key=lambda place: whole[place]):
        if not shortest or whole[place] > LONGER * shortest:
            groups.append([])
            shortest = whole[place]
        groups[-1].append(place)
    return [{place: chosen[place] for place in group} for group in groups if group]


def _few(given: Prepared, chosen: Sequence[Example]) -> bool:
    """Whether an accelerator hardly notices the padding of all these examples in one pass."""
    rows = [
        len(given.terms[term].ids[row])
        for term, example in chosen
        for row in range(example * given.terms[term].size, (example + 1) * given.terms[term].size)
    ]
    return given.accelerated and len(rows) * max(rows) <= FEW


def logits_of(
    model: PreTrainedModel, module: nn.Module, given: Prepared, sequences: Sequences
) -> Float[Tensor, "places vocab"]:
    """The logits at the places of the sequences, in their order, by calling ``module`` (the model, or a wrapper)."""
    rows = [given.first[term] + row for term, row in sequences]
    places = [given.terms[term].places[row] for term, row in sequences]
    packed = _packed(model, [given.ids[row] for row in rows]) if given.trees else None
    if packed:
        return _in_trees(model, module, given, rows, places, packed)
    batch: Batch = given.prefix.batch(rows) if given.prefix else pad(given.ids, rows, model.device)
    start = given.prefix.block if given.prefix else 0
    only_last = all(at == (len(given.ids[row]) - 1,) for at, row in zip(places, rows, strict=True))
    with shortcut(model, start=start, last=only_last, call=module) as run:
        if only_last:
            return run(batch)
        width = batch.ids.shape[1]
        flat = torch.tensor(
            [number * width + at for number, mine in enumerate(places) for at in mine], device=model.device
        )

        def cut(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            return (args[0].flatten(0, 1)[flat.to(args[0].device)][None], *args[1:])

        handle = model.get_submodule(head_of(model)).register_forward_pre_hook(cut)
        try:
            return run(batch)[0]
        finally:
            handle.remove()


def _packed(model: PreTrainedModel, ids: Ids) -> list[list[Pack]] | None:
    """A small step as one tree, of whose last block only what is read runs; otherwise in batches of packs, or None."""
    tree = one_tree(ids, most_in_one(model, max(map(len, ids))))
    return [tree] if tree else trees_for(model, ids)


def _in_trees(
    model: PreTrainedModel,
    module: nn.Module,
    given: Prepared,
    rows: Sequence[int],
    places: Sequence[Sequence[int]],
    packed: Sequence[Sequence[Pack]],
) -> Float[Tensor, "places vocab"]:
    """As ``logits_of``, of the sequences ``rows`` as token trees: each place is the end of a path of its own."""
    found, order = [], []
    with shortcut(model, start=given.prefix.block if given.prefix else 0, call=module) as run:
        for some in packed:
            batch = given.prefix.trees(model, some, rows) if given.prefix else as_batch(model, some)
            paths = dict(zip(batch.rows, batch.paths, strict=True))
            read = [(number, at) for number in sorted(paths) for at in places[number]]
            found.append(run(replace(batch, paths=tuple(paths[number][: at + 1] for number, at in read))))
            order += read
    if len(found) == 1:
        return found[0]
    back = sorted(range(len(order)), key=lambda place: order[place])
    return torch.cat(found)[torch.tensor(back, device=found[0].device)]


def losses_of(
    model: PreTrainedModel, module: nn.Module, given: Prepared, chosen: Sequence[Example]
) -> Float[Tensor, " chosen"]:
    """The unweighted loss of each example, by as few passes as ``passes`` finds."""
    found: list[Tensor] = []
    order: list[int] = []  # the places of ``chosen`` that the values in ``found`` belong to
    for members in passes(given, chosen):
        ordered = sorted(members.items(), key=lambda member: member[1][0])  # a term's logits are one piece, not copied
        sequences = [
            (term, example * given.terms[term].size + part)
            for _, (term, example) in ordered
            for part in range(given.terms[term].size)
        ]
        logits = logits_of(model, module, given, sequences)
        by_term: dict[int, list[int]] = {}
        for term, row in sequences:
            by_term.setdefault(term, []).append(row)
        widths = [sum(len(given.terms[term].places[row]) for row in rows) for term, rows in by_term.items()]
        # Split, since the gradient of every slice would be as large as all logits together.
        for (term, rows), piece in zip(by_term.items(), logits.split(widths), strict=True):
            kept = [given.targets[given.first[term] + row] for row in rows]
            target = tuple(torch.cat(pieces) for pieces in zip(*kept, strict=True))
            found.append(given.terms[term].loss(piece, target, rows))
            order += [place for place, (number, _) in ordered if number == term]
    back = torch.tensor(order, device=model.device).argsort()
    return torch.cat(found)[back]


def losses_untouched(model: PreTrainedModel, term: Term, rows: Sequence[int]) -> Float[Tensor, " rows"]:
    """The loss of some examples of ``term`` while ``model`` is untouched: their targets come from the same pass.

    Only the gradient says something: where training starts, and which way it goes.
    """
    given = Prepared((term,), list(term.ids), (0,), (), None, trees=takes_trees(model, term.ids))
    sequences = [(0, row * term.size + part) for row in rows for part in range(term.size)]
    logits = logits_of(model, model, given, sequences)
    return term.loss(logits, term.target(logits.detach()), [row for _, row in sequences])
