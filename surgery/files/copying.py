"""Copy a checkpoint's files as cheaply as the file system allows, and make them durable."""

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock
from typing import Self

from surgery.errors import SurgeryError
from surgery.files.atomic import sync_folder

FICLONE = 0x40049409  # linux/fs.h: share the blocks until one side is written (btrfs, xfs, bcachefs)
PIECE = 16 * 2**20
_NO_CLONE = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


OnBytes = Callable[[int, int], None]


class Beside:
    """A second thread (`start`) beside this one, which share one count of the bytes that are done.

    Inside `with`; at its end the second thread has finished, after an exception it is stopped at the next piece.
    `progress` is called with (bytes done, bytes in all), from either thread but never at once.
    """

    def __init__(self, total: int, progress: OnBytes | None = None) -> None:
        self._total, self._progress, self._done = total, progress, 0
        self._lock, self._stop = Lock(), Event()
        self._thread = ThreadPoolExecutor(1)
        self._rest: Future[None] | None = None

    def start(self, work: Callable[[], None]) -> None:
        """Begin `work` in the second thread; once."""
        self._rest = self._thread.submit(work)

    def seen(self, count: int) -> None:
        """So many more bytes are done."""
        if self._stop.is_set():
            raise InterruptedError("stopped")
        with self._lock:
            self._done += count
            if self._progress:
                self._progress(self._done, self._total)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            self._stop.set()
        self._thread.shutdown(wait=True)
        if kind is None and self._rest is not None:
            self._rest.result()


class Copier(Beside):
    """Copies files of `source` into `out`, some at once (`copy`), the rest in the second thread.

    Files in `link` become hard links. Without `sync` the copies need not survive the machine.

    Raises:
        OSError: the disk is full, ...; SurgeryError: a hard link is impossible.
    """

    def __init__(
        self,
        source: Path,
        out: Path,
        link: frozenset[str],
        total: int,
        progress: OnBytes | None = None,
        *,
        sync: bool = True,
    ) -> None:
        super().__init__(total, progress)
        self._source, self._out, self._link, self._sync = source, out, link, sync

    def copy(self, names: Iterable[str]) -> None:
        """Copy now, in this thread."""
        for name in names:
            target = self._out / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if name in self._link:
                self._hard_link(name, target)
            else:
                copy_file(self._source / name, target, self.seen, sync=self._sync)

    def _hard_link(self, name: str, target: Path) -> None:
        source = self._source / name
        try:
            os.link(os.path.realpath(source), target)
        except OSError as error:
            raise SurgeryError(f"{source}: cannot be hard-linked ({error.strerror}); repeat without --link") from None
        self.seen(source.stat().st_size)


def outline(source: Path, target: Path, begin: int) -> None:
    """The first `begin` bytes of a file, then a hole as long as the rest of it."""
    fd = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with open(source, "rb") as file:
            write_exactly(fd, 0, memoryview(file.read(begin)))
        os.ftruncate(fd, source.stat().st_size)
    finally:
        os.close(fd)


def copy_file(source: Path, target: Path, seen: Callable[[int], None], *, sync: bool = True) -> None:
    """Content, mode and times: by reference where the file system can, else inside the kernel, else read and write.

    Without ``sync`` nothing is begun that makes it durable.
    """
    fd_in = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fd_out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            size = os.fstat(fd_in).st_size
            if not _clone(fd_in, fd_out):
                copy_range(fd_in, fd_out, size, seen, sync=sync)
            else:
                seen(size)
        finally:
            os.close(fd_out)
    finally:
        os.close(fd_in)
    shutil.copystat(source, target)


def _clone(fd_in: int, fd_out: int) -> bool:
    if sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(fd_out, FICLONE, fd_in)
    except OSError as error:
        if error.errno in _NO_CLONE:
            return False
        raise
    return True


def copy_range(
    fd_in: int,
    fd_out: int,
    size: int,
    seen: Callable[[int], None],
    *,
    start: int = 0,
    at: int = 0,
    sync: bool = True,
) -> None:
    """Copy `size` bytes from byte `start` to byte `at`, inside the kernel where it can.

    Raises ``SurgeryError`` where the source became shorter meanwhile.
    """
    done, in_kernel = 0, sys.platform == "linux"
    while done < size:
        count = min(PIECE, size - done)
        if in_kernel:
            try:
                moved = os.copy_file_range(fd_in, fd_out, count, start + done, at + done)
            except OSError as error:
                if error.errno not in _NO_CLONE:
                    raise
                in_kernel = False
                continue
        else:
            moved = os.pwrite(fd_out, os.pread(fd_in, min(count, 4 * 2**20), start + done), at + done)
        if moved == 0:
            raise SurgeryError(
                f"a source file became shorter while it was copied (at byte {start + done}); run it again"
            )
        # Begin to write this piece to the disk now, not at the fsync: Linux starts the write-back of dirty
        # pages that it is told will not be needed, and keeps them until they are written.
        if sync and sys.platform == "linux":
            os.posix_fadvise(fd_out, at + done, moved, os.POSIX_FADV_DONTNEED)
        done += moved
        seen(moved)


def sync_tree(out: Path, names: Collection[str]) -> None:
    """fsync the files `names` and all their folders, so that the rename after it publishes durable data."""
    for name in names:
        sync_file(out / name)
    for folder in sorted({(out / name).parent for name in names} | {out}):
        sync_folder(folder)


def sync_file(path: Path) -> None:
    """fsync one file."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_exactly(fd: int, offset: int, data: memoryview) -> None:
    """Write all of `data` at `offset` (a full disk writes a part first, then fails)."""
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written


def open_writable(path: Path) -> int:
    """A descriptor to patch a fresh copy, which may have come from a read-only file."""
    mode = path.stat().st_mode
    if not mode & 0o200:
        path.chmod(mode | 0o200)
        try:
            return os.open(path, os.O_RDWR | os.O_CLOEXEC)
        finally:
            path.chmod(mode)
    return os.open(path, os.O_RDWR | os.O_CLOEXEC)
