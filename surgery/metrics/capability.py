"""Accuracy on small capability checks: what an edit costs where no bias is asked about."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.capability import FILES, load
from surgery.data.rows import sample
from surgery.metrics.multiple_choice import Norm, accuracy, score
from surgery.processes import each_once
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
    every = {task: load(task, folder) for task in tasks}
    drawn = {task: sample(every[task], limit, seed, lambda question: question.answer) for task in tasks}
    # All in one: batches are then full to the last task's, and several processes have as much to do each.
    scores = score(model, tokenizer, [question for questions in drawn.values() for question in questions], step=step)
    asked, first = {}, 0
    for task, questions in drawn.items():
        own, first = scores.part(first, first + len(questions)), first + len(questions)
        some = f", {len(questions)} of {len(every[task])} with seed {seed}" if len(questions) < len(every[task]) else ""
        name = "two-way HellaSwag" if task == "hellaswag" else task
        data = f"{name}, {Path(FILES[task]).name}{some}, zero-shot"
        asked[task] = partial(accuracy, own, NORMS[task], data=data)
    return each_once(asked)
