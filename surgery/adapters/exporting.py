"""A delta as a PEFT LoRA adapter directory, written without torch or peft."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.delta.format import Delta
from surgery.errors import SurgeryError
from surgery.files.architecture import is_embedding
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.copying import sync_tree
from surgery.files.safetensors_io import file_parts
from surgery.files.tensor_names import is_vocabulary

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
# transformers' Conv1D stores [in, out], the transpose of nn.Linear; PEFT calls that fan_in_fan_out.
_CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt")


@dataclass(frozen=True)
class PeftReport:
    """An exported adapter. errors: ||difference - adapter|| / ||difference|| (Frobenius) per tensor; 0.0 is
    exact.

    dropped: the tensors that LoRA cannot hold (norms, biases), with their part of the delta's squared norm.
    """

    out: Path
    rank: int
    errors: dict[str, float]
    dropped: dict[str, float]
    bytes: int


def export_peft(delta: Delta, out: Path | str, *, rank: int | None = None, drop_vectors: bool = False) -> PeftReport:
    """Write the folder `out` with the delta as a LoRA adapter for `PeftModel.from_pretrained`.

    With `rank` R each matrix is cut to its R largest singular values (Eckart and Young 1936: the best of that
    rank); with None, or where R reaches the short side, the short side gets the identity and the adapter is
    exact.

    Raises:
        SurgeryError: a tensor that LoRA cannot hold (unless `drop_vectors`, for norms and biases), a tied
            vocabulary matrix, kind "module", a destination that exists.
    """
    out = Path(out)
    if delta.kind == "module":
        raise SurgeryError("a delta of kind 'module' holds new parts; a LoRA adapter cannot hold them")
    if rank is not None and rank < 1:
        raise SurgeryError(f"rank {rank}: expected at least 1, or none for an exact adapter")
    check_destination(out)
    dropped = _dropped(delta, drop_vectors)
    facts = delta.metadata["architecture"]
    transposed = facts.get("model_type") in _CONV1D_MODELS
    arrays: dict[str, np.ndarray] = {}
    errors, ranks = {}, {}
    for name, shape in delta.shapes.items():
        if name in dropped:
            continue
        if is_vocabulary(name) and facts.get("tied"):
            raise SurgeryError(
                f"{name}: embedding and head are tied in the base; adapters lose the tie, so this delta stays dense"
            )
        left, right, errors[name] = _factors(delta.read(name, 0, math.prod(shape)).reshape(shape), rank)
        module = delta.metadata["prefix"] + name.removesuffix(".weight")
        ranks[module] = right.shape[0]
        key = f"{_ROOT}{module}.lora_"
        if is_embedding(name):  # the embedding's product is transposed in PEFT: weight + (B @ A).T
            arrays[key + "embedding_A"], arrays[key + "embedding_B"] = left.T, right.T
        elif transposed:
            arrays[key + "A.weight"], arrays[key + "B.weight"] = left.T, right.T
        else:
            arrays[key + "A.weight"], arrays[key + "B.weight"] = right, left
    if not arrays:
        raise SurgeryError(f"{out}: the delta has no matrix; there is nothing that LoRA can hold")
    highest = max(ranks.values())
    config = _config(delta.metadata["base"], ranks, highest, transposed)
    spec = {name: ("F32", array.shape) for name, array in arrays.items()}

    def data(name: str) -> list[memoryview]:
        return [np.ascontiguousarray(arrays[name], "<f4").reshape(-1).view(np.uint8).data]

    try:
        with temporary(out, folder=True) as part:
            (part / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
            with open(part / WEIGHTS, "wb") as file:
                file.writelines(file_parts(spec, {"format": "pt"}, data))
            size = sum(os.path.getsize(part / name) for name in (CONFIG, WEIGHTS))
            sync_tree(part, [CONFIG, WEIGHTS])
            publish(part, out)
    except OSError as error:
        raise SurgeryError(f"{out}: writing failed ({error.strerror or error}); nothing was left behind") from None
    return PeftReport(out, highest, errors, dropped, size)


def _dropped(delta: Delta, drop_vectors: bool) -> dict[str, float]:
    squares = {
        name: float(np.square(delta.read(name, 0, math.prod(shape)), dtype=np.float64).sum())
        for name, shape in delta.shapes.items()
    }
    total = sum(squares.values()) or 1.0
    vectors = {name: squares[name] / total for name, shape in delta.shapes.items() if len(shape) != 2}
    if vectors and not drop_vectors:
        name = next(iter(vectors))
        raise SurgeryError(
            f"{name}: LoRA holds matrices only, this is of shape {list(delta.shapes[name])}; make the "
            "edit with its norms frozen, or add --drop-vectors and measure the result"
        )
    return vectors


def _factors(difference: np.ndarray, rank: int | None) -> tuple[np.ndarray, np.ndarray, float]:
    """(left [rows, r], right [r, columns], relative Frobenius error) with difference ~ left @ right."""
    rows, columns = difference.shape
    if rank is None or rank >= min(rows, columns):
        if rows <= columns:
            return np.eye(rows, dtype=np.float32), difference, 0.0
        return difference, np.eye(columns, dtype=np.float32), 0.0
    u, s, v = np.linalg.svd(difference, full_matrices=False)
    root = np.sqrt(s[:rank])
    left, right = u[:, :rank] * root, root[:, None] * v[:rank]
    norm = float(np.linalg.norm(difference))
    error = float(np.linalg.norm(difference - left @ right)) / norm if norm else 0.0
    return left.astype(np.float32), right.astype(np.float32), error


def _config(base: str, ranks: Mapping[str, int], highest: int, transposed: bool) -> dict[str, Any]:
    odd = {module: rank for module, rank in sorted(ranks.items()) if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": highest,
        "lora_alpha": highest,  # alpha = r: scaling 1, per module too
        "rank_pattern": odd,
        "alpha_pattern": odd,
        "target_modules": sorted(ranks),
        "fan_in_fan_out": transposed,
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
    }
