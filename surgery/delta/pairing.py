"""The tensors of two checkpoints of one model, matched and compared, however each of them names and cuts them."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from surgery.delta.naming import Names, read_as, skeleton
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import CheckpointFiles, chunks, same_bytes, values
from surgery.files.rounding import STORED, refuse_not_finite
from surgery.files.tensor_names import is_leftover, is_vocabulary, same_tensors

Read = Callable[[int, int], np.ndarray]


def changes(left: CheckpointFiles, right: CheckpointFiles) -> Iterator[tuple[str, np.ndarray]]:
    """(name in `left`, right - left as fp32 with the tensor's shape) of each tensor whose values differ.

    Buffers that no model learns are left out, and a tied matrix is compared once.

    Raises:
        SurgeryError: a tensor that only one of them has, another shape, or values that are not finite.
    """
    pairs, rest = _pairs(left, right)
    for name, other in sorted(pairs.items()):
        shapes = [left.entry(name).shape, right.entry(other).shape]
        if shapes[0] != shapes[1]:
            raise SurgeryError(
                f"{name}: {list(shapes[0])} in the base, {list(shapes[1])} in the edited checkpoint; a difference "
                "needs equal shapes"
            )
        if left.entry(name).dtype not in STORED and same_bytes(left, name, right, other):
            continue
        change = _difference(left, name, right, partial(values, right, other))
        if change is not None:
            yield name, change
    for name, array in rest:
        change = _difference(left, name, right, partial(_cut, array.reshape(-1)))
        if change is not None:
            yield name, change


def _cut(flat: np.ndarray, start: int, stop: int) -> np.ndarray:
    return flat[start:stop]


def _difference(left: CheckpointFiles, name: str, right: CheckpointFiles, read: Read) -> np.ndarray | None:
    """edited - base as fp32 with the tensor's shape, or None where the stored values are equal."""
    result: np.ndarray | None = None
    for start, stop in chunks(left.entry(name)) if left.entry(name).dtype in STORED else [(0, 0)]:
        old, new = values(left, name, start, stop), read(start, stop)
        if np.array_equal(old, new):
            continue
        for stored, part in ((left, old), (right, new)):
            refuse_not_finite(part, name, str(stored.path))
        if result is None:
            result = np.zeros(left.entry(name).elements, np.float32)
        result[start:stop] = new - old
    return None if result is None else result.reshape(left.entry(name).shape)


def _learnt(stored: CheckpointFiles) -> list[str]:
    names = [name for name in stored.places if not is_leftover(name, stored.entry(name).shape)]
    matrices = [name for name in names if is_vocabulary(name)]
    return [name for name in names if not (stored.tied and name in matrices[1:])]


def _pairs(left: CheckpointFiles, right: CheckpointFiles) -> tuple[dict[str, str], Iterator[tuple[str, np.ndarray]]]:
    """{name in left: name in right} of the tensors that both hold alike, and right's in left's pieces of the others."""
    ours, theirs = _learnt(left), _learnt(right)
    pairs = same_tensors(ours, theirs)
    if left.tied and right.tied:  # one stores the embedding, one the head
        heads = [[name for name in names if is_vocabulary(name)] for names in (ours, theirs)]
        pairs |= dict(zip(*heads, strict=True)) if len(heads[0]) == len(heads[1]) else {}
    lost = [name for name in ours if name not in pairs] + sorted(set(theirs) - set(pairs.values()))
    if not lost:
        return pairs, iter(())
    here, there = (read_as(skeleton(stored), names) for stored, names in ((left, ours), (right, theirs)))
    others = {held: name for name, held in there.plain}
    pairs = {name: others[held] for name, held in here.plain if held in others}
    joined = here.joined
    covered = {*pairs, *(name for group in joined for name in group.stored.values())}
    loose = [name for name, held in here.plain if name not in pairs and _held_by(there, held)]
    missing = [name for name in ours if name not in covered and name not in loose]
    reached = {*pairs.values(), *(name for group in there.joined for name in group.stored.values())}
    for group in joined:
        reached |= {others[held] for held in group.held if held in others}
    missing += [name for name in theirs if name not in reached]
    if missing:
        where = right.path if missing[0] in ours else left.path
        raise SurgeryError(f"{where}: has no {missing[0]!r} ({len(missing)} names differ); compare equal models")
    return pairs, _recut(here, there, right, loose)


def _held_by(names: Names, held: str) -> bool:
    return any(held in group.held for group in names.joined)


def _recut(here: Names, there: Names, right: CheckpointFiles, loose: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Right's numbers in left's pieces, group by group: joined as the model holds them, then split as left does."""
    import torch

    def tensor(name: str) -> torch.Tensor:
        entry = right.entry(name)
        return torch.from_numpy(values(right, name, 0, entry.elements)).reshape(entry.shape)

    others = {held: name for name, held in there.plain}

    def held(wanted: tuple[str, ...]) -> dict[str, torch.Tensor]:
        found = {name: tensor(others[name]) for name in wanted if name in others}
        for group in there.joined:
            if set(group.held) & set(wanted) - set(found):
                found |= group.join({name: tensor(name) for name in group.stored.values()})
        return found

    for group in here.joined:
        for name, piece in group.split(held(group.held)).items():
            yield name, piece.contiguous().numpy()
    for name, param in here.plain:
        if name in loose:
            yield name, held((param,))[param].contiguous().numpy()
