"""One recipe over a grid of settings: a folder for each run; finished ones are skipped, interrupted ones resumed."""

import itertools
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from surgery.errors import SurgeryError
from surgery.progress import Progress
from surgery.runs.recipe_files import build, by_new_names, dump, read_toml
from surgery.runs.settings import Settings

S = TypeVar("S", bound=Settings)


def parse_vary(pairs: Sequence[str]) -> dict[str, list[Any]]:
    """``key=v1,v2,...`` pairs; values are read as TOML (numbers, true, lists), else as plain words.

    >>> parse_vary(["decay=0.1,0.2", "method=crawd,vanilla"])
    {'decay': [0.1, 0.2], 'method': ['crawd', 'vanilla']}

    Raises ``SurgeryError`` for a pair without a key or a value, or a key or value that is named twice.
    """
    varied: dict[str, list[Any]] = {}
    for pair in pairs:
        key, sign, text = (piece.strip() for piece in pair.partition("="))
        if not (key and sign and text):
            raise SurgeryError(f"--vary {pair!r}: expected key=v1,v2,..., for example --vary decay=0.1,0.2,0.3")
        try:
            values = tomllib.loads(f"values = [{text}]")["values"]
        except tomllib.TOMLDecodeError:
            values = [piece.strip() for piece in text.split(",") if piece.strip()]
        if key in varied:
            raise SurgeryError(f"--vary {key}: named twice; give all its values at once")
        twice = next((value for n, value in enumerate(values) if value in values[:n]), None)
        if twice is not None or not values:
            raise SurgeryError(f"--vary {pair!r}: {'no value' if not values else f'{twice!r} twice'}; name each once")
        varied[key] = values
    return varied


def grid(varied: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every combination of the values; the last key changes fastest."""
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def folder_name(point: Mapping[str, Any]) -> str:
    """A folder's name for one point of the grid: ``decay=0.1,seed=0``."""
    words = (f"{key}={'+'.join(map(str, v)) if isinstance(v, list) else v}" for key, v in point.items())
    return re.sub(r"[^\w.=,+-]+", "_", ",".join(words))


def sweep(
    kind: type[S],
    recipe: str,
    values: Mapping[str, Any],
    varied: Mapping[str, Sequence[Any]],
    out: Path,
    run: Callable[[S, Path, bool], object],
    *,
    progress: Progress | None = None,
) -> list[Path]:
    """Call ``run(settings, folder, resume)`` for every point of the grid that is not finished; all the folders.

    ``kind`` is the recipe's settings class, ``values`` what all runs share. Every point's settings are checked before
    the first run starts. A run that fails ends the sweep with its error; the same command goes on from there.

    Raises ``SurgeryError`` for nothing to vary, settings that are not right, two points with one folder's name, and a
    folder in ``out`` that was made with other settings.
    """
    progress = progress or Progress(quiet=True)
    if not varied:
        raise SurgeryError("sweep: nothing to vary; name at least one setting, for example --vary decay=0.1,0.2,0.3")
    values, varied = by_new_names(kind, values, recipe), by_new_names(kind, varied, "--vary")
    points = {folder_name(point): build(kind, {**values, **point}, folder_name(point)) for point in grid(varied)}
    if len(points) < len(grid(varied)):
        raise SurgeryError("sweep: two points of the grid would share a folder; name values that differ in letters")
    for settings in points.values():
        settings.check()
    for name, settings in points.items():
        if (out / name).exists():
            _check_same(out / name, dump(recipe, settings))
    for number, (name, settings) in enumerate(points.items(), 1):
        if (out / name).exists():
            progress.say(f"{number}/{len(points)} {name}: finished before")
            continue
        resume = (out / f"{name}.part").exists()
        progress.say(f"{number}/{len(points)} {name}" + (": goes on" if resume else ""))
        run(settings, out / name, resume)
    return [out / name for name in points]


def _check_same(folder: Path, recipe: str) -> None:
    if not (folder / "recipe.toml").is_file():
        raise SurgeryError(f"{folder}: is not a run's folder; choose another --out, or move it away")
    made, wanted = read_toml(folder / "recipe.toml"), tomllib.loads(recipe)
    odd = [key for key in dict.fromkeys([*wanted, *made]) if made.get(key) != wanted.get(key)]
    if odd:
        raise SurgeryError(
            f"{folder}: was made with {odd[0]} = {made.get(odd[0])!r}, this sweep has {wanted.get(odd[0])!r}; choose "
            "another --out, or move it away"
        )
