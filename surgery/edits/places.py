"""Which blocks a setting names: of a model, and as far as its files say before any of it is opened."""

from collections.abc import Sequence

import numpy as np

from surgery.errors import SurgeryError
from surgery.files.architecture import read_json
from surgery.files.converted import check_model, ready

NAMES = ("last", "auto", "first", "middle", "random", "upper", "all")


class PlaceError(SurgeryError):
    """A model has no such block; another one may."""


def choose(chosen: str | int | Sequence[int], count: int, seed: int) -> tuple[int, ...] | None:
    """Block numbers for ``chosen`` in a model of ``count`` blocks; None stands for all parameters.

    ``chosen``: last, first, middle, random (drawn by ``seed``), all, upper (two thirds of the depth to a fifteenth
    below the end), a number or numbers; negative ones count from the end. "auto" stands for last until a ranking says
    otherwise. Raises ``SurgeryError`` for anything else.
    """
    places = {"first": 0, "middle": count // 2, "last": count - 1, "auto": count - 1}
    if chosen == "all":
        return None
    if chosen == "upper":
        return tuple(range(2 * count // 3, max(2 * count // 3 + 1, count - max(1, count // 15))))
    if chosen == "random":
        return (int(np.random.default_rng(seed).integers(count)),)
    if isinstance(chosen, str) and chosen in places:
        return (places[chosen],)
    numbers = [chosen] if isinstance(chosen, int) else chosen
    if isinstance(numbers, str) or not numbers or any(not -count <= number < count for number in numbers):
        raise PlaceError(
            f"block: got {chosen!r}; the model has blocks 0 to {count - 1}; expected such numbers, or one of "
            f"{', '.join(NAMES)}"
        )
    return tuple(sorted({number % count for number in numbers}))


def check_place(chosen: str | int | Sequence[int], model: str) -> None:
    """Raises ``SurgeryError`` for what ``choose`` refuses; for numbers where ``model`` lies here and says how many."""
    if isinstance(chosen, str) and chosen not in NAMES:
        raise SurgeryError(f"block: got {chosen!r}, expected numbers, or one of {', '.join(NAMES)}")
    if isinstance(chosen, str):
        return
    check_model(model)
    directory = ready(model)
    config = read_json(directory / "config.json") if directory else {}
    count = config.get("num_hidden_layers") if isinstance(config, dict) else None
    if isinstance(count, int):
        choose(chosen, count, 0)
