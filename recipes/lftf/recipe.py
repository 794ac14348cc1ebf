"""The steps of an LFTF run: rank, measure, train, measure as saved, and the controls beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.lftf import open_questions
from recipes.lftf.report import write_report
from recipes.lftf.settings import Settings
from recipes.lftf.variants import Place, Variant, control_names, control_variant, main_variant, starts
from surgery.data import genbias
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.edits import block as edit
from surgery.edits.kept_streams import KeptStreams
from surgery.forward.next_token import rank_blocks
from surgery.forward.residual_cache import why_not
from surgery.forward.shown import shown
from surgery.forward.tokens import encode, word_ids
from surgery.locate.objectives import words_objective
from surgery.metrics.material import fewer, material
from surgery.metrics.suite import measure, plain
from surgery.operation import Edit, Made, Operation, Outcome, OwnPart, Run, Tracking, Where, control, operation
from surgery.runs import examples, summary
from surgery.training import Plan, steps_of

TOLD = ("genbias.relative_gap.all", "genbias.mass.all", "genhint.ub", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of an LFTF run: also the compared words, and the ranking of the blocks."""

    words: Sequence[str]
    ranking: dict[str, Any]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Rank, train, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    Everything is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.operation`` for interruptions.
    """
    prompts = _prompt_set(settings)
    train = genbias.records(settings.split, "train", settings.split_seed, prompts)
    ids = encode(tokenizer, [row.text for row in train])
    asked = material(
        model, tokenizer, prompts, split=settings.split, seed=settings.split_seed, texts=settings.neutral or None
    )
    asked = fewer(asked, {"genbias": settings.test_rows, "genhint": settings.test_rows}, settings.seed)
    names = control_names(settings.controls, settings.ablations, prompts.words, settings.random_blocks)
    with operation("lftf", model, settings, **where) as op:
        at = Place(len(anatomy.find(model).blocks), settings.seed)
        main = main_variant(settings.block, settings.block_part, settings.trained_words, prompts.words, at)
        streams = op.shared.get("streams", (ids, asked), partial(KeptStreams, model, ids, asked, op.progress))
        work = _Work(op, tokenizer, settings, prompts, streams)
        if settings.block == "auto" and settings.rank_by == "gain":
            objective = words_objective(model, ids, word_ids(tokenizer, main.words), "log")
            located = op.located(tokenizer, objective, len(ids), of=(ids, main.words))
            main = replace(main, blocks=(located["block"],), located=located)
        if settings.block == "auto" and settings.rank_by != "gain":
            ranking = op.once("ranking", work.rank, of=work.ranks_by)
            main = replace(main, blocks=(ranking["order"][settings.rank_by][0],))
            controls = work.beside(main, names, at)
        else:
            controls = work.beside(main, names, at)
            ranking = op.once("ranking", work.rank, of=work.ranks_by)
        before = op.once("before", work.before, of=(asked, prompts, settings.open_questions, settings.split_seed))
        work.streams.reference = before["reference"]
        settled = [row.text for row in asked.settled["locality"]]
        hints = [row.text for row in asked.hints]
        work = replace(work, texts=examples.texts_to_show(asked.prompts, before["probabilities"], hints, settled))
        first = op.once("shown", work.shown, of=work.texts)
        if settings.objective == "as_printed":
            op.note("objective as_printed (Eq. 5) is smallest when the model says neither word: watch the mass")
        edited = work.carry_out(main, keep=True)
        summary = Summary(
            **op.about(edited),
            before=before["scores"],
            after=edited.measured["scores"],
            controls={control.name: work.control(control) for control in controls},
            words=list(prompts.words.words),
            ranking=ranking,
            cases=examples.cases(asked.prompts, before["probabilities"], edited.measured["probabilities"]),
            shown={"before": first, "after": edited.measured["shown"]},
            own_part=OwnPart("the place", "random", TOLD) if "random" in names else None,
        )
        return op.finish(summary, write_report)


def _prompt_set(settings: Settings) -> PromptSet:
    prompts = load_prompt_set(settings.prompt_set)
    return replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts


@dataclass(frozen=True)
class _Work:
    """The steps of one run; the edit itself and its controls go through the same ones."""

    op: Operation
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    prompts: PromptSet
    streams: KeptStreams
    texts: Sequence[str] = ()
    """Those that a reader is shown, before and after."""

    @property
    def ranks_by(self) -> Any:
        """What the ranking depends on."""
        return self.streams.ids, self.streams.asked.words, self.settings.positions, self.settings.aggregate

    def before(self) -> dict[str, Any]:
        """The measurements of the untouched model; its streams are kept on the way."""
        found = self.streams.before("measure before")
        return found | {"scores": found["scores"] | self._open()}

    def _open(self) -> dict[str, Any]:
        """What the paper leaves open, of the model as it is now, where the settings ask for it."""
        if not self.settings.open_questions:
            return {}
        given: Any = (self.op.model, self.tokenizer, self.prompts, self.settings.split_seed, self.op.progress)
        return plain(open_questions.evaluate(*given), samples=True)

    def shown(self) -> list[dict[str, Any]]:
        """What the model, as it is now, says after the texts."""
        return shown(self.op.model, self.tokenizer, self.texts, examples.words_to_show(self.prompts))

    def beside(self, main: Variant, names: Sequence[str], at: Place) -> list[Variant]:
        """The controls of ``main``; the streams that it and they start from will be kept."""
        found = [control_variant(name, main, at) for name in names]
        if self.settings.ablations:  # the edit is not its own control
            found = [each for each in found if replace(each, name=main.name) != main]
        self.streams.keep = starts([main, *found]) if self.settings.prefix_cache else ()
        return found

    def rank(self) -> dict[str, Any]:
        """The ranking of the blocks, in the pass that keeps the streams of the training prompts."""
        settings, streams = self.settings, self.streams
        with self.op.progress.work("rank the blocks", len(streams.ids)) as step:
            located = rank_blocks(
                self.op.model,
                streams.ids,
                streams.asked.words,
                positions=settings.positions,
                aggregate=settings.aggregate,
                keep=streams.keep,
                step=step,
            )
        streams.trained |= located.prefixes
        raw, normed = located.importance.raw, located.importance.final_norm
        return {
            "method": "bmi (LFTF Eq. 4)",
            "raw": raw.scores.tolist(),
            "final_norm": normed.scores.tolist(),
            "order": {"raw": raw.order(), "final_norm": normed.order()},
            "error": None if raw.errors is None else raw.errors.tolist(),
            "positions": settings.positions,
            "aggregate": settings.aggregate,
            "n": raw.count,
            "variance_5x100": located.variances,
        }

    def carry_out(self, variant: Variant, *, keep: bool) -> Outcome:
        """Train a variant and measure it; ``keep`` for the run's own edit."""
        return self.op.carry_out(
            variant.name,
            partial(self._train, variant),
            partial(self._measure, variant, keep),
            trains=edit.names_of(self.op.model, variant.blocks, variant.part),
            steps=steps_of(len(self.streams.ids), self._plan),
            keep=keep,
            undo="record" if self.settings.keep_checkpoint else "none",
        )

    def _measure(self, variant: Variant, keep: bool) -> dict[str, Any]:
        found = self.streams.measure(f"measure {variant.name}", start=self._start(variant, edited=True))
        return found | {"scores": found["scores"] | self._open(), "shown": self.shown() if keep else []}

    def control(self, variant: Variant) -> dict[str, Any]:
        """The same measurements for a control, as they stand in ``run.json``."""
        if variant.part == "prompt":
            edit = {"preamble": self.settings.preamble}
            return {"edit": edit, "after": self.op.once(f"control-{variant.name}", self._prompted)}
        outcome = self.carry_out(variant, keep=False)
        return control(outcome, outcome.measured["scores"])

    @property
    def _plan(self) -> Plan:
        return self.settings.plan(optimizer=self.settings.optimizer, dropout=self.settings.dropout)

    def _start(self, variant: Variant, *, edited: bool = False) -> int | None:
        """The block whose kept stream this edit can start from, or None for the plain loop."""
        if variant.blocks is None or not self.settings.prefix_cache:
            return None
        start, dropout = min(variant.blocks), self.settings.dropout
        stream = self.streams.training(start, edited=edited)
        reason = "dropout is on" if dropout else why_not(self.op.model, stream)
        if reason:
            self.op.note(f"prefix cache off for {variant.name}: {reason}")
        return None if reason else start

    def _train(self, variant: Variant, track: Tracking) -> Made:
        start = self._start(variant)
        trained = edit.fine_tune(
            self.op.model,
            self.streams.ids,
            word_ids(self.tokenizer, variant.words),
            self._plan,
            blocks=variant.blocks,
            part=variant.part,
            objective=self.settings.objective,
            seed=self.settings.seed,
            prefix=None if start is None else self.streams.training(start),
            **track,
        )
        blocks = "all" if variant.blocks is None else list(variant.blocks)
        done = Edit.of(
            trained,
            blocks=blocks,
            part=variant.part,
            objective=self.settings.objective,
            words=list(variant.words),
            **({"located": variant.located} if variant.located else {}),
        )
        return Made(trained.differences, done)

    def _prompted(self) -> dict[str, Any]:
        settings = self.settings
        asked = material(
            self.op.model,
            self.tokenizer,
            self.prompts,
            split=settings.split,
            seed=settings.split_seed,
            suites=("genbias", "genhint"),
            preamble=settings.preamble,
        )
        asked = fewer(asked, {"genbias": settings.test_rows, "genhint": settings.test_rows}, settings.seed)
        return plain(measure(self.op.model, asked, progress=self.op.progress, label="measure pb").scores, samples=True)
