"""The settings of an unlearning run: the paper's values as defaults, and what a variant, profile or method changes."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.data.stereoset import Kind
from surgery.errors import SurgeryError
from surgery.runs import settings as shared

# What a variant, a profile or a method changes where nothing else is said; later ones win.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("variant", "released"): {
        "weight_forget": 0.5,
        "weight_retain": 0.3,
        "weight_kl": 0.2,
        "retain_by": "token",
        "lr": 4e-5,
        "dev_rows": 100,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    # Ours, labelled: all in the scorers' unit, bias types alike, steered by every term of the source; chosen on terms
    # left out of SmolLM2-135M. Gemma 3 270M takes 3e-4. Offsets are of the data's bias types, so they are to be named.
    ("variant", "ours"): {
        "unit": "mean",
        "weight_forget": 0.0,
        "weight_prefer": 1.0,
        "balance": "types",
        "steer": "folds",
        "swap_when": "interval",
        "select": "overall",
        "early_stop": False,
        "beta": 5.0,
        "weight_kl": 1.0,
        "lr": 4e-4,
        "steps": 150,
        "evaluate_every": 30,
    },
    # Chosen on the development sets of SmolLM2-135M among 14 settings; docs/recipes/bias_unlearn.md has them.
    ("profile", "small"): {"lr": 2e-4, "steps": 250, "weight_forget": 0.05, "dev_rows": 1000},
    # For two cores and the demo model. So few steps need a high rate, at which the paper's weights (beta 0.1, forget
    # 0.4) make every sentence unlikely: NPO's gradient then fades only once a stereotype is e^10 times less likely.
    ("profile", "quick"): {
        "lr": 1e-3,
        "steps": 40,
        "beta": 1.0,
        "weight_forget": 0.1,
        "retain_batch": 12,
        "balance": "types",
        "evaluate_every": 8,
        "dev_rows": 40,
        "test_rows": 400,
    },
    # Fine-tuning on anti-stereotypes; on both sides alike; on stereotypes, to be subtracted; preferring one to the
    # other: no other part of Eq. 4 unless weight_kl asks for it.
    ("method", "cda"): {"swap": False, "retain_by": "token", "weight_kl": 0.0, "controls": []},
    ("method", "sft"): {"swap": False, "retain_by": "token", "weight_kl": 0.0, "controls": []},
    ("method", "stereotypes"): {
        "swap": False,
        "retain_by": "token",
        "weight_kl": 0.0,
        "adversarial": 0.0,
        "early_stop": False,
        "keep": "last",
        "controls": [],
    },
    ("method", "dpo"): {"swap": False, "weight_kl": 0.0, "controls": []},
    ("method", "ga"): {
        "swap": False,
        "weight_forget": 1.0,
        "weight_retain": 0.0,
        "weight_kl": 0.0,
        "adversarial": 0.0,
        "controls": [],
    },
    ("method", "self_debias"): {"controls": []},
}


class Settings(shared.Rates, shared.LoRA, shared.Suites, shared.Saving):
    """Defaults are the paper's (appendix A.2) where it says one."""

    renamed = {"limit": "test_rows", "dropout": "lora_dropout"}
    train: str = ""
    """Another training source, and another test file; any form that surgery.data.stereoset reads."""
    test: str = ""
    kind: Kind = "intrasentence"
    """Which rows of the test file: intrasentence (what bias-bench and the paper score), intersentence or all."""
    profile: Literal["paper", "small", "quick"] = "paper"
    """small: for models of about 0.1 billion parameters; quick: fewer steps and rows, for two CPU cores."""
    method: Literal["bias_unlearn", "cda", "sft", "stereotypes", "dpo", "ga", "self_debias"] = "bias_unlearn"
    """Or a baseline: CDA (anti-stereotypes only), SFT (both sides), the stereotypes (a task vector, to be subtracted),
    DPO, gradient ascent, Self-Debias (no edit)."""
    variant: Literal["paper", "released", "ours"] = "paper"
    """released: as the authors' code: one sigmoid a batch, one type after another, selection on the test file.

    ours: a preference between the sides in the scorers' unit, steered by cross-validation over all training terms.
    """
    unit: Literal["sum", "mean"] = "sum"
    """A sentence's log-probability in NPO, retention and preference: the sum over its continuation, as printed, or the
    mean over all its tokens, which is what the scorers compare."""
    forget_batch: int = Field(4, ge=1)
    retain_batch: int = Field(28, ge=1)
    unrelated_batch: int = Field(4, ge=1)
    """Unrelated sentences of a chunk, for the KL divergence; the paper gives no number."""
    beta: float = Field(0.1, gt=0)
    weight_forget: float = Field(0.4, ge=0)
    weight_retain: float = Field(0.4, ge=0)
    weight_kl: float = Field(0.2, ge=0)
    """Eq. 4; 0 leaves a part out (Table 5)."""
    weight_prefer: float = Field(0.0, ge=0)
    """Of a term of ours: -log sigma(-beta (margin + offset)) of a stereotype and its anti-stereotype."""
    gradient_ratio: float = Field(0.0, ge=0)
    """From step 2 on, the norm of the weighted gradients of what pushes (NPO, preference) over that of retention, which
    the weights set from its size after step 1; 0 leaves the weights as they are."""
    prefer_batch: int = Field(16, ge=1)
    offset: list[str | int | float] = [0.0]
    """Nats (by unit): 0.1, or by bias type, a number alone being that of the others: gender=0.3,0.1."""
    retain_by: Literal["sentence", "token"] = "sentence"
    """Eq. 2's cross-entropy summed over a sentence, as NPO's argument is, or per token, as the released code has it.

    Held per token, every sentence of the development set became less likely by 1 nat a token in ten steps of the demo
    model at 2e-3, stereotypes and others alike, and LMS fell by 4 to 10 points; summed, LMS stayed.
    """
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(reference || model); reverse is Eq. 3 as printed."""
    adversarial: float = Field(0.25, ge=0, le=1)
    """The share of anti-stereotypes mixed into the forget set; "a small portion" in the paper, 25 % in its code."""
    swap: bool = True
    """Exchange the two sets of a bias type while its score on the development set is below 50."""
    swap_when: Literal["score", "interval"] = "score"
    """Below 50: the score, as the paper has it, or its whole 95 % interval over terms."""
    steer: Literal["part", "folds"] = "part"
    """By a part of the terms, which is not trained on, or by folds: as many more trainings score all terms unseen."""
    folds: int = Field(3, ge=2)
    balance: Literal["rows", "types"] = "rows"
    """Draw from all triples alike, as the paper does, or from each bias type equally often."""
    start: Literal["tokenizer", "always", "never"] = "tokenizer"
    """A start token before each training sentence where the tokenizer puts one by itself, always, or never."""
    lr: shared.Positive = 5e-5
    steps: int = Field(1000, ge=1)
    """At most so many chunks."""
    schedule: Literal["constant", "linear"] = "linear"
    rank: shared.Count = 8
    alpha: shared.Positive = 16.0
    lora_dropout: shared.DropoutRate = 0.1
    dev_share: float = Field(0.2, gt=0, lt=1)
    """The share of each bias type's target terms that is not trained on."""
    dev_rows: int = Field(50, ge=2)
    """At most so many rows of each bias type are scored while training."""
    evaluate_every: int = Field(25, ge=1)
    threshold: float = Field(2.0, gt=0)
    """Training ends when each type's score on the development set is so near 50 (or one row of that set, if larger)."""
    early_stop: bool = True
    keep: Literal["best", "last"] = "best"
    """Without an early stop: the best checkpoint by the development set, or the last one."""
    select: Literal["icat", "ss", "overall"] = "icat"
    """Best: the highest ICAT, or, where LMS falls by at most 1.5, SS nearest to 50: each bias type's, or their mean."""
    controls: list[str] = ["no_push"]
    """no_push: the same training without what pushes (NPO, preference), at the same swaps and the same kept step. None
    for a baseline."""
    scorer: str = "bias-bench"
    """Of StereoSet, and of the suites that take one: crows_pairs. Further suites: bbq, capability."""

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What the variant, the profile and the method change."""
        changed: dict[str, Any] = {}
        for (key, value), more in CHANGES.items():
            if values.get(key) == value:
                changed |= more
        return changed

    def check(self) -> None:
        """Also whether the two files are named, and whether the suites can be measured."""
        super().check()
        if not (self.data or (self.train and self.test)):
            raise SurgeryError(
                "bias_unlearn: no data; name the directory with --set data=DIR, or two files: train, test"
            )
        known = ["no_push"] if self.method == "bias_unlearn" else []
        unknown = next((name for name in self.controls if name not in known), None)
        if unknown is not None:
            raise SurgeryError(
                f"controls: got {unknown!r} with method {self.method}; expected {known[0] if known else 'none'}; "
                "leave it out"
            )
        if self.steer == "folds" and (self.variant == "released" or self.method == "self_debias"):
            raise SurgeryError(
                f"steer: got folds with variant {self.variant} and method {self.method}; the released variant steers "
                "by the test file, Self-Debias trains nothing; use steer=part"
            )
        named = ", ".join(self.suites)
        if self.suites and not self.data:
            raise SurgeryError(f"suites: {named} need a directory of data sets; name it with data=DIR")
        if "stereoset" in self.suites:
            raise SurgeryError("suites: got stereoset, which is measured in every run, on the test file; leave it out")
        if self.suites and self.method == "self_debias":
            raise SurgeryError(f"suites: got {named}; under Self-Debias StereoSet alone is scored; leave them out")
