"""Deltas as PEFT LoRA adapters and back: an adapter directory in, an adapter directory out, without torch or
peft."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.delta.extract import make
from surgery.delta.format import Delta
from surgery.errors import SurgeryError
from surgery.files.architecture import is_embedding, read_json
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.copying import sync_tree
from surgery.files.rounding import STORED, widen
from surgery.files.safetensors_io import file_parts, open_regular, read_exactly, read_header
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
            "edit with its norms frozen, or drop such tensors and measure the result"
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


def import_peft(
    adapter: Path | str,
    checkpoint: Path | str,
    *,
    base: str | None = None,
    kind: str = "lora",
    recipe: str = "",
) -> Delta:
    """The delta of a PEFT LoRA adapter directory, for the checkpoint it was trained on.

    kind "lora" keeps the factors (alpha / r is folded into lora_B), "dense" multiplies them out.

    Raises:
        SurgeryError: no LoRA adapter; DoRA, trained biases or `modules_to_save`, which are no plain
            differences; a name that the checkpoint does not have; weights that are not plain floats.
    """
    adapter = Path(adapter)
    config = read_json(adapter / CONFIG)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise SurgeryError(f"{adapter / CONFIG}: not a LoRA adapter; expected peft_type LORA")
    if kind not in ("lora", "dense"):
        raise SurgeryError(f"kind {kind!r}: an adapter becomes 'lora' or 'dense'")
    _refuse_special(adapter, config)
    arrays = _adapter_tensors(adapter)
    pairs: dict[str, dict[str, np.ndarray]] = {}
    for name, array in arrays.items():
        stem, side = _split(name, adapter)
        pairs.setdefault(stem, {})[side] = array
    differences: dict[str, np.ndarray] = {}
    for module, pair in pairs.items():
        embedding = "embedding_A" in pair
        a, b = (pair.get(("embedding_" if embedding else "") + side) for side in "AB")
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:
            raise SurgeryError(f"{adapter / WEIGHTS}: {module!r} has no fitting pair of lora_A and lora_B")
        b = b * np.float32(_scaling(config, module, a.shape[0], adapter))
        left, right = (a.T, b.T) if embedding or config.get("fan_in_fan_out") else (b, a)
        if kind == "dense":
            differences[module + ".weight"] = left @ right
        else:
            differences[module + ".weight.lora_B"], differences[module + ".weight.lora_A"] = left, right
    name = base or str(config.get("base_model_name_or_path") or Path(checkpoint).name)
    return make(differences, checkpoint, base=name, recipe=recipe, seed=0, kind=kind)


def _refuse_special(adapter: Path, config: Mapping[str, Any]) -> None:
    if config.get("modules_to_save"):
        raise SurgeryError(
            f"{adapter / CONFIG}: modules_to_save ({', '.join(map(str, config['modules_to_save']))[:80]}) holds whole "
            "weights, which would replace a child's instead of adding to them; merge the adapter and use surgery diff"
        )
    for field in ("use_dora", "lora_bias", "alora_invocation_tokens", "trainable_token_indices"):
        if config.get(field):
            raise SurgeryError(f"{adapter / CONFIG}: {field} is not a plain difference; merge it and use surgery diff")
    if config.get("bias", "none") != "none":
        raise SurgeryError(f"{adapter / CONFIG}: bias {config['bias']!r}; merge the adapter and use surgery diff")


def _adapter_tensors(adapter: Path) -> dict[str, np.ndarray]:
    path = adapter / WEIGHTS
    header = read_header(path)
    arrays = {}
    fd = open_regular(path)
    try:
        for name, entry in header.tensors.items():
            if entry.dtype not in STORED:
                raise SurgeryError(f"{path}: {name!r} is {entry.dtype}; expected F32, F16 or BF16")
            raw = read_exactly(fd, entry.begin, entry.end - entry.begin, path)
            arrays[name] = widen(np.frombuffer(raw, STORED[entry.dtype]), entry.dtype).reshape(entry.shape)
    finally:
        os.close(fd)
    if not arrays:
        raise SurgeryError(f"{path}: holds no tensors")
    return arrays


def _split(name: str, adapter: Path) -> tuple[str, str]:
    for suffix, side in (
        (".lora_A.weight", "A"),
        (".lora_B.weight", "B"),
        (".lora_embedding_A", "embedding_A"),
        (".lora_embedding_B", "embedding_B"),
    ):
        if name.startswith(_ROOT) and name.endswith(suffix):
            return name[len(_ROOT) : -len(suffix)], side
    raise SurgeryError(f"{adapter / WEIGHTS}: {name[:80]!r} is no LoRA factor; merge the adapter and use surgery diff")


def _scaling(config: Mapping[str, Any], module: str, rank: int, adapter: Path) -> float:
    """alpha / r (Hu et al. 2021, section 4.1), or alpha / sqrt(r) (rsLoRA, Kalajdzievski 2023)."""
    alpha = config.get("lora_alpha")
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        # PEFT matches these patterns as regular expressions; only plain names are understood here.
        if module == pattern or module.endswith("." + pattern):
            alpha = value
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise SurgeryError(f"{adapter / CONFIG}: lora_alpha is {alpha!r}, expected a number")
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
