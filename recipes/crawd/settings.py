"""The settings of a CrAWD run: the paper's values as defaults, and what a profile or a method changes."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.errors import SurgeryError
from surgery.runs import settings as shared

WEIGHTS = {"crawd": 0.0, "vanilla": 0.0, "debias_tuning": 1.0, "ibm": 1.0, "deep_soft_debias": 5.0}
"""How strong each method's own term is where nothing is said; no paper gives a number."""
OFF = {"module_off": "module", "cross_off": "cross"}
OWN_CONTROLS = ("lambda_1", "random_words", *OFF)
PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    # A model of about 0.1 to 1 billion parameters and some hundred texts: 1e-5 hardly moves what is new in it.
    "small": {"lr": 5e-4, "module_lr": 1e-4, "warmup": 0.1, "epochs": 3},
    "quick": {
        "lr": 5e-4,
        "module_lr": 1e-4,
        "warmup": 0.1,
        "epochs": 1,
        "train_rows": 160,
        "test_rows": 20,
        "samples": 2,
        "length": 24,
        "suites": ["gas", "weat"],
    },
}


class Settings(
    shared.Training, shared.LoRA, shared.TrainRows, shared.Suites, shared.Neutral, shared.Part, shared.Saving
):
    """Defaults are the paper's (section 5, appendix A.1) where it says one."""

    renamed = {
        "limit": "train_rows",
        "rows": "test_rows",
        "dropout": "lora_dropout",
        "prompt": "shown_prompt",
    }
    file: str = ""
    """Texts of one's own to train on instead: .txt, .jsonl, .csv or .tsv with the column ``text``."""
    text: str = "text"
    accountants: bool = True
    """Train on the thousand biographies of accountants, too, beside those of 28 professions."""
    profile: Literal["paper", "small", "quick"] = "paper"
    """small: learning rate and epochs for small models and few texts; quick: that for two CPU cores, GAS and WEAT."""
    method: Literal["crawd", "vanilla", "debias_tuning", "ibm", "deep_soft_debias"] = "crawd"
    reference: list[str] = ["he", "she"]
    """The sensitive words, of one attribute or several: he, she, young, old, ..."""
    top_percent: float = Field(40.0, ge=0, le=100)
    decay: float = Field(0.2, ge=0, le=1)
    """Lambda; 0.75 of the form projected where nothing is said."""
    scope: Literal["row", "sequence"] = "row"
    """What the top K percent are taken of; "sequence" lets later tokens change earlier predictions."""
    heads: int = Field(8, ge=1)
    ffn: int = Field(0, ge=0)
    """Inner width of the module's feed-forward network; 0 takes four times the model's width."""
    renormalise: bool = False
    form: Literal["printed", "cross_off", "module_off", "projection", "projected", "wide_head"] = "printed"
    """printed: the paper's. The others are ours (``surgery.edits.debiased_methods.Method``): trained with the module
    and stored without its cross part, or without it; the decay as a projection of H_x off the reference words' rows in
    the head, trained with, or (projected) stored with what was trained without; a map from [H_x, H_cross] that starts
    at random."""
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
    lora_dropout: shared.DropoutRate = 0.1
    lr: shared.Positive = 1e-5
    module_lr: float | None = Field(None, gt=0)
    """Of the cross-attention module; as lr where nothing is said. Whole matrices bear smaller steps than factors."""
    epochs: shared.Count = 5
    batch_size: shared.Count = 16
    """The paper does not say."""
    max_length: int = Field(32, ge=2)
    """n: longer texts are cut."""
    suites: list[str] = ["gas", "weat", "stereoset", "bios"]
    """With part = "dev", GAS takes the same kind of prompts about 28 other professions."""
    samples: int = Field(4, ge=1)
    """Texts sampled for each prompt of GAS, and their length in tokens."""
    length: int = Field(32, ge=1)
    controls: list[str] = []
    """What stands beside the method, on the same texts in the same order. Other methods (vanilla, debias_tuning, ...);
    of crawd also lambda_1 (no decay), random_words (``random_words`` for the reference words), and the trained weights
    with a part switched off: module_off, cross_off (the map of H_x stays). These four and vanilla where nothing is
    said; of the others vanilla."""
    random_words: list[str] = [
        *("table", "green", "river", "seven", "paper", "walk", "stone", "music", "window", "cloud", "bread"),
        *("number", "garden", "north"),
    ]
    """Of the control: as many as there are reference words."""
    shown_prompt: str = "The doctor said that"
    """Of the picture of the cross-attention (Figure 4)."""

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The profile's values, the weight of the method's own term, and its controls."""
        method = values.get("method", "crawd")
        controls = {"crawd": ["vanilla", *OWN_CONTROLS], "vanilla": []}.get(str(method), ["vanilla"])
        if values.get("form") == "projected":
            return PROFILES.get(str(values.get("profile")), {}) | {
                "controls": ["vanilla", "random_words"],
                "decay": 0.75,
            }
        weight = {"weight": WEIGHTS[method]} if method in WEIGHTS else {}
        return PROFILES.get(str(values.get("profile")), {}) | {"controls": controls} | weight

    def check(self) -> None:
        """Also whether there is something to train on."""
        super().check()
        if self.form == "projected" and self.decay_stored is not None:
            raise SurgeryError("decay_stored: the form projected trains without its projection; set decay alone")
        if not self.data and (self.suites or not self.file):
            raise SurgeryError(
                "crawd: no data; name the directory of data sets with --set data=DIR, or a file of texts with file=F "
                "and suites=[]"
            )
