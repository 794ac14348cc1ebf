"""A run's folder: written as NAME.part, renamed when it is complete; an interrupted one can be continued."""

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.files.atomic import write_json


@dataclass(frozen=True)
class Run:
    """A finished run: its folder and what ``run.json`` in it says."""

    folder: Path
    summary: dict[str, Any]


@dataclass(frozen=True)
class Folder:
    """The folder of a run that is being written."""

    path: Path

    def log(self, row: dict[str, Any]) -> None:
        """Append one line to ``log.jsonl``, with the time in seconds since the epoch."""
        with (self.path / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"time": round(time.time(), 3), **row}) + "\n")

    def once(self, name: str, compute: Callable[[], Any]) -> Any:
        """The JSON value of ``compute()``; a continued run takes it from the folder instead."""
        file = self.path / "state" / f"{name}.json"
        if file.is_file():
            return json.loads(file.read_text("utf-8"))
        value = compute()
        write_json(file, value)
        return value

    def state(self, name: str) -> Path:
        """A file that outlives an interruption and is gone from the finished run."""
        (self.path / "state").mkdir(exist_ok=True)
        return self.path / "state" / name


@contextmanager
def run_folder(out: Path, recipe: str, *, resume: bool = False) -> Iterator[Folder]:
    """Inside, write into ``Folder.path`` (``out`` with ``.part``); it becomes ``out`` at the end.

    An interruption (Ctrl-C, a kill) leaves the ``.part`` folder, which ``resume`` takes up if its ``recipe.toml``
    is the same; any other failure removes it. Raises ``SurgeryError`` when ``out`` or a ``.part`` stands in the way.
    """
    part = check_free(out, resume=resume)
    written = part / "recipe.toml"
    if resume and written.read_text("utf-8") != recipe:
        raise SurgeryError(
            f"{written}: another recipe than this one; resume with exactly its settings: surgery run {written} "
            f"--resume --out {out}, or remove the folder"
        )
    try:
        part.mkdir(parents=True, exist_ok=resume)
        written.write_text(recipe, "utf-8")
        yield Folder(part)
        shutil.rmtree(part / "state", ignore_errors=True)
        part.rename(out)
    except KeyboardInterrupt:
        raise
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        where = error.filename or part
        raise SurgeryError(
            f"{where}: cannot be written ({error.strerror}); nothing was left; make room or choose --out"
        ) from error
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def check_free(out: Path, *, resume: bool = False) -> Path:
    """The ``.part`` folder of a run that goes to ``out``; raises ``SurgeryError`` when something stands in the way."""
    part = out.with_name(out.name + ".part")
    if out.exists():
        raise SurgeryError(f"{out}: exists; a run never overwrites one; choose another --out, or remove it")
    if part.exists() and not resume:
        raise SurgeryError(f"{part}: an interrupted run is here; continue it with --resume, or remove it")
    if resume and not (part / "recipe.toml").is_file():
        raise SurgeryError(f"{part}: nothing to resume; expected an interrupted run's folder; run without --resume")
    return part
