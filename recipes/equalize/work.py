"""The edit of a run and its controls: what each trains, on which terms, from where."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from hooks import anatomy
from surgery.delta import Delta
from surgery.edits.block import fine_tune, names_of
from surgery.edits.equalize import Prepared, equalize, hints_term, hold_term, prepare_each, words_term
from surgery.edits.equalize.terms import Term
from surgery.edits.equalize.training import inside
from surgery.edits.places import choose
from surgery.edits.supervised import Lora
from surgery.forward.next_token import next_words
from surgery.forward.precision import matrix_products
from surgery.forward.residual_cache import ResidualCache, usable
from surgery.forward.tokens import Ids
from surgery.locate.gain import fitting
from surgery.locate.objectives import term_objective
from surgery.objective import ASKED
from surgery.operation import Edit, Made, Operation, Outcome, Tracking
from surgery.training import Plan, steps_of

if TYPE_CHECKING:
    from recipes.equalize.settings import Settings

Measure = Callable[[str, int], dict[str, Any]]  # a label, and the first block that an edit changed
LFTF = {"lr": 1e-5, "epochs": 2, "batch_size": 32}  # LFTF section 5.1, on the last block


@dataclass(frozen=True)
class Variant:
    """One edit to make: its name, the blocks that train (None: all of the model), which part of them."""

    name: str
    blocks: tuple[int, ...] | None
    part: str = "all"
    names: tuple[str, ...] = ()
    """The parameters that train, where they are named one by one."""
    located: Mapping[str, Any] | None = None
    """Of the edit itself, where block or block_part is auto: how it was found."""

    @property
    def start(self) -> int:
        """The first block that trains; the stream that enters it never changes."""
        return min(self.blocks) if self.blocks else 0


def blocks_of(chosen: str | int | list[int], count: int, seed: int) -> tuple[int, ...] | None:
    """As ``surgery.edits.block.choose``, and ``blocks``: all of them, without embeddings, head and last norm."""
    if chosen == "blocks":
        return tuple(range(count))
    return choose(chosen, count, seed)


def word_terms(
    settings: "Settings", ids: Mapping[str, Ids], words: Sequence[int], shares: Sequence[float]
) -> list[Term]:
    """The terms of the words form: prompts whose words are equalised, and what is held; each where it has texts."""
    ratio, kept = settings.hold_emphasis, {"words": words, "top": settings.kept_tokens}
    even: Any = {"shares": shares, "emphasis": settings.emphasis, "power": settings.mass_power}
    hints: Any = {"shares": shares, "emphasis": ratio, "power": settings.hints_power}
    facts: Any = {"emphasis": ratio + settings.facts_emphasis, "power": settings.facts_power}
    kinds: dict[str, tuple[float, Callable[..., Term]]] = {  # weight, how the term is made
        "words": (1.0, partial(words_term, **even)),
        "hints": (settings.hold_hints, partial(hints_term, "hints", **hints)),
        "settled": (settings.hold_settled, partial(hold_term, "settled", emphasis=ratio)),
        "facts": (settings.hold_settled, partial(hold_term, "facts", **facts)),
        "texts": (settings.hold_texts, partial(hold_term, "texts", positions=settings.hold_positions)),
    }
    return [
        make(ids=ids[name], weight=weight, **kept) for name, (weight, make) in kinds.items() if weight and ids.get(name)
    ]


@dataclass(frozen=True)
class Work:
    """The steps of one run; the edit itself and its controls go through the same ones."""

    op: Operation
    settings: "Settings"
    terms: Sequence[Term]
    """The terms of the loss: first what is equalised, then what is held."""
    measure: Measure
    objective: str = "equalise and hold"
    own: Ids = ()
    """The prompt set's training prompts, which LFTF learns from, and its words."""
    words: Sequence[int] = ()
    scale: float = 1.0
    """What is learnt is multiplied by it."""
    asked: int = ASKED
    """On how many examples the objective is asked before and after (``surgery.training.Plan``)."""
    whole: Sequence[Term] = ()
    """Where several trainings learn parts of the same terms: all of these, whose targets and streams they share."""
    given: dict[int, Prepared] = field(default_factory=dict)
    """The targets and the stream of ``whole`` by first block; made when needed."""
    entered: dict[int, ResidualCache] = field(default_factory=dict)
    """By first block the stream of ``own``, kept for LFTF in the pass that gives the targets, where all are in it."""

    def located(self, main: Variant, tokenizer: PreTrainedTokenizerBase, term: Term) -> Variant:
        """``main`` where auto stands for, by the gain of ``term``; as it is where the settings say more."""
        anywhere, part = self.settings.block == "auto", self.settings.block_part == "auto"
        if not (anywhere or part):
            return main
        given: Any = {"size": self.settings.part_size, "blocks": None if anywhere else main.blocks} if part else {}
        objective = term_objective(self.op.model, term)
        found = self.op.located(tokenizer, objective, term.count, of=self._of(term), **given)
        if part:
            return replace(main, blocks=tuple(found["blocks"]), names=tuple(found["names"]), located=found)
        return replace(main, blocks=(found["block"],), located=found)

    def control(self, name: str, main: Variant) -> Variant:
        """The edit that stands beside ``main`` for comparison."""
        count = len(anatomy.find(self.op.model).blocks)
        if name == "lftf":
            return Variant(name, (count - 1,))
        if name == "random" and main.names:
            return self._random_matrices(main)
        if name == "random" and main.blocks:
            free = [block for block in range(count) if block not in main.blocks] or list(range(count))
            size = min(len(main.blocks), len(free))
            drawn = np.random.default_rng(self.settings.seed).choice(free, size=size, replace=False)
            return Variant(name, tuple(sorted(int(block) for block in drawn)), main.part)
        return replace(main, name=name, located=None)

    def _random_matrices(self, main: Variant) -> Variant:
        """As many numbers in other matrices of any block."""
        blocks = anatomy.find(self.op.model).blocks
        sizes = {name: self.op.model.get_parameter(name).numel() for name in names_of(self.op.model, None, "matrices")}
        owners = {n: at for at, block in enumerate(blocks) for n in sizes if n.startswith(block.name + ".")}
        free = [name for name in owners if name not in main.names] or list(owners)
        order = np.random.default_rng(self.settings.seed).permutation(len(free))
        names = fitting([free[at] for at in order], sizes, self.settings.part_size)
        return Variant("random", tuple(sorted({owners[name] for name in names})), main.part, tuple(names))

    def carry_out(self, variant: Variant, *, keep: bool) -> Outcome:
        """Train a variant and measure it; ``keep`` for the run's own edit."""
        return self.op.carry_out(
            variant.name,
            partial(self._train, variant),
            partial(self.measure, f"measure {variant.name}", variant.start),
            trains=self.trains(variant),
            steps=steps_of(self._count(variant), self.plan(variant)),
            keep=keep,
            undo="record" if self.settings.keep_checkpoint else "none",
        )

    def trains(self, variant: Variant) -> list[str]:
        """The parameters that a variant changes."""
        lora = self._lora(variant)
        return [f"{name}.weight" for name in lora.targets] if lora else self._names(variant)

    def _of(self, term: Term) -> Any:
        """What the gain of ``term`` depends on."""
        about = {"words", "prompt_set", "shares", "emphasis", "kept_tokens", "pairs", "scorers"}
        return term.name, term.ids, term.places, self.settings.model_dump(include=about)

    def _count(self, variant: Variant) -> int:
        return len(self.own) if variant.name == "lftf" else sum(term.count for term in self._terms(variant))

    def _terms(self, variant: Variant) -> Sequence[Term]:
        return self.terms[: 1 if variant.name == "no_hold" else None]

    def _names(self, variant: Variant) -> list[str]:
        return list(variant.names) or names_of(self.op.model, variant.blocks, variant.part)

    def _lora(self, variant: Variant) -> Lora | None:
        if self.settings.method == "dense" or variant.name == "lftf":
            return None
        return inside(self.op.model, self._names(variant), Lora(self.settings.rank, self.settings.alpha))

    def plan(self, variant: Variant) -> Plan:
        """How a variant is trained."""
        if variant.name == "lftf":
            return Plan(**LFTF)  # type: ignore[arg-type]
        return replace(self.settings.plan(optimizer=self.settings.optimizer), asked=self.asked)

    def _train(self, variant: Variant, track: Tracking) -> Made:
        if variant.name == "lftf":
            return self._train_lftf(variant, track)
        return self.train(variant, self.prepare(variant, self._terms(variant)), track)

    def prepare(self, variant: Variant, terms: Sequence[Term]) -> Prepared:
        """The targets of the terms, and the stream that enters the first block that the variant trains."""
        if not self.whole:
            return self._prepared(variant, terms)
        if variant.start not in self.given:
            self.given[variant.start] = self._prepared(variant, self.whole)
        return self.given[variant.start].part(terms)

    def _prepared(self, variant: Variant, terms: Sequence[Term]) -> Prepared:
        count = sum(len(term.ids) for term in terms if term.untouched or variant.start)
        starts = [variant.start, *self._kept_for_lftf(variant, terms)]
        with self.op.progress.work(f"targets of {variant.name}", count) as step, matrix_products(self.settings.matmul):
            every = prepare_each(self.op.model, terms, starts, step=step)
        given = every[variant.start]
        for start in starts[1:]:
            stream = every[start].prefix
            if stream:
                places = {ids: row for row, ids in enumerate(stream.ids)}
                self.entered[start] = stream.part([places[tuple(ids)] for ids in self.own])
        if given.note:
            self.op.note(f"prefix cache off for {variant.name}: {given.note}")
        return given

    def _kept_for_lftf(self, variant: Variant, terms: Sequence[Term]) -> list[int]:
        """The block that LFTF trains, where it stands beside the edit and all its prompts are among the ``terms``."""
        last = self.control("lftf", variant).start
        if "lftf" not in self.settings.controls or not self.own or last in self.entered:
            return []
        return [last] if {*map(tuple, self.own)} <= {tuple(ids) for term in terms for ids in term.ids} else []

    def train(self, variant: Variant, given: Prepared, track: Tracking) -> Made:
        """Train a variant on the terms of ``given``."""
        lora = self._lora(variant)
        place: Any = {"blocks": variant.blocks, "names": self._names(variant), "lora": lora, "given": given}
        plan, seed = self.plan(variant), self.settings.seed
        with matrix_products(self.settings.matmul):
            trained = equalize(self.op.model, given.terms, plan, alike=self.settings.alike, seed=seed, **place, **track)
        blocks: Any = "all" if variant.blocks is None else list(variant.blocks)
        counts = {term.name: term.count for term in given.terms}
        about: Any = {"part": variant.part, "objective": self.objective, "matmul": self.settings.matmul}
        about |= {"located": variant.located} if variant.located else {}
        about |= {"scale": self.scale} if self.scale != 1 else {}
        edit = Edit.of(trained, blocks=blocks, terms=counts, **about)
        differences = {
            name: value if self.scale == 1 or name.endswith(".lora_A") else value * self.scale
            for name, value in trained.differences.items()
        }
        return Made(differences, edit, "lora" if lora else "dense")

    def learnt(self, name: str, variant: Variant, given: Prepared) -> tuple[Edit, Delta]:
        """Train a variant on the terms of ``given``; what was done, and the delta, to be judged in memory."""
        with self.op.tracking(name, steps_of(sum(term.count for term in given.terms), self.plan(variant))) as track:
            made = self.train(variant, given, track)
        return made.edit, self.op.delta(made)

    def _train_lftf(self, variant: Variant, track: Tracking) -> Made:
        model, ids = self.op.model, self.own
        plan, blocks = self.plan(variant), variant.blocks
        with matrix_products(self.settings.matmul):
            prefix = self.entered.get(variant.start)
            if prefix is None:
                kept = next_words(model, ids, self.words, keep=[variant.start]).prefixes[variant.start]
                prefix = usable(model, kept, ids)
            trained = fine_tune(
                model, ids, self.words, plan, blocks=blocks, seed=self.settings.seed, prefix=prefix, **track
            )
        about: Any = {"objective": "log", "lr": plan.lr, "matmul": self.settings.matmul}
        edit = Edit.of(trained, blocks=list(blocks or ()), part="all", **about)
        return Made(trained.differences, edit)
