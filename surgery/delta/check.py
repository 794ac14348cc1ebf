"""Refuse before training what `make` and `apply` would refuse after it."""

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.delta.config import resolved
from surgery.delta.naming import place
from surgery.errors import SurgeryError
from surgery.files.architecture import brief, differences, facts
from surgery.files.checkpoint_files import CheckpointFiles, open_checkpoint, require_float

if TYPE_CHECKING:
    from torch import nn


def check_edit(
    model: "nn.Module", names: Iterable[str], checkpoint: Path | str, *, out: Path | None = None, whole: bool = True
) -> None:
    """Refuse now what would stop the delta of an edit from being made, applied and measured when training is over.

    Call it before the first step; it reads the checkpoint's headers, not its weights:

        surgery.delta.check_edit(model, names_that_will_train, directory, out=run_folder)

    Args:
        model: opened from `checkpoint`; its configuration must be the one that the checkpoint's config.json describes.
        names: the parameters that will change, as `model.named_parameters()` calls them.
        checkpoint: the directory that `surgery.delta.make` and `surgery.apply.apply` will be given.
        out: the folder that the run writes below, if the disk is to be checked too: the delta in float32 and one
            checkpoint as saved must fit there; of that only what changes, unless it is written `whole`.

    Raises:
        SurgeryError: an unreadable or quantised checkpoint, a name or shape that it does not hold, weights that take no
            difference or hold NaN or infinity, another architecture, or no room on the disk.
    """
    stored = open_checkpoint(checkpoint)
    config = getattr(model, "config", None)
    if config is not None:
        odd = differences(resolved(stored.config)[0], facts(config.to_dict()))
        if odd:
            raise SurgeryError(
                f"{stored.path}: config.json describes another model than the one given: {brief(odd)}; "
                "name the model's own checkpoint"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    chosen = list(dict.fromkeys(names))
    unknown = [name for name in chosen if name not in parameters]
    if unknown:
        raise SurgeryError(
            f"the model has no parameter {unknown[0]!r}; it has, for example, {next(iter(parameters))!r}"
        )
    for name in chosen:
        if parameters[name].device.type != "meta" and not bool(parameters[name].detach().isfinite().all()):
            raise SurgeryError(f"{stored.path}: {name!r} holds NaN or infinity; the file is broken, get it again")
    shapes = {name: tuple(parameters[name].shape) for name in chosen}
    found = place(chosen, shapes, stored)
    for target, name in found.plain:
        _check_tensor(stored, target, name, shapes[name])
    for group in found.joined:
        pieces = group.split({held: group.model.get_parameter(held) for held in group.held})
        for target, piece in pieces.items():
            _check_tensor(stored, target, group.held[0], tuple(piece.shape))
    if out is not None:
        size = sum((stored.path / name).stat().st_size for name in stored.files)
        changed = sum(parameters[name].numel() for name in chosen)
        _check_room(4 * changed + (size if whole else min(size, 4 * changed)), out)


def _check_tensor(stored: CheckpointFiles, target: str, name: str, shape: tuple[int, ...]) -> None:
    entry = stored.entry(target)
    require_float(entry.dtype, target, stored.path / stored.places[target])
    if shape != entry.shape:
        raise SurgeryError(
            f"{name}: the model has {list(shape)} as {target}, {stored.path} has {list(entry.shape)}; "
            "name the model's own checkpoint"
        )


def _check_room(needed: int, out: Path) -> None:
    folder = next(path for path in (out, *out.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SurgeryError(
            f"{folder}: {free / 1e9:.1f} GB are free, the delta and one saved checkpoint need {needed / 1e9:.1f} GB; "
            "make room or choose another --out"
        )
