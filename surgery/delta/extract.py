"""Make a delta: from the differences an edit found in a live model, or from two checkpoints on disk."""

from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery import __version__
from surgery.delta.config import refuse_other_config, resolved
from surgery.delta.format import Delta
from surgery.delta.metadata import FORMAT, KINDS, MODULE, check_metadata, encode, pack_sketch
from surgery.delta.naming import Joined, place
from surgery.delta.pairing import changes
from surgery.errors import SurgeryError
from surgery.files.ahead import in_order
from surgery.files.architecture import is_embedding, is_head, tokenizer_fingerprint
from surgery.files.checkpoint_files import CheckpointFiles, measure, open_checkpoint
from surgery.files.converted import public_name
from surgery.files.rounding import refuse_not_finite

if TYPE_CHECKING:
    import torch


def make(
    differences: "Mapping[str, torch.Tensor | np.ndarray]",
    checkpoint: Path | str,
    *,
    base: str,
    recipe: str,
    seed: int,
    kind: str = "dense",
    module: Mapping[str, Any] | None = None,
    measured: Mapping[str, Any] | None = None,
    parents: Iterable[Mapping[str, Any]] = (),
    rounding: str = "auto",
) -> Delta:
    """A delta of differences (edited - base, fp32) that were found in a live model of `checkpoint`.

    Args:
        differences: arrays under the live model's parameter names; with kind "lora" the two factors of each
            tensor NAME as `NAME.lora_B` [rows, r] and `NAME.lora_A` [r, columns]; with kind "module" the
            module's tensors as `module.NAME` and, where the base was trained with it, LoRA factors or
            differences.
        checkpoint: the directory that the model was loaded from; shapes, dtypes, hashes and sketches of the
            base are read from it. Names are resolved to its own (a missing or extra prefix; a tied head).
        base: the base's name on a hub, or what the model was opened by (`demo`, a directory).
        recipe: TOML text. measured: effects, for the model card.
        rounding: of the checkpoint that is measured, with `seed`; a later apply then does the same by default.
        module: with kind "module", the module's type and settings (`surgery.delta.module.module_delta`).

    Raises:
        SurgeryError: a name, shape or value that does not fit the checkpoint.
    """
    if kind not in KINDS:
        raise SurgeryError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    stored = open_checkpoint(checkpoint)
    arrays = {name: _array(value, name) for name, value in differences.items()}
    if (kind == "module") != (module is not None):
        raise SurgeryError(f"kind {kind!r}: a module's settings go with kind 'module', and only with it")
    parts = {name: array for name, array in arrays.items() if kind == "module" and name.startswith(MODULE)}
    arrays = {name: array for name, array in arrays.items() if name not in parts}
    tensors, prefix = _to_stored(arrays, kind, stored)
    changed = sorted({_stem(name) if name not in stored.places else name for name in tensors})
    about = {
        "kind": kind,
        "base": public_name(base),
        "recipe": recipe,
        "seed": seed,
        "prefix": prefix,
        "measured": measured,
    }
    about |= {"module": dict(module)} if module is not None else {}
    about |= {"rounding": rounding} if rounding != "auto" else {}
    return _assemble(stored, tensors | parts, changed, about | {"parents": [dict(parent) for parent in parents]})


def diff(base_dir: Path | str, edited_dir: Path | str, *, base: str | None = None, recipe: str = "") -> Delta:
    """The delta between two checkpoints with the same tensors: edited - base, of every tensor whose bytes
    differ.

    Raises:
        SurgeryError: the configs describe models that compute differently (a delta holds weights only); a tensor is
            missing or has another shape; nothing differs; values are not finite.
    """
    left, right = open_checkpoint(base_dir), open_checkpoint(edited_dir)
    refuse_other_config(left, right)
    tensors = dict(changes(left, right))
    if not tensors:
        raise SurgeryError(f"{right.path}: no tensor differs from {left.path}; there is nothing to write")
    # Applied, it must give the edited checkpoint: its numbers are of the dtype already, so that nearest finds them.
    about = {
        "kind": "dense",
        "base": public_name(base) if base else left.path.name,
        "recipe": recipe,
        "seed": 0,
        "rounding": "nearest",
    }
    return _assemble(left, tensors, sorted(tensors), about)


def _assemble(
    stored: CheckpointFiles, tensors: dict[str, np.ndarray], changed: Iterable[str], about: Mapping[str, Any]
) -> Delta:
    """The delta of `tensors` with what the checkpoint says of the `changed` ones, and the fields of `about`."""
    entries: dict[str, dict[str, Any]] = {}
    names = list(changed)
    for name, found in zip(names, in_order(partial(measure, stored), names), strict=True):
        assert found is not None  # no hash was given to compare with
        entries[name] = {
            "shape": list(stored.entry(name).shape),
            "dtype": stored.entry(name).dtype,
            "sha256": found.sha256,
            "norm": float(np.float32(found.norm)),
            "sketch": pack_sketch(found.sketch),
        }
    vocabulary = [entries[name]["shape"][0] for name in entries if is_embedding(name) or is_head(name)]
    known, unsaid = resolved(stored.config)
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "architecture": known | ({"tied": stored.tied_by(bool(known["tied"]))} if "tied" in known else {}),
        "tensors": entries,
        "tool": f"model-surgery {__version__}",
        "parents": [],
        "prefix": "",
        "tokenizer": tokenizer_fingerprint(stored.path, max(vocabulary)) if vocabulary else None,
        **about,
        "measured": dict(about.get("measured") or {}),
    }
    metadata |= {"unsaid": unsaid} if unsaid else {}
    encode(metadata)
    check_metadata(metadata, {name: array.shape for name, array in tensors.items()}, "this delta")
    return Delta(dict(sorted(tensors.items())), metadata)


def _array(value: Any, name: str) -> np.ndarray:
    """A finite fp32 array in row-major order from a numpy array or a torch tensor on any device."""
    if hasattr(value, "detach"):
        value = value.detach().to("cpu").float().numpy()
    array = np.ascontiguousarray(value, dtype=np.float32).reshape(np.shape(value))
    refuse_not_finite(array, name, "the differences")
    return array


def _stem(name: str) -> str:
    for suffix in (".lora_A", ".lora_B"):
        if name.endswith(suffix):
            return name.removesuffix(suffix)
    return name


def _to_stored(arrays: dict[str, np.ndarray], kind: str, stored: CheckpointFiles) -> tuple[dict[str, np.ndarray], str]:
    """The arrays under the checkpoint's names, and what the model's names have in front of these."""
    stems = {name: name if kind == "dense" else _stem(name) for name in arrays}
    whole = {name: array.shape for name, array in arrays.items() if stems[name] == name}
    names = place(list(dict.fromkeys(stems.values())), whole, stored)
    of_stem: dict[str, list[str]] = {}
    for name, stem in stems.items():
        of_stem.setdefault(stem, []).append(name)
    tensors: dict[str, np.ndarray] = {}
    for target, stem in names.plain:
        for name in of_stem[stem]:
            own, array = target + name[len(stem) :], arrays[name]
            if own in tensors and not np.array_equal(tensors[own], array):
                raise SurgeryError(
                    f"{name}: the checkpoint ties it to {own}, for which another difference was given; "
                    "train the tied tensor once"
                )
            tensors[own] = array
    for group in names.joined:
        tensors |= _apart(group, arrays, names.called)
    for name, array in tensors.items():
        if name in stored.places and array.shape != stored.entry(name).shape:
            raise SurgeryError(
                f"{name}: the difference is {list(array.shape)}, the checkpoint has {list(stored.entry(name).shape)}; "
                "name the one that was trained"
            )
    return tensors, names.prefix


def _apart(group: Joined, arrays: Mapping[str, np.ndarray], called: Mapping[str, str]) -> dict[str, np.ndarray]:
    """The differences of parameters that the checkpoint holds in other pieces; a factored one is multiplied out."""
    import torch

    held = {}
    for name in group.held:
        shape, own = group.model.get_parameter(name).shape, called.get(name, name)
        if own + ".lora_B" in arrays:
            array = arrays[own + ".lora_B"] @ arrays[own + ".lora_A"]
        else:
            array = arrays.get(own, np.zeros(0, np.float32))
        if array.size and array.shape != shape:
            raise SurgeryError(
                f"{own}: the difference is {list(array.shape)}, the checkpoint gives {list(shape)}; "
                "name the one that was trained"
            )
        held[name] = torch.from_numpy(array) if array.size else torch.zeros(shape)
    return {name: np.ascontiguousarray(piece.numpy()) for name, piece in group.split(held).items()}
