"""The steps of an unlearning: read and divide StereoSet, train until neither side is preferred, measure."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.bias_unlearn.folds import cross_validate, parts_of, steering, unseen
from recipes.bias_unlearn.measuring import measure, watched_scores
from recipes.bias_unlearn.report import verdict, write_report
from recipes.bias_unlearn.settings import Settings
from recipes.bias_unlearn.training import OBJECTIVES, offsets_of, parts, train
from surgery.edits.unlearning import Dataset, Scores, read_dataset, trained_names
from surgery.operation import Edit, Operation, Outcome, Run, Where, control, operation
from surgery.runs import summary
from surgery.runs.summary import OwnPart

TRAIN, TEST = "stereoset/stereoset_train_union.jsonl", "stereoset/stereoset_dev.jsonl"


NO_PUSH = "no_push"
TOLD = ("stereoset.ss.overall", "stereoset.lms.overall", "stereoset.margin.overall", "perplexity")


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of an unlearning run: also the scores of the development set, and how many rows there were."""

    method: str
    variant: str
    dev: Mapping[str, Any]
    rows: Mapping[str, Any]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Unlearn, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    Everything is left in the folder ``out``. Self-Debias trains nothing and leaves no delta. Raises ``SurgeryError``;
    see ``surgery.operation`` for interruptions.
    """
    settings.check()
    given = _read(settings)
    parts(settings)
    offsets_of(settings, [row.bias_type for row in given.train])
    if settings.steer == "folds":
        parts_of(given.train, settings)
    trains = trained_names(model, settings.target_modules)
    with operation("bias_unlearn", model, settings, **where) as op:
        for note in given.notes:
            op.note(note)
        wanted: Any = {key: getattr(settings, key) for key in ("scorer", "suites", "seed")}
        wanted |= {"limit": settings.test_rows}
        measured = partial(measure, model, tokenizer, given, **wanted, folder=settings.data, progress=op.progress)
        before = op.once("before", partial(measured, when="before"), of=(given, wanted, settings.data))
        if settings.method == "self_debias":
            after = op.once("after", partial(measured, when="after", debiased=True))
            main = Outcome(Edit(objective=OBJECTIVES[settings.method]), after)
        else:
            watched = partial(watched_scores, op.model, tokenizer, given, settings.scorer, op.progress)
            evaluate: Callable[[int], Scores] = lambda _: watched()  # noqa: E731
            if settings.steer == "folds":
                tables = cross_validate(op, tokenizer, given, settings)
                evaluate = steering(tables).__getitem__
            main = op.carry_out(
                "bias_unlearn",
                partial(train, op, tokenizer, given, settings, evaluate),
                partial(measured, when="after"),
                trains=trains,
                steps=settings.steps,
            )
        after, others = main.measured, {}
        if NO_PUSH in settings.controls and (off := _without_push(op, settings)):
            pushless = partial(train, op, tokenizer, given, off, replayed(main.edit, evaluate))
            again: Any = {"trains": trains, "steps": settings.steps, "keep": False}
            others[NO_PUSH] = op.carry_out(NO_PUSH, pushless, partial(measured, when=f"control {NO_PUSH}"), **again)
        if settings.steer == "folds":
            kept = main.edit.details["kept_step"]
            before, after = before | {"dev": unseen(tables[0])}, after | {"dev": unseen(tables[kept])}
        summary = Summary(
            **op.about(main),
            method=settings.method,
            variant=settings.variant,
            before=before["test"],
            after=after["test"],
            controls={name: control(one, one.measured["test"]) for name, one in others.items()},
            own_part=OwnPart("the push (NPO, preference)", NO_PUSH, TOLD) if others else None,
            dev={"before": before["dev"], "after": after["dev"]},
            rows={key: len(getattr(given, key).rows) for key in ("watched", "held_out", "test")}
            | {"trained": len(given.train), "skipped": given.skipped},
        )
        summary = replace(summary, verdict=verdict(summary.to_dict()))
        return op.finish(summary, partial(write_report, given.notes, before))


def _without_push(op: Operation, settings: Settings) -> Settings | None:
    """The control's settings: retention and divergence alone; None, which is said, where neither has a weight."""
    if not (settings.weight_retain or settings.weight_kl):
        op.note("No control: without the push (NPO, preference) nothing trains, which is the model before.")
        return None
    return settings.model_copy(update={"weight_forget": 0.0, "weight_prefer": 0.0, "gradient_ratio": 0.0})


def replayed(edit: Edit, evaluate: Callable[[int], Scores]) -> Callable[[int], Scores]:
    """The scores that steered ``edit``, so that another training swaps, stops and keeps a step where it did."""
    found = {row["step"]: {key: row[key] for key in row if key != "step"} for row in edit.details["evaluations"]}
    kept = found[edit.details["kept_step"]]
    return lambda step: found.get(step, kept) if step else evaluate(0)


def _read(settings: Settings) -> Dataset:
    files = {
        key: chosen or (f"{settings.data}/{usual}" if settings.data else "")
        for key, chosen, usual in (("train", settings.train, TRAIN), ("test", settings.test, TEST))
    }
    return read_dataset(
        files["train"],
        files["test"],
        share=settings.dev_share,
        watched=settings.dev_rows,
        seed=settings.seed,
        kind=settings.kind,
        limit=settings.test_rows,
        released=settings.variant == "released",
        folds=settings.steer == "folds",
    )
