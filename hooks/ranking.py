"""The one result of every localisation method: units with scores, and how they were measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from hooks.display import Readable
from hooks.errors import HookError

Unit = Literal["block", "head", "attention", "mlp", "matrix"]
_DIMENSIONS = {"block": 1, "attention": 1, "mlp": 1, "head": 2, "matrix": 1}


@dataclass(frozen=True, eq=False, repr=False)
class Ranking(Readable):
    """Scores of the units of a model; higher ranks first.

    method: what measured them, such as "bmi"; unit: "block", "attention" or "mlp" with scores (block,), "head" with
    scores (block, head), or "matrix" with a score for each of `names`. errors: standard error of each score, in the
    same shape; low, high: bounds of an interval. data: name of the data set; count: how many of its rows were
    measured; settings: everything else that is needed to measure it again.
    """

    method: str
    unit: Unit
    scores: NDArray[np.float64]
    data: str
    count: int
    errors: NDArray[np.float64] | None = None
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        if self.unit not in _DIMENSIONS:
            raise HookError(f"ranking {self.method}: unit is {self.unit!r}; expected one of {', '.join(_DIMENSIONS)}")
        for name in ("scores", "errors", "low", "high"):
            value = getattr(self, name)
            if value is None:
                continue
            array = np.array(value, dtype=np.float64)
            expected = array.shape if name == "scores" else self.scores.shape
            if array.ndim != _DIMENSIONS[self.unit] or array.shape != expected or not array.size:
                raise HookError(
                    f"ranking {self.method}: {name} of unit {self.unit} have shape {array.shape}; "
                    f"expected {_DIMENSIONS[self.unit]} dimension(s) like the scores"
                )
            if name == "scores" and not np.isfinite(array).all():
                first = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
                raise HookError(f"ranking {self.method}: the score of {self.unit} {first} is {array[first]}")
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        if (self.names is not None) != (self.unit == "matrix") or (self.names and len(self.names) != len(self.scores)):
            raise HookError(
                f"ranking {self.method}: {len(self.names or ())} names for {self.scores.size} scores of unit "
                f"{self.unit}; expected a name for each matrix, and none for other units"
            )

    def order(self) -> list[Any]:
        """Units from the highest score to the lowest: block numbers, or (block, head); ties by position."""
        flat = np.argsort(-self.scores, axis=None, kind="stable")
        if self.unit != "head":
            return [int(i) for i in flat]
        return [tuple(int(i) for i in np.unravel_index(place, self.scores.shape)) for place in flat]

    def top(self, count: int = 1) -> list[Any]:
        """The first `count` of `order()`."""
        return self.order()[:count]

    def table(self, count: int | None = None) -> str:
        """Plain text, best first: rank, unit, score and, where known, its standard error or interval."""
        lines = [f"{self.method} by {self.unit}, {self.data}, n = {self.count}"]
        for rank, unit in enumerate(self.order()[:count], 1):
            name = ".".join(map(str, unit)) if isinstance(unit, tuple) else str(unit)
            name = self.names[unit] if self.names is not None else name
            line = f"{rank:>4}  {name:>6}  {self.scores[unit]:>10.4f}"
            if self.errors is not None:
                line += f" ± {self.errors[unit]:.4f}"
            if self.low is not None and self.high is not None:
                line += f"  [{self.low[unit]:.4f}, {self.high[unit]:.4f}]"
            lines.append(line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; `from_dict` gives the same ranking back."""
        arrays = {name: getattr(self, name) for name in ("scores", "errors", "low", "high")}
        lists = {name: None if array is None else array.tolist() for name, array in arrays.items()}
        plain = {"method": self.method, "unit": self.unit, "data": self.data, "count": self.count}
        named = {} if self.names is None else {"names": list(self.names)}
        return plain | lists | {"settings": dict(self.settings)} | named

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Ranking:
        """Raises HookError for a missing or unknown key."""
        known = set(cls.__dataclass_fields__)
        needed = {"method", "unit", "scores", "data", "count"}
        if not needed <= set(values) <= known:
            wrong = sorted((needed - set(values)) | (set(values) - known))
            raise HookError(f"ranking: keys {wrong} are missing or unknown; expected {sorted(known)}")
        return cls(**values)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Ranking) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # it holds arrays and a mapping
