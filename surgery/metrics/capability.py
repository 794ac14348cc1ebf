"""Accuracy on small capability checks: what an edit costs where no bias is asked about."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.capability import FILES, load
from surgery.data.rows import sample
from surgery.metrics.multiple_choice import Norm, accuracy, score
from surgery.progress import Advance

NORMS: dict[str, Norm] = {
    "boolq": "sum",
    "piqa": "characters",
    "openbookqa": "characters",
    "commonsenseqa": "sum",
    "mmlu": "sum",
    "hellaswag": "characters",
}
"""What is compared: whole texts of unlike length per character, single words and letters by their sum."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    step: Advance | None = None,
    tasks: Sequence[str] = tuple(FILES),
) -> dict[str, Any]:
    """``{"boolq": Metric, "piqa": Metric, ...}``: zero-shot accuracy of each of ``tasks`` (``data.capability``).

    ``limit`` questions of each task, drawn with ``seed`` so that the places of the right answers keep their shares.
    HellaSwag is two-way: chance is 0.5, and the value is not that of the four-way benchmark.
    """
    found = {}
    for task in tasks:
        every = load(task, folder)
        questions = sample(every, limit, seed, lambda question: question.answer)
        drawn = f", {len(questions)} of {len(every)} with seed {seed}" if len(questions) < len(every) else ""
        scores = score(model, tokenizer, questions, step=step)
        name = "two-way HellaSwag" if task == "hellaswag" else task
        found[task] = accuracy(scores, NORMS[task], data=f"{name}, {Path(FILES[task]).name}{drawn}, zero-shot")
    return found
