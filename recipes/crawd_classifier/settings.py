"""The settings of a classifier's run: the paper's module, usual values for a BERT, and each method's weight."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.errors import SurgeryError
from surgery.runs import settings as shared

WEIGHTS = {"crawd": 0.0, "vanilla": 0.0, "adversarial": 1.0, "ibm": 1.0, "cbe": 1.0}
"""How strong each method's own term is where nothing is said; no paper gives a number."""


class Settings(shared.Training, shared.TrainRows, shared.DataFolder, shared.Part, shared.Saving):
    """The paper's decay and module (appendix A.1); the rest are usual values for a BERT, of which it says nothing."""

    renamed = {"limit": "train_rows", "dropout": "module_dropout"}
    has_ledger = False  # its delta is of a classifier, which knows no next word
    source: Literal["hatecheck", "davidson", "both"] = "hatecheck"
    """What is trained on. HateCheck's templates of the test part are not seen in training; Davidson names no group."""
    """Of each source ``train_rows`` are drawn, the classes in their proportions."""
    method: Literal["crawd", "vanilla", "adversarial", "ibm", "cbe"] = "crawd"
    reference: list[str] = ["woman", "man", "black", "white", "gay", "straight", "Muslim", "Christian", "disabled"]
    """Those of the paper's 21 words that name the groups of HateCheck and their counterparts."""
    top_percent: float = Field(40.0, ge=0, le=100)
    decay: float = Field(0.2, ge=0, le=1)
    scope: Literal["row", "sequence"] = "sequence"
    """What the top K percent are taken of: a classifier reads the whole text before it answers."""
    heads: int = Field(8, ge=1)
    ffn: int = Field(0, ge=0)
    renormalise: bool = False
    weight: float = Field(0.0, ge=0)
    """Of the adversary's reversed gradient, or of IBM's or CBE's term; 1 where nothing is said. CrAWD has none."""
    lr: shared.Positive = 5e-5
    schedule: Literal["constant", "linear"] = "linear"
    warmup: shared.Share = 0.1
    epochs: shared.Count = 4
    batch_size: shared.Count = 32
    max_length: int = Field(64, ge=2)
    weight_decay: shared.NotNegative = 0.01
    module_dropout: shared.DropoutRate = 0.1
    """Inside the module; above 0 the encoder's own dropout is on, too."""
    controls: list[str] = ["vanilla", "adversarial"]
    dtype: Literal["float32"] = "float32"

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """The weight of the method's own term."""
        method = values.get("method", "crawd")
        return {"weight": WEIGHTS[method]} if method in WEIGHTS else {}

    def check(self) -> None:
        """Also whether a data folder is named."""
        super().check()
        if not self.data:
            raise SurgeryError("crawd_classifier: no data; name the directory of data sets with --set data=DIR")
