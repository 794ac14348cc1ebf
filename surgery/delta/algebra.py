"""Weighted sums of deltas, computed in fp32 and rounded only when the sum is applied."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from surgery import __version__
from surgery.delta.format import Delta
from surgery.delta.metadata import recipe_text, recipe_texts, unpack_sketch
from surgery.errors import SurgeryError
from surgery.files import weight_fingerprint as sketch
from surgery.files.architecture import differences


def compose(deltas: Sequence[Delta], weights: Sequence[float] | None = None) -> Delta:
    """The dense delta sum_i weights[i] * deltas[i] (weights 1 when None), summed in fp32 in the order given.

    The parents' hashes, weights and recipes are recorded. Deltas may touch different tensors; where they
    touch the same one, their bases must be the same weights (equal hash, or distance within `sketch.SAME`:
    another dtype).

    Raises:
        SurgeryError: fewer than one delta, a weight that is not finite, a kind "module", unrelated bases.
    """
    weights = [1.0] * len(deltas) if weights is None else [float(weight) for weight in weights]
    if not deltas or len(weights) != len(deltas):
        raise SurgeryError(f"compose: {len(deltas)} deltas and {len(weights)} weights; give one weight per delta")
    if not np.isfinite(weights).all():
        raise SurgeryError(f"compose: the weights {weights} are not all finite; give a number for each delta")
    first = deltas[0].metadata
    tensors: dict[str, np.ndarray] = {}
    entries: dict[str, Any] = {}
    for delta, weight in zip(deltas, weights, strict=True):
        if delta.kind == "module":
            raise SurgeryError(
                "compose: a delta of kind 'module' holds new parts, which do not add up; load them one by one"
            )
        odd = differences(first["architecture"], delta.metadata["architecture"])
        if odd:
            raise SurgeryError(
                f"compose: the deltas have different bases ({odd[0]}); only deltas of the same base add up"
            )
        for name, shape in delta.shapes.items():
            entry = delta.metadata["tensors"][name]
            if name in entries:
                _same_base(name, entries[name], entry)
            entries.setdefault(name, entry)
            part = delta.read(name, 0, int(np.prod(shape))).reshape(shape) * np.float32(weight)
            tensors[name] = tensors[name] + part if name in tensors else part
    parents = [
        {
            "sha256": d.sha256,
            "weight": w,
            "kind": d.kind,
            "recipe": recipe_text(d.metadata),
            **({"recipes": said} if len(said := recipe_texts(d.metadata)) > 1 else {}),
            "seed": d.metadata["seed"],
        }
        for d, w in zip(deltas, weights, strict=True)
    ]
    metadata = {
        **{key: value for key, value in first.items() if key != "rounding"},  # the parts' measured one is not the sum's
        "kind": "dense",
        "tensors": entries,
        "recipe": "",
        "tool": f"model-surgery {__version__}",
        "parents": parents,
        "measured": {},  # the parts' effects are not the sum's
        "tokenizer": next((d.metadata["tokenizer"] for d in deltas if d.metadata["tokenizer"]), None),
    }
    return Delta(dict(sorted(tensors.items())), metadata)


def _same_base(name: str, left: dict[str, Any], right: dict[str, Any]) -> None:
    if left["shape"] != right["shape"]:
        raise SurgeryError(
            f"compose: {name} is {left['shape']} in one delta and {right['shape']} in another; "
            "only deltas of the same base add up"
        )
    if left["sha256"] == right["sha256"]:
        return
    sketches = [unpack_sketch(entry["sketch"]) for entry in (left, right)]
    gap = sketch.distance(sketches[1], right["norm"], sketches[0], left["norm"])
    if gap > sketch.SAME:
        raise SurgeryError(f"compose: the bases of {name} lie {gap:.3f} apart; only deltas of the same base add up")
