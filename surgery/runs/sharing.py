"""What the runs of one sweep share: results on one model that depend on nothing in which the runs differ."""

import pickle
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from surgery.runs.settings import Dropout, LoRA, Settings, SharedTraining

TRAINING = {key for kind in (SharedTraining, Dropout, LoRA) for key in kind.model_fields} - {*Settings.model_fields}
APART = TRAINING | {"rounding", "keep_checkpoint", "controls"}

T = TypeVar("T")


@dataclass
class Shared:
    """Results by their name and by all that they depend on beside the model; nothing is shared by a run alone.

    >>> shared = Shared()
    >>> [shared.get("square", of, lambda: of**2) for of in (3, 3, 4)], len(shared.found)
    ([9, 9, 16], 2)
    """

    found: list[tuple[str, Any, Any]] = field(default_factory=list)

    def get(self, name: str, of: Any, make: Callable[[], T]) -> T:
        """``make()``, or what it gave where ``of`` was equal: the texts themselves, and every setting that counts."""
        for known, depends, value in self.found:
            if known == name and depends == of:
                return value
        value = make()
        self.found.append((name, of, value))
        return value

    def once(self, name: str, of: Any, compute: Callable[[], T]) -> T:
        """``get`` of a value of lists and dictionaries, a copy for each run."""
        found: T = pickle.loads(pickle.dumps(self.get(name, of, compute)))  # a tenth of deepcopy's time
        return found


def untrained(settings: Settings, *aside: str) -> dict[str, Any]:
    """The settings that a measurement of the untouched model may depend on: all but how it is trained and ``aside``."""
    return settings.model_dump(exclude=APART | set(aside))
