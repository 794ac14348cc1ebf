"""What a tuning tries: a place, a rate and the strength of the holds, named in words; which follows from which."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from recipes.equalize.settings import Settings
from recipes.equalize.work import blocks_of

RATES = (1.0, 1 / 5, 1 / 25)
"""Of the recipe's own, tried at its own place first; one that suits SmolLM2 destroys Gemma 3 at the same blocks."""
FINER = 5**0.5
"""Then, at the best places, so many times more and less: half of the way to the next of ``RATES``."""
OWN = "the recipe's own"


@dataclass(frozen=True)
class Candidate:
    """What is tried: where, at which rate, and how much is held."""

    place: str
    blocks: tuple[int, ...] | None
    """None: where the recipe itself trains."""
    rate: float = 1.0
    """In multiples of the recipe's, of a training as long as the recipe's."""
    holds: float = 1.0
    """The weights of all that is held, in multiples of the recipe's."""

    @property
    def name(self) -> str:
        """In words; the same in every round."""
        rate = f", rate times {self.rate:.2g}" if self.rate != 1 else ""
        return f"{self.place}{rate}{f', holds times {self.holds:g}' if self.holds != 1 else ''}"

    def changes(self, settings: Settings, longer: float) -> dict[str, Any]:
        """What it changes of ``settings``, where the recipe itself takes ``longer`` times as many steps.

        Fewer steps take a larger rate, by the cube root: 5e-4 in the 590 steps of the defaults and 8e-4 in the 153 of
        ``recipes/demo.toml`` were each chosen by hand.
        """
        lr = float(f"{settings.lr * self.rate * longer ** (1 / 3):.2g}")
        found: dict[str, Any] = {"block": list(self.blocks)} if self.blocks else {}
        found |= {"lr": lr} if lr != settings.lr else {}
        if self.holds != 1:
            found |= {key: getattr(settings, key) * self.holds for key in ("hold_hints", "hold_settled", "hold_texts")}
        return found


def at_other_places(best: Candidate, places: Mapping[str, tuple[int, ...]], count: int) -> list[Candidate]:
    """The other places at the rate of ``best``, more of it for fewer blocks: what they do to the stream adds up."""
    own = places.get(OWN)
    size = len(own) if own else count
    return [
        Candidate(name, blocks, best.rate * (size / len(blocks)) ** 0.5)
        for name, blocks in places.items()
        if blocks != own
    ]


def nearby(best: Sequence[Candidate]) -> list[Candidate]:
    """A finer step of the rate up and down from each, and the first with twice the holds."""
    found = [replace(one, rate=rate) for one in best for rate in (one.rate * FINER, one.rate / FINER)]
    return [*found, replace(best[0], holds=2.0)]


def places_of(settings: Settings, count: int, order: Sequence[int], *, everywhere: bool) -> dict[str, tuple[int, ...]]:
    """Places to try, by their name: the recipe's own, upper ones, the best by gain (``order``), the middle, and all."""
    quarter = max(1, count // 4)
    named = {
        "upper blocks": blocks_of("upper", count, settings.seed),
        "upper half": tuple(range(count // 2, max(count // 2 + 1, count - max(1, count // 15)))),
        f"best {quarter} by gain": tuple(sorted(order[:quarter])),
        "best block by gain": (order[0],),
        "middle third": tuple(range(count // 3, max(count // 3 + 1, 2 * count // 3))),
        **({"all blocks": tuple(range(count))} if everywhere else {}),
    }
    own = blocks_of(settings.block, count, settings.seed)
    found: dict[str, tuple[int, ...]] = {OWN: own} if own else {}
    for name, blocks in named.items():
        if blocks and blocks not in found.values():
            found[name] = blocks
    return found
