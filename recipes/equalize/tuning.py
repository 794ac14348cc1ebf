"""Choosing the place and the rate of an equalising on development parts, so that nobody has to guess.

Candidates are screened in trainings of a few steps at their own rate, which show whether text pays for it: the highest
rate that it does not pay for where the recipe trains, places at that, finer rates at the best place. The best setting
and one of another kind are then trained on the texts that a run would take, with all texts the better one again in
twice the steps, and judged on all that a report warns of, as learnt, a little enlarged, and once more. Those of a round
share one measurement of the untouched model, the targets and, by first block, the stream.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import inf
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.equalize import dataset, pairs
from recipes.equalize.candidates import OWN, RATES, Candidate, at_other_places, last_quarter, nearby, places_of
from recipes.equalize.measuring import Measuring, distances
from recipes.equalize.recipe import texts_of
from recipes.equalize.rounds import Round
from recipes.equalize.settings import Settings
from surgery.data import genbias
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.errors import SurgeryError
from surgery.forward.tokens import word_ids
from surgery.locate.gain import GAIN_LIMIT, auto_ranking, gain_of
from surgery.metrics.material import Material, material
from surgery.operation import Operation, Where, operation
from surgery.runs.tuning import TOLERANCE, Tried, Tuned, finish

FEW = {"own": 300, "shapes": 1200, "each": 2, "hints": 500, "settled": 900, "facts": 600}
FEW |= {"hints_each": 2, "settled_each": 5}
"""Of the finalists, where a run is to take a few minutes on a CPU."""
SUITED_TO_FEW = {"lr": 6e-4, "batch_size": 48, "emphasis": 2.0, "own_each": 1, "matmul": "medium"}
SUITED_TO_FEW |= {"hold_hints": 2.5, "hold_settled": 2.5, "hold_texts": 3.0}
"""And what was chosen with them for an earlier demo, at the last quarter of the blocks."""
SUITED_TO_ALL = {"lr": 8e-4, "batch_size": 64, "emphasis": 4.0, "matmul": "medium"}
SUITED_TO_ALL |= {"hold_hints": 3.0, "hold_settled": 6.0, "hold_texts": 2.0}
"""What did well on all texts (docs/tune.md). Each instead of the recipe's default, not of what somebody chose."""
SCREEN = {"own": 300, "own_each": 0, "each": 0, "hints": 60, "hints_each": 0, "settled": 80, "facts": 40}
SCREEN |= {"settled_each": 1, "batch_size": 32, "samples": 0}
"""Of the screening, in one epoch: 17 steps."""
ALL_BY_0 = ("own", "hints", "settled", "facts")
ROWS = 80
"""Of each development set of prompts in the screening; perplexity is that of the report."""
SCREENED = ("genbias", "perplexity")
"""What the screening looks at. Holds have hardly a say in so few steps, so that it would warn of nearly everything."""


def tune(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, *, few: bool, **where: Unpack[Where]
) -> Tuned:
    """Try places and rates; leave the winning recipe, a page and all numbers in the folder ``out``.

    ``few``: finalists take few texts (``FEW``), unless ``settings`` name fewer; without it those of ``settings``.
    ``model`` stays as it was. Raises ``SurgeryError`` as ``recipes.equalize.run``, and where no training stays finite.
    """
    settings.check()
    pairs.refuse_other_form(settings)
    settings.check_tuning()
    prompts = load_prompt_set(settings.prompt_set)
    prompts = replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts
    if settings.samples:  # of which the finalists learn first, behind all of the screening
        dataset.first_token(tokenizer, settings.samples)
    asked = material(model, tokenizer, prompts, part="dev", seed=settings.split_seed, texts=settings.neutral or None)
    far = distances(tokenizer, prompts, settings.split_seed, "dev") if settings.split == "both" else {}
    words = word_ids(tokenizer, prompts.words.words)
    with operation("equalize", model, settings, **where) as op:
        ranking = op.once("ranking", partial(_ranking, op, tokenizer, prompts, settings))
        if settings.block == "auto":
            settings = settings.model_copy(update={"block": [ranking["order"][0]]})
        count = len(anatomy.find(model).blocks)
        settings = settings.model_copy(update=_suited(settings, count) if few else _defaults(settings, SUITED_TO_ALL))
        screen = settings.model_copy(update=_fewer(settings, SCREEN) | {"epochs": 1})
        places = places_of(settings, count, ranking["order"])
        starts = sorted({blocks[0] for blocks in places.values() if blocks[0]})

        def a_round(name: str, own: Settings, judged: Material, others: Mapping[str, Any], keep: list[int]) -> Round:
            texts = texts_of(prompts, own, "pairs" if own.split == "pairs" else "profession")
            ids = dataset.encoded(op, tokenizer, own, texts)
            measuring = Measuring(model, judged, dict(others), words, op.progress, keep=keep)
            before = op.once(f"before-{name}", measuring.before)
            measuring.take_up(before)
            return Round(op, name, own, prompts, ids, words, measuring, before["scores"], keep)

        near = {kind: _head(*rows) for kind, rows in far.items() if kind == "unseen templates"}
        tried = _screen(a_round("screening", screen, _some(asked, ROWS), near, starts), places)
        chosen = _finalists(tried)
        begin = sorted({one.blocks[0] if one.blocks else places.get(OWN, (0,))[0] for one in chosen} - {0})
        last = a_round("final", settings, asked, far, begin)
        last = replace(last, scaled=settings.scales == [1.0])
        finals = last.try_all(chosen)
        if not finals:
            raise SurgeryError("tune: no finalist's training stayed finite; lower lr (--set lr=...), or use float32")
        if not few:
            finals |= last.try_all([replace(_cheapest(finals), scale=1.0, steps=2)])
        return finish(op.folder.path, op.out, "equalize", settings, [*tried.values(), *finals.values()], ranking)


def _screen(first: Round, places: Mapping[str, tuple[int, ...]]) -> dict[Candidate, Tried]:
    """The highest rate for which text pays nothing where the recipe trains; places at that; finer ones at the best.

    What a few steps leave of the bias says little of what many would; whether text pays, they say. So of rates at the
    same place the highest is taken: trained to the end it left less on both models that were tried (docs/tune.md).
    """
    count = len(anatomy.find(first.op.model).blocks)
    tried: dict[Candidate, Tried] = {}
    for rate in RATES:
        tried |= first.try_all([one := Candidate(OWN, None, rate)])
        if one in tried and tried[one].perplexity <= TOLERANCE:
            break
    if not tried:
        raise SurgeryError("tune: no training stayed finite at any rate; lower lr (--set lr=...), or use float32")
    tried |= first.try_all(at_other_places(_best(tried)[0], places, count))
    best = _best(tried)[0]
    for one in nearby(best, pays=tried[best].perplexity > TOLERANCE):
        tried |= first.try_all([one])
        if _best(tried)[0] != one:
            break
    return tried


def _best(tried: Mapping[Candidate, Tried]) -> list[Candidate]:
    """By what few steps can tell: what is left of the bias, and what text pays. The words' mass is not yet settled."""
    return sorted(tried, key=lambda one: tried[one].screened)


def _cheapest(tried: Mapping[Candidate, Tried]) -> Candidate:
    return min(tried, key=lambda one: tried[one].price)


def _finalists(tried: Mapping[Candidate, Tried]) -> list[Candidate]:
    """The best, and beside it the recipe as it is, unless text pays for that; else the best at another place.

    A few steps say little of a setting but what text pays, and what was chosen by hand is not to be lost by them.
    """
    best, *others = _best(tried)
    own = Candidate(OWN, None)
    if own in others and tried[own].perplexity <= TOLERANCE:
        return [best, own]
    return [best, *[one for one in others if one.place != best.place][:1]]


def _ranking(
    op: Operation, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, settings: Settings
) -> dict[str, Any]:
    rows = genbias.records("profession", "train", settings.split_seed, prompts)[:GAIN_LIMIT]
    with op.progress.work("rank the blocks by gain", len(rows)) as step:
        found = auto_ranking(gain_of(op.model, tokenizer, prompts, rows, seed=settings.seed, step=step))
    return {"method": found.method, "order": list(found.order()), "scores": found.scores.tolist(), "n": len(rows)}


def _fewer(settings: Settings, sizes: Mapping[str, int]) -> dict[str, int]:
    """Those of ``sizes`` that are smaller than the settings' own."""
    now = {key: getattr(settings, key) or (inf if key in ALL_BY_0 else 0) for key in sizes}
    return {key: size for key, size in sizes.items() if size < now[key]}


def _suited(settings: Settings, count: int) -> dict[str, Any]:
    """The amounts of few texts, and what suits them, the place among it, in a model of ``count`` blocks."""
    place = {"block": list(last_quarter(count))}
    return _fewer(settings, FEW) | _defaults(settings, SUITED_TO_FEW | place)


def _defaults(settings: Settings, suited: Mapping[str, Any]) -> dict[str, Any]:
    """Those of ``suited`` where the settings have the recipe's default."""
    fields = type(settings).model_fields
    return {key: value for key, value in suited.items() if getattr(settings, key) == fields[key].get_default()}


def _some(asked: Material, rows: int) -> Material:
    """About ``rows`` of the prompts, evenly spread, and the texts of perplexity whole; nothing else."""
    step = max(1, len(asked.prompts) // rows)
    ids = {name: asked.ids[name][:: step if name == "genbias" else 1] for name in SCREENED if name in asked.ids}
    return replace(asked, ids=ids, prompts=asked.prompts[::step])


def _head(rows: Sequence[Any], ids: Sequence[Any]) -> tuple[Any, Any]:
    step = max(1, len(rows) // ROWS)
    return list(rows[::step]), tuple(ids[::step])
