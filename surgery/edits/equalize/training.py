"""Training on several terms at once, at a chosen place, against targets that the untouched model gave once."""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery import processes
from surgery.edits.block import Trained, names_of
from surgery.edits.equalize.passes import Prepared, logits_of, losses_of, takes_trees
from surgery.edits.equalize.terms import Target, Term
from surgery.edits.supervised import Lora, fit, target_names
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, logit_budget, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.next_token import Kept
from surgery.forward.residual_cache import ResidualCache, shortcut, why_not
from surgery.forward.trees import Trees, as_batch, in_common, trees_for, why_no_trees
from surgery.processes import mine
from surgery.progress import Advance
from surgery.training import Log, Plan


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
        batches = mine(list(_batches(model, terms, first, wanted)))
        if batches:  # what is looked at must come by
            kept.attach(model, stack)
        for batch in batches:
            if isinstance(batch, Trees):
                rows = list(batch.rows)
                kept.expect(batch)
                with shortcut(model) as run:
                    logits = run(batch)
            else:
                rows = batch
                kept.expect(pad(ids, rows, model.device))
                logits = logits_of(model, model, plain, [_owner(first, row) for row in rows])
            targets |= _targets(terms, first, rows, logits)
            if step:
                step(len(rows))
        trees = takes_trees(model, ids)
    accelerated = model.device.type != "cpu"
    of_all = _of_all(targets, len(ids), model.device)
    whole = replace(plain, targets=_as_wanted(terms, of_all), trees=trees, accelerated=accelerated)
    streams = kept.prefixes()
    return {start: _entering(model, whole, streams[start]) if start else whole for start in starts}


def _batches(
    model: PreTrainedModel, terms: Sequence[Term], first: Sequence[int], wanted: Sequence[int]
) -> Iterator[list[int] | Trees]:
    """The sequences of the ``wanted`` terms, counted through all terms, in batches.

    Of those read at their last token what they begin alike runs once, whichever term they are of; the others, and those
    of a term too long for the trees of this model, stand with those of their own term.
    """

    def fits(term: Term) -> bool:
        return term.only_last and why_no_trees(model, max(map(len, term.ids))) is None

    alike = [number for number in wanted if fits(terms[number])]
    rows = [first[number] + row for number in alike for row in range(len(terms[number].ids))]
    packed = trees_for(model, [row for number in alike for row in terms[number].ids])
    for some in packed or ():
        batch = as_batch(model, some)
        yield replace(batch, rows=tuple(rows[row] for row in batch.rows))
    for number in wanted:
        if packed is None or number not in alike:
            for each in batches_for(model, terms[number].ids, tokens=min(2048, logit_budget(model))):
                yield [first[number] + row for row in each]


def _owner(first: Sequence[int], row: int) -> tuple[int, int]:
    """The term of a sequence that is counted through all terms, and its number there."""
    number = bisect_right(first, row) - 1
    return number, row - first[number]


def _targets(
    terms: Sequence[Term], first: Sequence[int], rows: Sequence[int], logits: Float[Tensor, "places vocab"]
) -> dict[int, Target]:
    """What its term keeps of each of the sequences ``rows``, whose logits stand one after the other."""
    owners = [_owner(first, row) for row in rows]
    widths = [len(terms[number].places[row]) for number, row in owners]
    pieces = logits.split(widths)
    found: dict[int, Target] = {}
    for number in dict.fromkeys(number for number, _ in owners):
        own = [place for place, (each, _) in enumerate(owners) if each == number]
        some = logits if len(own) == len(rows) else torch.cat([pieces[place] for place in own])
        kept = [piece.split([widths[place] for place in own]) for piece in terms[number].target(some)]
        found |= {rows[place]: tuple(piece[at].clone() for piece in kept) for at, place in enumerate(own)}
    return found


def _of_all(targets: dict[int, Target], count: int, device: torch.device) -> tuple[Target, ...]:
    """The targets of all sequences, also of those that other processes ran."""
    if processes.count() > 1:
        found = processes.gathered({row: tuple(piece.cpu() for piece in each) for row, each in targets.items()})
        targets = {row: tuple(piece.to(device) for piece in each) for part in found for row, each in part.items()}
    return tuple(targets[row] for row in range(count))


def _as_wanted(terms: Sequence[Term], found: Sequence[Target]) -> tuple[Target, ...]:
    """What was kept of the sequences of each term, anew where one target depends on others."""
    whole: list[Target] = []
    for term in terms:
        own = found[len(whole) : len(whole) + len(term.ids)]
        whole += term.together(own) if term.together else own
    return tuple(whole)


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


def equalize(
    model: PreTrainedModel,
    terms: Sequence[Term],
    plan: Plan,
    *,
    blocks: Sequence[int] | None = None,
    part: str = "all",
    names: Sequence[str] = (),
    lora: Lora | None = None,
    alike: int = 1,
    seed: int,
    given: Prepared | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Trained:
    """Train ``part`` of ``blocks`` (None: all of the model), or LoRA factors there, on the weighted ``terms``.

    ``names``: these parameters, which lie in ``blocks``, instead of a part.

    ``given`` are the targets of the same terms from ``prepare``, made here otherwise. An epoch goes through every
    example of every term in one shuffled order, in which up to ``alike`` that begin alike follow one another; the loss
    of a step is the mean of weight * loss over its examples.
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
        groups=begun_alike(chosen.terms, alike),
    )


def begun_alike(terms: Sequence[Term], most: int) -> list[list[int]]:
    """All examples, counted through the terms, in groups of at most ``most`` whose next neighbours share half or more.

    So that in a token tree what they share runs once. Examples of several sequences stand alone.
    """
    rows = [tuple(term.ids[row * term.size]) for term in terms for row in range(term.count)]
    alone = [term.size > 1 for term in terms for _ in range(term.count)]
    found: list[list[int]] = []
    for row in sorted(range(len(rows)), key=lambda row: rows[row]) if most > 1 else range(len(rows)):
        before = found[-1][-1] if found else row
        near = not (alone[row] or alone[before]) and 2 * in_common(rows[before], rows[row]) >= len(rows[row])
        if found and near and len(found[-1]) < most:
            found[-1].append(row)
        else:
            found.append([row])
    return found


def inside(model: PreTrainedModel, names: Sequence[str], lora: Lora) -> Lora:
    """The same factors on those of its targets whose weights are among ``names``, under their full names.

    Raises ``SurgeryError`` where there is none.
    """
    targets = [name for name in target_names(model, lora.targets) if f"{name}.weight" in set(names)]
    if not targets:
        raise SurgeryError("lora: none of its targets lies in the chosen blocks; choose other blocks or targets")
    return Lora(lora.rank, lora.alpha, tuple(targets), lora.dropout)
