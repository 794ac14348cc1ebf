"""How large a dose must be: read off where a score of groups that training never saw crosses its ideal.

A dose changes what is learnt on the training groups at once and reaches other groups in part, by how much is measured:
for each fold the pairs of the other folds are learnt at a dose of a grid, and the fold's own are scored.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from surgery.data.pairs import Pair
from surgery.errors import SurgeryError

Dose = float | tuple[float, float]
"""Of a bias type: of both forms of its sentences, or of the one with a start token and of the one without."""
RESAMPLES = 1000
BETWEEN = 20  # steps from one dose of the grid to the next


@dataclass(frozen=True)
class Choice:
    """The dose of one bias type, its 95 % interval over resampled groups, and the held-out score at each dose.

    ``reached`` says whether the score crosses its aim inside the grid; where it does not, the nearest end is taken.
    """

    dose: float
    low: float
    high: float
    curve: dict[float, float]
    groups: int
    reached: bool

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self) | {"curve": {f"{dose:g}": score for dose, score in self.curve.items()}}


def read_doses(given: Sequence[str | float], types: Sequence[str], key: str = "dose") -> dict[str, Dose | None]:
    """The dose of each bias type, None for one that is to be chosen ("auto").

    ``given`` holds "TYPE=DOSE" for single types, and a DOSE alone for the others: a number, or "auto", which is also
    that of types of which nothing is said. "0.4/0.2" are the doses with a start token and without one.

    >>> read_doses(["gender=0.4/0.2", "auto"], ["gender", "race"])
    {'gender': (0.4, 0.2), 'race': None}

    ``key`` is the setting's name in errors. Raises ``SurgeryError`` for what is no dose, a type that the pairs do not
    have, and one that is given twice.
    """
    found: dict[str, Dose | None] = {}
    for piece in given:
        name, sign, text = str(piece).rpartition("=")
        name = name.strip()
        if sign and name not in types:
            raise SurgeryError(f"{key}: got {piece!r}; the pairs have the bias types {', '.join(types)}; name one")
        if name in found:
            raise SurgeryError(f"{key}: {name or 'of the other types'!r} is given twice; give it once")
        try:
            numbers = [] if text.strip() == "auto" else [float(each) for each in text.split("/")]
        except ValueError:
            numbers = [np.nan]
        if len(numbers) > 2 or not np.isfinite(numbers).all():
            raise SurgeryError(
                f"{key}: got {piece!r}, expected a number (nats a token), auto, or TYPE=NUMBER; two numbers, a/b, are "
                "with a start token and without"
            )
        found[name] = None if not numbers else numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    return {name: found.get(name, found.get("")) for name in types}


def crossing(doses: Sequence[float], scores: Sequence[float], aim: float, within: float = 0.0) -> tuple[float, bool]:
    """Where ``scores``, joined by straight lines over rising ``doses``, first come down to within so much of ``aim``.

    And whether they do: those that begin below that have an end of the doses for an answer, as those that stay above.

    >>> crossing([0.0, 0.2, 0.4], [60.0, 54.0, 48.0], 50.0)
    (0.33333333333333337, True)
    """
    wanted = aim + within
    if scores[0] <= wanted:
        return float(doses[0]), scores[0] >= aim - within
    for place in range(1, len(doses)):
        before, after = scores[place - 1], scores[place]
        if after <= wanted:
            share = (before - wanted) / (before - after)
            return float(doses[place - 1] + share * (doses[place] - doses[place - 1])), True
    return float(doses[-1]), False


def read_levels(given: Sequence[str | float], types: Sequence[str], key: str = "doses") -> dict[str, list[float]]:
    """The doses among which a bias type's is chosen, rising: "TYPE=LOW:HIGH" for single types, numbers for the others.

    >>> read_levels(["gender=0.5:1.3", 0.0, 0.6], ["gender", "race"])
    {'gender': [0.5, 1.3], 'race': [0.0, 0.6]}

    Raises ``SurgeryError`` for what is no number, a type that the pairs do not have, one that is given twice, and fewer
    than two different doses.
    """
    found: dict[str, list[float]] = {}
    for piece in given:
        name, _, text = str(piece).rpartition("=")
        name = name.strip()
        if name and name not in types:
            raise SurgeryError(f"{key}: got {piece!r}; the pairs have the bias types {', '.join(types)}; name one")
        if name in found and name:
            raise SurgeryError(f"{key}: {name!r} is given twice; give it once")
        try:
            numbers = [float(each) for each in text.split(":")]
        except ValueError:
            numbers = [np.nan]
        if not np.isfinite(numbers).all():
            raise SurgeryError(f"{key}: got {piece!r}, expected a number (nats a token) or TYPE=LOW:HIGH")
        found[name] = [*found.get(name, ()), *numbers]
    levels = {name: sorted(found.get(name, found.get("", []))) for name in types}
    for name, doses in levels.items():
        if len(set(doses)) < max(2, len(doses)):
            raise SurgeryError(f"{key}: got {doses} for {name}, expected at least 2 numbers, each once; name others")
    return levels


def slopes(
    pairs: Sequence[Pair],
    before: Float[np.ndarray, "pairs scorers"],
    after: Float[np.ndarray, "pairs scorers"],
    at: Float[np.ndarray, " pairs"],
) -> Float[np.ndarray, " scorers"]:
    """By how much a margin moves for a unit of dose, for each scorer: of all bias types together.

    The dose's slope in the least-squares fit of the margins after a training on those before and the dose ``at`` which
    each was measured, with a line in the margins before for each type. A type has too few groups for a slope of its
    own: what they differ in by chance would be taken for it.
    """
    types = np.array([pair.bias_type for pair in pairs])
    own = [types == name for name in sorted(set(types.tolist()))]
    found = []
    for was, now in zip(before.T, after.T, strict=True):
        known = np.stack([at, *(column for mine in own for column in (was * mine, 1.0 * mine))], axis=1)
        found.append(np.linalg.lstsq(known, now, rcond=None)[0][0])
    return np.array(found)


def between(
    margins: Mapping[float, Float[np.ndarray, "pairs scorers"]],
) -> dict[float, Float[np.ndarray, "pairs scorers"]]:
    """The margins at ``BETWEEN`` even steps from each dose to the next, on a straight line for every pair.

    >>> list(between({0.0: np.array([[2.0]]), 0.2: np.array([[0.0]])}).values())[10]
    array([[1.]])
    """
    doses = sorted(margins)
    found = {}
    for low, high in pairwise(doses):
        for step in range(BETWEEN):
            share = step / BETWEEN
            found[low + share * (high - low)] = (1 - share) * margins[low] + share * margins[high]
    return found | {doses[-1]: margins[doses[-1]]}


def choose(
    pairs: Sequence[Pair],
    margins: Mapping[float, Float[np.ndarray, "pairs scorers"]],
    *,
    aim: float = 50.0,
    within: float = 0.0,
    seed: int = 0,
) -> dict[str, Choice]:
    """For each bias type the smallest dose at which as many held-out pairs prefer one side as the other.

    ``margins[dose]`` are those of every pair by a model that was trained on other groups with that dose, or moved to
    it from another by their ``slopes``; between two doses each pair's margin is taken to lie on a straight line, since
    signs, once counted, would no longer. The score is StereoSet's: the percentage of margins above 0, the mean over
    groups of their means, here also over scorers. A score ``within`` so much of ``aim`` will do.

    Raises ``SurgeryError`` for fewer than two doses.
    """
    doses = sorted(margins)
    if len(doses) < 2:
        raise SurgeryError(f"doses: got {doses}, expected at least 2 to choose between; name more")
    types = np.array([pair.bias_type for pair in pairs])
    groups = np.array([pair.group for pair in pairs])
    fine = between(margins)
    prefers = np.stack([100.0 * (values > 0).mean(axis=1) for values in fine.values()], axis=1)
    found = {}
    generator = np.random.default_rng(seed)
    for name in sorted(set(types.tolist())):
        _, index = np.unique(groups[types == name], return_inverse=True)
        counts = np.bincount(index)
        each = np.stack([np.bincount(index, column) / counts for column in prefers[types == name].T], axis=1)
        curve = each.mean(axis=0)
        dose, reached = crossing(list(fine), curve.tolist(), aim, within)
        draws = generator.integers(0, len(each), size=(RESAMPLES, len(each)))
        drawn = [crossing(list(fine), each[draw].mean(axis=0).tolist(), aim, within)[0] for draw in draws]
        low, high = np.quantile(drawn, [0.025, 0.975])
        points = dict(zip(doses, curve[::BETWEEN].tolist(), strict=True))
        found[name] = Choice(dose, float(low), float(high), points, len(each), reached)
    return found
