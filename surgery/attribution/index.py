"""A gradient index: projected gradients of a data set in a directory of memory-mapped arrays, for later queries.

    manifest.json     what it was made of: fingerprints of model, adapter, tokenizer and texts, projection, settings,
                      and rows, bytes and sha256 of every file
    rows-000000.npy   (row, dim) float16 or float32: the projection of each text's gradient, divided by the gradient's
                      length, so that its product with a projected unit gradient estimates their cosine
    facts-000000.npy  (row) of norm, loss, tokens, text: the gradient's length, the loss, how many tokens are learnt,
                      and 64 bits of a hash of the text

It is written as NAME.part and renamed when it is complete. The shards are cut by row number alone; each one's rows
are written and synced first and its facts last, each under its name only when complete, so a killed build goes on
after the last whole shard, whichever process made it, and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor

from surgery.errors import SurgeryError
from surgery.progress import Advance

FORMAT = 1
FACTS = np.dtype([("norm", "<f4"), ("loss", "<f4"), ("tokens", "<i4"), ("text", "<u8")])
DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}
QUERIED = ("model", "config", "adapter", "tokenizer", "projection", "dtype", "layers", "loss", "cut")
NAMES = {"dtype": "weight type", "row_dtype": "row type", "data": "set of texts", "moments": "set of Adam's moments"}


def text_hash(text: str) -> int:
    """64 bits that stand for a text, whatever its case and white space."""
    return int.from_bytes(hashlib.sha256(" ".join(text.lower().split()).encode()).digest()[:8], "little")


@dataclass(frozen=True)
class Index:
    """An index that was opened and looked over; its arrays are read from disk when they are needed."""

    path: Path
    manifest: dict[str, Any]

    def __len__(self) -> int:
        """How many texts it holds."""
        return int(self.manifest["data"]["rows"])

    def check(self, made: Mapping[str, Any]) -> None:
        """Raises ``SurgeryError`` when a probe of ``made`` (``Source.describe``) does not fit to the index.

        The optimiser may differ, which acts on the side of the data alone, and the batch size, which moves the last
        bits only.
        """
        # Indices of before this was recorded do not say what their model's config was.
        asked = (key for key in made if key in QUERIED and (key != "config" or key in self.manifest))
        key = differing(self.manifest, made, asked)
        if key is not None:
            raise SurgeryError(
                f"{self.path}: was built with another {NAMES.get(key, key)} ({short(self.manifest.get(key))}, here "
                f"{short(made[key])}); query with what it was built with, or build another index"
            )

    def refuse_overlap(self, probe: Sequence[str], what: str = "probe") -> None:
        """Raises ``SurgeryError`` for a probe without texts, and for a text of it that is also in the index.

        ``what`` else the texts are, such as test pairs.
        """
        if not probe:
            raise SurgeryError(f"the {what} is empty; expected at least 1 text")
        places = {text_hash(text): place for place, text in enumerate(probe)}
        for start, facts in self._parts("facts"):
            found = np.flatnonzero(np.isin(facts["text"], np.array(list(places), np.uint64)))
            if found.size:
                text = probe[places[int(facts["text"][found[0]])]]
                raise SurgeryError(
                    f"{self.path}: row {start + int(found[0])} is also a text of the {what} ({text[:60]!r}); its score "
                    "would be that of a known text: take it out of the one or the other"
                )

    def column(self, name: Literal["norm", "loss", "tokens", "text"]) -> np.ndarray:
        """One fact of all texts, in the order of the data."""
        return np.concatenate([facts[name] for _, facts in self._parts("facts")])

    def scores(
        self,
        probes: Float[Tensor, "dim probe"] | Float[Tensor, " dim"],
        *,
        scale: float = 1.0,
        normalise: Literal["cosine", "dot"] = "cosine",
        step: Advance = lambda n: None,
    ) -> Float[np.ndarray, "text probe"] | Float[np.ndarray, " text"]:
        """The score of every text against projected probes (``Source.probe``), one shard in memory at a time.

        A cosine is the product of the text's unit gradient with the probe over ``scale``; "dot" is the product of the
        gradients themselves.
        """
        vectors, found = probes.float().cpu().numpy(), []
        if len(vectors) != self.manifest["projection"]["dim"]:
            raise SurgeryError(f"{self.path}: got a probe of length {len(vectors)}; project it as the index is")
        for (_, rows), (_, facts) in zip(self._parts("rows"), self._parts("facts"), strict=True):
            product = rows.astype(np.float32) @ vectors
            size = facts["norm"] if normalise == "dot" else np.float32(1 / scale)
            found.append((product.T * size).T)
            step(len(rows))
        return np.concatenate(found)

    def verify(self) -> None:
        """Read every file and compare its sha256 with the manifest, where opening looks at sizes and shapes only.

        Raises ``SurgeryError`` naming the first file that differs.
        """
        for name, facts in self.manifest["files"].items():
            if described(self.path / name) != facts:
                raise SurgeryError(
                    f"{self.path / name}: its bytes are not those that were written; build the index anew"
                )

    def _parts(self, kind: str) -> Iterator[tuple[int, np.ndarray]]:
        """(number of its first text, array) of each shard, mapped and not read."""
        shard = self.manifest["shard"]
        for number in range(-(-len(self) // shard)):
            yield number * shard, np.load(file_of(self.path, kind, number), mmap_mode="r")


def open_index(path: Path) -> Index:
    """The index in the directory ``path``.

    Raises ``SurgeryError``, naming the file, for a directory that is not a finished index, another version of the
    format, and an array that is missing, truncated or of the wrong shape.
    """
    if not (path / "manifest.json").is_file():
        unfinished = path.with_name(path.name + ".part")
        hint = (
            f"finish {unfinished} with --resume"
            if unfinished.is_dir()
            else "expected what surgery attribute build made"
        )
        raise SurgeryError(f"{path}: is no gradient index (no manifest.json); {hint}")
    manifest = read_manifest(path / "manifest.json")
    if "files" not in manifest:
        raise SurgeryError(f"{path}: its build did not finish; go on with it: surgery attribute build --resume")
    total, shard = manifest["data"]["rows"], manifest["shard"]
    for file in files_of(path, total, shard):
        number = int(file.stem.partition("-")[2])
        count = min(shard, total - number * shard)
        facts = file.name.startswith("facts")
        shape = (count,) if facts else (count, manifest["projection"]["dim"])
        expected = manifest["files"].get(file.name, {}).get("bytes")
        size = file.stat().st_size if file.is_file() else "no file"
        if size != expected:
            raise SurgeryError(f"{file}: got {size} bytes, expected {expected}: truncated or changed; build it anew")
        try:
            array = np.load(file, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise SurgeryError(f"{file}: is no array ({error}); build the index anew") from None
        if array.shape != shape or array.dtype != (FACTS if facts else DTYPES[manifest["row_dtype"]]):
            raise SurgeryError(f"{file}: holds {array.dtype} {array.shape}, expected {shape}; build the index anew")
    return Index(path, manifest)


def file_of(folder: Path, kind: str, number: int) -> Path:
    """The file of shard ``number``: its ``kind`` is rows or facts."""
    return folder / f"{kind}-{number:06}.npy"


def files_of(folder: Path, rows: int, shard: int) -> list[Path]:
    """All files of an index of so many rows."""
    return [file_of(folder, kind, number) for number in range(-(-rows // shard)) for kind in ("rows", "facts")]


def described(path: Path) -> dict[str, Any]:
    """A file's size and hash, as the manifest keeps them."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def read_manifest(path: Path) -> dict[str, Any]:
    """An index's manifest. Raises ``SurgeryError`` for what is none, and for another format."""
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise SurgeryError(f"{path}: is not JSON ({error}); build the index anew") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise SurgeryError(f"{path}: got another format than {FORMAT}; build the index anew with this version")
    return manifest


def differing(one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str] | None = None) -> str | None:
    """The first of ``keys`` (default: all) whose value is not the same in both."""
    return next((key for key in (keys or {**one, **other}) if one.get(key) != other.get(key)), None)


def short(value: Any) -> str:
    """A manifest's value for an error: a hash by its beginning."""
    text = value if isinstance(value, str) else json.dumps(value)
    return text[:12] if len(text) == 64 else text[:120]
