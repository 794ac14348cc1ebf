"""How far a training moved its objective, as plain numbers (``surgery.objective`` measures them); no torch here."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Term:
    """The mean of one weighted term over the examples asked, and the Euclidean norm of its gradient, before and after.

    The gradient is that of the mean, over all trained parameters.
    """

    before: float
    after: float
    gradient_before: float
    gradient_after: float


@dataclass(frozen=True)
class Moved:
    """The objective before and after; ``low`` and ``high`` bound the difference, paired by example (95 %).

    One example has no such bounds: they are None.
    """

    before: float
    after: float
    low: float | None
    high: float | None
    examples: int
    terms: Mapping[str, Term]

    @property
    def share(self) -> float:
        """(before - after) / |before|: positive where the objective fell, as it should."""
        return (self.before - self.after) / abs(self.before) if self.before else float("nan")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as they stand in ``run.json`` under the edit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Moved":
        """The inverse of ``to_dict``."""
        return cls(**{**values, "terms": {name: Term(**term) for name, term in values["terms"].items()}})
