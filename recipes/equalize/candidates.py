"""What a tuning tries: a place and a rate, named in words; which follows from which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recipes.equalize.settings import Settings
from recipes.equalize.work import blocks_of

RATES = (1.0, 1 / 3, 1 / 9, 1 / 27)
"""Of the recipe's own, tried at its own place first; one that suits SmolLM2 destroys Gemma 3 at the same blocks."""
FINER = 3**0.5
"""Then, at the best place, so many times more (or less): half of the way to the next of ``RATES``."""
STEPS = 3
"""So often at most."""
OWN = "the recipe's own"


@dataclass(frozen=True)
class Candidate:
    """What is tried: where, and at which rate."""

    place: str
    blocks: tuple[int, ...] | None
    """None: where the recipe itself trains."""
    rate: float = 1.0
    """In multiples of the recipe's."""
    steps: int = 1
    """In multiples of the recipe's: its batches are divided by it."""
    scale: float = 1.0
    """By how much what was learnt is multiplied, in multiples of the recipe's."""

    @property
    def name(self) -> str:
        """In words; the same in every round."""
        factors = {"rate": self.rate, "steps": self.steps, "delta": self.scale}
        return ", ".join([self.place, *(f"{name} times {x:.2g}" for name, x in factors.items() if x != 1)])

    def changes(self, settings: Settings) -> dict[str, Any]:
        """What it changes of ``settings``."""
        lr = float(f"{settings.lr * self.rate:.2g}")
        found: dict[str, Any] = {"block": list(self.blocks)} if self.blocks else {}
        found |= {"lr": lr} if lr != settings.lr else {}
        found |= {"batch_size": max(1, settings.batch_size // self.steps)} if self.steps != 1 else {}
        return found | ({"scales": [round(settings.scales[0] * self.scale, 4)]} if self.scale != 1 else {})


def at_other_places(best: Candidate, places: Mapping[str, tuple[int, ...]], count: int) -> list[Candidate]:
    """The other places at the rate of ``best``, more of it for fewer blocks: what they do to the stream adds up."""
    own = places.get(OWN)
    size = len(own) if own else count
    return [
        Candidate(name, blocks, best.rate * (size / len(blocks)) ** 0.5)
        for name, blocks in places.items()
        if blocks != own
    ]


def nearby(best: Candidate, *, pays: bool) -> list[Candidate]:
    """The same place at finer steps of the rate: down where text ``pays`` for it, else up."""
    factor = 1 / FINER if pays else FINER
    return [replace(best, rate=best.rate * factor**step) for step in range(1, STEPS + 1)]


def last_quarter(count: int) -> tuple[int, ...]:
    """The last of ``count`` blocks, a quarter of them and one."""
    return tuple(range(count - max(1, count // 4 + 1), count))


def places_of(settings: Settings, count: int, order: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Places to try, by their name: the recipe's own, upper ones, the best by gain (``order``)."""
    quarter = max(1, count // 4)
    named = {
        "upper third": blocks_of("upper", count, settings.seed),
        "last quarter": last_quarter(count),
        "upper half": tuple(range(count // 2, max(count // 2 + 1, count - max(1, count // 15)))),
        f"best {quarter} by gain": tuple(sorted(order[:quarter])),
    }
    own = blocks_of(settings.block, count, settings.seed)
    found: dict[str, tuple[int, ...]] = {OWN: own} if own else {}
    for name, blocks in named.items():
        if blocks and blocks not in found.values():
            found[name] = blocks
    return found
