"""Settings that recipes share: each key once, with its type, its default and what it means."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from surgery.catalogue import check_suites
from surgery.data import checking, neutral
from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.seeds import SEEDS

if TYPE_CHECKING:
    from surgery.training import Plan

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
