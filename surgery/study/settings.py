"""What a study compares, read from one TOML file: models, methods, seeds, judges, and which numbers decide."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from surgery.catalogue import check_suites
from surgery.data.genbias import SEED
from surgery.errors import SurgeryError
from surgery.runs.recipe_files import build, toml_of

PROMPT_SUITES = ("genbias", "genhint", "free_text")
WRITING_SUITES = ("free_text", "gas")  # which go on from cached keys, so that no second pass can be made beside
OWN = {"model", "seed", "recipe"}  # of the study, not of a method's settings
KINDS = ("recipe", "delta", "preamble", "decoding", "absent")


class Method(BaseModel):
    """A row of the study: a recipe with settings, a delta file, a text before every prompt, another way to decode."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str = Field(min_length=1)
    recipe: str = ""
    settings: dict[str, Any] = {}
    """Settings of the recipe beside its own TOML file's; ``model`` and ``seed`` are the study's."""
    by_model: dict[str, dict[str, Any]] = {}
    """Settings for one model beside these, by its name or the last part of its path."""
    delta: str = ""
    """A delta file, ours or foreign, instead of a recipe."""
    preamble: str = ""
    """A text before every prompt, instead of an edit: the baseline that costs nothing."""
    decoding: Literal["", "cafie"] = ""
    """What is done to every next-token distribution, instead of an edit (``surgery.edits.cafie``)."""
    absent: str = ""
    """Why a method that belongs here cannot be run: a row that says so."""
    seeds: list[int] = []
    """Of the recipe, instead of the study's: fewer where a method takes long."""
    deterministic: bool = False
    """Nothing is drawn, so that the first seed stands for all of them."""
    scale: float = 1.0
    """What the delta is multiplied by; -1 subtracts what a recipe taught (task-vector negation)."""
    about: str = ""
    """Where it comes from and what differs, for the page."""


class Study(BaseModel):
    """A study; every key has the same meaning as in a recipe where both have it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    models: list[str] = ["demo"]
    seeds: list[int] = [0]
    suites: list[str] = []
    """What is measured, all rows of it; none stands for the ledger, every axis in its quick form."""
    data: str = "genbias"
    """A prompt set."""
    folder: str = ""
    """The data folder, for suites that need one."""
    scorer: str = "bias-bench"
    limit: int = Field(0, ge=0)
    """So many rows of each suite and file; 0 for all (of the ledger: its quick form)."""
    rows: dict[str, Annotated[int, Field(ge=0)]] = {}
    """The same by suite, of those without a folder, too."""
    bias: list[str] = []
    """The numbers an edit is to improve, by their place such as "genbias.afgb.all"."""
    cost: list[str] = []
    """The numbers it must not spoil."""
    tolerance: float = Field(1.0, ge=0)
    """A cost number that is worse by no more points (``surgery.metrics.metric.points``) than that is no objection."""
    dtype: str = "float32"


def check_names(models: Sequence[str]) -> None:
    """Raises ``SurgeryError`` where two models would share a folder: they are told apart by the last part of a path."""
    names = [Path(model).name for model in models]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise SurgeryError(f"models: two are called {twice!r}, by which the page tells them apart; rename a folder")


def seeds_of(study: Study, method: Method) -> list[int]:
    """The seeds of a method: its own, or the study's; the first one where nothing depends on it."""
    return study.seeds[:1] if method.deterministic or not method.recipe else method.seeds or study.seeds


def settings_for(method: Method, model: str) -> dict[str, Any]:
    """The settings of a method's recipe on one model."""
    return method.settings | method.by_model.get(model, method.by_model.get(Path(model).name, {}))


def refuse_seen(study: Study, recipe: Mapping[str, Any], where: str) -> None:
    """Raises ``SurgeryError`` for a ``recipe`` that learns subjects of the prompts which the study judges all by."""
    seen = {"split": recipe.get("split") == "pairs", "split_seed": recipe.get("split_seed", SEED) != SEED}
    odd = next((key for key, learns in seen.items() if learns), None)
    if odd and (not study.suites or set(study.suites) & set(PROMPT_SUITES)):
        raise SurgeryError(
            f"{where}: got {odd} {recipe[odd]!r}, with which it learns subjects of the prompts that a study judges "
            f"every method by (split by profession, split_seed {SEED}); leave it out"
        )


def read(path: Path) -> tuple[Study, list[Method]]:
    """The study and its methods. Raises ``SurgeryError`` with every fault of the file in one line."""
    raw = toml_of(path, "study")
    tables = raw.pop("methods", [])
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise SurgeryError(f"{path}: has no methods; write at least one [[methods]] table")
    study = build(Study, raw, str(path))
    check_suites(list(study.rows), shipped=True)
    methods = [build(Method, table, f"{path}, methods[{n}]") for n, table in enumerate(tables, 1)]
    for number, method in enumerate(methods, 1):
        kinds = [key for key in KINDS if getattr(method, key)]
        if len(kinds) != 1:
            raise SurgeryError(
                f"{path}, methods[{number}] ({method.name}): got {' and '.join(kinds) or 'nothing'}, expected exactly "
                f"one of {', '.join(KINDS)}"
            )
        if (method.seeds or method.deterministic) and not method.recipe:
            raise SurgeryError(f"{path}, methods[{number}] ({method.name}): seeds are a recipe's; it names none")
        if method.seeds and method.deterministic:
            raise SurgeryError(f"{path}, methods[{number}] ({method.name}): got seeds of what draws nothing; give one")
        if {key for given in (method.settings, *method.by_model.values()) for key in given} & OWN:
            raise SurgeryError(f"{path}, methods[{number}] ({method.name}): model, seed and recipe are the study's own")
    names = [method.name for method in methods]
    if twice := next((name for name in names if names.count(name) > 1 or name == "untouched"), None):
        raise SurgeryError(f"{path}: the method {twice!r} is named twice, or is the model itself; name each once")
    if not study.models or not study.seeds:
        raise SurgeryError(f"{path}: no {'seeds' if study.models else 'models'}; name at least one")
    for seeds in (study.seeds, *(method.seeds for method in methods)):
        if len(set(seeds)) < len(seeds):  # the one run would count as two that agree
            raise SurgeryError(f"{path}: seeds: got {seeds}, expected different ones; name each once")
    return study, methods
