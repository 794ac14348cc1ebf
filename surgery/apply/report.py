"""What an apply did, to a directory or to a GGUF file, tensor by tensor and as a whole."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TensorChange:
    """What happened to one stored tensor.

    before, after: its dtype, its GGUF type, or the kind of its codes. changed: entries with another value now (of
    floats: whose stored bits differ). lost: entries with a difference that rounding threw away. distance: estimate of
    how far the tensor was from the delta's base (`surgery.files.weight_fingerprint.distance`).
    """

    name: str
    file: str
    before: str
    after: str
    entries: int
    changed: int
    lost: int
    distance: float


@dataclass(frozen=True)
class ApplyReport:
    """The result of `apply` and `apply_gguf`; `verdict` is same, related or distant, judged on `farthest` at
    `distance`; bytes_before, bytes: of the source and of what was written, an undo record in a directory among it."""

    out: Path
    tensors: tuple[TensorChange, ...]
    files: int
    bytes_before: int
    bytes: int
    farthest: str
    distance: float
    verdict: str
    scale: float
    rounding: str
    seed: int
    delta_sha256: str
    undo: Path | None
    notes: tuple[str, ...]

    @property
    def entries(self) -> int:
        return sum(change.entries for change in self.tensors)

    @property
    def changed(self) -> int:
        return sum(change.changed for change in self.tensors)

    @property
    def lost(self) -> int:
        return sum(change.lost for change in self.tensors)

    def __str__(self) -> str:
        types = ", ".join(sorted({change.after for change in self.tensors}))
        return (
            f"{self.out}: {self.changed:,} of {self.entries:,} entries of {len(self.tensors)} tensors changed, "
            f"{self.lost:,} left as they were by rounding ({types}, {self.rounding}); distance to the base "
            f"{self.distance:.4f} at {self.farthest} ({self.verdict})"
        )
