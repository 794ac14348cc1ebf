"""Equalise and hold: the compared words share their mass anew, and everything that must not move is held.

One training on several terms (``surgery.edits.equalize``): prompts of hundreds of shapes whose next word is equalised,
and hints, settled subjects, ordinary sentences and a user's own texts, whose distributions stay the untouched model's.
Measured at three distances: the prompt set's templates, templates that training never saw, other shapes of text.

With ``pairs`` whole sentences are compared instead of words (``recipes.equalize.pairs``): StereoSet's, CrowS-Pairs', or
those of a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.equalize import dataset, pairs
from recipes.equalize.measuring import Measuring, distances
from recipes.equalize.report import write_report
from recipes.equalize.work import Variant, Work, blocks_of, controls_of, word_terms
from surgery.data import genbias
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.edits.equalize import check_shares
from surgery.forward.tokens import encode, word_ids
from surgery.metrics.suite import material
from surgery.operation import Run, Where, control, operation
from surgery.runs import settings as shared
from surgery.runs import summary


class Settings(shared.Training, shared.DataFolder, shared.PromptSet, shared.Neutral, shared.Saving):
    """This project's own method; the defaults were chosen on development parts of SmolLM2-135M-Instruct."""

    renamed = {"part": "block_part", "top": "kept_tokens"}
    pairs: str = ""
    """Sentences in pairs instead of words: stereoset or crows_pairs (of the folder data), or a .jsonl of your own."""
    dose: list[str | int | float] = ["auto"]
    """Offset of a pair's margin (nats a token): 0.2, auto (by cross-validation), or by bias type: gender=0.2,auto."""
    doses: list[float] = [0.0, 0.2, 0.4, 0.6]
    """The doses among which auto chooses, by straight lines between them."""
    folds: int = Field(3, ge=2)
    """Into so many parts of its groups (terms) the training data is cut for that; each dose trains as often."""
    scorers: list[str] = ["bos", "bias-bench"]
    """Of the pairs, StereoSet and CrowS-Pairs; doses are chosen on all of them together."""
    test_rows: shared.Limit = 0
    """At most so many rows of StereoSet and CrowS-Pairs are measured, drawn by the seed; 0 takes all."""
    hold_unrelated: float = Field(1.0, ge=0)
    """Weight of holding the unrelated sentences of the pairs, of each example beside 1 of a pair."""
    words: list[str] = []
    """Other words to share the mass among than the prompt set's; any number from two."""
    shares: list[float] = []
    """The share of each word, in the order of the words; equal ones where nothing is said."""
    block: str | int | list[int] = "upper"
    """upper (two thirds of the depth to a fifteenth below the end), all, last, middle, first, random, numbers,
    or blocks (all of them and nothing else, which is what pairs train)."""
    block_part: Literal["all", "attention", "mlp", "without_attention", "without_mlp"] = "all"
    method: Literal["dense", "lora"] = "dense"
    rank: shared.Count = 16
    alpha: shared.Positive = 32.0
    lr: shared.Positive = 3e-4
    epochs: shared.Count = 2
    batch_size: shared.Count = 32
    optimizer: Literal["adam", "adamw"] = "adam"
    schedule: Literal["constant", "linear"] = "linear"
    warmup: shared.Share = 0.05
    emphasis: float = Field(2.0, ge=0)
    """Weight of the gap among the words alone, which counts every prompt alike, beside the whole target's KL."""
    shapes: int = Field(2000, ge=1)
    """How many sentence shapes are drawn from the grammar; for he, she and they, about people, only."""
    each: int = Field(16, ge=0)
    """In how many of them each person stands; 0 trains on the prompt set's own templates alone."""
    own: int = Field(0, ge=0)
    """Only so many of the prompt set's own training prompts; 0 takes all."""
    hints: int = Field(0, ge=0)
    """Only so many hint prompts and settled subjects are held, drawn by the seed; 0 holds all."""
    settled: int = Field(0, ge=0)
    hold_hints: float = Field(2.0, ge=0)
    """Weights of what is held, of each example beside 1 of a prompt; 0 leaves a kind out."""
    hold_settled: float = Field(2.0, ge=0)
    hold_texts: float = Field(1.0, ge=0)
    hold_file: str = ""
    """Your own texts to hold, .txt (one a line) or .jsonl (key "text")."""
    hold_positions: Literal["all", "last"] = "all"
    """Of the sentences and of your texts: every position, or the last one."""
    hints_each: int = Field(4, ge=0)
    """In how many of the grammar's hint shapes each person stands."""
    settled_each: int = Field(4, ge=0)
    """In how many of the shapes each thing, plural, gendered noun and name stands."""
    kept_tokens: int = Field(256, ge=2)
    """Tokens kept of a target, the others together as one."""
    split: Literal["both", "profession", "pairs"] = "both"
    """both: test professions unseen, and beside them templates and other people unseen, too. pairs: the paper's."""
    split_seed: int = genbias.SEED
    controls: list[str] = ["lftf"]
    """lftf (the paper's settings), random (as many other blocks), no_hold (the first term alone); none for pairs."""

    @classmethod
    def usual(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """What pairs change: all blocks train, longer and at a lower rate, and LFTF has nothing to learn from."""
        changed = {"block": "blocks", "lr": 1e-4, "epochs": 3, "batch_size": 64, "controls": []}
        return changed if values.get("pairs") else {}


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
    if settings.pairs:
        return pairs.run(model, tokenizer, settings, **where)
    prompts = load_prompt_set(settings.prompt_set)
    prompts = replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts
    shares = check_shares(prompts.words.words, settings.shares or None)
    words = word_ids(tokenizer, prompts.words.words)
    controls = controls_of(settings.controls)
    split = "pairs" if settings.split == "pairs" else "profession"
    texts = _texts(prompts, settings, split)
    ids = {name: encode(tokenizer, lines) for name, lines in texts.items() if lines}
    asked = material(model, tokenizer, prompts, split=split, seed=settings.split_seed, texts=settings.neutral or None)
    far = distances(tokenizer, prompts, settings.split_seed) if settings.split == "both" else {}
    main = Variant(
        "equalize", blocks_of(settings.block, len(anatomy.find(model).blocks), settings.seed), settings.block_part
    )
    with operation("equalize", model, settings, **where) as op:
        measuring = Measuring(model, asked, far, words, op.progress)
        terms = word_terms(settings, ids, words, shares)
        work = Work(op, settings, terms, measuring.scores, own=ids["own"], words=words)
        beside = {name: work.control(name, main) for name in controls}
        measuring.keep = sorted({each.start for each in (main, *beside.values())} - {0})
        before = op.once("before", partial(measuring.scores, "measure before"))
        edited = work.carry_out(main, keep=True)
        others = {name: work.carry_out(variant, keep=False) for name, variant in beside.items()}
        found = Summary(
            **op.about(edited),
            before=before,
            after=edited.measured,
            controls={name: control(other, other.measured) for name, other in others.items()},
            words=list(prompts.words.words),
            shares=list(shares),
            texts={name: len(lines) for name, lines in texts.items()},
        )
        return op.finish(found, write_report)


def _texts(prompts: PromptSet, settings: Settings, split: str) -> dict[str, list[str]]:
    """The texts of each term; ``own`` are the prompt set's training prompts alone."""
    seed, count, drawn = settings.split_seed, settings.shapes, settings.seed
    words = dataset.prompts_to_equalize(
        prompts, seed=seed, split=split, own=settings.own, count=count, each=settings.each
    )
    held = {
        "hints": dataset.some(dataset.hints(prompts, seed=seed, each=settings.hints_each), settings.hints, drawn),
        "settled": dataset.some(
            dataset.settled(prompts, seed=seed, count=count, each=settings.settled_each), settings.settled, drawn
        ),
        "texts": dataset.texts(settings.hold_file),
    }
    for name, lines in held.items():
        dataset.refuse_both(words, lines, settings.hold_file or f"hold of {name}")
    return {"own": [row.text for row in genbias.records(split, "train", seed, prompts)], "words": words, **held}
