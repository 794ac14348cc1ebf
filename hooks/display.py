"""How a result shows itself: one short line where Python prints it, its table in a notebook."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from hooks.errors import HookError

_LONG = 6  # entries of a list and characters of ten words: more is told by its size


class Readable:
    """A frozen dataclass (with ``repr=False``) of results; its fields are shown by value, or by size where long."""

    def __repr__(self) -> str:
        shown = ", ".join(f"{one.name}={_short(getattr(self, one.name))}" for one in fields(self) if one.repr)  # type: ignore[arg-type]
        return f"{type(self).__name__}({shown})"

    def _repr_html_(self) -> str:
        found = getattr(self, "table", None)
        if found is None and hasattr(self, "ranking"):
            try:
                found = self.ranking().table
            except HookError:  # what no ranking can hold, such as effects by position
                found = None
        return f"<pre>{html.escape(str(found()) if found else repr(self))}</pre>"


def _short(value: Any) -> str:
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    if shape is not None and dtype is not None:
        return f"{str(dtype).removeprefix('torch.')}{list(shape)}"
    if isinstance(value, Readable):
        return f"{type(value).__name__}(...)"
    if isinstance(value, Mapping):
        short = len(value) <= _LONG and all(isinstance(one, str | int | float | None) for one in value.values())
        return repr(dict(value)) if short else f"{{{len(value)} entries}}"
    if isinstance(value, tuple | list) and (len(value) > _LONG or any(map(is_dataclass, value))):
        return f"({len(value)} of {type(value[0]).__name__})"
    if isinstance(value, tuple | list):
        return f"({', '.join(_short(one) for one in value)})"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
