"""Small capability checks: BoolQ, PIQA, OpenBookQA, CommonsenseQA, MMLU and two-way HellaSwag from their files.

Prompts are those of lm-eval's tasks of the same names, without examples (zero-shot), as far as the files allow:
MMLU's file names no subject, and HellaSwag's no activity and one wrong ending only.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from surgery.data.reading import read_text
from surgery.data.rows import find_file, read_rows
from surgery.errors import SurgeryError

FILES = {
    "boolq": "capability/boolq_dev_600.jsonl",
    "piqa": "capability/piqa_validation.jsonl",
    "openbookqa": "capability/openbookqa_test.jsonl",
    "commonsenseqa": "capability/commonsenseqa_validation.jsonl",
    "mmlu": "capability/mmlu_test_1000.jsonl",
    "hellaswag": "capability/hellaswag_val_correct.800.txt",
}
WRONG_ENDINGS = "capability/hellaswag_val_wrong.800.txt"


@dataclass(frozen=True)
class Question:
    """A prompt, its options as they follow it (with their leading space), and the place of the right one."""

    prompt: str
    options: tuple[str, ...]
    answer: int


def load(task: str, folder: str | Path) -> list[Question]:
    """The questions of ``task`` (a key of ``FILES``) from its file under the data directory ``folder``.

    Raises ``SurgeryError`` for an unknown task, a missing file, or a row that cannot be read, by its line.
    """
    if task not in FILES:
        raise SurgeryError(f"capability task: got {task!r}, expected one of {', '.join(FILES)}")
    path = find_file(folder, FILES[task])
    if task == "hellaswag":
        return _hellaswag(path, find_file(folder, WRONG_ENDINGS))
    if task == "boolq":
        return [_boolq(row, path, number) for number, row in enumerate(read_rows(path, ("question", "answer")), 1)]
    make = _MAKERS[task]
    found = []
    for number, row in enumerate(read_rows(path, ("question", "options", "answer")), 1):
        question, texts = split_options(row["question"], row["options"])
        letter = row["answer"][:1]
        if len(texts) < 2 or letter not in ascii_uppercase[: len(texts)]:
            raise SurgeryError(
                f"{path}, row {number}: answer {row['answer'][:20]!r} among {len(texts)} options; expected the "
                "letter of one of at least 2 options; mend that row"
            )
        found.append(make(question, texts, ascii_uppercase.index(letter)))
    return found


def split_options(question: str, options: str) -> tuple[str, list[str]]:
    """The question, and ``"A. bank\\nB. library"`` as ``["bank", "library"]``; an option may run over lines.

    In a few CommonsenseQA rows the cut between the two fields stands in the wrong place: options that do not begin
    with A are looked for in both fields put together.
    """
    if not options.lstrip().startswith("A."):
        question, _, options = (question + options).partition("\nA. ")
        options = f"A. {options}"
    found: list[str] = []
    rest = options.strip()
    for here, after in pairwise([*ascii_uppercase, ""]):
        if not rest.startswith(f"{here}."):
            break
        end = rest.find(f"\n{after}.") if after else -1
        found.append((rest[2:end] if end >= 0 else rest[2:]).strip())
        rest = rest[end + 1 :] if end >= 0 else ""
    return question.strip(), found


def _boolq(row: dict[str, Any], path: Path, number: int) -> Question:
    if row["answer"] not in ("True", "False") or "passage" not in row:
        raise SurgeryError(f"{path}, row {number}: got answer {row['answer']!r}; expected True or False, and a passage")
    prompt = f"{row['passage']}\nQuestion: {row['question'].strip().rstrip('?')}?\nAnswer:"
    return Question(prompt, (" no", " yes"), int(row["answer"] == "True"))


def _piqa(question: str, texts: list[str], answer: int) -> Question:
    return Question(f"Question: {question}\nAnswer:", tuple(f" {text}" for text in texts), answer)


def _openbookqa(question: str, texts: list[str], answer: int) -> Question:
    return Question(question, tuple(f" {text}" for text in texts), answer)


def lettered(question: str, texts: list[str]) -> tuple[str, tuple[str, ...]]:
    """A question with its options listed as ``A. ...``, ending in ``Answer:``, and the letters as continuations."""
    letters = ascii_uppercase[: len(texts)]
    lines = [f"{letter}. {text}" for letter, text in zip(letters, texts, strict=True)]
    return "\n".join([question, *lines, "Answer:"]), tuple(f" {letter}" for letter in letters)


def _commonsenseqa(question: str, texts: list[str], answer: int) -> Question:
    return Question(*lettered(f"Question: {question}", texts), answer)


def _mmlu(question: str, texts: list[str], answer: int) -> Question:
    heading = "The following are multiple choice questions (with answers).\n\n"
    return Question(*lettered(heading + question, texts), answer)


_MAKERS: dict[str, Callable[[str, list[str], int], Question]] = {
    "piqa": _piqa,
    "openbookqa": _openbookqa,
    "commonsenseqa": _commonsenseqa,
    "mmlu": _mmlu,
}


def _hellaswag(right_path: Path, wrong_path: Path) -> list[Question]:
    """Line i of both files is one context with its right and with a wrong ending; the context is what they share."""
    right, wrong = (read_text(path).strip("\n").split("\n") for path in (right_path, wrong_path))
    if len(right) != len(wrong):
        raise SurgeryError(f"{wrong_path}: {len(wrong)} lines, {right_path.name} has {len(right)}; expected as many")
    found = []
    for number, (good, bad) in enumerate(zip(right, wrong, strict=True)):
        # Back to the last white space before the first difference, so that no word is cut.
        length = next(
            (at for at, (a, b) in enumerate(zip(good, bad, strict=False)) if a != b), min(len(good), len(bad))
        )
        cut = good.rfind(" ", 0, length)
        if cut < 1 or good.strip() == bad.strip():
            raise SurgeryError(f"{wrong_path}, line {number + 1}: shares no context with {right_path.name}; mend it")
        # The right ending stands first in every second question, so that no place is favoured among equals.
        endings = (good[cut:], bad[cut:]) if number % 2 == 0 else (bad[cut:], good[cut:])
        found.append(Question(good[:cut], endings, number % 2))
    return found
