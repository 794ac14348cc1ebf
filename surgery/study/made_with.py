"""Whether a run that is there was made with the settings that a study asks for."""

import tomllib
from pathlib import Path

from surgery.errors import SurgeryError
from surgery.runs.recipe_files import build, dump, read_toml
from surgery.runs.settings import Settings
from surgery.study.cells import TAKEN, Cell

PLACES = ("model", "data")  # settings that say where something lies, which is elsewhere on another machine


def refuse_other_settings(cell: Cell, settings: Settings) -> None:
    """Raises ``SurgeryError`` where the cell's run, made here or taken, was made with other settings than these."""
    for kind, places in (("run", ()), (TAKEN, PLACES)):
        if (cell.folder / kind).exists() and (key := other(cell.folder / kind / "recipe.toml", settings, places)):
            raise SurgeryError(
                f"{cell.folder / kind}: was made with other settings ({key}); remove it, or choose another --out"
            )


def other(file: Path, settings: Settings, places: tuple[str, ...] = PLACES) -> str:
    """The first setting, apart from ``places``, in which a written recipe is another one, with both values; or "".

    A recipe is written with every setting that its run read, so that one it lacks came later, and has its default.
    """
    values = read_toml(file)
    name = values.pop("recipe", "")
    try:
        there = tomllib.loads(dump(name, build(type(settings), values, str(file))))
    except SurgeryError as error:  # a setting that there is no more
        return str(error)
    asked = tomllib.loads(dump(name, settings))
    for key in dict.fromkeys((*asked, *there)):
        if key not in places and there.get(key) != asked.get(key):
            return f"{key} is {there.get(key)}, expected {asked.get(key)}"
    return ""
