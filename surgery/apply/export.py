"""A checkpoint with the module in it as a directory that transformers opens without this package."""

import inspect as python_inspect
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hooks.errors import HookError
from surgery.apply.engine import apply
from surgery.apply.plan import check_architecture
from surgery.delta.format import Delta
from surgery.errors import SurgeryError
from surgery.files.architecture import read_json
from surgery.files.atomic import check_outside, publish, temporary
from surgery.files.checkpoint_files import INDEX, SINGLE, CheckpointFiles, open_checkpoint
from surgery.files.copying import Copier, sync_tree
from surgery.files.rounding import Rounding
from surgery.files.safetensors_io import write_floats
from surgery.modules.cross_attention import modeling_crawd
from surgery.modules.cross_attention.reference import NAME, place_of

CODE = "modeling_crawd.py"
SHARD = "model-crawd.safetensors"
RENAMED = "model-base.safetensors"  # SINGLE itself would be opened alone
_IMPORT = "from torch import Tensor, nn\n"
# The auto classes that a model's class can be opened with, by the table in which transformers lists it.
_AUTO = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
}


@dataclass(frozen=True)
class ExportReport:
    """An exported directory: what opens it, its bytes, the module's parameters, and the base entries that changed."""

    out: Path
    auto_class: str
    bytes: int
    parameters: int
    changed: int
    lost: int


def export_transformers(
    delta: Delta,
    checkpoint: Path | str,
    out: Path | str,
    *,
    scale: float = 1.0,
    rounding: Rounding = "auto",
    seed: int | None = None,
    force: bool = False,
) -> ExportReport:
    """Write the folder `out`: the checkpoint with the delta's differences added and its module beside them.

        AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)  # needs torch and transformers alone

    The weights are copied and changed on disk as `surgery.apply` does it (`scale`, `rounding`, `seed` and `force` are
    its), the module is one more shard in float32, its code a file, and config.json gets a model type of its own, so
    that no program opens the directory as the unedited model by mistake. The tokenizer and all other files come along.

    Raises:
        SurgeryError: a delta without a module, a checkpoint that it does not fit or whose class is not one of
            transformers' own; then nothing was created.
    """
    out = Path(out)
    if delta.kind != "module":
        raise SurgeryError(
            f"a delta of kind {delta.kind!r} has no module; a plain checkpoint holds it: surgery apply DELTA "
            "CHECKPOINT --out DIR"
        )
    if delta.metadata["module"]["type"] != "cross_attention":
        raise SurgeryError(
            f"a module of type {delta.metadata['module']['type']!r} cannot be exported for transformers; expected a "
            "cross-attention; open the edited model in Python: surgery.load(CHECKPOINT, deltas=[FILE])"
        )
    stored = open_checkpoint(checkpoint)
    check_outside(out, stored.path)
    base, auto_class = _model_class(stored)
    check_architecture(delta, stored)
    settings = {key: value for key, value in delta.metadata["module"].items() if key != "type"}
    settings["place"] = _place(stored, base, settings["width"])
    with temporary(out, folder=True) as part:
        folder, changed, lost = part / "model", 0, 0
        if (plain := delta.differences) is None:
            _copy(stored, folder)
        else:
            options: Any = {"scale": scale, "rounding": rounding, "seed": seed, "force": force}
            report = apply(plain, stored.path, folder, undo="none", **options)
            changed, lost = report.changed, report.lost
        module = delta.module | {"fusion.weight": delta.module["fusion.weight"] * np.float32(scale)}
        _add_shard(folder, stored, module)
        (folder / CODE).write_text(_code(base), encoding="utf-8")
        _write_json(folder / "config.json", _config(stored, base, auto_class, settings))
        _name_tokenizer(folder, stored)
        names = [name for name in os.listdir(folder) if (folder / name).is_file()]
        sync_tree(folder, names)
        size = sum((folder / name).stat().st_size for name in names)
        publish(folder, out)
    parameters = sum(array.size for name, array in module.items() if name != "reference")
    return ExportReport(out, auto_class, size, parameters, changed, lost)


def _model_class(stored: CheckpointFiles) -> tuple[type, str]:
    """The checkpoint's class in transformers, and the auto class that opens it."""
    import transformers
    from transformers.models.auto import modeling_auto

    if "auto_map" in stored.config or CODE in stored.files:
        raise SurgeryError(
            f"{stored.path}: this checkpoint brings its own code (auto_map); expected one of transformers' own classes"
        )
    name = (stored.config.get("architectures") or [""])[0]
    for auto_class, table in _AUTO.items():
        if name and name in getattr(modeling_auto, table).values():
            return getattr(transformers, name), auto_class
    raise SurgeryError(
        f"{stored.path}: its config.json names the class {name!r}; expected a causal, encoder-decoder or masked "
        "language model, or a sequence classifier, of transformers"
    )


def _place(stored: CheckpointFiles, base: type, width: int) -> str:
    """The module that returns H_x, found on a model without weights."""
    from transformers import AutoConfig

    from hooks.anatomy import find

    with torch.device("meta"):
        model = base(AutoConfig.from_pretrained(stored.path)).to(torch.bfloat16)  # what mixtures of experts need there
    try:
        found = find(model).d_model
        place = place_of(model)
    except HookError as error:
        raise SurgeryError(f"{stored.path}: {error}") from error
    if found != width:
        raise SurgeryError(
            f"{stored.path}: its hidden states have width {found}, the module's have {width}; expected a checkpoint of "
            "the same architecture as the one it was trained on"
        )
    return place


def _copy(stored: CheckpointFiles, folder: Path) -> None:
    folder.mkdir()
    total = sum((stored.path / name).stat().st_size for name in stored.files)
    with Copier(stored.path, folder, frozenset(), total) as copier:
        copier.copy(stored.files)


def _add_shard(folder: Path, stored: CheckpointFiles, module: dict[str, np.ndarray]) -> None:
    """The module's tensors as a file of their own, and the index that names all tensors."""
    arrays = {f"{NAME}.{name}": array for name, array in sorted(module.items())}
    write_floats(folder / SHARD, arrays)
    places = dict(stored.places)
    if set(places.values()) == {SINGLE}:
        os.rename(folder / SINGLE, folder / RENAMED)
        places = dict.fromkeys(places, RENAMED)
    places |= dict.fromkeys(arrays, SHARD)
    size = sum(header.file_bytes for header in stored.shards.values()) + sum(array.nbytes for array in arrays.values())
    _write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))})


def _config(stored: CheckpointFiles, base: type, auto_class: str, settings: dict[str, Any]) -> dict[str, Any]:
    code = CODE.removesuffix(".py")
    return stored.config | {
        "architectures": [f"Crawd{base.__name__}"],
        "auto_map": {"AutoConfig": f"{code}.CrawdConfig", auto_class: f"{code}.Crawd{base.__name__}"},
        "model_type": _model_type(base),
        "crawd": settings,
    }


def _name_tokenizer(folder: Path, stored: CheckpointFiles) -> None:
    """Name the tokenizer's class: transformers corrects what some checkpoints name, by a model type it knows."""
    from transformers import AutoTokenizer

    file = "tokenizer_config.json"
    if file in stored.files:
        known = type(AutoTokenizer.from_pretrained(stored.path)).__name__
        _write_json(folder / file, read_json(stored.path / file) | {"tokenizer_class": known})


def _model_type(base: Any) -> str:
    return f"crawd_{base.config_class.model_type}"


def _code(base: Any) -> str:
    """The module's code with the two classes of this checkpoint behind it."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    source = python_inspect.getsource(modeling_crawd)
    config, own = base.config_class, f"Crawd{base.__name__}"
    parents = f"from transformers import {config.__name__}, {base.__name__}\n"
    classes = f"""

class CrawdConfig({config.__name__}):
    model_type = "{_model_type(base)}"


class {own}(CrossAttended, {base.__name__}):
    config_class = CrawdConfig
"""
    if get_checkpoint_conversion_mapping(config.model_type) is not None:
        # transformers joins the experts of such checkpoints while it reads them, by the config's model type.
        names = "get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping"
        parents += f"from transformers.conversion_mapping import {names}\n"
        known = f'get_checkpoint_conversion_mapping("{config.model_type}")'
        classes += f'\n\nregister_checkpoint_conversion_mapping("{_model_type(base)}", {known}, overwrite=True)\n'
    return source.replace(_IMPORT, _IMPORT + parents, 1).rstrip() + "\n" + classes


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.unlink(missing_ok=True)  # it may be a copy of a read-only file
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
