"""Settings of a recipe: a flat TOML file, checked; a wrong key or value is answered with what was expected."""

import difflib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError

from surgery.errors import SurgeryError

S = TypeVar("S", bound=BaseModel)


class Settings(BaseModel):
    """Base of every recipe's settings; the keys here belong to all recipes."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    model: str = "demo"
    """Directory, hub name, .gguf file or demo."""
    seed: int = 0


def read_toml(path: Path) -> dict[str, Any]:
    """The keys of a flat TOML file; raises ``SurgeryError`` when it cannot be read or is not flat TOML."""
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise SurgeryError(f"{path}: cannot be read ({error.strerror}); give a recipe's TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SurgeryError(f"{path}: not valid TOML ({error}); mend that place") from None
    nested = [key for key, value in values.items() if isinstance(value, dict)]
    if nested:
        raise SurgeryError(f"{path}: [{nested[0]}] is a table; recipes are flat: write keys without tables")
    return values


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


def build(kind: type[S], values: dict[str, Any], where: str) -> S:
    """``kind(**values)``, with every fault of the values in one ``SurgeryError``.

    A list may be written as "a,b"; an integer is taken where a float is expected.
    """
    fields = kind.model_fields
    ready: dict[str, Any] = {}
    for key, value in values.items():
        listed = key in fields and str(fields[key].annotation).startswith("list[")
        if listed and isinstance(value, str | int | float) and not isinstance(value, bool):
            pieces = [piece.strip() for piece in str(value).split(",") if piece.strip()]
            ready[key] = [int(p) if p.lstrip("-").isdigit() else p for p in pieces]
        else:
            ready[key] = value
    try:
        return kind(**ready)
    except ValidationError as error:
        raise SurgeryError(f"{where}: " + "; ".join(_fault(kind, fault) for fault in error.errors())) from None


def _fault(kind: type[BaseModel], fault: Any) -> str:
    key = ".".join(str(place) for place in fault["loc"]) or "settings"
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, kind.model_fields, 1)
        known = ", ".join(sorted(kind.model_fields))
        return f"unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else f"; expected one of {known}")
    message = fault["msg"].removeprefix("Value error, ")
    return f"{key}: got {fault['input']!r}; {message[0].lower()}{message[1:]}"


def dump(recipe: str, settings: Settings) -> str:
    """The resolved recipe as TOML text: ``surgery run`` on it repeats the run."""
    values = {key: value for key, value in settings.model_dump().items() if value is not None}
    return tomli_w.dumps({"recipe": recipe, **values})


def explain(kind: type[BaseModel]) -> list[tuple[str, str, str, str]]:
    """(key, type, default, what it is) of every setting, as a person reads them."""
    found = []
    for key, field in kind.model_fields.items():
        annotation = field.annotation
        words = annotation.__name__ if isinstance(annotation, type) else str(annotation)
        words = words.removeprefix("typing.").replace("Literal[", "one of [")
        default = "needed" if field.is_required() else json.dumps(field.get_default(call_default_factory=True))
        found.append((key, words, default, " ".join((field.description or "").split())))
    return found
