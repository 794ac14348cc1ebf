"""A recipe's file, flat TOML, and ``--set`` into settings and back; a wrong key or value is answered in one line."""

import difflib
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ValidationError

from surgery.errors import SurgeryError
from surgery.runs.settings import Settings

S = TypeVar("S", bound=BaseModel)


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a flat TOML file; raises ``SurgeryError`` when it cannot be read or is not flat TOML."""
    values = toml_of(path, "recipe")
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise SurgeryError(f"{path}: [{nested[0]}] is a table; recipes are flat: write keys without tables")
    return values


def toml_of(path: Path, kind: str) -> dict[str, Any]:
    """What a TOML file of a ``kind`` (recipe, study) holds; raises ``SurgeryError`` where it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be read ({error.strerror}); give a {kind}'s TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path}: not valid TOML ({error}); mend that place") from None


def parse_set(pairs: list[str]) -> dict[str, Any]:
    """``--set key=value`` pairs; a value is read as TOML (numbers, true, lists), else as a plain string."""
    values: dict[str, Any] = {}
    for pair in pairs:
        key, sign, text = pair.partition("=")
        if not sign or not key.strip():
            raise SurgeryError(f"--set {pair!r}: expected key=value, for example --set lr=1e-4")
        try:
            values[key.strip()] = tomllib.loads(f"value = {text}")["value"]
        except tomllib.TOMLDecodeError:
            values[key.strip()] = text.strip()
    return values


def by_new_names(kind: type[BaseModel], values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The values with the keys that they have now; for an old name a line on standard error names the new one.

    Raises ``SurgeryError`` when both are given.
    """
    renamed: Mapping[str, str] = getattr(kind, "renamed", {})
    named: dict[str, Any] = {}
    for key, value in values.items():
        new = renamed.get(key, key)
        if new != key:
            print(f"{where}: {key!r} is now called {new!r}", file=sys.stderr)
            if new in values:
                raise SurgeryError(f"{where}: {key!r} is now called {new!r}, and both are given; name one of them")
        named[new] = value
    return named


def build(kind: type[S], values: dict[str, Any], where: str) -> S:
    """``kind(**values)``, every fault in one ``SurgeryError``; a list may be "a,b", a float whole, a name old."""
    fields = kind.model_fields
    ready: dict[str, Any] = {}
    for key, value in by_new_names(kind, values, where).items():
        form = str(fields[key].annotation) if key in fields else ""
        if form.startswith("list[") and isinstance(value, str | int | float) and not isinstance(value, bool):
            pieces = [piece.strip() for piece in str(value).split(",") if piece.strip()]
            ready[key] = [_number(piece, float if "float" in form else int) for piece in pieces]
        elif "list[int]" in form and re.fullmatch(r"-?\d+(\s*,\s*-?\d+)+", str(value)):
            ready[key] = [int(piece) for piece in value.split(",")]  # one of several forms: block=1,2
        else:
            ready[key] = value
    try:
        return kind(**ready)
    except ValidationError as error:
        raise SurgeryError(f"{where}: " + "; ".join(_fault(kind, fault) for fault in error.errors())) from None


def _number(piece: str, kind: type[int] | type[float]) -> float | str:
    try:
        return kind(piece)
    except ValueError:
        return piece


def _fault(kind: type[BaseModel], fault: Any) -> str:
    key = ".".join(str(place) for place in fault["loc"]) or "settings"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, 1)
        known = ", ".join(sorted(kind.model_fields))
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; expected one of {known}")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: got {fault['input']!r}; {message[0].lower()}{message[1:]}"


def dump(recipe: str, settings: Settings) -> str:
    """The resolved recipe as TOML text: ``surgery run`` on it repeats the run. Without the keys that it never reads."""
    known = settings.model_dump(exclude=set(getattr(settings, "unread", ())), exclude_none=True)
    return tomli_w.dumps({"recipe": recipe, **known})
