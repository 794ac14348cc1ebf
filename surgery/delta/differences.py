"""What every delta answers, whether it lies in memory or on disk, and how it shows itself."""

import html
import math
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


def one_line(delta: Differences) -> str:
    """How Python prints a delta: its kind, its size, its base."""
    data, shapes = delta.metadata, delta.shapes
    size = sum(math.prod(shape) for shape in shapes.values())
    return f"{type(delta).__name__}({data['kind']}, {len(shapes)} tensors, {size:,} parameters, of {data['base']!r})"


def html_table(delta: Differences) -> str:
    """How a notebook shows a delta: the same line, and its tensors with their shapes."""
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td><td>{' x '.join(map(str, shape))}</td></tr>"
        for name, shape in sorted(delta.shapes.items())
    )
    return f"<p>{html.escape(one_line(delta))}</p><table><tr><th>tensor</th><th>shape</th></tr>{rows}</table>"


class Edit(Differences, Protocol):
    """A whole delta in memory: its differences and, with kind "module", the new part."""

    @property
    def kind(self) -> str: ...
    @property
    def module(self) -> dict[str, np.ndarray]: ...
