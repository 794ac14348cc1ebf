"""Which sentences a step sees: chunks of 4 to forget and 28 to retain, from the seed and the step alone.

Forget and retain sets are cycled through separately, each cycle in a new order. A swapped bias type has its two
sets exchanged; that changes which side of a triple is taken, never which triple.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from surgery.edits.unlearning.encoding import ANTI, STEREOTYPE, UNRELATED
from surgery.errors import SurgeryError

# What happens to a sentence: NPO or ascent; cross-entropy; cross-entropy of both sides in turn (SFT), of stereotypes
# (for a task vector to subtract); DPO; KL.
_SIDES = {
    "forget": (STEREOTYPE,),
    "retain": (ANTI,),
    "both": (STEREOTYPE, ANTI),
    "learn": (STEREOTYPE,),
    "prefer": (STEREOTYPE,),
    "unrelated": (UNRELATED,),
}


def other(side: str) -> str:
    """The opposite side; the unrelated sentence has none and stays."""
    return {STEREOTYPE: ANTI, ANTI: STEREOTYPE}.get(side, side)


@dataclass(frozen=True)
class Item:
    """One place of a chunk: what is done with which side of which triple. Of "prefer" the side is the rejected one."""

    role: str
    triple: int
    side: str


@dataclass(frozen=True)
class BatchSampler:
    """The chunks of a run.

    ``types`` are the bias types of the triples, ``sizes`` how many places of a chunk have which role.
    ``adversarial`` is the share of anti-stereotypes that is mixed into the forget set, drawn evenly over the bias
    types; ``in_order`` takes it from the front of the types in alphabetical order instead (the released code, which so
    mixes in no race or religion). ``balance``: "rows" draws from all triples alike (the paper), "types" from every
    bias type equally often.
    """

    types: tuple[str, ...]
    sizes: dict[str, int]
    seed: int
    adversarial: float = 0.25
    in_order: bool = False
    balance: Literal["rows", "types"] = "rows"
    names: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        unknown = [role for role in self.sizes if role not in _SIDES]
        if unknown or not self.sizes or min(self.sizes.values()) < 1:
            raise SurgeryError(f"chunk: got {self.sizes}, expected at least 1 place for some of {', '.join(_SIDES)}")
        object.__setattr__(self, "names", tuple(sorted(set(self.types))))

    @property
    def size(self) -> int:
        """Places of a chunk."""
        return sum(self.sizes.values())

    @cached_property
    def mixed_in(self) -> tuple[int, ...]:
        """The triples whose anti-stereotypes stand in the forget set."""
        groups = [[n for n, kind in enumerate(self.types) if kind == name] for name in self.names]
        if self.in_order:
            every = [number for group in groups for number in group]
            return tuple(every[: round(self.adversarial * len(every))])
        generator = np.random.default_rng([self.seed, 0])
        return tuple(
            int(number)
            for group in groups
            for number in sorted(generator.permutation(group)[: round(self.adversarial * len(group))])
        )

    def items(
        self, step: int, *, swapped: frozenset[str] = frozenset(), active: Sequence[str] | None = None
    ) -> list[Item]:
        """The chunk of ``step`` (from 0), the sides of ``swapped`` types exchanged; ``active``: only these types."""
        found = []
        for place, (role, count) in enumerate(self.sizes.items(), 1):
            pools = self._pools[role] if active is None else self._pools_of(role, active)
            for k in range(step * count, (step + 1) * count):
                triple, side = _draw(pools, k, self.seed, place)
                found.append(Item(role, triple, other(side) if self.types[triple] in swapped else side))
        return found

    def referenced(self, steps: int, *, focus: bool = False) -> tuple[set[tuple[int, str]], set[int]]:
        """What the frozen model must be asked for ``steps`` chunks: sentences of both sides, and unrelated ones.

        Which types are swapped when is not known yet; with ``focus`` not even which are drawn from.
        """
        if focus:
            every = set(range(len(self.types)))
            return {(n, side) for n in every for side in (STEREOTYPE, ANTI)}, every
        items = [item for step in range(steps) for item in self.items(step)]
        compared = {item.triple for item in items if item.role in ("forget", "prefer")}
        unrelated = {item.triple for item in items if item.role == "unrelated"}
        return {(n, side) for n in compared for side in (STEREOTYPE, ANTI)}, unrelated

    def passes(self, steps: int) -> dict[str, dict[str, float]]:
        """How often ``steps`` chunks go through the sentences of each role and bias type, nothing being swapped."""
        found: dict[str, dict[str, float]] = {}
        for role, count in self.sizes.items():
            pools = self._pools[role]
            each = [steps * count / len(pools) / len(pool) for pool in pools]
            names = [{self.types[triple] for triple, _ in pool} for pool in pools]
            found[role] = {
                name: next(value for value, of in zip(each, names, strict=True) if name in of) for name in self.names
            }
        return found

    @cached_property
    def _pools(self) -> dict[str, list[list[tuple[int, str]]]]:
        return {role: self._pools_of(role, self.names) for role in self.sizes}

    def _pools_of(self, role: str, active: Sequence[str]) -> list[list[tuple[int, str]]]:
        pools = []
        for group in [[name] for name in active] if self.balance == "types" else [list(active)]:
            pool = [(n, side) for side in _SIDES[role] for n, kind in enumerate(self.types) if kind in group]
            if role == "forget":
                pool += [(n, ANTI) for n in self.mixed_in if self.types[n] in group]
            pools.append(pool)
        return pools


def _draw(pools: Sequence[Sequence[tuple[int, str]]], k: int, seed: int, stream: int) -> tuple[int, str]:
    """The ``k``-th of an endless sequence that takes the pools in turn, each in cycles of a new order."""
    turn, pool = k // len(pools), pools[k % len(pools)]
    order = _order(len(pool), seed, stream, k % len(pools), turn // len(pool))
    return pool[order[turn % len(pool)]]


@lru_cache(maxsize=64)
def _order(count: int, *key: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(key).permutation(count).tolist())
