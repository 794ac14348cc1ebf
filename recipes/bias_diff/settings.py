"""The settings of a BIAS DIFF run: what trains a small model visibly as defaults, and what a profile changes."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.catalogue import check_scorer
from surgery.errors import SurgeryError
from surgery.runs import settings as shared

PROFILES: dict[str, dict[str, Any]] = {
    "demo": {},
    # Table 8. At these rates a small model hardly moves; 50 epochs of retraining stand against 5 of the warm-up.
    "paper": {"lr": 1.5e-6, "retrain_epochs": 50, "unlearn_lr": 3e-7, "unlearn_epochs": 10},
    # Two cores, ten minutes, the demo model.
    "quick": {
        "train_rows": 160,
        "max_length": 40,
        "epochs": 3,
        "lr": 1e-3,
        "probe_pairs": 60,
        "test_pairs": 80,
        "checkpoints": "last",
        "test_rows": 24,
        "tokens_of": 6,
    },
}


class Settings(shared.Epochs, shared.LoRA, shared.TrainRows, shared.Suites, shared.Neutral, shared.Saving):
    """Defaults train a small model visibly; ``profile = "paper"`` has the values of Table 8."""

    renamed = {"rows": "train_rows", "limit": "test_rows", "optimizer": "attribute_optimizer"}
    profile: Literal["demo", "quick", "paper"] = "demo"
    """Sets what the others leave unsaid: quick for two cores and ten minutes, paper for Table 8's learning rates."""
    mixture: Literal["crows_agnews", "rtp_agnews", "crows_trex"] = "crows_agnews"
    """3 biased rows to 7 neutral ones (appendix C)."""
    """Of the mixture ``train_rows`` are made; 0 is as large as the files allow."""
    file: str = ""
    """Your own training texts instead of a mixture: .txt, .jsonl, .csv or .tsv."""
    text: str = "text"
    label: str = "biased"
    """The columns of the text and, where there is one, of a true-or-false label, which only judges the selection."""
    probe: str = ""
    """With ``file``: biased sentences (column text), with their anti-stereotypes (column anti) where you have them."""
    probe_from: Literal["stereoset", "crows_pairs"] = "stereoset"
    """Of a mixture: what probes the gradients and gives the twins. StereoSet's twins share the group's word, so that
    only what is said of the group tells them apart; in CrowS-Pairs the words of the groups do."""
    probe_pairs: int = Field(0, ge=0)
    """Probe with so many sentences or pairs; 0 takes all."""
    test: str = ""
    """With ``file``: other such pairs to measure with; without it half of the probe's pairs are held out for that."""
    max_length: int = Field(128, ge=2)
    """Longer texts are cut after so many tokens; how many were is said in the log."""

    lora_dropout: shared.DropoutRate = 0.05
    target_modules: list[str] = []
    """Ends of the names of the layers that get LoRA factors; none: q_proj and v_proj, or the model's own."""
    lr: shared.Positive = 5e-4
    """Of warm-up and retraining; the paper's 1.5e-6 leaves a small model where it was."""
    epochs: shared.Count = 5
    batch_size: shared.Count = 16
    """The paper does not say."""
    warmup: shared.Share = 0.2
    schedule: Literal["constant", "linear"] = "linear"
    weight_decay: shared.NotNegative = 0.001

    checkpoints: Literal["all", "last"] = "all"
    """Of the warm-up: Eq. 5 sums over them, weighted by their learning rates; Eq. 6 takes the last."""
    attribute_at: Literal["lora", "weights"] = "lora"
    attribute_targets: list[str] = []
    """Ends of the names of the layers whose gradients are compared; none: all that ``attribute_at`` has."""
    attribute_optimizer: Literal["less", "frozen_v", "none"] = "less"
    """What Adam makes of a text's gradient (Gamma in Eq. 5): LESS's form, v alone, or nothing."""
    normalise: Literal["cosine", "dot"] = "cosine"
    """cosine: Eq. 5. dot: Eq. 6."""
    layers: Literal["summed", "equal"] = "summed"
    """equal: the probe's part in each layer is scaled to length 1; it tells more stereotypes from their twins."""
    select_by: Literal["influence", "contrast", "tfidf", "tfidf_contrast", "minus_loss", "random", "labels", "best"] = (
        "influence"
    )
    """best: the score that covers most of the labelled rows, so it needs the labels, as labels does."""
    top: float = Field(0.35, gt=0, lt=1)
    """The share of the texts that is selected (section 3.2)."""

    mitigation: Literal["retrain", "npo", "multi", "ascent", "margin"] = "retrain"
    """retrain: the original model on what is left. npo: Eq. 7. multi: Eq. 8. ascent: gradient ascent. margin, which is
    ours: the margin between the selected texts and their twins, where these are known, back to the original's."""
    npo_form: Literal["original", "printed"] = "original"
    """original: NPO's own 2/beta. printed: 1/beta in Eq. 7; per token and without pi_ref in Eq. 8."""
    beta: float = Field(0.1, gt=0)
    retain: float = Field(1.0, ge=0)
    """Of multi: the weight of what is kept beside what is forgotten."""
    retain_by: Literal["text", "token"] = "text"
    """Of multi: what is kept counts by its sum, as what is forgotten does, or by its mean token."""
    unlearn_until: Literal["original", "epochs"] = "original"
    """original: unlearning ends where the selected texts' likelihood (margin: theirs over their twins') is back at the
    original model's. epochs: not before ``unlearn_epochs``."""
    unlearn_lr: float = Field(1e-3, gt=0)
    unlearn_epochs: int = Field(10, ge=1)
    """At most, where ``unlearn_until`` ends it before."""
    retrain_epochs: int = Field(0, ge=0)
    """0: as many as the warm-up's."""
    controls: list[str] = ["random"]
    """What else is done from the same warm-up: a score (random, tfidf, labels, ...) takes its rows instead, a
    mitigation (retrain, npo, multi, ascent, margin) treats the same rows, and npo:random is both. scaled and prompt
    treat none: the warm-up's difference times ``scale``, and the preamble before each sentence."""
    scale: float = Field(0.5, ge=0, le=1)
    """Of the control scaled."""
    preamble: str = "Please write a sentence without any bias. "
    """What the prompt baseline puts before each sentence; the paper's text is that of its NPO prompt (appendix E)."""

    scorer: str = "bias-bench"
    """Of the CrowS-Pairs sentences; Eq. 15 is a masked model's and is not defined for a causal one."""
    test_pairs: int = Field(0, ge=0)
    """Measure with so many test pairs; 0 takes all."""
    suites: list[str] = []
    """What is measured beside CrowS-Pairs and perplexity with files of ``data``: cloze, seat, stereoset and others.
    cloze where ``data`` is given and nothing is said."""
    test_rows: shared.Limit = 500
    """Also of the texts for perplexity."""
    tokens_of: int = Field(20, ge=0)
    """How many of the top texts are shown with what each of their tokens adds."""

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The profile's values, and cloze where there is a data folder."""
        suites: dict[str, Any] = {"suites": ["cloze"]} if values.get("data") else {}
        return suites | PROFILES.get(str(values.get("profile")), {})

    def check(self) -> None:
        """Also whether there is something to train on and to probe with, and the scorer."""
        super().check()
        if not (self.file or self.data):
            raise SurgeryError("bias_diff: no data; name the data folder (--set data=DIR), or your own file and probe")
        if self.file and not self.probe:
            raise SurgeryError(f"{self.file}: no probe; name a file of biased sentences with --set probe=FILE")
        if self.suites and not self.data:
            raise SurgeryError(f"suites: {', '.join(self.suites)} need the data folder; set data, or suites to []")
        check_scorer(self.scorer)
