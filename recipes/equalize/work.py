"""The edit of a run and its controls: what each trains, on which terms, from where."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks import anatomy
from recipes.equalize.measuring import Measuring
from surgery.edits.block import choose, fine_tune, names_of
from surgery.edits.equalize import Prepared, equalize, hold_term, prepare, words_term
from surgery.edits.equalize.terms import Term
from surgery.edits.equalize.training import inside
from surgery.edits.supervised import Lora
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words
from surgery.forward.tokens import Ids
from surgery.operation import Edit, Made, Operation, Outcome, Tracking
from surgery.training import Plan, steps_of

if TYPE_CHECKING:
    from recipes.equalize import Settings

CONTROLS = ("lftf", "random", "no_hold")
LFTF = {"lr": 1e-5, "epochs": 2, "batch_size": 32}  # LFTF section 5.1, on the last block


@dataclass(frozen=True)
class Variant:
    """One edit to make: its name, the blocks that train (None: all of the model), which part of them."""

    name: str
    blocks: tuple[int, ...] | None
    part: str = "all"

    @property
    def start(self) -> int:
        """The first block that trains; the stream that enters it never changes."""
        return min(self.blocks) if self.blocks else 0


def blocks_of(chosen: str | int | list[int], count: int, seed: int) -> tuple[int, ...] | None:
    """As ``surgery.edits.block.choose``, and ``upper``: from two thirds of the depth to a fifteenth below the end."""
    if chosen == "upper":
        return tuple(range(2 * count // 3, max(2 * count // 3 + 1, count - max(1, count // 15))))
    return choose(chosen, count, seed)


def controls_of(names: Sequence[str]) -> list[str]:
    """Raises ``SurgeryError`` for a control that does not exist."""
    unknown = next((name for name in names if name not in CONTROLS), None)
    if unknown is not None:
        raise SurgeryError(f"controls: got {unknown!r}, expected some of {', '.join(CONTROLS)}")
    return list(dict.fromkeys(names))


@dataclass
class Work:
    """The steps of one run; the edit itself and its controls go through the same ones."""

    op: Operation
    settings: "Settings"
    words: Sequence[int]
    shares: Sequence[float]
    ids: Mapping[str, Ids]
    """The texts of each term; ``own`` are the prompt set's training prompts, which LFTF learns from."""
    measuring: Measuring
    prepared: dict[int, Prepared] = field(default_factory=dict)

    def terms(self) -> list[Term]:
        """The terms of the loss: the prompts whose words are equalised, and what is held."""
        given, top = self.settings, self.settings.kept_tokens
        found = [words_term(self.ids["words"], self.words, shares=self.shares, emphasis=given.emphasis, top=top)]
        weights = {"hints": given.hold_hints, "settled": given.hold_settled, "texts": given.hold_texts}
        for name, weight in weights.items():
            if weight and self.ids.get(name):
                at = given.hold_positions if name == "texts" else "last"
                found.append(hold_term(name, self.ids[name], positions=at, weight=weight, words=self.words, top=top))
        return found

    def control(self, name: str, main: Variant) -> Variant:
        """The edit that stands beside ``main`` for comparison."""
        count = len(anatomy.find(self.op.model).blocks)
        if name == "lftf":
            return Variant(name, (count - 1,))
        if name == "random" and main.blocks:
            free = [block for block in range(count) if block not in main.blocks] or list(range(count))
            size = min(len(main.blocks), len(free))
            drawn = np.random.default_rng(self.settings.seed).choice(free, size=size, replace=False)
            return Variant(name, tuple(sorted(int(block) for block in drawn)), main.part)
        return Variant(name, main.blocks, main.part)

    def carry_out(self, variant: Variant, *, keep: bool) -> Outcome:
        """Train a variant and measure it; ``keep`` for the run's own edit."""
        lora = self._lora(variant)
        names = [f"{name}.weight" for name in lora.targets] if lora else self._names(variant)
        return self.op.carry_out(
            variant.name,
            partial(self._train, variant),
            partial(self.measuring.scores, f"measure {variant.name}", variant.start),
            trains=names,
            steps=steps_of(self._count(variant), self._plan(variant)),
            keep=keep,
            undo="record" if self.settings.keep_checkpoint else "none",
        )

    def _count(self, variant: Variant) -> int:
        if variant.name == "lftf":
            return len(self.ids["own"])
        terms = self.terms()
        return sum(term.count for term in terms[: 1 if variant.name == "no_hold" else None])

    def _names(self, variant: Variant) -> list[str]:
        return names_of(self.op.model, variant.blocks, variant.part)

    def _lora(self, variant: Variant) -> Lora | None:
        if self.settings.method == "dense" or variant.name == "lftf":
            return None
        return inside(self.op.model, self._names(variant), Lora(self.settings.rank, self.settings.alpha))

    def _plan(self, variant: Variant) -> Plan:
        given = self.settings
        if variant.name == "lftf":
            return Plan(**LFTF)  # type: ignore[arg-type]
        return given.plan(optimizer=given.optimizer)

    def _train(self, variant: Variant, track: Tracking) -> Made:
        if variant.name == "lftf":
            return self._train_lftf(variant, track)
        terms, model = self.terms(), self.op.model
        if variant.name == "no_hold":
            terms = terms[:1]
        with self.op.progress.work(f"targets of {variant.name}", sum(len(term.ids) for term in terms)) as step:
            given = prepare(model, terms, start=variant.start, step=step)
        if given.note:
            self.op.note(f"prefix cache off for {variant.name}: {given.note}")
        lora = self._lora(variant)
        plan, seed = self._plan(variant), self.settings.seed
        trained = equalize(
            model, terms, plan, blocks=variant.blocks, part=variant.part, lora=lora, seed=seed, given=given, **track
        )
        blocks: Any = "all" if variant.blocks is None else list(variant.blocks)
        counts = {term.name: term.count for term in terms}
        edit = Edit.of(trained, blocks=blocks, part=variant.part, objective="equalise and hold", terms=counts)
        return Made(trained.differences, edit, "lora" if lora else "dense")

    def _train_lftf(self, variant: Variant, track: Tracking) -> Made:
        model, ids = self.op.model, self.ids["own"]
        prefix = next_words(model, ids, self.words, keep=[variant.start]).prefixes[variant.start]
        plan, blocks = self._plan(variant), variant.blocks
        trained = fine_tune(
            model, ids, self.words, plan, blocks=blocks, seed=self.settings.seed, prefix=prefix, **track
        )
        edit = Edit.of(trained, blocks=list(blocks or ()), part="all", objective="log", lr=plan.lr)
        return Made(trained.differences, edit)
