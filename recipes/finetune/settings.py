"""The settings of a plain fine-tuning; defaults are usual ones."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from surgery.data.texts import Columns, examples
from surgery.errors import SurgeryError
from surgery.runs import settings as shared

LR = {"full": 2e-5, "lora": 2e-4}


class Settings(
    shared.Training,
    shared.Dropout,
    shared.LoRA,
    shared.TrainRows,
    shared.PromptSet,
    shared.Neutral,
    shared.Saving,
):
    """Defaults are usual ones; the papers say little about their Vanilla / SFT baselines."""

    renamed = {"data": "prompt_set", "limit": "train_rows"}
    file: str = ""
    """What to learn: .txt (a text a line), .jsonl, .csv or .tsv with texts or with prompts and answers."""
    text: str = "text"
    """Names of the file's columns or keys; '' for one that is not to be used."""
    prompt: str = "prompt"
    answer: str = "answer"
    held_out: float = Field(0.1, gt=0, lt=1)
    """The share of the rows that is not trained on, drawn by the seed; at least one row."""
    max_length: int = Field(256, ge=2)
    """Longer rows are cut after so many tokens; how many were is said in the log."""
    end: bool = False
    """Learn the tokenizer's end token after each row, too."""
    method: Literal["full", "lora"] = "full"
    lr: shared.Positive = LR["full"]
    """2e-5; for LoRA 2e-4 where nothing else is said."""
    batch_size: shared.Count = 8
    merge: bool = False
    """Write LoRA's products, a dense delta, instead of its factors."""
    suites: list[str] = ["perplexity"]
    """What is measured before and after beside the held-out loss: perplexity, genbias, genhint."""

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """LoRA's own learning rate."""
        return {"lr": LR[values["method"]]} if values.get("method") in LR else {}

    def check(self) -> None:
        """Also the file, every row of it."""
        super().check()
        if not self.file:
            raise SurgeryError("finetune: no file to learn from; name one with --set file=texts.jsonl")
        examples(self.file, columns=Columns(self.text, self.prompt, self.answer))
