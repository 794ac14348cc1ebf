"""What every delta answers, whether it lies in memory or on disk."""

from typing import Any, Protocol

import numpy as np


class Differences(Protocol):
    """What `Delta` and `DeltaFile` share: enough to apply either without knowing which it is."""

    @property
    def metadata(self) -> dict[str, Any]: ...
    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    @property
    def sha256(self) -> str: ...
    def read(self, name: str, start: int, stop: int) -> np.ndarray:
        """The difference of the base tensor `name`, elements start..stop in row-major order, fp32 [stop - start]."""
        ...


class Edit(Differences, Protocol):
    """A whole delta in memory: its differences and, with kind "module", the new part."""

    @property
    def kind(self) -> str: ...
    @property
    def module(self) -> dict[str, np.ndarray]: ...
