"""Write a file or a folder so that its name appears only when it is complete, and sweep what a killed run
left.

A temporary stands beside its destination and is locked with flock for as long as its process lives; the
kernel releases the lock when the process dies, however it dies, so a later run can tell rubbish from work in
progress.
"""

import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError

SUFFIX = ".surgery-part"


def check_destination(path: Path, *, overwrite: bool = False) -> None:
    """Refuse a destination that exists (a dangling link counts) or whose folder does not.

    Raises:
        SurgeryError
    """
    if path.is_symlink():
        raise SurgeryError(f"{path}: the destination is a symbolic link; name a path that does not exist")
    if os.path.lexists(path) and not (overwrite and path.is_file()):
        raise SurgeryError(f"{path}: the destination exists; choose another, or remove it yourself")
    if not path.parent.is_dir():
        raise SurgeryError(f"{path.parent}: no such folder for the destination; create it first")


@contextmanager
def temporary(destination: Path, *, folder: bool) -> Iterator[Path]:
    """A locked temporary beside `destination`, removed at exit unless it was renamed; sweeps stale ones first.

    Raises: SurgeryError for what the system refuses inside (the disk is full, ...); then nothing is left.
    """
    try:
        with _temporary(destination, folder) as path:
            yield path
    except OSError as error:
        at = f", {Path(str(error.filename)).name}" if error.filename else ""
        why = f"{error.strerror or error}{at}"
        raise SurgeryError(f"{destination}: writing failed ({why}); nothing was left behind") from None


@contextmanager
def _temporary(destination: Path, folder: bool) -> Iterator[Path]:
    sweep(destination.parent)
    path = destination.parent / f".{destination.name[:100]}.{secrets.token_hex(4)}{SUFFIX}"
    if folder:
        os.mkdir(path)
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    else:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        # A concurrent sweep may take the lock between creation and here; then its removal is our loss.
        fcntl.flock(lock, fcntl.LOCK_EX)
        if os.fstat(lock).st_nlink == 0:
            raise SurgeryError(f"{path}: another run swept it at the same moment; run the command again")
        yield path
    finally:
        if folder:
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(FileNotFoundError):
                os.unlink(path)
        os.close(lock)


def take(handle: int, refusal: str) -> None:
    """Lock an open file or folder for this process; the kernel gives it back when the handle goes, however that ends.

    Raises: SurgeryError, ``refusal``, where another process has it.
    """
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise SurgeryError(refusal) from None


def sweep(folder: Path) -> None:
    """Remove the temporaries in `folder` whose process is dead."""
    for name in os.listdir(folder):
        if not (name.startswith(".") and name.endswith(SUFFIX)):
            continue
        path = folder / name
        with suppress(OSError):  # gone meanwhile, or somebody else's
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            finally:
                os.close(fd)


def publish(temporary_path: Path, destination: Path, *, overwrite: bool = False) -> None:
    """Give the complete temporary its name, durably. Raises: SurgeryError if the name was taken meanwhile."""
    if not overwrite and os.path.lexists(destination):
        raise SurgeryError(f"{destination}: appeared while its content was being written; nothing was changed")
    os.rename(temporary_path, destination)
    sync_folder(destination.parent)


def sync_folder(path: Path) -> None:
    """fsync a directory, so that the names in it survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_outside(out: Path, source: Path) -> None:
    """Refuse a destination that exists or that lies inside the source. Raises: SurgeryError."""
    check_destination(out)
    if out.parent.resolve().is_relative_to(source.resolve()):
        raise SurgeryError(f"{out}: lies inside the checkpoint {source}; choose a folder elsewhere")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, complete or not at all, in place of one that stands there.

    Raises: SurgeryError for what the system refuses (the disk is full, ...), and a name of something else than a file.
    """
    path = Path(os.path.realpath(path))  # a link stays one
    if path.exists() and not path.is_file():
        raise SurgeryError(f"{path}: is no plain file, and none can take its place; choose another name")
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary(path, folder=False) as part:
        part.write_bytes(data)
        os.replace(part, path)


def write_text(path: Path, text: str) -> None:
    """The same of a text, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any, *, indent: int | None = 1) -> None:
    """The same of a JSON value, with sorted keys. Without ``indent`` it takes a tenth of the time."""
    write_text(path, json.dumps(value, indent=indent, sort_keys=True, allow_nan=False) + "\n")
