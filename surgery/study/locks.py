"""Locks on the folders of a study, so that several processes can share it and two studies cannot meet in it."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from surgery.errors import SurgeryError


class BlockedError(SurgeryError):
    """Another process holds the lock."""


@contextmanager
def held(path: Path, *, shared: bool) -> Iterator[None]:
    """Inside, this process has the lock at ``path``; the kernel lets it go when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockedError(
                f"{path.parent}: another study is at work in this folder; wait for it, choose another --out, or start "
                "both with --share"
            ) from None
        yield
    finally:
        os.close(file)
