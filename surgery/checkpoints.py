"""Open a checkpoint (directory, hub name, GGUF file or the packaged demo model) as a plain model and tokenizer."""

import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from surgery.delta import Delta, DeltaFile
from surgery.delta.live import attached, restored, touched
from surgery.devices import check_room, check_shares, device_named, dtype_named, spread
from surgery.errors import NoRoom, SurgeryError
from surgery.files.ahead import in_order
from surgery.files.architecture import read_json
from surgery.files.checkpoint_files import check_shards, open_checkpoint, values
from surgery.files.converted import check_model, converted, demo_gguf, parsed_once
from surgery.files.gguf import open_gguf
from surgery.files.tensor_names import is_leftover
from surgery.weights import on_disk, shares

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


def load(
    spec: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device | None = None,
    deltas: Iterable[str | Path] = (),
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open ``spec`` as a plain Hugging Face model, in evaluation mode, and its tokenizer.

    ``spec`` is a directory, a hub name, a ``.gguf`` file or ``"demo"``. The default dtype is float32 whatever
    the file holds: bf16 and fp16 weights are represented exactly, and scores do not depend on the machine's
    half-precision kernels; ``"auto"`` keeps the checkpoint's own. ``device`` defaults to the accelerator where
    there is one; "all" spreads the blocks over all of them. ``deltas`` are applied in memory, in order; the module of
    one of kind "module" is put into the model.

    Raises ``SurgeryError`` when nothing that can be opened stands at ``spec``.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_named(dtype)
    count = torch.accelerator.device_count() if spread(device) else 0
    every = [device_named(f"{torch.accelerator.current_accelerator()}:{number}") for number in range(count)]
    places = every or [device_named(device)]
    edits = [Delta.load(Path(path)) for path in deltas]
    directory = checkpoint_dir(spec)
    own = read_json(directory / "config.json")
    if not isinstance(own, dict):
        raise SurgeryError(f"{directory / 'config.json'}: not a JSON object; the file is broken, get it again")
    if "auto_map" in own:
        raise SurgeryError(
            f"{directory}: this checkpoint brings its own code (auto_map), which is not run; open it with transformers "
            "and trust_remote_code=True, or give the base checkpoint and the delta"
        )
    check_shards(directory)
    check_room(directory, dtype, places)
    model, tokenizer = _open(directory, dtype, places)
    model.eval()
    for delta in edits:
        delta.apply(model)
    return model, tokenizer


def _open(
    directory: Path, dtype: str | torch.dtype, places: Sequence[torch.device]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, as transformers reads them, whose load report was read. Raises ``SurgeryError``.

    On an accelerator every tensor goes there as it is read, so that no second copy of the weights is made; on several,
    each holds whole blocks.
    """
    import transformers

    level = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()  # the report is read here, and told in one line
    try:
        config = AutoConfig.from_pretrained(directory)
        options: Any = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
        kind: Any = model_class(config)
        model, report = _read(kind, directory, config, places, options)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except ImportError as error:
        raise SurgeryError(
            f"{directory}: needs a package that is not installed here ({_first_line(error)}); install it, or give a "
            "checkpoint that does without (unquantised, with the default attention)"
        ) from error
    except SurgeryError:
        raise
    except torch.OutOfMemoryError as error:
        where = ", ".join(map(str, places))
        raise NoRoom(f"{directory}: does not go onto {where} ({_first_line(error)}); try cpu") from error
    except Exception as error:  # whatever a damaged or unknown checkpoint makes transformers raise
        raise SurgeryError(
            f"{directory}: transformers cannot open this checkpoint ({_first_line(error)}); expected config.json, "
            "*.safetensors weights and tokenizer files in Hugging Face form; download or convert it again"
        ) from error
    finally:
        transformers.utils.logging.set_verbosity(level)
    _read_report(directory, model, report)
    return model, tokenizer


def _read(kind: Any, directory: Path, config: Any, places: Sequence[torch.device], options: dict[str, Any]) -> Any:
    """``kind.from_pretrained``; onto CUDA devices the weights go straight from the files."""
    if places[0].type == "cpu":
        return kind.from_pretrained(directory, **options)
    tied, dtype = config.get_text_config().tie_word_embeddings, options["dtype"]
    places_of: Any = {"": places[0]}
    if places[1:] and (tied or not isinstance(dtype, torch.dtype)):
        places_of = "balanced"  # accelerate knows which modules have to stand together
    elif places[1:]:
        with torch.device("meta"):
            places_of, held = shares(kind(config), dtype, list(places))
        check_shares(directory, held)
    options = options | {"device_map": places_of}
    plain = isinstance(dtype, torch.dtype) and not getattr(config, "quantization_config", None)
    tensors = on_disk(directory, places_of) if plain and places_of != "balanced" and places[0].type == "cuda" else None
    if tensors is None:
        return kind.from_pretrained(directory, **options)
    model, report = kind.from_pretrained(None, config=config, state_dict=tensors, **options)
    if (directory / "generation_config.json").exists():  # which comes with a directory, not with a state_dict
        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model, report


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that wrote the checkpoint; where the config names none that transformers has, the causal one."""
    import transformers

    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:
        named = AutoModelForCausalLM._model_mapping[type(config)]
    return named


def _read_report(directory: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raises ``SurgeryError`` unless every tensor of the model is in the files, and the files hold no more of it."""
    for name, stored, wanted in sorted(report["mismatched_keys"]):
        raise SurgeryError(
            f"{directory}: {name!r} has shape {list(stored)} in the weights, {list(wanted)} by config.json; they do "
            "not belong together, get the checkpoint again"
        )
    known = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    missing = sorted(name for name in report["missing_keys"] if not is_leftover(name, known.get(name, ())))
    if missing:
        raise SurgeryError(
            f"{directory}: the weights lack {missing[0]!r} ({len(missing)} of the model's {len(known)} tensors), which "
            "would be drawn at random; get or merge the checkpoint again"
        )
    modules = dict(model.named_modules())
    extra = sorted(name for name in report["unexpected_keys"] if not is_leftover(name, (1, 1, 1, 1)))
    inside = [name for name in extra if name.rpartition(".")[0] in modules and "." in name]
    if inside:
        raise SurgeryError(
            f"{directory}: the weights hold {inside[0]!r}, which the model that config.json describes has no use for "
            f"({len(extra)} such tensors); it would compute something else without it, so correct config.json"
        )
    if extra:
        print(f"{directory}: left out, not of {type(model).__name__}: {_listed(extra)}", file=sys.stderr, flush=True)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"


def checkpoint_dir(spec: str | Path, *, note: Callable[[str], None] | None = None) -> Path:
    """The local directory that holds ``spec`` as a plain Hugging Face checkpoint, made once where needed.

    A GGUF file is dequantised once into a cache directory (``SURGERY_CACHE``, default
    ``~/.cache/model-surgery``) as a bf16 checkpoint; a hub name is downloaded by ``huggingface_hub``.
    ``note`` receives the one line that is said before long work.

    Raises ``SurgeryError``.
    """
    check_model(spec)
    path = demo_gguf() if str(spec) == "demo" else Path(spec).expanduser()
    if path.is_dir():
        return path
    return _from_gguf(path, note) if path.suffix == ".gguf" else _from_hub(str(spec))


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise SurgeryError(
            f"{name}: no such directory here, and the hub did not give it ({_first_line(error)}); "
            "check the name, the network, or give a local directory"
        ) from error


def _from_gguf(path: Path, note: Callable[[str], None] | None) -> Path:
    part_of = _SPLIT.search(path.name)
    if part_of:
        raise SurgeryError(
            f"{path}: part {int(part_of[1])} of {int(part_of[2])} of a split GGUF file; join the parts first: "
            "llama-gguf-split --merge FIRST_PART JOINED.gguf"
        )
    target = converted(path)
    if target.is_dir():
        return target
    open_gguf(path)  # a damaged file is told in this project's words, not in those of the reader that trips over it
    line = f"dequantising {path.name} once into {target} (seconds for a small model)"
    (note or (lambda text: print(text, file=sys.stderr, flush=True)))(line)
    part = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        _convert_gguf(path, part)
        try:
            part.rename(target)
        except OSError:
            # Another process finished the same conversion first; its directory is as good as ours.
            if not target.is_dir():
                raise
    except Exception as error:  # whatever a damaged or unknown file makes the readers raise
        raise SurgeryError(
            f"{path}: could not be converted ({_first_line(error)}); expected a GGUF file of a decoder-only model "
            "that transformers can dequantise, and room on the disk; check the file"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _convert_gguf(path: Path, out: Path) -> None:
    """Write the GGUF file ``path`` as a bf16 Hugging Face checkpoint into ``out``."""
    quiet = nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())  # the libraries' bar
    with parsed_once():
        with quiet:
            model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    # transformers refuses to save a model that still carries the mark of its quantised source.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    for mark in ("hf_quantizer", "quantization_method", "is_quantized"):
        model.__dict__.pop(mark, None)
    model.config._name_or_path = path.stem
    nn.Module.to(model, torch.bfloat16)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:200]


@contextmanager
def tensors_of(model: PreTrainedModel, delta: Delta | DeltaFile, directory: Path) -> Iterator[None]:
    """Inside, the tensors that ``delta`` touches hold what the checkpoint in ``directory`` holds; then they return.

    With ``directory`` the result of applying ``delta`` to the checkpoint of ``model``, the model is that saved
    checkpoint inside, rounding included, without a second model in memory. A module of the delta stands in it, too.
    """
    stored = open_checkpoint(directory)
    if isinstance(delta, DeltaFile) and delta.kind == "module":
        delta = Delta.load(delta.path)
    with restored(delta, model), attached(delta, model) if isinstance(delta, Delta) else nullcontext():
        found = touched(delta, model)
        every = in_order(lambda name: values(stored, name, 0, math.prod(delta.shapes[name])), delta.shapes)
        for (name, shape), numbers in zip(delta.shapes.items(), every, strict=True):
            found.write({name: torch.from_numpy(numbers).reshape(shape)})
        yield
