"""Settings of a recipe: a flat TOML file, checked; a wrong key or value is answered with what was expected."""

import difflib
import re
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from surgery.catalogue import check_suites
from surgery.data import checking, neutral
from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS

if TYPE_CHECKING:
    from surgery.training import Plan

S = TypeVar("S", bound=BaseModel)

Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Limit = Annotated[int, Field(ge=0)]  # 0 stands for all
Seed = Annotated[int, Field(ge=0, le=SEEDS)]
DropoutRate = Annotated[float, Field(ge=0, lt=1)]


class Settings(BaseModel):
    """Base of every recipe's settings; the keys here belong to all recipes, and a key means the same in each."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    renamed: ClassVar[Mapping[str, str]] = {}
    """Keys of this recipe that had another name: the old name and the new one. The old one is still understood."""

    has_ledger: ClassVar[bool] = True  # whether judges of next words can measure the opened model with the run's delta
    shares_work: ClassVar[bool] = False  # whether processes of one accelerate launch may carry it out together
    model: str = "demo"
    """Directory, hub name, .gguf file or demo."""
    seed: Seed = 0

    def check(self) -> None:
        """Refuse what can be seen without the model: files that are not there, names that do not exist.

        Raises ``SurgeryError``. A recipe calls it first, and the command line before it imports anything heavy.
        """

    def cautions(self) -> list[str]:
        """What a user should know before a run of these settings, such as that the data are few; a sentence each."""
        return []

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What ``values`` change of the defaults (a profile's learning rate, say) where they do not say it."""
        return {}

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        named = {cls.renamed.get(key, key): value for key, value in values.items()}
        return cls.usual(named) | named


class Rates(Settings):
    """How fast to train."""

    lr: Positive = 1e-5
    schedule: Literal["constant", "linear"] = "constant"
    """The learning rate after the warm-up: constant, or down to 0 at the last step."""
    warmup: Share = 0.0
    """The share of the steps in which the learning rate rises from 0."""
    weight_decay: NotNegative = 0.0


class Epochs(Rates):
    """And how long."""

    epochs: Count = 1
    batch_size: Count = 16

    def plan(self, *, optimizer: str = "adamw", dropout: bool = False) -> "Plan":
        """The training that these settings ask for."""
        from surgery.training import Plan

        how: Any = {k: getattr(self, k) for k in ("schedule", "warmup", "parts", "average", "clip") if hasattr(self, k)}
        return Plan(self.lr, self.epochs, self.batch_size, optimizer, self.weight_decay, dropout, **how)


class Training(Epochs):
    """And by which optimizer."""

    optimizer: Literal["adam", "adamw"] = "adamw"


class SharedTraining(Training):
    """And in how many passes a step is taken, which several processes can share."""

    shares_work = True
    parts: Count = 1
    """Passes of a step, each over a part of its examples: so many processes share training. To rounding the same."""
    average: Share = 0.0
    """The last share of the steps, of which the mean of the parameters is what is learnt; 0: the last step's own."""


class Dropout(Settings):
    """Of the model that is trained itself."""

    dropout: bool = False
    """Train with the model's own dropout on."""


class LoRA(Settings):
    """Low-rank factors (Hu et al. 2021) beside some linear layers, which are trained instead of the layers."""

    rank: Count = 16
    alpha: Positive = 32.0
    lora_dropout: DropoutRate = 0.0
    """Of the factors' input, and inside a new module; above 0 the model's own dropout is on while training, too."""
    target_modules: list[str] = []
    """Ends of the names of the layers that get factors, such as q_proj; every linear layer of the blocks if none."""


class TrainRows(Settings):
    """How much to train on."""

    train_rows: Limit = 0
    """At most so many training rows, drawn by the seed; 0 takes all."""


class DataFolder(Settings):
    """Where the data sets are."""

    data: str = ""
    """The directory of data sets."""

    @classmethod
    def reads_data(cls, values: Mapping[str, Any]) -> bool:
        """Whether a run with these values reads the directory, so that a study hands it on."""
        return True

    def check(self) -> None:
        """Also the folder, where one is named."""
        super().check()
        if self.data and not Path(self.data).is_dir():
            raise SurgeryError(f"data: {self.data!r} is no folder; name the directory of the data sets")


class Suites(DataFolder):
    """What is measured before and after on files of ``data``."""

    suites: list[str] = []
    test_rows: Limit = 0
    """At most so many rows of each data set that is measured, drawn by the seed; 0 takes all."""

    def check(self) -> None:
        """Also the suites' names."""
        super().check()
        check_suites(self.suites)


class PromptSet(Settings):
    """The prompts that name a group and leave the next word open."""

    prompt_set: str = "genbias"
    """genbias, race, or a .toml / .json file of your own."""

    def check(self) -> None:
        """Also the prompt set."""
        super().check()
        load_prompt_set(self.prompt_set)

    def cautions(self) -> list[str]:
        """Also of a prompt set with few subjects."""
        return [*super().cautions(), *checking.cautions(load_prompt_set(self.prompt_set))]


class Neutral(Settings):
    """Texts for perplexity."""

    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""

    def check(self) -> None:
        """Also the texts."""
        super().check()
        if self.neutral:
            neutral.sentences(self.neutral)


class Part(Settings):
    """What is measured on."""

    part: Literal["dev", "test"] = "test"
    """dev while settings are chosen, test for what is reported."""


class Saving(Settings):
    """In what numbers the model is opened, and how the edited checkpoint is written."""

    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    """auto: stochastic into 16-bit checkpoints, where nearest loses 20-50 % of a small edit's entries."""
    keep_checkpoint: bool = False
    """Leave the edited model as a checkpoint in the run's folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


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
