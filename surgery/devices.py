"""Where a model goes: the device and the dtype of a name, and whether the weights have room there."""

import ctypes
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from surgery import processes
from surgery.catalogue import check_device
from surgery.errors import NoRoom, SurgeryError
from surgery.files.safetensors_io import read_header

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def device_named(device: str | torch.device | None) -> torch.device:
    """The device of that name with its number; None is the accelerator where there is one, else the CPU.

    Without a number it is this process's own. Raises ``SurgeryError`` if it is absent.
    """
    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = device or own or torch.device("cpu")
    check_device(str(device))
    found = torch.device(device)
    count = torch.accelerator.device_count() if own else 0
    if found.type != "cpu" and (own is None or found.type != own.type or (found.index or 0) >= count):
        has = f"{count} of type {own.type}" if own else "none, or this torch was built without support for it"
        raise SurgeryError(f"device: got {str(device)!r}, but the accelerators here are: {has}; leave --device out")
    if own is None or found.type != own.type or found.index is not None:
        return found
    return torch.device(own.type, torch.accelerator.current_device_index())


def spread(device: str | torch.device | None) -> bool:
    """Whether the weights are to be spread over all accelerators ("all"), whole blocks on each.

    Raises ``SurgeryError`` where there is not more than one, or several processes would all do so.
    """
    if device != "all":
        return False
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < 2 or processes.wanted() > 1:
        shared = f" for {processes.wanted()} processes" if processes.wanted() > 1 else ""
        raise SurgeryError(
            f"device: all spreads one model over several accelerators; got {count} here{shared}; expected at least 2 "
            "for one process; leave --device out"
        )
    return True


def dtype_named(name: str) -> torch.dtype:
    """The torch dtype called ``name`` (float32, float16 or bfloat16); raises ``SurgeryError`` otherwise."""
    if name not in _DTYPES:
        raise SurgeryError(f"dtype: got {name!r}, expected one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def check_room(directory: Path, dtype: str | torch.dtype, places: Sequence[torch.device]) -> None:
    """Raises ``NoRoom`` where the weights alone are larger than what is free on the accelerators ``places``."""
    known = [free_memory(place) for place in places]
    free = None if None in known else sum(map(int, known))  # type: ignore[arg-type]
    if free is None or not any(directory.glob("*.safetensors")):
        return
    entries = [entry for file in directory.glob("*.safetensors") for entry in read_header(file).tensors.values()]
    count = sum(entry.elements for entry in entries)
    own = sum(entry.end - entry.begin for entry in entries)
    needed = own if isinstance(dtype, str) else count * dtype.itemsize
    if needed > free:
        raise NoRoom(
            f"{directory}: {count:,} numbers in {str(dtype).removeprefix('torch.')} are {needed / 1e9:.1f} GB, and "
            f"{' + '.join(map(str, places))} has {free / 1e9:.1f} GB free; expected all of them to fit there: take a "
            "16-bit dtype, a larger device, several (--device all), or --device cpu"
        )


def check_shares(directory: Path, held: Mapping[torch.device, int]) -> None:
    """Raises ``NoRoom`` where one accelerator has less room than its share of the weights, ``held`` (bytes)."""
    for place, needed in held.items():
        free = free_memory(place)
        if free is not None and needed > free:
            sums = ", ".join(f"{device} {size / 1e9:.1f}" for device, size in held.items())
            raise NoRoom(
                f"{directory}: {place} has {free / 1e9:.1f} GB free, expected {needed / 1e9:.1f} for its share of the "
                f"weights (GB: {sums}); end what else is there, or leave it out (CUDA_VISIBLE_DEVICES)"
            )


def peak_memory(place: torch.device) -> int | None:
    """The most bytes that were taken on one accelerator so far; None for the CPU."""
    if place.type == "cpu":
        return None
    return max(torch.accelerator.max_memory_allocated(number) for number in range(torch.accelerator.device_count()))


def free_memory(place: torch.device) -> int | None:
    """The bytes that are free on an accelerator; None for the CPU, and where a backend does not say.

    Raises ``NoRoom`` where so little is free that the driver cannot even begin on it.
    """
    if place.type != "cuda":
        return None
    try:
        return torch.cuda.mem_get_info(place)[0]
    except RuntimeError as error:  # of which each version of torch has its own kind
        said = (str(error).splitlines() or [""])[0][:120]
        raise NoRoom(
            f"{place}: does not answer how much of it is free ({said}); expected room for the weights: end what else "
            "is there, or take another (CUDA_VISIBLE_DEVICES), or --device cpu"
        ) from error


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for what comes next (blocks below half a gigabyte); elsewhere nothing changes.

    Else every step of a training gives 0.6 GB back and is given it anew, page by page: a tenth of its time on a CPU.
    """
    libc: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "mallopt"):
        for option, size in ((-3, 1 << 29), (-1, 2**31 - 1)):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
            libc.mallopt(option, size)
