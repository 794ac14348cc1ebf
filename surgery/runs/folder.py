"""A run's folder: written as NAME.part by one process at a time, kept when it fails, renamed when it is complete."""

import fcntl
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooks.errors import HookError
from surgery import processes
from surgery.errors import SurgeryError
from surgery.files import atomic


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what ``run.json`` in it says."""

    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The folder of a run that is being written."""

    path: Path
    under_way: list[str] = field(default_factory=list)
    """The stage whose time is being taken."""

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``, with the time in seconds since the epoch."""
        if not processes.first():
            return
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Inside, the time is that of ``name`` in the log; a stage within another belongs to the outer one."""
        if self.under_way:
            yield
            return
        self.under_way.append(name)
        began = time.monotonic()
        try:
            yield
        finally:
            self.under_way.clear()
            self.log({"stage": name, "seconds": round(time.monotonic() - began, 3)})

    def seconds(self) -> dict[str, float]:
        """The time of each stage in the order of their beginnings, over all sittings of a run that was continued."""
        found: dict[str, float] = {}
        for line in (self.path / "log.jsonl").read_text("utf-8").splitlines():
            row = json.loads(line)
            if "stage" in row:
                found[row["stage"]] = round(found.get(row["stage"], 0.0) + row["seconds"], 3)
        return found

    def cost(self, peak: int | None) -> dict[str, Any]:
        """What ``run.json`` says of a run's cost: the seconds of its stages, and the peak memory of an accelerator."""
        return {"seconds": self.seconds()} | ({} if peak is None else {"peak_bytes": peak})

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of ``compute()``; a continued run takes it from the folder instead."""
        file = self.path / "state" / f"{name}.json"
        if processes.told(file.is_file):
            return json.loads(file.read_text("utf-8"))
        value = compute()
        if processes.first():
            atomic.write_json(file, value, indent=None)
        return processes.told(lambda: value)

    def state(self, name: str) -> Path:
        """A file that outlives an interruption and is gone from the finished run."""
        (self.path / "state").mkdir(exist_ok=True)
        return self.path / "state" / name


AGAIN = "surgery run {recipe} --out {out} --resume"


@contextmanager
def run_folder(out: Path, recipe: str, *, resume: bool = False, again: str = AGAIN) -> Iterator[Folder]:
    """Inside, write into ``Folder.path`` (``out`` with ``.part``); it becomes ``out`` at the end.

    Whatever ends it before, an interruption or any failure, what was finished stays in the ``.part`` folder and the
    error's line says so; only what is half written goes, and a failure before anything was finished leaves nothing.
    ``resume`` takes the folder up if its ``recipe.toml`` is the same; ``again`` is the command that does so. One
    process writes it at a time; of several that share a run (``surgery.processes``) the first one, and the others read.

    Raises ``SurgeryError`` when ``out`` or a ``.part`` stands in the way, or another process writes there.
    """
    if not processes.first():
        processes.wait()
        yield Folder(out.with_name(out.name + ".part"))
        processes.wait()
        return
    part = check_free(out, resume=resume)
    written = part / "recipe.toml"
    if resume and written.read_text("utf-8") != recipe:
        raise SurgeryError(
            f"{written}: another recipe than this one; resume with exactly its settings: "
            f"{again.format(recipe=written, out=out)}, or remove the folder"
        )
    try:
        part.mkdir(parents=True, exist_ok=resume)
    except OSError as error:
        raise SurgeryError(f"{part}: cannot be made ({error.strerror}); choose another --out") from None
    with _held(part):
        try:
            _drop_half_written(part)
            written.write_text(recipe, "utf-8")
            processes.wait()
            yield Folder(part)
            processes.wait()
            shutil.rmtree(part / "state", ignore_errors=True)
            part.rename(out)
        except KeyboardInterrupt:
            _drop_half_written(part)
            raise
        except BaseException as error:
            kept = _kept(part, again.format(recipe=written, out=out))
            if isinstance(error, OSError):
                where = f"{error.filename or part}: cannot be written ({error.strerror}); make room or choose --out"
                raise SurgeryError(f"{where}; {kept or 'nothing was finished, so nothing is left'}") from error
            if kept and isinstance(error, SurgeryError | HookError):
                raise type(error)(f"{error}; {kept}") from error
            if kept:
                error.add_note(kept)
            raise


def check_apart(out: Path, checkpoint: Path) -> None:
    """Raises ``SurgeryError`` where a run would be written into the checkpoint that it reads."""
    if out.resolve().is_relative_to(checkpoint.resolve()):
        raise SurgeryError(f"{out}: lies inside the checkpoint {checkpoint}; choose another --out")


def check_free(out: Path, *, resume: bool = False) -> Path:
    """The ``.part`` folder of a run that goes to ``out``.

    Raises ``SurgeryError`` when something stands in the way, or no folder can be made there.
    """
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise SurgeryError(f"{out}: exists; a run never overwrites one; choose another --out, or remove it")
    if part.exists():
        with _held(part, write=False):
            pass
    if part.exists() and not resume:
        raise SurgeryError(f"{part}: an interrupted run is here; continue it with --resume, or remove it")
    if resume and not (part / "recipe.toml").is_file():
        raise SurgeryError(f"{part}: nothing to resume; expected an interrupted run's folder; run without --resume")
    standing = next(folder for folder in part.absolute().parents if folder.exists())
    try:  # what may be written is seen by writing: permissions, read-only and special file systems
        tempfile.TemporaryDirectory(prefix=".surgery-", dir=standing).cleanup()
    except OSError as error:
        raise SurgeryError(f"{part}: cannot be made in {standing} ({error.strerror}); choose another --out") from None
    return part


@contextmanager
def _held(part: Path, *, write: bool = True) -> Iterator[None]:
    """Inside, no other process writes ``part``; the kernel lets it go when this process ends, however it ends."""
    pid = part / "state" / "pid"
    try:
        lock = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise SurgeryError(f"{part}: was finished or removed by another process at this moment; run it again") from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = f"process {pid.read_text()}" if pid.is_file() else "another process"
            raise SurgeryError(f"{part}: {holder} is writing this run; wait for it, or choose another --out") from None
        if not part.exists() or os.stat(part).st_ino != os.fstat(lock).st_ino:
            raise SurgeryError(f"{part}: was finished or removed by another process at this moment; run it again")
        if write:
            pid.parent.mkdir(exist_ok=True)
            pid.write_text(str(os.getpid()))
        yield
    finally:
        os.close(lock)


def _drop_half_written(part: Path) -> None:
    """Remove what a failed or killed step left half written: every writer here names it so until it is complete."""
    for pattern in ("*.json.part", "*.pt.part", f".*{atomic.SUFFIX}"):
        for path in list(part.rglob(pattern)):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _kept(part: Path, again: str) -> str:
    """What a failed run leaves, in words; "" and no folder if nothing in it was finished."""
    _drop_half_written(part)
    beside = {"recipe.toml", "log.jsonl", "pid"}
    if all(path.name in beside for path in part.rglob("*") if path.is_file()):
        shutil.rmtree(part, ignore_errors=True)
        return ""
    return f"what was finished is kept: go on with {again}, or remove {part}"
