"""What a recipe and ``surgery.operation`` hand each other: where a run goes, what follows a training, what it made."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

import numpy as np
from torch import Tensor

from surgery.delta.module import NewPart
from surgery.progress import Advance, Progress
from surgery.runs.sharing import Shared
from surgery.runs.summary import Edit
from surgery.training import Log


class Where(TypedDict, total=False):
    """Keyword arguments of every recipe's ``run`` beside the model, the tokenizer and the settings."""

    out: Required[str | Path]
    """The run's folder, which must not exist."""
    checkpoint: str | Path | None
    """The directory that the model was loaded from; the one of ``settings.model`` where nothing is said."""
    resume: bool
    """Go on with what an earlier call left in ``out`` with ``.part``."""
    progress: Progress | None
    opened: float
    """How many seconds opening the model took, if that is to stand among the stages."""
    again: str
    """The command that takes up an interrupted one, where it is not ``surgery run``."""
    shared: Shared
    """What the runs of a sweep share on this model."""


class Tracking(TypedDict):
    """Keyword arguments of every training here: where it keeps its state, where it logs, whom it tells of a step."""

    state: Path
    log: Log
    step_done: Advance


@dataclass(frozen=True)
class Made:
    """What a training gave: differences as ``surgery.delta.make`` takes them (and their kind), and what was done."""

    differences: Mapping[str, Tensor | np.ndarray]
    edit: Edit
    kind: str = "dense"
    module: NewPart | None = None
    """Weights of a new module, with which the delta is of kind "module"."""


Train = Callable[[Tracking], Made]
Report = Callable[[Path, dict[str, Any], str], None]  # folder, the contents of run.json, the recipe as TOML
