"""Training on several terms at once, at a chosen place, against targets that the untouched model gave once."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from surgery import processes
from surgery.edits.block import Trained, names_of
from surgery.edits.equalize.passes import passes
from surgery.edits.equalize.terms import Ids, Target, Term
from surgery.edits.supervised import Lora, fit, target_names
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, batches_for, logit_budget, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.next_token import Kept
from surgery.forward.residual_cache import ResidualCache, shortcut, why_not
from surgery.forward.trees import Trees, as_batch, trees_for
from surgery.processes import mine
from surgery.progress import Advance
from surgery.training import Log, Plan


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

    def examples(self) -> list[tuple[int, int]]:
        """(term, example) of every example."""
        return [(number, example) for number, term in enumerate(self.terms) for example in range(term.count)]


def prepare(model: PreTrainedModel, terms: Sequence[Term], *, start: int = 0, step: Advance | None = None) -> Prepared:
    """Run the untouched model once: the stream entering block ``start`` (0: none is kept), and each term's targets.

    ``step`` is told of finished sequences. Raises ``SurgeryError`` for no terms, and for a sequence that stands in two
    of them, where one would move what the other holds.
    """
    return prepare_each(model, terms, [start], step=step)[start]


@torch.no_grad()
def prepare_each(
    model: PreTrainedModel, terms: Sequence[Term], starts: Sequence[int], *, step: Advance | None = None
) -> dict[int, Prepared]:
    """``prepare`` for several first blocks, by the same one pass: they share the targets, each has its stream."""
    if not terms:
        raise SurgeryError("equalize: got no terms to train on, expected at least one; add words, pairs or texts")
    _check_apart(terms)
    ids = [tuple(row) for term in terms for row in term.ids]
    first = [sum(len(term.ids) for term in terms[:number]) for number in range(len(terms))]
    bare = [number for number, term in enumerate(terms) if not term.untouched]
    targets: dict[int, Target] = {first[number] + row: () for number in bare for row in range(len(terms[number].ids))}
    plain = Prepared(tuple(terms), ids, tuple(first), (), None)
    entered = [start for start in dict.fromkeys(starts) if start]
    kept = Kept(ids, entered, model.device)
    with evaluating(model), ExitStack() as stack:
        wanted = [number for number in range(len(terms)) if number not in bare or entered]
        batches = mine([(number, some) for number in wanted for some in _together(model, terms[number])])
        if batches:  # what is looked at must come by
            kept.attach(model, stack)
        for number, some in batches:
            term = terms[number]
            if isinstance(some, Trees):
                kept.expect(some, first[number])
                with shortcut(model) as run:
                    found = term.target(run(some))
                chosen = list(some.rows)
            else:
                chosen = some
                kept.expect(pad(term.ids, chosen, model.device), first[number])
                found = term.target(_logits(model, model, plain, [(number, row) for row in chosen]))
            pieces = [piece.split([len(term.places[row]) for row in chosen]) for piece in found]
            for place, row in enumerate(kept.rows):
                targets[row] = tuple(piece[place].clone() for piece in pieces)
            if step:
                step(len(chosen))
    whole = replace(plain, targets=_of_all(targets, len(ids), model.device))
    streams = kept.prefixes()
    return {start: _entering(model, whole, streams[start]) if start else whole for start in starts}


def _together(model: PreTrainedModel, term: Term) -> Iterator[list[int] | Trees]:
    """The sequences of a term in batches; those read at their last token with what they begin alike run once."""
    packed = trees_for(model, term.ids) if term.only_last else None
    if packed:
        yield from (as_batch(model, some) for some in packed)
    else:
        yield from batches_for(model, term.ids, tokens=min(2048, logit_budget(model)))


def _of_all(targets: dict[int, Target], count: int, device: torch.device) -> tuple[Target, ...]:
    """The targets of all sequences, also of those that other processes ran."""
    if processes.count() > 1:
        found = processes.gathered({row: tuple(piece.cpu() for piece in each) for row, each in targets.items()})
        targets = {row: tuple(piece.to(device) for piece in each) for part in found for row, each in part.items()}
    return tuple(targets[row] for row in range(count))


def _entering(model: PreTrainedModel, whole: Prepared, prefix: ResidualCache) -> Prepared:
    """With the stream entering its block, or with the reason why it cannot be used."""
    with evaluating(model):
        note = why_not(model, prefix) or ""
    return replace(whole, prefix=None if note else prefix, note=note)


def _check_apart(terms: Sequence[Term]) -> None:
    owner: dict[tuple[tuple[int, ...], int], tuple[str, int]] = {}
    for number, term in enumerate(terms):
        for row, (ids, places) in enumerate(zip(term.ids, term.places, strict=True)):
            for place in places:
                name, other = owner.setdefault((tuple(ids), place), (term.name, number))
                if other != number:
                    raise SurgeryError(
                        f"text {row} of {term.name!r} is also a text of {name!r}; one would move what the other "
                        "holds; take it out of one of them"
                    )


def _logits(
    model: PreTrainedModel, module: nn.Module, given: Prepared, sequences: Sequence[tuple[int, int]]
) -> Float[Tensor, "places vocab"]:
    """The logits at the places of the sequences (term, its row), in their order, from one pass of ``module``."""
    rows = [given.first[term] + row for term, row in sequences]
    places = [given.terms[term].places[row] for term, row in sequences]
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

        handle = model.get_submodule(_head(model)).register_forward_pre_hook(cut)
        try:
            return run(batch)[0]
        finally:
            handle.remove()


def _head(model: PreTrainedModel) -> str:
    head = anatomy.find(model).head
    if head is None:
        raise SurgeryError(f"{type(model).__name__} has no language-model head; open a causal language model")
    return head


def losses_of(
    model: PreTrainedModel, module: nn.Module, given: Prepared, chosen: Sequence[tuple[int, int]]
) -> Float[Tensor, " chosen"]:
    """The unweighted loss of each example (term, number), by a pass for each kind and length of text.

    Apart, short texts are not padded to the length of long ones, and prompts go through the head at one position.
    """
    found: list[Tensor] = []
    order: list[int] = []  # the places of ``chosen`` that the values in ``found`` belong to
    for members in passes(given.terms, chosen, model.device.type):
        ordered = sorted(members.items(), key=lambda member: member[1][0])  # a term's logits are one piece, not copied
        sequences = [
            (term, example * given.terms[term].size + part)
            for _, (term, example) in ordered
            for part in range(given.terms[term].size)
        ]
        logits = _logits(model, module, given, sequences)
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
    given = Prepared((term,), list(term.ids), (0,), (), None)
    sequences = [(0, row * term.size + part) for row in rows for part in range(term.size)]
    logits = _logits(model, model, given, sequences)
    return term.loss(logits, term.target(logits.detach()), [row for _, row in sequences])


def equalize(
    model: PreTrainedModel,
    terms: Sequence[Term],
    plan: Plan,
    *,
    blocks: Sequence[int] | None = None,
    part: str = "all",
    names: Sequence[str] = (),
    lora: Lora | None = None,
    seed: int,
    given: Prepared | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Trained:
    """Train ``part`` of ``blocks`` (None: all of the model), or LoRA factors there, on the weighted ``terms``.

    ``names``: these parameters, which lie in ``blocks``, instead of a part.

    ``given`` are the targets of the same terms from ``prepare``, made here otherwise. An epoch goes through every
    example of every term in one shuffled order; the loss of a step is the mean of weight * loss over its examples.
    ``differences`` are the parameters' own or, with ``lora``, factors as ``surgery.edits.supervised.fit`` gives them.
    The model is left as it was. Raises ``SurgeryError`` as ``names_of``, ``prepare`` and ``train`` do.
    """
    chosen = given or prepare(model, terms, start=min(blocks) if blocks else 0)
    names = list(names) or names_of(model, blocks, part)
    examples = chosen.examples()
    weights = torch.tensor([chosen.terms[term].weight for term, _ in examples], device=model.device)

    def losses(module: nn.Module, rows: Sequence[int]) -> dict[str, Tensor]:
        each = losses_of(model, module, chosen, [examples[row] for row in rows]) * weights[list(rows)]
        owner = torch.tensor([examples[row][0] for row in rows], device=each.device)
        return {term.name: each * (owner == number) for number, term in enumerate(chosen.terms)}

    return fit(
        model,
        losses,
        len(examples),
        plan,
        seed=seed,
        lora=inside(model, names, lora) if lora else None,
        names=None if lora else names,
        state=state,
        log=log,
        step_done=step_done,
    )


def inside(model: PreTrainedModel, names: Sequence[str], lora: Lora) -> Lora:
    """The same factors on those of its targets whose weights are among ``names``, under their full names.

    Raises ``SurgeryError`` where there is none.
    """
    targets = [name for name in target_names(model, lora.targets) if f"{name}.weight" in set(names)]
    if not targets:
        raise SurgeryError("lora: none of its targets lies in the chosen blocks; choose other blocks or targets")
    return Lora(lora.rank, lora.alpha, tuple(targets), lora.dropout)
