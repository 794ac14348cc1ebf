"""What the development set decides: which bias types are swapped, whether training ends, which checkpoint is kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Bias types' targets in the released code (its train.py), and the distance within which the rate falls to 4/5.
RELEASED_TARGETS = {"gender": 49.0, "profession": 49.0, "race": 49.0, "religion": 48.0}
RELEASED_NEAR, RELEASED_FACTOR = 5.0, 0.8


@dataclass(frozen=True)
class EarlyStopping:
    """How training is steered; ``every`` so many steps the development set is scored.

    ``rows`` are the development set's rows of each bias type. ``focus`` is the released code's schedule: after the
    first evaluation only the type farthest from its target goes on, with a new optimizer.
    """

    every: int
    rows: Mapping[str, int]
    threshold: float = 2.0
    swap: bool = True
    early_stop: bool = True
    focus: bool = False
    targets: Mapping[str, float] = field(default_factory=dict)
    """Where a type's stereotype score should be; 50 where nothing is said."""
    explosion: float = 20.0
    """A forget loss so many times its start ends the training (section 4.4: "more than twenty times")."""
    keep: str = "best"  # "best": highest ``merit`` on the development set; "last"
    swap_when: str = "score"
    """A type is swapped while its "score" is below its target, or only while its whole "interval" is."""
    select: str = "icat"
    """What ``merit`` is: the highest "icat"; each type's stereotype score nearest to 50 ("ss"), or their mean
    ("overall"), at no less than ``lms_floor``."""
    lms_floor: float = 0.0
    counted: tuple[str, ...] = ()
    """The bias types that the selection by "ss" and "overall" counts, each alike; all of them where none is named."""

    def target(self, kind: str) -> float:
        """The stereotype score that ``kind`` should have."""
        return self.targets.get(kind, 50.0)

    def tolerance(self, kind: str) -> float:
        """How near the target ``kind`` must be; not less than one row of its development set.

        The paper's 2 is one of its 50 rows; a set of 12 rows cannot come nearer than 100 / 12.
        """
        return max(self.threshold, 100 / self.rows[kind])


@dataclass(frozen=True)
class Decision:
    """What holds until the next evaluation. ``factor`` is of the learning rate."""

    swapped: frozenset[str] = frozenset()
    active: tuple[str, ...] | None = None
    factor: float = 1.0
    stop: bool = False


def decide(control: EarlyStopping, scores: Mapping[str, Mapping[str, float]]) -> Decision:
    """From the development set's stereotype score of each bias type (or the top of its interval), nothing else.

    A type's two sets are exchanged while its score is below 50 ("Dynamic Dataset Swapping"), so that they are
    exchanged back when it rises above. All within their tolerance ends the training.
    """
    gaps = {kind: scores["ss"][kind] - control.target(kind) for kind in control.rows}
    stop = control.early_stop and all(abs(gap) <= control.tolerance(kind) for kind, gap in gaps.items())
    tops = scores["high"] if control.swap_when == "interval" else scores["ss"]
    below = [kind for kind in control.rows if tops[kind] < control.target(kind)]
    swapped = frozenset(below) if control.swap else frozenset()
    if not control.focus:
        return Decision(swapped, stop=stop)
    farthest = max(gaps, key=lambda kind: abs(gaps[kind]))
    factor = RELEASED_FACTOR if abs(gaps[farthest]) <= RELEASED_NEAR else 1.0
    return Decision(swapped & {farthest}, (farthest,), factor, stop)


def merit(control: EarlyStopping, scores: Mapping[str, Mapping[str, float]]) -> float:
    """How good a checkpoint is, by the development set; see ``EarlyStopping.select``.

    ICAT is the mean over bias types weighted by their rows: a small type is a noisy one. By "ss" each type that counts
    weighs alike, whatever rows the source happens to have of it, and LMS is a bound, so that it cannot pay for SS. By
    "overall" types on both sides of 50 make up for each other, as they do in the overall score.
    """
    if control.select != "icat":
        kinds = control.counted or tuple(control.rows)
        gaps = [scores["ss"][kind] - control.target(kind) for kind in kinds]
        missed = abs(sum(gaps)) if control.select == "overall" else sum(map(abs, gaps))
        missed /= len(kinds)
        return -missed - 1000 * max(0.0, control.lms_floor - scores["lms"]["overall"])
    return sum(scores["icat"][kind] * count for kind, count in control.rows.items()) / sum(control.rows.values())
