"""The settings of a CrAWD run: the paper's values as defaults, and what a profile or a method changes."""

from typing import Any, Literal

from pydantic import Field, model_validator

import surgery.runs.settings
from surgery.edits.debiased_tuning import WEIGHTS

PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    # A model of about 0.1 to 1 billion parameters and some hundred texts: 1e-5 hardly moves what is new in it.
    "small": {"lr": 5e-4, "module_lr": 1e-4, "warmup": 0.1, "epochs": 3},
    "quick": {
        "lr": 5e-4,
        "module_lr": 1e-4,
        "warmup": 0.1,
        "epochs": 1,
        "limit": 160,
        "rows": 20,
        "samples": 2,
        "length": 24,
        "suites": ["gas", "weat"],
    },
}


class Settings(surgery.runs.settings.Settings):
    """Defaults are the paper's (section 5, appendix A.1) where it says one."""

    data: str = ""
    """Directory of data sets: bias_in_bios/ to train on and to measure, stereoset/, seat/ and so on to measure."""
    file: str = ""
    """Texts of one's own to train on instead: .txt, .jsonl, .csv or .tsv with the column ``text``."""
    text: str = "text"
    accountants: bool = True
    """Train on the thousand biographies of accountants, too, beside those of 28 professions."""
    limit: int = Field(0, ge=0)
    """So many of the training texts, drawn by the seed; 0 takes all."""
    profile: Literal["paper", "small", "quick"] = "paper"
    """small: learning rate and epochs for small models and few texts; quick: that for two CPU cores, GAS and WEAT."""
    method: Literal["crawd", "vanilla", "debias_tuning", "ibm", "deep_soft_debias"] = "crawd"
    reference: list[str] = ["he", "she"]
    """The sensitive words, of one attribute or several: he, she, young, old, ..."""
    top_percent: float = Field(40.0, ge=0, le=100)
    decay: float = Field(0.2, ge=0, le=1)
    scope: Literal["row", "sequence"] = "row"
    """What the top K percent are taken of; "sequence" lets later tokens change earlier predictions."""
    heads: int = Field(8, ge=1)
    ffn: int = Field(0, ge=0)
    """Inner width of the module's feed-forward network; 0 takes four times the model's width."""
    renormalise: bool = False
    decay_stored: float | None = Field(None, ge=0, le=1)
    """Lambda of the module as it is stored; the paper trains and generates with the same one."""
    weight: float = Field(0.0, ge=0)
    """Of the method's own term: 1 for debias_tuning and ibm, 5 for deep_soft_debias where nothing is said.

    CrAWD has none; above 0 the module is trained with Debias Tuning's term, which is not the paper's method."""
    penalised: list[str] = []
    """Words of Debias Tuning's term; the reference words if none."""
    lora: bool = True
    """False trains CrAWD's module alone."""
    four_bit: bool = False
    """Train on the base in 4 bits (QLoRA, appendix A.1), which needs a GPU and bitsandbytes. What comes out is put onto
    the checkpoint as it is, and measured there."""
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    target_modules: list[str] = []
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the LoRA factors' input and inside the module (and the model's own, where it has any)."""
    lr: float = Field(1e-5, gt=0)
    module_lr: float | None = Field(None, gt=0)
    """Of the cross-attention module; as lr where nothing is said. Whole matrices bear smaller steps than factors."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """The share of the steps in which the rates rise from 0."""
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1)
    """The paper does not say."""
    max_length: int = Field(32, ge=2)
    """n: longer texts are cut."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    part: Literal["dev", "test"] = "test"
    """What is measured on: dev (and BOLD's prompts for GAS) while settings are chosen, test for what is reported."""
    suites: list[str] = ["gas", "weat", "stereoset", "bios"]
    rows: int = Field(0, ge=0)
    """So many prompts or rows of each suite, drawn by the seed; 0 takes all."""
    samples: int = Field(4, ge=1)
    """Texts sampled for each prompt of GAS, and their length in tokens."""
    length: int = Field(32, ge=1)
    controls: list[str] = ["vanilla"]
    """Methods that are trained beside, on the same texts in the same order."""
    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""
    prompt: str = "The doctor said that"
    """Of the picture of the cross-attention (Figure 4)."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        usual = PROFILES.get(values.get("profile", "paper"), {})
        method = values.get("method", "crawd")
        return usual | ({"weight": WEIGHTS[method]} if method in WEIGHTS else {}) | values
