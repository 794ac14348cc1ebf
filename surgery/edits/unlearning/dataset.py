"""What an unlearning run is given: triples to train on, a development set of other target terms, and the test."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from surgery.data.stereoset import Kind, Triple, Triples, load
from surgery.edits.unlearning.split import split_terms
from surgery.errors import SurgeryError
from surgery.metrics.stereoset import sample


@dataclass(frozen=True)
class Dataset:
    """The triples of a run: those trained on, the few scored while training, all held-out ones, the test."""

    train: tuple[Triple, ...]
    watched: Triples
    held_out: Triples
    test: Triples
    notes: tuple[str, ...]
    """What a reader must know, in sentences: how many rows each part has, which cannot be learnt, what steers."""
    skipped: dict[str, int]
    """How many rows of the training source and of the test file could not be used."""


def read_dataset(
    train: str | Path,
    test: str | Path,
    *,
    share: float,
    watched: int,
    seed: int,
    kind: Kind = "intrasentence",
    limit: int = 0,
    released: bool = False,
    folds: bool = False,
) -> Dataset:
    """Read both files; a ``share`` of each bias type's terms of ``train`` is held out, ``watched`` rows a type scored.

    ``limit`` takes so many rows, drawn by ``seed``, of the held-out and of the test rows. ``released`` holds nothing
    out: the development set is the front of the file that is tested on, ``watched`` rows a type (the released
    code's dataloader.py, line 182). With ``folds`` nothing is held out either: all rows are trained on and watched,
    and whoever trains scores each by a training without its term.

    Raises ``SurgeryError`` for files without usable triples, a bias type with one term only, and for one that the
    development set has and the training rows have not.
    """
    # Only contexts with a BLANK say where the continuation begins; the test may have both kinds.
    source, tested = load(train), load(test, kind=kind)
    notes = []
    if source.skipped:  # those of the test file are said where they are scored
        notes.append(f"{train}: {len(source.skipped)} rows skipped, not trained on: {'; '.join(source.skipped[:3])}")
    if released:
        front: dict[str, list[Triple]] = {}
        for row in load(test).rows:
            if len(front.setdefault(row.bias_type, [])) < watched:
                front[row.bias_type].append(row)
        chosen = tuple(row for name in sorted(front) for row in front[name])
        learnt, held = source.rows, Triples(chosen, (), f"first {watched} rows a type of the test file")
        few = held
        notes.append(f"Warning: variant released: training is steered by the {held.name}, as in the authors' code.")
    elif folds:
        learnt, few = source.rows, source
        held = Triples((), (), source.name)
    else:
        split = split_terms(source.rows, share=share, watched=watched, seed=seed)
        name = f"held-out terms of {source.name}"
        learnt, *others = (tuple(source.rows[n] for n in part) for part in (split.train, split.held_out, split.watched))
        held, few = (Triples(part, (), name) for part in others)
    missing = sorted({row.bias_type for row in few.rows} - {row.bias_type for row in learnt})
    if missing:
        raise SurgeryError(f"{train}: no rows of bias type {missing[0]}, which {few.name} has; add some")
    parts = f"{len(held.rows)} of {held.name}, {len(few.rows)} of them scored while training"
    parts = "each scored by a training without its term" if folds else parts
    notes.append(
        f"{len(learnt)} triples to train on; {parts}; {len(tested.rows)} of {tested.name} to test"
        + f"; measured: {limit} of each" * bool(limit)
    )
    some = partial(sample, limit=limit, seed=seed)
    skipped = {"train": len(source.skipped), "test": len(tested.skipped)}
    return Dataset(learnt, few, some(held), some(tested), tuple(notes), skipped)
