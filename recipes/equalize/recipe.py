"""The steps of an equalising of words: texts, targets, the edit and its controls, three distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.equalize import dataset, holding, pairs
from recipes.equalize.measuring import Measuring, distances, fewer
from recipes.equalize.report import verdict, write_report
from recipes.equalize.settings import Settings, controls_of
from recipes.equalize.work import Variant, Work, blocks_of, word_terms
from surgery.data import genbias, shapes
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.data.shares import check_shares, read_shares
from surgery.forward.shown import shown
from surgery.forward.tokens import word_ids
from surgery.metrics.material import material
from surgery.operation import Run, Where, control, operation
from surgery.runs import examples, summary


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of equalising: also the words with their shares, and how many texts each term has."""

    words: Sequence[str]
    shares: Sequence[float]
    texts: Mapping[str, int]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Train, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    Everything is left in the folder ``out``. Raises ``SurgeryError`` for shares that do not add up to 1, a word of
    several tokens, a text that is both equalised and held; see ``surgery.operation`` for interruptions.
    """
    pairs.refuse_other_form(settings)
    settings.check()
    if settings.pairs:
        return pairs.run(model, tokenizer, settings, **where)
    prompts = load_prompt_set(settings.prompt_set)
    prompts = replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts
    shares = check_shares(prompts.words.words, read_shares(settings.shares, prompts.words.words))
    words = word_ids(tokenizer, prompts.words.words)
    controls = controls_of(settings.controls)
    split = "pairs" if settings.split == "pairs" else "profession"
    texts = texts_of(prompts, settings, split)
    if settings.samples:
        dataset.first_token(tokenizer, settings.samples)
    asked = material(model, tokenizer, prompts, split=split, seed=settings.split_seed, texts=settings.neutral or None)
    far = distances(tokenizer, prompts, settings.split_seed) if settings.split == "both" else {}
    asked, far = fewer(asked, far, settings.test_rows, settings.test_texts, settings.seed)
    main = Variant(
        "equalize", blocks_of(settings.block, len(anatomy.find(model).blocks), settings.seed), settings.block_part
    )
    with operation("equalize", model, settings, **where) as op:
        ids = dataset.encoded(op, tokenizer, settings, texts)
        judged = (asked, far)
        measuring = op.shared.get("measuring", judged, partial(Measuring, model, asked, far, words, op.progress))
        terms = word_terms(settings, ids, words, shares)
        work = Work(op, settings, terms, measuring.scores, own=ids["own"], words=words, scale=settings.scales[0])
        main = work.located(main, tokenizer, terms[0])
        beside = {name: work.control(name, main) for name in controls}
        measuring.keep = sorted({each.start for each in (main, *beside.values())} - {0})
        before = op.once("before", measuring.before, of=judged)
        measuring.take_up(before)
        settled, hints = ([row.text for row in rows] for rows in (asked.settled["locality"], asked.hints))
        seen = examples.texts_to_show(asked.prompts, before["probabilities"], hints, settled)
        look = partial(shown, model, tokenizer, seen, examples.words_to_show(prompts))
        first = op.once("shown", look, of=seen)

        def measured(label: str, start: int) -> dict[str, Any]:
            return measuring.with_probabilities(label, start) | {"shown": look()}

        edited = replace(work, measure=measured).carry_out(main, keep=True)
        others = {name: work.carry_out(variant, keep=False) for name, variant in beside.items()}
        found = Summary(
            **op.about(edited),
            before=before["scores"],
            after=edited.measured["scores"],
            cases=examples.cases(asked.prompts, before["probabilities"], edited.measured["probabilities"]),
            shown={"before": first, "after": edited.measured["shown"]},
            controls={name: control(other, other.measured) for name, other in others.items()},
            words=list(prompts.words.words),
            shares=list(shares),
            texts={name: len(ids.get(name, ())) for name in texts},
        )
        return op.finish(replace(found, verdict=verdict(found.to_dict())), write_report)


def texts_of(prompts: PromptSet, settings: Settings, split: str) -> dict[str, list[str]]:
    """The texts of each term; ``own`` are the prompt set's training prompts alone."""
    seed, drawn, size = settings.split_seed, settings.seed, len(prompts.words.words)
    people = shapes.people("train", settings.more_people)[: settings.people or None]
    where: Any = {"seed": seed, "split": split, "people": people, "count": settings.shapes, "longest": settings.longest}
    words = dataset.prompts_to_equalize(
        prompts, own=settings.own, own_each=settings.own_each, each=settings.each, endings=settings.endings, **where
    )
    hints = dataset.hints(prompts, seed=seed, each=settings.hints_each, people=people)
    settled = holding.settled(prompts, each=settings.settled_each, nouns=settings.more_nouns, **where)
    held = {
        "hints": shapes.of_fewer_beginnings(
            dataset.some(hints, settings.hints, drawn, size), settings.hold_endings, size
        ),
        **holding.apart(settled, settings.settled, settings.facts, settings.hold_endings, drawn),
        "texts": dataset.texts(settings.hold_file),
    }
    for name, lines in held.items():
        dataset.refuse_both(words, lines, settings.hold_file or f"hold of {name}")
    return {"own": [row.text for row in genbias.records(split, "train", seed, prompts)], "words": words, **held}
