"""Choosing the place, the rate and the holds of an equalising on development parts, so that nobody has to guess.

Candidates are screened on few texts: places first, then rates and holds at the best of them. The best of the screening
and the recipe as it is are then trained on the texts that a run would take, and judged again. All share one
measurement of the untouched model; those of a round share the targets and, by first block, the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.equalize import dataset, pairs
from recipes.equalize.measuring import Measuring, distances
from recipes.equalize.recipe import texts_of
from recipes.equalize.settings import Settings
from recipes.equalize.work import Variant, Work, blocks_of, word_terms
from surgery.data import genbias
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.edits.equalize import Prepared, check_shares, prepare_each
from surgery.errors import SurgeryError
from surgery.forward.tokens import encode, word_ids
from surgery.locate.gain import GAIN_LIMIT, auto_ranking, gain_of
from surgery.metrics.suite import Material, material
from surgery.operation import Operation, Tracking, Where, operation
from surgery.runs.paired import without_samples
from surgery.runs.tuning import Tried, Tuned, better, finish
from surgery.training import steps_of

FEW = {"own": 250, "shapes": 1200, "each": 4, "hints": 450, "settled": 500, "hints_each": 1, "settled_each": 3}
"""Of the finalists, where a run is to take a few minutes on a CPU."""
SCREEN = {"own": 100, "shapes": 600, "each": 2, "hints": 150, "settled": 200, "hints_each": 1, "settled_each": 1}
"""Of the screening there, in one epoch."""
ROWS = 120
"""Of each development set in that screening; perplexity is always that of the report."""
FACTOR = 3.0


@dataclass(frozen=True)
class Candidate:
    """What is tried: a name in words, and the settings that it changes."""

    name: str
    changes: Mapping[str, Any]


@dataclass
class _Round:
    """Candidates trained on the same texts and judged on the same rows; targets and streams are made when needed."""

    op: Operation
    name: str
    settings: Settings
    prompts: PromptSet
    ids: Mapping[str, Any]
    words: Sequence[int]
    measuring: Measuring
    before: Mapping[str, Any]
    given: dict[int, Prepared] = field(default_factory=dict)

    def try_all(self, candidates: Sequence[Candidate]) -> list[Tried]:
        """Train and judge those that were not done before; the results of all."""
        works = {one.name: self._work(one) for one in candidates}
        starts = {variant.start for _, variant in works.values()}
        found = []
        for one in candidates:
            work, variant = works[one.name]
            measured = self.op.carry_out(
                variant.name,
                partial(self._train, work, variant, sorted(starts)),
                partial(self._measure, variant),
                trains=work.trains(variant),
                steps=steps_of(sum(term.count for term in work.terms), work.plan(variant)),
                keep=False,
            )
            edit = measured.edit.to_dict()
            found.append(Tried(one.name, self.name, one.changes, edit, self.before, measured.measured))
        return found

    def _work(self, one: Candidate) -> tuple[Work, Variant]:
        settings = self.settings.model_copy(update=dict(one.changes))
        words = self.prompts.words.words
        shares = check_shares(words, dataset.shares(settings.shares, words))
        terms = word_terms(settings, self.ids, self.words, shares)
        count = len(anatomy.find(self.op.model).blocks)
        variant = Variant(
            f"{self.name}: {one.name}", blocks_of(settings.block, count, settings.seed), settings.block_part
        )
        return Work(self.op, settings, terms, self.measuring.scores, words=self.words), variant

    def _train(self, work: Work, variant: Variant, starts: Sequence[int], track: Tracking) -> Any:
        if variant.start not in self.given:
            missing = [start for start in starts if start not in self.given]
            total = sum(len(term.ids) for term in work.terms)
            with self.op.progress.work(f"targets of {self.name}", total) as step:
                self.given |= prepare_each(self.op.model, work.terms, missing, step=step)
        # Other weights of the same terms: their targets and streams are the same.
        return work.train(variant, replace(self.given[variant.start], terms=tuple(work.terms)), track)

    def _measure(self, variant: Variant) -> Any:
        return without_samples(self.measuring.scores(f"measure {variant.name}", variant.start))


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, few: bool, **where: Unpack[Where]
) -> Tuned:
    """Try places, rates and holds; leave the winning recipe, a page and all numbers in the folder ``out``.

    ``few``: finalists take few texts, too (``FEW``), unless ``settings`` name fewer; without it those of ``settings``,
    and the screening takes ``FEW``. ``model`` stays as it was. Raises ``SurgeryError`` as ``recipes.equalize.run``.
    """
    settings.check()
    pairs.refuse_other_form(settings)
    if settings.pairs:
        raise SurgeryError(
            "tune: pairs choose their own doses (dose = auto); run equalize with them, or leave pairs out"
        )
    prompts = load_prompt_set(settings.prompt_set)
    prompts = replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts
    asked = material(model, tokenizer, prompts, part="dev", seed=settings.split_seed, texts=settings.neutral or None)
    far = distances(tokenizer, prompts, settings.split_seed, "dev") if settings.split == "both" else {}
    words = word_ids(tokenizer, prompts.words.words)
    with operation("equalize", model, settings, **where) as op:
        ranking = op.once("ranking", partial(_ranking, op, tokenizer, prompts, settings))
        if settings.block == "auto":
            settings = settings.model_copy(update={"block": [ranking["order"][0]]})
        whole = settings.model_copy(update=_fewer(settings, FEW)) if few else settings
        screen = settings.model_copy(update=_fewer(settings, SCREEN if few else FEW) | ({"epochs": 1} if few else {}))
        places = _places(model, settings, ranking, few)
        starts = sorted({blocks[0] for blocks in places.values() if blocks[0]})

        def a_round(name: str, own: Settings, judged: Material, others: Mapping[str, Any]) -> _Round:
            texts = texts_of(prompts, own, "pairs" if own.split == "pairs" else "profession")
            ids = {kind: encode(tokenizer, lines) for kind, lines in texts.items() if lines}
            measuring = Measuring(model, judged, dict(others), words, op.progress, keep=starts)
            before = op.once(f"before-{name}", measuring.before)
            measuring.take_up(before)
            return _Round(op, name, own, prompts, ids, words, measuring, without_samples(before["scores"]))

        near = {kind: _head(*rows) for kind, rows in far.items() if kind == "unseen templates"} if few else far
        first = a_round("screening", screen, _some(asked, ROWS) if few else asked, near)
        tried = _screen(first, settings, places, few)
        second = a_round("final", whole, asked, far)
        finalists = {one.name: Candidate(one.name, one.changes) for one in better(tried)[: 2 if few else 3]}
        own = next(one for one in tried if not one.changes)
        finalists[own.name] = Candidate(own.name, own.changes)
        tried += second.try_all(list(finalists.values()))
        return finish(op.folder.path, op.out, "equalize", whole, tried, ranking)


def _screen(first: _Round, settings: Settings, places: Mapping[str, tuple[int, ...]], few: bool) -> list[Tried]:
    """Places at the recipe's rate; rates and holds at the best of them; the rate further where its best is an end."""
    own = blocks_of(settings.block, len(anatomy.find(first.op.model).blocks), settings.seed)
    candidates = [Candidate("the recipe as it is", {})]
    candidates += [Candidate(name, {"block": list(blocks)}) for name, blocks in places.items() if blocks != own]
    tried = first.try_all(candidates)
    more = []
    for one in better(tried)[: 1 if few else 2]:
        for factor in (1 / FACTOR, FACTOR):
            more.append(_changed(one, settings, lr=factor))
        more.append(_changed(one, settings, holds=2.0))
    tried += first.try_all(more)
    best = better(tried)[0]
    rate = best.changes.get("lr", settings.lr)
    ends = {settings.lr / FACTOR: 1 / FACTOR, settings.lr * FACTOR: FACTOR}
    further = next((factor for end, factor in ends.items() if abs(rate / end - 1) < 0.01), None)
    if further is not None:
        tried += first.try_all([_changed(best, settings, lr=further)])
    return tried


def _changed(one: Tried, settings: Settings, *, lr: float = 1.0, holds: float = 1.0) -> Candidate:
    changes = dict(one.changes)
    name = one.name
    if lr != 1:
        changes["lr"] = float(f"{changes.get('lr', settings.lr) * lr:.3g}")
        name = f"{name.partition(', lr')[0]}, lr {changes['lr']:g}"
    if holds != 1:
        for key in ("hold_hints", "hold_settled", "hold_texts"):
            changes[key] = getattr(settings, key) * holds
        name += f", holds times {holds:g}"
    return Candidate(name, changes)


def _places(
    model: PreTrainedModel, settings: Settings, ranking: Mapping[str, Any], few: bool
) -> dict[str, tuple[int, ...]]:
    """Places to try, by their name: the recipe's own, the upper ones, the best by gain, the middle, and all."""
    count = len(anatomy.find(model).blocks)
    order = ranking["order"]
    named = {
        "upper blocks": blocks_of("upper", count, settings.seed),
        f"best {max(1, count // 4)} by gain": tuple(sorted(order[: max(1, count // 4)])),
        f"best {max(1, count // 8)} by gain": tuple(sorted(order[: max(1, count // 8)])),
        "middle third": tuple(range(count // 3, max(count // 3 + 1, 2 * count // 3))),
        **({} if few else {"all blocks": tuple(range(count))}),
    }
    own = blocks_of(settings.block, count, settings.seed)
    found: dict[str, tuple[int, ...]] = {"the recipe's own": own} if own else {}
    for name, blocks in named.items():
        if blocks and blocks not in found.values():
            found[name] = blocks
    return found


def _ranking(
    op: Operation, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, settings: Settings
) -> dict[str, Any]:
    rows = genbias.records("profession", "train", settings.split_seed, prompts)[:GAIN_LIMIT]
    with op.progress.work("rank the blocks by gain", len(rows)) as step:
        found = auto_ranking(gain_of(op.model, tokenizer, prompts, rows, seed=settings.seed, step=step))
    return {"method": found.method, "order": list(found.order()), "scores": found.scores.tolist(), "n": len(rows)}


def _fewer(settings: Settings, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of ``sizes`` that are smaller than the settings' own (0 stands for all)."""
    return {key: size for key, size in sizes.items() if (now := getattr(settings, key)) == 0 or now > size}


def _some(asked: Material, rows: int) -> Material:
    """About ``rows`` of each suite, evenly spread; the texts of perplexity whole."""

    def part(found: Any) -> Any:
        return found[:: max(1, len(found) // rows)]

    return replace(
        asked,
        ids={name: ids if name.startswith("perplexity") else part(ids) for name, ids in asked.ids.items()},
        prompts=part(asked.prompts),
        hints=part(asked.hints),
        settled={name: part(found) for name, found in asked.settled.items()},
    )


def _head(rows: Sequence[Any], ids: Sequence[Any]) -> tuple[Any, Any]:
    step = max(1, len(rows) // ROWS)
    return list(rows[::step]), tuple(ids[::step])
