"""Weights on their way to accelerators: straight from the files through pinned memory, and which card holds what."""

import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.files.safetensors_io import Entry, read_header, read_into

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
PIECE = 32 * 2**20  # bytes; two such buffers a thread
TRAINED = 16  # bytes a trained number: a float32 copy, its gradient, Adam's two
_own = threading.local()


@dataclass(frozen=True)
class OnDisk:
    """A tensor that is read when it is asked for whole (``[...]``), as transformers does with safetensors' slices."""

    file: Path
    entry: Entry
    device: torch.device

    def __getitem__(self, _: Any) -> Tensor:
        """The tensor on its device, in the file's dtype."""
        out = torch.empty(self.entry.shape, dtype=DTYPES[self.entry.dtype], device=self.device)
        flat, size = out.view(-1).view(torch.uint8), self.entry.end - self.entry.begin
        if not hasattr(_own, "buffers"):
            _own.buffers = [torch.empty(PIECE, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
        stream, done = torch.cuda.Stream(self.device), [torch.cuda.Event(), torch.cuda.Event()]
        stream.wait_stream(torch.cuda.current_stream(self.device))  # memory that was freed there may still be in use
        fd = os.open(self.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with torch.cuda.device(self.device), torch.cuda.stream(stream):
                for number, start in enumerate(range(0, size, PIECE)):
                    count, turn = min(PIECE, size - start), number % 2
                    done[turn].synchronize()  # the copy out of this buffer
                    read_into(fd, memoryview(_own.buffers[turn].numpy())[:count], self.entry.begin + start, self.file)
                    flat[start : start + count].copy_(_own.buffers[turn][:count], non_blocking=True)
                    done[turn].record()
        finally:
            os.close(fd)
            stream.synchronize()
        return out


def on_disk(directory: Path, places: Mapping[str, torch.device]) -> dict[str, OnDisk] | None:
    """Every tensor of the checkpoint by its name, for ``from_pretrained(state_dict=...)``.

    ``places`` maps a module to its device, as a ``device_map`` does ("" for all). None for a checkpoint that holds
    anything but plain floats in safetensors files, which transformers reads itself.
    """
    files = sorted(directory.glob("*.safetensors"))
    found = {name: (file, entry) for file in files for name, entry in read_header(file).tensors.items()}
    other = (directory / "adapter_config.json").exists() or not files
    if other or any(entry.dtype not in DTYPES or not entry.elements for _, entry in found.values()):
        return None
    return {name: OnDisk(file, entry, _place(name, places)) for name, (file, entry) in found.items()}


def _place(name: str, places: Mapping[str, torch.device]) -> torch.device:
    """The device of the longest module name that the tensor stands in; any, where the model calls it otherwise."""
    parts = name.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((places[prefix] for prefix in prefixes if prefix in places), next(iter(places.values())))


def shares(
    model: nn.Module, dtype: torch.dtype, devices: list[torch.device]
) -> tuple[dict[str, torch.device], dict[torch.device, int]]:
    """A ``device_map`` of whole blocks in their order, and the bytes of weights that each device gets by it.

    All devices are filled alike when the last block trains. ``model`` may lie on "meta"; what has no weights stands on
    the first device.
    """
    units: list[tuple[str, int]] = []
    whole = set(getattr(model, "_no_split_modules", None) or ())

    def walk(name: str, module: nn.Module) -> None:
        children = list(module.named_children())
        if type(module).__name__ in whole or not children or any(True for _ in module.parameters(recurse=False)):
            units.append((name, sum(p.numel() for p in module.parameters())))
            return
        for child, inner in children:
            walk(f"{name}.{child}" if name else child, inner)

    walk("", model)
    size = dtype.itemsize
    room = TRAINED * max((count for name, count in units if name.rpartition(".")[2].isdigit()), default=0)
    share = (size * sum(count for _, count in units) + room) / len(devices)
    found, filled, held = {}, 0, dict.fromkeys(devices, 0)
    for name, count in units:
        number = min(len(devices) - 1, int((filled + size * count / 2) / share))
        found[name] = devices[number if count else 0]
        filled += size * count
        held[found[name]] += size * count
    return found, held
