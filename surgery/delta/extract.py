"""Make a delta: from the differences an edit found in a live model, or from two checkpoints on disk."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery import __version__
from surgery.delta.format import Delta
from surgery.delta.metadata import FORMAT, KINDS, MODULE, check_metadata, encode, pack_sketch
from surgery.errors import SurgeryError
from surgery.files.architecture import is_embedding, is_head, tokenizer_fingerprint
from surgery.files.checkpoint_files import CheckpointFiles, chunks, measure, open_checkpoint, require_float
from surgery.files.rounding import STORED, refuse_not_finite, widen
from surgery.files.safetensors_io import open_regular, read_exactly
from surgery.files.tensor_names import common_prefix, resolve_tied, translate

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
        base: the base's public name. recipe: TOML text. measured: effects, for the model card.
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
    stems = {name: name if kind == "dense" else _stem(name) for name in arrays}
    mapping, prefix = to_stored(list(dict.fromkeys(stems.values())), stored)
    tensors: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        stem = stems[name]
        target = mapping[stem] + name[len(stem) :]
        if target in tensors and not np.array_equal(tensors[target], array):
            raise SurgeryError(
                f"{name}: the checkpoint ties it to {target}, for which another difference was given; "
                "train the tied tensor once"
            )
        tensors[target] = array
    for name in mapping.values():
        shape = stored.entry(name).shape
        if kind == "dense" and tensors[name].shape != shape:
            raise SurgeryError(
                f"{name}: the difference is {list(tensors[name].shape)}, the checkpoint has {list(shape)}"
            )
    changed = sorted(set(mapping.values()))
    about = {"kind": kind, "base": base, "recipe": recipe, "seed": seed, "prefix": prefix, "measured": measured}
    about |= {"module": dict(module)} if module is not None else {}
    about |= {"rounding": rounding} if rounding != "auto" else {}
    return _assemble(stored, tensors | parts, changed, about | {"parents": [dict(parent) for parent in parents]})


def diff(base_dir: Path | str, edited_dir: Path | str, *, base: str | None = None, recipe: str = "") -> Delta:
    """The delta between two checkpoints with the same tensors: edited - base, of every tensor whose bytes
    differ.

    Raises:
        SurgeryError: a tensor is missing or has another shape; nothing differs; values are not finite.
    """
    left, right = open_checkpoint(base_dir), open_checkpoint(edited_dir)
    missing = sorted(set(left.places) ^ set(right.places))
    if missing:
        where = right.path if missing[0] in left.places else left.path
        raise SurgeryError(f"{where}: has no {missing[0]!r} ({len(missing)} names differ); compare equal models")
    tensors = {}
    for name in sorted(left.places):
        if left.entry(name).shape != right.entry(name).shape:
            shapes = f"{list(left.entry(name).shape)} in the base, {list(right.entry(name).shape)} in the edited"
            raise SurgeryError(f"{name}: {shapes} checkpoint; a difference needs equal shapes")
        change = _difference(left, right, name)
        if change is not None:
            tensors[name] = change
    if not tensors:
        raise SurgeryError(f"{right.path}: no tensor differs from {left.path}; there is nothing to write")
    # Applied, it must give the edited checkpoint: its numbers are of the dtype already, so that nearest finds them.
    about = {"kind": "dense", "base": base or left.path.name, "recipe": recipe, "seed": 0, "rounding": "nearest"}
    return _assemble(left, tensors, sorted(tensors), about)


def _difference(left: CheckpointFiles, right: CheckpointFiles, name: str) -> np.ndarray | None:
    """edited - base as fp32 with the tensor's shape, or None where the stored values are equal."""
    result: np.ndarray | None = None
    for start, stop in chunks(left.entry(name)) if left.entry(name).dtype in STORED else [(0, 0)]:
        pair = [values(stored, name, start, stop) for stored in (left, right)]
        if np.array_equal(pair[0], pair[1]):
            continue
        for stored, part in zip((left, right), pair, strict=True):
            refuse_not_finite(part, name, str(stored.path))
        if result is None:
            result = np.zeros(left.entry(name).elements, np.float32)
        result[start:stop] = pair[1] - pair[0]
    return None if result is None else result.reshape(left.entry(name).shape)


def values(stored: CheckpointFiles, name: str, start: int, stop: int) -> np.ndarray:
    """Elements start..stop of a stored tensor, widened to fp32. Raises: SurgeryError (dtype, truncated)."""
    entry, path = stored.entry(name), stored.path / stored.places[name]
    require_float(entry.dtype, name, path)
    size = STORED[entry.dtype].itemsize
    fd = open_regular(path)
    try:
        raw = read_exactly(fd, entry.begin + size * start, size * (stop - start), path)
    finally:
        os.close(fd)
    return widen(np.frombuffer(raw, STORED[entry.dtype]), entry.dtype)


def _assemble(
    stored: CheckpointFiles, tensors: dict[str, np.ndarray], changed: Iterable[str], about: Mapping[str, Any]
) -> Delta:
    """The delta of `tensors` with what the checkpoint says of the `changed` ones, and the fields of `about`."""
    entries: dict[str, dict[str, Any]] = {}
    for name in changed:
        found = measure(stored, name)
        assert found is not None  # no hash was given to compare with
        entries[name] = {
            "shape": list(stored.entry(name).shape),
            "dtype": stored.entry(name).dtype,
            "sha256": found.sha256,
            "norm": float(np.float32(found.norm)),
            "sketch": pack_sketch(found.sketch),
        }
    vocabulary = [entries[name]["shape"][0] for name in entries if is_embedding(name) or is_head(name)]
    metadata = {
        "format": FORMAT,
        "architecture": stored.facts,
        "tensors": entries,
        "tool": f"model-surgery {__version__}",
        "parents": [],
        "prefix": "",
        "tokenizer": tokenizer_fingerprint(stored.path, max(vocabulary)) if vocabulary else None,
        **about,
        "measured": dict(about.get("measured") or {}),
    }
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


def to_stored(names: list[str], stored: CheckpointFiles) -> tuple[dict[str, str], str]:
    """{model name: checkpoint name} and what the model's names have in front of the checkpoint's."""
    tied = {name: resolve_tied(name, stored.places) for name in names if stored.tied}
    plain = [name for name in names if tied.get(name) is None]
    change = common_prefix(plain, stored.places)
    if change is None:
        lost = next(name for name in plain if name not in stored.places)
        raise SurgeryError(
            f"{stored.path}: has no tensor {lost!r}, and no single change of prefix explains it; "
            f"it has, for example, {sorted(stored.places)[0]!r}"
        )
    mapping = {name: tied.get(name) or translate(name, change) for name in names}
    return mapping, change[0] if not change[1] else ""
