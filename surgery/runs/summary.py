"""What ``run.json`` says, as types: the edit, its file, how it was applied, its controls, and the whole summary."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol

from surgery.moved import Moved

Scores = Mapping[str, Any]  # metrics as plain dictionaries, by suite


class Training(Protocol):
    """What every training gives (``surgery.edits.block.Trained`` and its like)."""

    @property
    def parameters(self) -> int: ...

    @property
    def losses(self) -> list[float]: ...

    @property
    def moved(self) -> Moved | None: ...


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What was trained and how; what a method adds of its own stands in ``details``, beside the others in the file."""

    blocks: Sequence[int] | Literal["all"] | None = None
    part: str | None = None
    objective: str | None = None
    parameters: int | None = None
    steps: int | None = None
    loss_first: float | None = None
    loss_last: float | None = None
    moved: Mapping[str, Any] | None = None
    """How far the training moved its objective, on the same examples (``surgery.objective.Moved``)."""
    details: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, trained: Training, **known: Any) -> "Edit":
        """With the number of parameters, the steps and the losses of ``trained``; unknown keywords are details."""
        losses = trained.losses
        counted = {"parameters": trained.parameters, "steps": len(losses)}
        far = {"moved": trained.moved.to_dict()} if trained.moved else {}
        return cls.from_dict(counted | {"loss_first": losses[0], "loss_last": losses[-1]} | far | known)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Edit":
        """The inverse of ``to_dict``."""
        own = {each.name for each in fields(cls)} - {"details"}
        details = {key: value for key, value in values.items() if key not in own}
        return cls(**{key: value for key, value in values.items() if key in own}, details=details)

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``run.json``; what is None is left out."""
        own = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "details"}
        return {key: value for key, value in own.items() if value is not None} | dict(self.details)


@dataclass(frozen=True)
class Applied:
    """How the file was put onto the checkpoint: entries of the tensors it touches, how many bits changed or not.

    The counts are None where it was put there in memory, with a module that a plain checkpoint cannot hold.
    """

    rounding: str
    entries: int | None = None
    changed: int | None = None
    lost: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """As it stands in ``run.json``; what is None is left out."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Outcome:
    """An edit that was carried out: what was trained, its file, how it was applied, and what was measured then."""

    edit: Edit
    measured: Any = None
    delta: Mapping[str, Any] | None = None
    """The file's name, kind, bytes and sha256; None for an edit that trains nothing, such as a prompt."""
    applied: Applied | None = None


@dataclass(frozen=True)
class OwnPart:
    """What makes a method the method, the control in which that is switched off, and the numbers that tell."""

    part: str
    """Such as "the cross-attention module"."""
    without: str
    """The control's name."""
    metrics: Sequence[str]
    """Such as "gas.gas"."""


@dataclass(frozen=True, kw_only=True)
class Summary:
    """``run.json``; a recipe adds its own fields in a subclass."""

    recipe: str
    model: str
    seed: int
    before: Scores
    after: Scores
    edit: Edit
    delta: Mapping[str, Any] | None = None
    """As of an ``Outcome``; this, ``applied``, ``own_part`` and ``verdict`` are left out where there is none."""
    applied: Applied | None = None
    controls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    cases: Sequence[Mapping[str, Any]] = ()
    shown: Mapping[str, Any] = field(default_factory=dict)
    """What the model says after a few texts (``surgery.forward.shown``), "before" and "after"."""
    verdict: Sequence[str] | None = None
    own_part: OwnPart | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in the file."""
        found = {each.name: getattr(self, each.name) for each in fields(self)}
        found |= {"edit": self.edit.to_dict(), "cases": list(self.cases)}
        found |= {"applied": self.applied.to_dict()} if self.applied else {}
        found |= {"own_part": vars(self.own_part)} if self.own_part else {}
        left_out = [key for key in ("delta", "applied", "verdict", "own_part") if found[key] is None]
        return {key: value for key, value in found.items() if key not in left_out}


def control(outcome: Outcome, after: Scores, **more: Any) -> dict[str, Any]:
    """An outcome as it stands under "controls": its edit and its scores, and what a recipe adds."""
    return {"edit": outcome.edit.to_dict(), "after": after, **more}
