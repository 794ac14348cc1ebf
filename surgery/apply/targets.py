"""Which tensors of a checkpoint a delta's differences go to: names and prefixes, tied matrices, longer vocabularies."""

import math
import re
from typing import Literal

from surgery.delta.differences import Differences
from surgery.errors import SurgeryError
from surgery.files.architecture import is_embedding, is_head, tokenizer_fingerprint
from surgery.files.checkpoint_files import CheckpointFiles, require_float
from surgery.files.quantised_layouts import TWO_WAYS
from surgery.files.tensor_names import common_prefix, is_vocabulary, same_tensors, translate

Tied = Literal["embed", "head", "both"]
Vocabulary = Literal["refuse", "first"]


def targets_of(
    delta: Differences, stored: CheckpointFiles, rename: tuple[str, str] | None, tied: Tied | None
) -> dict[str, tuple[str, ...]]:
    """{stored tensor: the delta's tensors to add to it}.

    Raises:
        SurgeryError: a name that the checkpoint does not have; a matrix that is tied in only one of base and
            checkpoint, without ``tied``.
    """
    base_tied = bool(delta.metadata["architecture"].get("tied", False))
    target_tied = stored.tied_by(bool(delta.metadata.get("unsaid", {}).get("tied", False)))
    known = stored.matrices
    names = {name: translate(name, rename) if rename else name for name in delta.shapes}
    same = same_tensors(names.values(), known)
    targets: dict[str, tuple[str, ...]] = {}
    lost = []
    for name, wanted in names.items():
        if is_vocabulary(name) and (base_tied or target_tied):
            continue
        if wanted in same:
            targets[same[wanted]] = (name,)
        else:
            lost.append(name)
    matrices = [name for name in names if is_vocabulary(name)]
    if base_tied and target_tied:
        for name in matrices:
            # Some tied checkpoints store the matrix twice, some under the head's name: change what is there.
            copies = [other for other in known if is_vocabulary(other)]
            targets.update({other: (name,) for other in copies})
            lost += [] if copies else [name]
    elif base_tied:
        targets.update(_untie(stored, matrices, tied))
    elif target_tied and matrices:
        targets.update(_tie(stored, matrices, tied))
    if lost:
        raise _no_such_names(stored, lost, list(delta.shapes))
    return targets


def _untie(stored: CheckpointFiles, matrices: list[str], tied: Tied | None) -> dict[str, tuple[str, ...]]:
    if not matrices:
        return {}
    if tied is None:
        raise SurgeryError(
            f"{stored.path}: embedding and head are separate, in the delta's base they are one tensor ({matrices[0]}); "
            "say which to change with --tied embed, head or both"
        )
    wanted = {"embed": (is_embedding,), "head": (is_head,), "both": (is_embedding, is_head)}[tied]
    chosen = [other for other in stored.matrices if is_vocabulary(other) and any(test(other) for test in wanted)]
    if len(chosen) != len(wanted):
        raise SurgeryError(
            f"{stored.path}: --tied {tied} means {len(wanted)} tensors, found {', '.join(chosen) or 'none'}; "
            "choose another"
        )
    return {other: (matrices[0],) for other in chosen}


def _tie(stored: CheckpointFiles, matrices: list[str], tied: Tied | None) -> dict[str, tuple[str, ...]]:
    if tied is None:
        raise SurgeryError(
            f"{stored.path}: embedding and head are one tensor, in the delta's base they are two, of which it changes "
            f"{' and '.join(sorted(matrices))}; say whose difference to take with --tied embed, head or both (the sum)"
        )
    wanted = {"embed": (is_embedding,), "head": (is_head,), "both": (is_embedding, is_head)}[tied]
    sources = tuple(sorted(name for name in matrices if any(test(name) for test in wanted)))
    if not sources:
        raise SurgeryError(
            f"{stored.path}: --tied {tied}, but the delta changes only {', '.join(sorted(matrices))}; choose another"
        )
    return {other: sources for other in stored.matrices if is_vocabulary(other)}


def _no_such_names(stored: CheckpointFiles, lost: list[str], names: list[str]) -> SurgeryError:
    known = stored.matrices
    change = common_prefix([name for name in names if not is_vocabulary(name) or name in lost], known)
    if change is not None and change != ("", ""):
        return SurgeryError(
            f"{stored.path}: has no {lost[0]!r}; all names fit when the prefix {change[0]!r} becomes {change[1]!r}: "
            f"repeat with --rename {change[0]}={change[1]} if that is the same part of the model"
        )
    cut, whole = re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.[a-z_]+$")
    for ours, theirs, ways in (
        (cut, whole, ("one by one", "as one tensor")),
        (whole, cut, ("as one tensor", "one by one")),
    ):
        expert = next((name for name in lost if ours.search(name)), None)
        if expert and any(theirs.search(name) for name in known):
            return SurgeryError(
                f"{stored.path}: has no {expert!r}: the delta's base stores its experts {ways[0]}, this one {ways[1]}; "
                "apply it in memory: surgery.load(CHECKPOINT, deltas=[DELTA])[0].save_pretrained(OUT)"
            )
    quantised = [name for name in known if name.startswith(lost[0].removesuffix("weight")) and name != lost[0]]
    if quantised:
        return SurgeryError(
            f"{stored.path}: has no {lost[0]!r} but {quantised[0]!r}, quantised in a way that is not known; {TWO_WAYS}"
        )
    return SurgeryError(
        f"{stored.path}: has no {lost[0]!r} ({len(lost)} of {len(names)} tensors are missing) and no single change "
        "of prefix explains it; the delta belongs to another model"
    )


def elements_of(
    delta: Differences, stored: CheckpointFiles, target: str, sources: tuple[str, ...], vocabulary: Vocabulary
) -> int:
    """How many elements of the stored tensor change: all, or the base's rows of a longer vocabulary.

    Raises:
        SurgeryError: another shape, a dtype that is no float; a longer vocabulary that is to be refused, or whose first
            tokens are not the base's.
    """
    layer = stored.layers.get(target)
    if layer is not None:
        if any(delta.shapes[name] != layer.shape for name in sources):
            raise SurgeryError(
                f"{stored.path}: {target!r} is {list(layer.shape)}, the delta's base {list(delta.shapes[sources[0]])}; "
                "it cannot fit"
            )
        return layer.elements
    entry, where = stored.entry(target), stored.path / stored.places[target]
    require_float(entry.dtype, target, where)
    for name in sources:
        base = delta.shapes[name]
        if entry.shape == base:
            continue
        longer = is_vocabulary(name) and len(base) == len(entry.shape) and entry.shape[1:] == base[1:]
        if not longer or entry.shape[0] < base[0]:
            raise SurgeryError(
                f"{where}: {target!r} has shape {list(entry.shape)}, the delta's base {list(base)}; it cannot fit"
            )
        if vocabulary == "refuse":
            raise SurgeryError(
                f"{where}: {target!r} has {entry.shape[0]} rows (tokens), the delta's base {base[0]}; if the "
                f"vocabulary was only extended, repeat with --vocabulary first to change the first {base[0]} rows"
            )
        wanted = delta.metadata["tokenizer"]
        found = tokenizer_fingerprint(stored.path, base[0])
        if wanted is None or found != wanted:
            problem = "cannot be compared (no tokenizer.json)" if wanted is None or found is None else "differ"
            raise SurgeryError(
                f"{where}: the first {base[0]} tokens of its tokenizer and of the delta's base {problem}; "
                f"the rows of {target!r} would not mean the same tokens"
            )
    return math.prod(delta.shapes[sources[0]])
