"""The metadata of a delta: how it is written, and the checks that a stranger's must pass."""

import base64
import binascii
import json
import re
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.rounding import ROUNDINGS
from surgery.files.weight_fingerprint import BUCKETS

FORMAT = 1
KINDS = ("dense", "lora", "module")
KEY = "surgery"
MODULE = "module."  # in front of the names of a module's own tensors
MAX_DEPTH = 32  # of the metadata's maps and lists
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")  # all but tab and line ends


def base_shapes(metadata: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The base tensors that a delta changes, with their shapes."""
    return {name: tuple(entry["shape"]) for name, entry in metadata["tensors"].items()}


def pack_sketch(sums: np.ndarray) -> str:
    """Sketch fp32 [64] as base64 of its little-endian bytes."""
    return base64.b64encode(sums.astype("<f4").tobytes()).decode("ascii")


def unpack_sketch(text: str) -> np.ndarray:
    """The inverse of `pack_sketch`. Raises: ValueError on anything else."""
    try:
        raw = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from None
    sums = np.frombuffer(raw, "<f4") if len(raw) == 4 * BUCKETS else np.empty(0, np.float32)
    if sums.size != BUCKETS or not np.isfinite(sums).all():
        raise ValueError(f"not {BUCKETS} finite numbers")
    return sums


def rounding_of(metadata: Mapping[str, Any], rounding: str, seed: int | None) -> tuple[str, int]:
    """The rounding and seed of an apply: where asked for "auto" and None, those of the measured checkpoint.

    A delta whose metadata has no `rounding` was measured with "auto": stochastic into 16 bits, by the delta's seed.

    Raises:
        SurgeryError: an unknown rounding.
    """
    if rounding not in ROUNDINGS:
        raise SurgeryError(f"rounding {str(rounding)[:40]!r}: expected one of {', '.join(ROUNDINGS)}")
    chosen = str(metadata.get("rounding", "auto")) if rounding == "auto" else rounding
    return chosen, int(metadata["seed"]) if seed is None else seed


def encode(metadata: Mapping[str, Any]) -> str:
    """Compact JSON with sorted keys. Raises: SurgeryError for NaN or a value that JSON cannot hold."""
    try:
        return json.dumps(metadata, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise SurgeryError(
            f"the delta's metadata cannot be written as JSON ({error}); use plain finite values"
        ) from None


def recipe_texts(metadata: Mapping[str, Any]) -> list[str]:
    """The recipe that a delta was made with; of one composed of others, or scaled, those of its parts, each once."""
    if metadata.get("recipe"):
        return [str(metadata["recipe"])]
    found: list[Any] = []
    for parent in metadata.get("parents", ()):
        several = parent.get("recipes")  # of a part that was itself composed
        found += several if isinstance(several, list) else [parent.get("recipe", "")]
    return list(dict.fromkeys(map(str, found)))


def recipe_text(metadata: Mapping[str, Any]) -> str:
    """The recipe of a delta, or what all of its parts say."""
    said = recipe_texts(metadata)
    return said[0] if len(said) == 1 else ""


def recipes_of(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The settings that a delta, or each of its parts, was made with, by its `metadata`; those that can be read."""
    found = []
    for text in recipe_texts(metadata):
        with suppress(ValueError):  # a foreign delta's own words
            found.append(tomllib.loads(text))
    return [settings for settings in found if settings]


_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format": int, "kind": str, "base": str, "architecture": dict, "tensors": dict, "recipe": str,
    "seed": int, "tool": str, "parents": list, "measured": dict, "prefix": str,
    "tokenizer": (dict, type(None)),
}  # fmt: skip


def check_metadata(metadata: Any, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check the metadata against the format and against the file's own tensors (`shapes`).

    Raises:
        SurgeryError
    """
    if not isinstance(metadata, dict):
        raise SurgeryError(f"{where}: its metadata is no JSON object; not a delta")
    _check_tree(metadata, where)
    if metadata.get("format") != FORMAT:
        raise SurgeryError(
            f"{where}: delta format {str(metadata.get('format'))[:20]!r}, expected {FORMAT}; update this tool"
        )
    for field, kind in _FIELDS.items():
        if field not in metadata or not isinstance(metadata[field], kind) or isinstance(metadata[field], bool):
            raise SurgeryError(f"{where}: its metadata has no proper {field!r}; not a delta, or broken")
    if not isinstance(metadata.get("unsaid", {}), dict):
        raise SurgeryError(f"{where}: its metadata has no proper 'unsaid'; not a delta, or broken")
    if metadata.get("rounding", "auto") not in ROUNDINGS:
        raise SurgeryError(f"{where}: its rounding is {str(metadata['rounding'])[:40]!r}; broken, or update this tool")
    if metadata["kind"] not in KINDS:
        raise SurgeryError(f"{where}: kind {metadata['kind'][:40]!r}, expected one of {', '.join(KINDS)}")
    if not shapes:
        raise SurgeryError(f"{where}: holds no tensors; there is nothing to apply")
    if not all(isinstance(parent, dict) for parent in metadata["parents"]):
        raise SurgeryError(f"{where}: its metadata has no proper 'parents'; not a delta, or broken")
    for name, entry in metadata["tensors"].items():
        _check_tensor(name, entry, where)
    expected = _file_tensors(metadata, shapes, where)
    if metadata["kind"] == "module":
        expected |= _module_tensors(metadata, shapes, where)
    if expected != set(shapes):
        odd = sorted(expected ^ set(shapes))[0]
        raise SurgeryError(
            f"{where}: {odd[:80]!r} stands in the metadata or in the file, but not in both; broken, make it again"
        )


def _check_tree(tree: Any, where: str) -> None:
    """Refuse depth that could exhaust the stack, and characters that could command a terminal. No recursion."""
    level: list[Any] = [tree]
    for _ in range(MAX_DEPTH):
        texts = [item for item in level if isinstance(item, str)]
        texts += [key for item in level if isinstance(item, dict) for key in item]
        bad = next((text for text in texts if _CONTROL.search(text)), None)
        if bad is not None:
            raise SurgeryError(f"{where}: its metadata holds control characters ({bad[:40]!r}); not a delta, or broken")
        maps = (item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list))
        level = [child for children in maps for child in children]
    if level:
        raise SurgeryError(f"{where}: its metadata is nested too deeply; not a delta, or broken")


def _check_tensor(name: str, entry: Any, where: str) -> None:
    def bad(field: str) -> SurgeryError:
        return SurgeryError(f"{where}: the metadata of {name[:80]!r} has no proper {field!r}; broken, make it again")

    if not isinstance(entry, dict):
        raise bad("shape")
    shape, norm = entry.get("shape"), entry.get("norm")
    if not isinstance(shape, list) or len(shape) > 32 or not all(type(n) is int and 0 < n < 2**62 for n in shape):
        raise bad("shape")
    if isinstance(norm, bool) or not isinstance(norm, int | float) or not 0 <= norm < 1e39:
        raise bad("norm")
    for field in ("dtype", "sha256", "sketch"):
        if not isinstance(entry.get(field), str):
            raise bad(field)
    try:
        unpack_sketch(entry["sketch"])
    except ValueError:
        raise bad("sketch") from None


def _file_tensors(metadata: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> set[str]:
    """The names that the file must hold for the base tensors it says it changes; checks their shapes."""
    expected: set[str] = set()
    for name, entry in metadata["tensors"].items():
        shape = tuple(entry["shape"])
        left, right = name + ".lora_B", name + ".lora_A"
        if metadata["kind"] != "dense" and left in shapes and right in shapes:
            b, a = shapes[left], shapes[right]
            fits = len(b) == len(a) == 2 and (b[0], a[1]) == shape and b[1] == a[0] > 0
            got, names = f"{list(b)} @ {list(a)}", {left, right}
        else:
            fits, got, names = shapes.get(name, shape) == shape, str(list(shapes.get(name, ()))), {name}
        if not fits:
            raise SurgeryError(
                f"{where}: the difference of {name[:80]!r} is {got}, its base {list(shape)}; broken, make it again"
            )
        expected |= names
    return expected


_SETTINGS: dict[str, dict[str, type | tuple[type, ...]]] = {
    "cross_attention": {
        "type": str, "width": int, "words": list, "heads": int, "ffn": int, "top_percent": (int, float),
        "decay": (int, float), "scope": str, "renormalise": bool, "dropout": (int, float),
    },
    "projection": {"type": str, "width": int, "rank": int},
}  # fmt: skip


def _module_tensors(metadata: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], where: str) -> set[str]:
    """The names of the module's tensors; checks its settings, and the two shapes that they say."""
    settings = metadata.get("module")
    if not isinstance(settings, dict) or settings.get("type") not in _SETTINGS:
        found = str(settings.get("type"))[:40] if isinstance(settings, dict) else "none"
        known = ", ".join(_SETTINGS)
        raise SurgeryError(f"{where}: its module is of type {found!r}, expected one of {known}; update this tool")
    fields = _SETTINGS[settings["type"]]
    for field, kind in fields.items():
        value = settings.get(field)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise SurgeryError(f"{where}: the settings of its module have no proper {field!r}; broken, make it again")
    if settings.keys() - fields.keys() or not all(isinstance(word, str) for word in settings.get("words", [])):
        raise SurgeryError(
            f"{where}: the settings of its module are not those of a {settings['type']}; update this tool"
        )
    width = settings["width"]
    known_shapes: dict[str, tuple[int, ...]]
    if settings["type"] == "projection":
        rank = settings["rank"]
        known_shapes = {"left": (width, rank), "right": (rank, width), "offset": (width,)}
    else:
        known_shapes = {"reference": (len(settings["words"]), width), "fusion.weight": (width, 2 * width)}
    for name, shape in known_shapes.items():
        if shapes.get(MODULE + name) != shape:
            raise SurgeryError(
                f"{where}: {MODULE + name!r} has shape {list(shapes.get(MODULE + name, ()))}, by its settings "
                f"{list(shape)}; broken, make it again"
            )
    return {name for name in shapes if name.startswith(MODULE)}
