"""Building a gradient index: shard by shard, by any number of processes, and going on after a kill."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch

from hooks.gradient_influence import Projected
from surgery.attribution.index import (
    DTYPES,
    FACTS,
    FORMAT,
    NAMES,
    described,
    differing,
    file_of,
    files_of,
    read_manifest,
    short,
    text_hash,
)
from surgery.errors import SurgeryError
from surgery.files.atomic import check_destination, sync_folder, take, write_json
from surgery.progress import Advance

SHARD = 256  # texts: a killed build loses less than this much work, and processes wait for each other at most so long
Texts = Callable[[], Iterable[str]]  # opens the texts anew, from the first one


class Rows(Protocol):
    """Where the rows come from; ``surgery.attribution.source.Source`` is one."""

    def describe(self) -> dict[str, Any]:
        """Fingerprints and settings, as JSON values; ``["projection"]["dim"]`` is the length of a row."""

    def check(self, texts: Iterable[str]) -> None:
        """Raises for a text that gives no row."""

    def __call__(self, texts: Sequence[str]) -> Iterable[Projected]:
        """Rows of all texts, in any order; the bits depend on the texts alone."""


def build(
    out: Path,
    texts: Texts,
    source: Rows,
    *,
    shard: int = SHARD,
    dtype: Literal["float16", "float32"] = "float16",
    resume: bool = False,
    process: tuple[int, int] = (0, 1),
    wait: Callable[[], None] = lambda: None,
    step: Advance = lambda n: None,
) -> None:
    """Write the index of ``texts`` to the new directory ``out``, or with ``resume`` go on with one that was killed.

    ``process`` is (this process's number, how many there are) and ``wait`` returns when all have called it; each makes
    every so many-th shard, and the result depends on neither. ``step`` is told of the rows that are done.

    Raises ``SurgeryError`` for an ``out`` that exists, a ``.part`` that stands in the way or belongs to other settings
    or texts or to a running build, and no texts; and what ``source`` refuses, before anything is written.
    """
    check_destination(out)
    part = out.with_name(out.name + ".part")
    if shard < 1 or dtype not in DTYPES:
        raise SurgeryError(
            f"index: got shard {shard} and dtype {dtype!r}; expected at least 1 row, {', '.join(DTYPES)}"
        )
    if process[0] == 0 and part.exists() and not resume:
        raise SurgeryError(f"{part}: an interrupted index is here; continue it with --resume, or remove it")
    source.check(texts())
    data = _digest(texts())
    begun = {"format": FORMAT, "data": data, "shard": shard, "row_dtype": dtype, **source.describe()}
    with _alone(part) if process[0] == 0 else nullcontext():
        if process[0] == 0:
            _begin(part, begun)
        wait()
        seen = hashlib.sha256()
        for number, held in enumerate(_shards(texts(), shard)):
            for text in held:
                _feed(seen, text)
            if number % process[1] == process[0] and not file_of(part, "facts", number).exists():
                _write_shard(part, number, held, source, DTYPES[dtype], begun["projection"]["dim"])
            step(len(held))
        if seen.hexdigest() != data["sha256"]:
            raise SurgeryError(f"{part}: the texts changed while they were read; remove it and build anew")
        wait()
        if process[0] == 0:
            files = {file.name: described(file) for file in files_of(part, data["rows"], shard)}
            write_json(part / "manifest.json", begun | {"files": files})
            sync_folder(part)
            part.rename(out)
            sync_folder(out.parent)
        wait()


def _begin(part: Path, begun: dict[str, Any]) -> None:
    path = part / "manifest.json"
    if not path.exists():
        write_json(path, begun)
        return
    there = read_manifest(path)
    there.pop("files", None)
    if (key := differing(there, begun)) is not None:
        raise SurgeryError(
            f"{part}: was begun with another {NAMES.get(key, key)} ({short(there.get(key))}, now "
            f"{short(begun.get(key))}); resume with what it was begun with, or remove it"
        )


def _write_shard(part: Path, number: int, texts: list[str], source: Rows, dtype: np.dtype[Any], dim: int) -> None:
    rows = np.zeros((len(texts), dim), dtype)
    facts = np.zeros(len(texts), FACTS)
    facts["text"] = [text_hash(text) for text in texts]
    done = 0
    for batch in source(texts):
        places = list(batch.places)
        norms = batch.norms.float().cpu()
        # A gradient of nothing points nowhere: its row is zeros, and so is its score.
        unit = batch.values.float().cpu() / norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
        if not bool(torch.isfinite(unit).all()):
            raise SurgeryError(f"{part}: a gradient of shard {number} is not finite; use float32 or bfloat16")
        rows[places] = unit.numpy()
        facts["norm"][places], facts["loss"][places] = norms.numpy(), batch.losses.float().cpu().numpy()
        facts["tokens"][places] = batch.tokens
        done += len(places)
    if done != len(texts):
        raise SurgeryError(f"{part}: shard {number} got {done} rows of {len(texts)} texts")
    _save(file_of(part, "rows", number), rows)
    _save(file_of(part, "facts", number), facts)  # the last: where it stands, its shard is whole


def _save(path: Path, array: np.ndarray) -> None:
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        np.lib.format.write_array(file, array)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def _shards(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    source = iter(texts)
    while held := list(islice(source, size)):
        yield held


def _digest(texts: Iterable[str]) -> dict[str, Any]:
    found, count = hashlib.sha256(), 0
    for text in texts:
        _feed(found, text)
        count += 1
    if not count:
        raise SurgeryError("index: got no texts, expected at least 1")
    return {"rows": count, "sha256": found.hexdigest()}


def _feed(found: Any, text: str) -> None:
    content = text.encode("utf-8", "surrogatepass")
    found.update(len(content).to_bytes(8, "little"))
    found.update(content)


@contextmanager
def _alone(part: Path) -> Iterator[None]:
    """Inside, no other build writes to ``part``; the kernel gives the lock back however the process ends."""
    part.mkdir(parents=True, exist_ok=True)
    handle = os.open(part, os.O_RDONLY | os.O_CLOEXEC)
    try:
        take(handle, f"{part}: another process is building it; wait for it, or choose another --out")
        yield
    finally:
        os.close(handle)
