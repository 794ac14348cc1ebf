"""The form of equalising for pairs of sentences: neither is preferred, unrelated sentences and texts stay as they are.

The loss of a pair is (margin + dose)^2 (``surgery.edits.equalize.pairs``); a bias type's dose is given, or chosen on
groups that training never saw (``recipes.equalize.doses``). StereoSet's training source is learnt and its dev file
measured; of other pairs a fifth of the groups is kept back and measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from hooks.batching import context_limit
from recipes.equalize import dataset, holding
from recipes.equalize.doses import check_doses, check_scales, choose_doses
from recipes.equalize.measuring import Measuring
from recipes.equalize.pairs_report import verdict, write_report
from recipes.equalize.pairs_terms import terms_of
from recipes.equalize.settings import OF_PAIRS, OF_WORDS, controls_of
from recipes.equalize.work import Variant, Work, blocks_of
from surgery.catalogue import check_scorer
from surgery.data import crows_pairs, neutral, shapes, stereoset
from surgery.data import pairs as data
from surgery.data.pairs import Pair
from surgery.data.prompts import load_prompt_set
from surgery.data.rows import find_file
from surgery.edits.equalize.dose import Dose, read_doses
from surgery.errors import SurgeryError
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import pairs as pairs_metric
from surgery.metrics import sentences
from surgery.metrics.material import material
from surgery.metrics.sentences import DEFINITIONS
from surgery.metrics.suite import evaluate_suites, plain
from surgery.operation import Run, Where, control, operation
from surgery.runs import summary

if TYPE_CHECKING:
    from recipes.equalize.settings import Settings

TRAIN = "stereoset/stereoset_train_union.jsonl"  # inside the data folder
SUITES = {"stereoset": stereoset.FILE, "crows_pairs": crows_pairs.FILE}
KEPT_BACK = 5  # one of so many parts of the groups, where there is no test file
SHIPPED = ("locality", "facts_of_gender", "perplexity")  # suites


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of equalising pairs: also each type's dose with what it was chosen from, and how many rows."""

    pairs: str
    scorers: Sequence[str]
    doses: Mapping[str, Any]
    scale: float
    margin_gone: float
    scales: Sequence[Mapping[str, Any]]
    """For each scale what its doses do to groups left out (``recipes.equalize.doses.Chosen``)."""
    rows: Mapping[str, Any]


@dataclass(frozen=True)
class Given:
    """The pairs to learn, those kept back, the suites of the data folder that are measured, and what to say."""

    train: tuple[Pair, ...]
    test: tuple[Pair, ...]
    name: str
    suites: tuple[str, ...]
    wanted: Mapping[str, Dose | None]
    """The dose of each bias type; None is to be chosen."""
    texts: Mapping[str, Sequence[str]]
    """Texts to hold beside the unrelated sentences: ordinary ones, and those that end where the pronoun is settled."""
    notes: tuple[str, ...]


def refuse_other_form(settings: "Settings") -> None:
    """Raises ``SurgeryError`` for a setting that was changed and belongs to the form that does not run."""
    usual = type(settings).model_fields
    keys = OF_WORDS if settings.pairs else OF_PAIRS
    odd = next((key for key in keys if getattr(settings, key) != usual[key].get_default()), None)
    if odd is not None and settings.pairs:
        raise SurgeryError(
            f"{odd}: got {getattr(settings, odd)!r} and pairs = {settings.pairs!r}; words and pairs are equalised one "
            "at a time; leave one out, or combine the deltas of two runs (surgery compose)"
        )
    if odd is not None:
        raise SurgeryError(
            f"{odd}: got {getattr(settings, odd)!r}, which only pairs of sentences read; name them with pairs "
            "(stereoset, crows_pairs or a .jsonl file), or leave it out; prompts are prompt_set"
        )


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: "Settings", **where: Unpack[Where]
) -> Run:
    """As ``recipes.equalize.run``; raises ``SurgeryError`` also for what is wrong with pairs, doses and scorers."""
    given = read(settings)
    for scorer in settings.scorers:
        if DEFINITIONS[scorer].start != "none":
            sentences.start_token(tokenizer, scorer)
    if settings.samples:
        dataset.first_token(tokenizer, settings.samples)
    controls = controls_of(settings.controls)
    if "lftf" in controls:
        raise SurgeryError("controls: got 'lftf', which learns words; expected random or no_hold beside pairs")
    build = partial(terms_of, model, tokenizer, settings, given.texts)
    no_dose = dict.fromkeys(given.wanted, 0.0)
    learnt = build(given.train, no_dose)[0]  # what cannot be trained on is said now
    blocks = blocks_of(settings.block, len(anatomy.find(model).blocks), settings.seed)
    main = Variant("equalize", blocks, settings.block_part)
    texts = settings.neutral or None
    asked = material(model, tokenizer, load_prompt_set(), seed=settings.split_seed, suites=SHIPPED, texts=texts)
    with operation("equalize", model, settings, **where) as op:
        for note in given.notes:
            op.note(note)
        measuring = Measuring(model, asked, {}, asked.words, op.progress)

        def measure(label: str, start: int = 0) -> dict[str, Any]:
            return measuring.scores(label, start) | judge(tokenizer, settings, given, measuring, label)

        work = Work(op, settings, (), measure, "squared margin of pairs with an offset (the dose), and hold")
        main = work.located(main, tokenizer, learnt)
        beside = {name: work.control(name, main) for name in controls}
        measuring.keep = sorted({each.start for each in (main, *beside.values())} - {0})
        first = op.once("before", lambda: {"scores": measure("measure before"), **measuring.kept()})
        measuring.take_up(first)
        before = first["scores"]
        sampled = settings.samples and settings.hold_texts
        own = op.once("own-texts", partial(dataset.written, op, tokenizer, settings)) if sampled else []
        build = partial(build, own=own, apart=learnt.ids)
        work = replace(work, whole=build(given.train, no_dose))
        judged = partial(margins_and_perplexity, model, tokenizer, settings.scorers)
        chosen = choose_doses(work, main, given.train, given.wanted, build, judged)
        terms = build(given.train, chosen.doses)
        work = replace(work, terms=terms, scale=chosen.scale)
        edited = work.carry_out(main, keep=True)
        others = {name: work.carry_out(variant, keep=False) for name, variant in beside.items()}
        found = Summary(
            **op.about(edited),
            before=before,
            after=edited.measured,
            controls={name: control(other, other.measured) for name, other in others.items()},
            pairs=given.name,
            scorers=list(settings.scorers),
            doses=chosen.told,
            scale=chosen.scale,
            scales=chosen.scales,
            margin_gone=settings.margin_gone,
            rows={"trained": len(given.train), "kept_back": len(given.test), "notes": list(given.notes)},
        )
        return op.finish(replace(found, verdict=verdict(found.to_dict())), write_report)


def read(settings: "Settings") -> Given:
    """Everything that the settings name; raises ``SurgeryError`` for what cannot be read, trained on or measured."""
    for number, name in enumerate(settings.scorers or [""]):
        check_scorer(name)
        if name in settings.scorers[:number]:
            raise SurgeryError(f"scorers: {name!r} is named twice; name it once")
    source, folder = settings.pairs, settings.data
    file = find_file(folder, {**SUITES, "stereoset": TRAIN}[source]) if source in SUITES else Path(source)
    if not file.is_file():
        raise SurgeryError(f'{file}: no such file; expected one JSON object a line, with "more" and "less"; name it')
    found = data.load(file)
    if source == "stereoset":
        find_file(folder, stereoset.FILE)
    suites = tuple(name for name, at in SUITES.items() if folder and (Path(folder) / at).is_file())
    train, test = found.rows, tuple[Pair, ...]()
    if source != "stereoset":
        suites = tuple(name for name in suites if name != source)  # it would be measured on what is learnt
        train, test = _split(found.rows, settings.split_seed)
    wanted = read_doses(settings.dose, found.types)
    check_doses(train, wanted, settings.doses, settings.folds, settings.split_seed)
    check_scales(settings.scales, wanted)
    texts = {"texts": dataset.texts(settings.hold_file) if settings.hold_texts else [], "settled": _settled(settings)}
    mine = set(neutral.sentences(settings.hold_file)) if settings.hold_file else set()
    both = next((pair for pair in train if {pair.more, pair.less} & mine), None)
    if both is not None:
        raise SurgeryError(f"{settings.hold_file}: also holds a side of {both.where}; take it out of one of them")
    notes = (
        [f"{found.name}: {len(found.skipped)} rows skipped; {'; '.join(found.skipped[:3])}"] if found.skipped else []
    )
    return Given(train, test, found.name, suites, wanted, texts, (*notes, *_leaks(train, suites, folder)))


def _settled(settings: "Settings") -> list[str]:
    if not settings.hold_settled:
        return []
    at: Any = {"seed": settings.split_seed, "split": "profession", "count": settings.shapes}
    people, each = shapes.people("train"), settings.settled_each
    lines = holding.settled(load_prompt_set(), each=each, people=people, longest=settings.longest, **at)
    return dataset.some(list(lines), settings.settled, settings.seed)


def _split(rows: Sequence[Pair], seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    purpose = f"to keep one of {KEPT_BACK} back for the test; add rows of other groups, or leave the type out"
    kept = set(data.folds(rows, KEPT_BACK, seed=seed, least=KEPT_BACK, purpose=purpose)[0])
    train = tuple(row for number, row in enumerate(rows) if number not in kept)
    return train, tuple(rows[number] for number in sorted(kept))


def _leaks(train: Sequence[Pair], suites: Sequence[str], folder: str) -> list[str]:
    learnt, found = {(pair.more, pair.less) for pair in train}, []
    for suite in suites:
        measured = {(pair.more, pair.less) for pair in data.load(Path(folder) / SUITES[suite]).rows}
        if both := learnt & measured:
            found.append(f"Warning: {len(both)} of the pairs that are learnt also stand in the test rows of {suite}.")
    return found


def margins_and_perplexity(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scorers: Sequence[str], pairs: Sequence[Pair]
) -> tuple[Float[np.ndarray, "pairs scorers"], float]:
    """What a dose is chosen by: the pairs' margins, and the perplexity of the shipped sentences with pronouns."""
    ids = encode(tokenizer, neutral.with_pronouns(), limit=context_limit(model))
    sums, counts, _ = token_losses(model, ids)
    return pairs_metric.margins(model, tokenizer, pairs, scorers), float(np.exp(sums.sum() / counts.sum()))


def judge(
    tokenizer: PreTrainedTokenizerBase, settings: "Settings", given: Given, by: Measuring, label: str
) -> dict[str, Any]:
    """SS, LMS, ICAT and margin of the pairs kept back, of StereoSet and CrowS-Pairs, under ``key`` of each scorer."""
    found: dict[str, Any] = {}
    for scorer in settings.scorers:
        if given.test:
            with by.progress.work(f"{label}, pairs kept back", None) as step:
                name = f"{given.name}, groups kept back"
                scores = pairs_metric.evaluate(by.model, tokenizer, given.test, data=name, scorer=scorer, step=step)
            found[key("pairs", scorer, settings.scorers)] = plain(scores, samples=True)
        if given.suites:
            options = {suite: {"scorer": scorer} for suite in given.suites}
            rest: Any = {"limit": settings.test_rows, "seed": settings.seed, "progress": by.progress}
            scores = evaluate_suites(by.model, tokenizer, given.suites, settings.data, options=options, **rest)
            found |= {key(suite, scorer, settings.scorers): plain(each, samples=True) for suite, each in scores.items()}
    return found


def key(suite: str, scorer: str, scorers: Sequence[str]) -> str:
    """The first scorer's results stand under the suite's own name, the others' under "SUITE, SCORER"."""
    return suite if scorer == scorers[0] else f"{suite}, {scorer}"
