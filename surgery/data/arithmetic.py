"""Small sums and word problems with one right answer each, of our own: what an edit of a bias should not touch.

Each prompt holds four worked examples of its kind and a question; the answer is a number.
"""

from dataclasses import dataclass

import numpy as np

KINDS = ("addition", "subtraction", "multiplication", "word problem")
EACH = 50
SHOTS = 4
SEED = 2024
_PROBLEMS = (
    "There are {a} birds on a roof and {b} more come. How many birds are there?",
    "A shelf holds {a} books. Then {b} books are added. How many books does it hold?",
    "A box has {s} pens and {a} are taken out. How many pens are left?",
    "A bus has {s} seats and {a} are taken. How many seats are free?",
    "Each bag holds {c} apples. How many apples are in {d} bags?",
)


@dataclass(frozen=True)
class Question:
    """A prompt that ends before its answer, the answer, and the kind."""

    prompt: str
    answer: str
    kind: str


def questions(seed: int = SEED, each: int = EACH) -> list[Question]:
    """``each`` questions of every kind; none of a prompt's examples is its own question.

    >>> questions(each=1)[0].answer.strip().isdigit()
    True
    """
    draw = np.random.default_rng(seed)
    found = []
    for kind in KINDS:
        for _ in range(each):
            rows = _different(kind, SHOTS + 1, draw)
            *shown, (asked, answer) = rows
            before = "".join(f"Question: {text}\nAnswer: {value}\n\n" for text, value in shown)
            found.append(Question(f"{before}Question: {asked}\nAnswer:", f" {answer}", kind))
    return found


def _different(kind: str, count: int, draw: np.random.Generator) -> list[tuple[str, int]]:
    rows: dict[str, int] = {}
    while len(rows) < count:
        text, answer = _one(kind, draw)
        rows[text] = answer
    return list(rows.items())


def _one(kind: str, draw: np.random.Generator) -> tuple[str, int]:
    a, b = (int(number) for number in draw.integers(2, 50, size=2))
    c, d = (int(number) for number in draw.integers(2, 10, size=2))
    if kind == "addition":
        return f"What is {a} + {b}?", a + b
    if kind == "subtraction":
        return f"What is {a + b} - {a}?", b
    if kind == "multiplication":
        return f"What is {c} * {d}?", c * d
    number = int(draw.integers(len(_PROBLEMS)))
    return _PROBLEMS[number].format(a=a, b=b, c=c, d=d, s=a + b), (a + b, a + b, b, b, c * d)[number]
