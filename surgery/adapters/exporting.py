"""A delta as a PEFT LoRA adapter directory; with a checkpoint at hand peft reads it back before it is left there."""

import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from surgery.adapters import CONFIG, ROOT, WEIGHTS
from surgery.delta.format import Delta
from surgery.errors import SurgeryError
from surgery.files.architecture import is_embedding
from surgery.files.atomic import check_destination, publish, temporary
from surgery.files.checkpoint_files import open_checkpoint, values
from surgery.files.converted import public_name
from surgery.files.copying import sync_tree
from surgery.files.safetensors_io import write_floats
from surgery.files.tensor_names import is_vocabulary

# transformers' Conv1D stores [in, out], the transpose of nn.Linear; PEFT calls that fan_in_fan_out.
SERVED_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's --max-lora-rank may be
_CONV1D_MODELS = ("gpt2", "imagegpt", "openai-gpt")
# Embeddings whose rows are no tokens; peft holds each nn.Embedding alike.
_POSITIONS = re.compile(r"(^|\.)(wpe|position_embeddings|embed_positions|token_type_embeddings)\.weight$")
# Experts that a checkpoint stores one by one, and their router: peft makes one parameter of them, of one rank.
_OF_EXPERTS = re.compile(r"\.experts\.\d+\.|\.gate$")


@dataclass(frozen=True)
class PeftReport:
    """An exported adapter. errors: ||difference - adapter|| / ||difference|| (Frobenius) per tensor; 0.0 is
    exact.

    dropped: the tensors that LoRA cannot hold (norms, biases), with their part of the delta's squared norm; saved:
    norms that went whole.
    """

    out: Path
    rank: int
    errors: dict[str, float]
    dropped: dict[str, float]
    saved: tuple[str, ...]
    bytes: int


def export_peft(
    delta: Delta,
    out: Path | str,
    *,
    rank: int | None = None,
    drop_vectors: bool = False,
    checkpoint: Path | str | None = None,
    served: bool = False,
) -> PeftReport:
    """Write the folder `out` with the delta as a LoRA adapter for `PeftModel.from_pretrained`.

    With `rank` R each matrix is cut to its R largest singular values (Eckart and Young 1936: the best of that
    rank); with None, or where R reaches the short side, the short side gets the identity and the adapter is
    exact. Norms, which are no product of factors, go whole, as base of `checkpoint` + difference (`modules_to_save`;
    on a sibling they replace its own). With `served` the adapter keeps to what vLLM, SGLang and llama.cpp load: one
    rank of at most 512, no whole modules, no embedding and no head.

    With a `checkpoint`, what peft makes of the adapter there is compared with the delta before it is published; without
    one, no torch is needed. Factors of experts, which peft joins by rules of its own, have one rank.

    Raises:
        SurgeryError: a tensor that LoRA cannot hold (norms and biases without a checkpoint, unless `drop_vectors`), a
            tied vocabulary matrix, kind "module", what servers do not load, a destination that exists; experts without
            a checkpoint, or an adapter that peft does not take or makes something else of.
    """
    out = Path(out)
    if delta.kind == "module":
        raise SurgeryError("a delta of kind 'module' holds new parts; a LoRA adapter cannot hold them")
    if rank is not None and rank < 1:
        raise SurgeryError(f"rank {rank}: expected at least 1, or none for an exact adapter")
    check_destination(out)
    saved = _saved(delta, checkpoint) if checkpoint is not None and not (drop_vectors or served) else {}
    dropped = _dropped(delta, drop_vectors, set(saved), checkpoint is None and not served)
    wrapped = _wrapped(delta, checkpoint)
    matrices = [name for name in delta.shapes if name not in {**dropped, **saved}]
    factors, errors = _factored(delta, matrices, rank, served)
    if not factors:
        raise SurgeryError(f"{out}: the delta has no matrix; there is nothing that LoRA can hold")
    ranks = {wrapped.module(name): right.shape[0] for name, (_, right) in factors.items()}
    highest = max(ranks.values())
    if served:
        _refuse_high(highest, out)
    if served or _of_experts(ranks, checkpoint):
        factors = {name: _padded(*both, highest) for name, both in factors.items()}
        ranks = dict.fromkeys(ranks, highest)
    transposed = delta.metadata["architecture"].get("model_type") in _CONV1D_MODELS
    arrays = {ROOT + wrapped.called(name): array for name, array in saved.items()}
    for name, both in factors.items():
        arrays |= _in_place(name, f"{ROOT}{wrapped.module(name)}", *both, transposed)
    whole = sorted({wrapped.called(name).rpartition(".")[0] for name in saved})
    config = _config(public_name(str(delta.metadata["base"])), ranks, transposed, whole, wrapped.task)
    with temporary(out, folder=True) as part:
        size = _write(part, config, arrays)
        if checkpoint is not None:
            from surgery.adapters.effect import refuse_unread  # which needs torch and peft

            refuse_unread(delta, part, checkpoint, math.hypot(max(errors.values()), sum(dropped.values()) ** 0.5))
        publish(part, out)
    return PeftReport(out, highest, errors, dropped, tuple(saved), size)


@dataclass(frozen=True)
class _Wrapped:
    """The model that peft wraps. called: its name for a tensor on disk. task: peft's word for what it does; None, which
    peft takes for every model, where it writes no text or is not known."""

    called: Callable[[str], str]
    task: str | None

    def module(self, name: str) -> str:
        """The module whose weight the tensor is."""
        return self.called(name).removesuffix(".weight")


def _wrapped(delta: Delta, checkpoint: Path | str | None) -> _Wrapped:
    """Without a checkpoint a tensor is called as on disk, behind the base's prefix.

    With one the model is asked; a text model inside another is called otherwise than it is stored (Gemma 3, Mistral 3).
    """
    prefix = str(delta.metadata["prefix"])
    if checkpoint is None:
        return _Wrapped(lambda name: prefix + name, None)
    from surgery.delta.naming import read_as, skeleton  # which needs transformers

    stored = open_checkpoint(checkpoint)
    model = skeleton(stored)
    held = dict(read_as(model, stored.places).plain)
    task = "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"
    return _Wrapped(lambda name: held.get(name, prefix + name), task if model.can_generate() else None)


def _factored(
    delta: Delta, names: Sequence[str], rank: int | None, served: bool
) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], dict[str, float]]:
    """The two factors of each matrix, left [rows, r] and right [r, columns], and their relative error."""
    factors, errors = {}, {}
    for name in names:
        if served and is_vocabulary(name):
            raise SurgeryError(f"{name}: servers load no adapter of embedding or head; make the edit without it")
        if is_vocabulary(name) and delta.metadata["architecture"].get("tied"):
            raise SurgeryError(
                f"{name}: embedding and head are tied in the base; adapters lose the tie, so this delta stays dense"
            )
        shape = delta.shapes[name]
        left, right, errors[name] = _factors(delta.read(name, 0, math.prod(shape)).reshape(shape), rank)
        factors[name] = left, right
    return factors, errors


def _of_experts(modules: Iterable[str], checkpoint: Path | str | None) -> bool:
    """Whether experts or their router are among the modules. Raises ``SurgeryError`` where so without a checkpoint."""
    found = next((module for module in modules if _OF_EXPERTS.search(module)), None)
    if found and checkpoint is None:
        raise SurgeryError(
            f"{found}: of experts and routers peft reads what its rules for the family allow; add --checkpoint "
            "CHECKPOINT, so that what it reads is compared with the delta"
        )
    return found is not None


def _in_place(name: str, module: str, left: np.ndarray, right: np.ndarray, transposed: bool) -> dict[str, np.ndarray]:
    """The factors of the tensor `name` under the names, and turned as, peft reads them for its `module`."""
    if is_embedding(name) or _POSITIONS.search(name):  # its product is transposed in PEFT: weight + (B @ A).T
        return {f"{module}.lora_embedding_A": left.T, f"{module}.lora_embedding_B": right.T}
    first, second = (left.T, right.T) if transposed else (right, left)
    return {f"{module}.lora_A.weight": first, f"{module}.lora_B.weight": second}


def _write(folder: Path, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
    """The adapter's two files, on the disk; their bytes."""
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    write_floats(folder / WEIGHTS, arrays)
    sync_tree(folder, [CONFIG, WEIGHTS])
    return sum(os.path.getsize(folder / name) for name in (CONFIG, WEIGHTS))


def _saved(delta: Delta, checkpoint: Path | str) -> dict[str, np.ndarray]:
    """The touched norms, weight and bias, whole: what the checkpoint holds plus the difference, fp32."""
    stored = open_checkpoint(checkpoint)
    found = {}
    for module in sorted({name.rpartition(".")[0] for name, shape in delta.shapes.items() if len(shape) == 1}):
        parts = [name for name in stored.places if name.startswith(f"{module}.")]
        if any(len(stored.entry(name).shape) != 1 or name.rpartition(".")[0] != module for name in parts):
            continue  # the bias of a matrix, or a vector of a whole attention (DiffLlama) or mixer (Mamba)
        for name in parts:
            size = stored.entry(name).elements
            found[name] = values(stored, name, 0, size)
            if name in delta.shapes and delta.shapes[name] != (size,):
                raise SurgeryError(
                    f"{stored.path}: {name!r} has {size} entries, the delta's base another number; it cannot fit"
                )
            if name in delta.shapes:
                found[name] = found[name] + delta.read(name, 0, size)
    return found


def _dropped(delta: Delta, drop_vectors: bool, saved: set[str], can_keep: bool) -> dict[str, float]:
    squares = {
        name: float(np.square(delta.read(name, 0, math.prod(shape)), dtype=np.float64).sum())
        for name, shape in delta.shapes.items()
    }
    total = sum(squares.values()) or 1.0
    vectors = {
        name: squares[name] / total
        for name, shape in delta.shapes.items()
        if not (len(shape) == 2 and name.endswith(".weight")) and name not in saved
    }
    if vectors and not drop_vectors:
        name = next(iter(vectors))
        whole = ", give --checkpoint CHECKPOINT to keep norms whole," if can_keep else ""
        step = f"make the edit with its norms frozen (--set block_part=matrices){whole}"
        if len(delta.shapes[name]) > 1:  # experts in one tensor, convolutions, matrices that belong to no module
            step = "make the edit without it (--set block_part=attention)"
        raise SurgeryError(
            f"{name}: LoRA holds matrices of modules only, this is of shape {list(delta.shapes[name])}; {step} or add "
            "--drop-vectors, and see what is lost"
        )
    return vectors


def _refuse_high(rank: int, out: Path) -> None:
    if rank > SERVED_RANKS[-1]:
        raise SurgeryError(
            f"{out}: rank {rank}; servers load at most {SERVED_RANKS[-1]} (vLLM's --max-lora-rank); add --rank 64"
        )


def _padded(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Both factors with zeros up to the rank that all share, where no rank of its own can be told."""
    more = (0, rank - right.shape[0])
    return np.pad(left, ((0, 0), more)), np.pad(right, (more, (0, 0)))


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


def _config(
    base: str, ranks: Mapping[str, int], transposed: bool, whole: list[str], task: str | None
) -> dict[str, Any]:
    highest = max(ranks.values())
    odd = {module: rank for module, rank in sorted(ranks.items()) if rank != highest}
    return {
        "peft_type": "LORA",
        "task_type": task,
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
        "modules_to_save": whole or None,
    }
