"""The steps of a plain fine-tuning: read and divide the rows, train, measure as saved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from recipes.finetune.settings import Settings
from surgery.data.prompts import load_prompt_set
from surgery.data.rows import sample
from surgery.data.texts import Columns, examples
from surgery.edits.supervised import Encoded, Lora, Row, encode_rows, evaluate, fine_tune, target_names
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import open_checkpoint
from surgery.metrics.material import Material, material
from surgery.metrics.metric import mean_metric
from surgery.metrics.suite import measure, plain
from surgery.operation import Edit, Made, Operation, Run, Tracking, Where, operation
from surgery.progress import Progress
from surgery.runs import summary
from surgery.runs.report import compared, write_page
from surgery.runs.sharing import untrained
from surgery.training import Plan, steps_of

LR = {"full": 2e-5, "lora": 2e-4}


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of a fine-tuning: also the words of the prompt set, and how many rows were read and learnt."""

    words: Sequence[str]
    rows: dict[str, Any]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Train, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    Everything is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.operation`` for interruptions.
    """
    settings.check()
    length = min(settings.max_length, context_limit(model) or settings.max_length)
    columns = Columns(settings.text, settings.prompt, settings.answer)
    given = sample(examples(settings.file, columns=columns), settings.train_rows, settings.seed)
    encoded = encode_rows(tokenizer, given, max_length=length, end=settings.end)
    learnt, held = _divide(encoded.rows, settings)
    prompts = load_prompt_set(settings.prompt_set)
    asked = material(model, tokenizer, prompts, suites=settings.suites, texts=settings.neutral or None)
    full = settings.method == "full"
    names = [name for name, _ in model.named_parameters()]
    trains = names if full else [f"{name}.weight" for name in target_names(model, settings.target_modules)]
    with operation("finetune", model, settings, **where) as op:
        note = _note(encoded, len(learnt), len(held), length)
        op.note(note)
        look = partial(_measure, model, held, asked, settings, op.progress)
        before = op.once("before", partial(look, "before"), of=untrained(settings, "method"))
        plan = settings.plan(optimizer=settings.optimizer, dropout=settings.dropout or settings.lora_dropout > 0)
        train = partial(_train, op, learnt, plan, settings)
        steps = steps_of(len(learnt), plan)
        main = op.carry_out("training", train, partial(look, "after"), trains=trains, steps=steps)
        rows = {"file": settings.file, "read": len(given), "trained": len(learnt), "held_out": len(held)}
        summary = Summary(
            **op.about(main),
            before=before,
            after=main.measured,
            words=list(prompts.words.words),
            rows=rows | {"cut": encoded.cut, "left_out": encoded.left_out, "max_length": length},
        )
        return op.finish(summary, partial(_report, note))


def _train(op: Operation, learnt: Sequence[Row], plan: Plan, settings: Settings, track: Tracking) -> Made:
    targets = tuple(settings.target_modules)
    lora = Lora(settings.rank, settings.alpha, targets, settings.lora_dropout) if settings.method == "lora" else None
    trained = fine_tune(op.model, learnt, plan, seed=settings.seed, lora=lora, **track)
    edit = Edit.of(trained, blocks="all", part="lora" if lora else "all", objective="mean token cross-entropy")
    made = Made(trained.differences, edit, "lora" if lora else "dense")
    if lora and settings.merge:
        delta = op.delta(made)
        whole = {name: delta.read(name, 0, prod(shape)).reshape(shape) for name, shape in delta.shapes.items()}
        return Made(whole, edit)
    return made if lora else replace(made, differences=_halved(made.differences, op.directory))


def _halved(differences: Mapping[str, Tensor | np.ndarray], base: Path) -> Mapping[str, Tensor | np.ndarray]:
    """Of a 16-bit checkpoint: each difference to the nearest bfloat16, which a delta keeps in two bytes.

    That errs by 1/512 of the difference at most, and the weights' own rounding by up to 1/256 of the weight; what is
    applied and measured is what was written.
    """
    stored = open_checkpoint(base)
    if any(stored.entry(name).dtype == "F32" for name in stored.places):
        return differences
    return {name: torch.as_tensor(value).bfloat16().float() for name, value in differences.items()}


def _report(note: str, folder: Path, summary: dict[str, Any], recipe: str) -> None:
    edit, applied = summary["edit"], summary["applied"]
    lines = [
        f"{note}. {edit['parameters']:,} numbers trained in {edit['steps']} steps, seed {summary['seed']}.",
        f"Everything under after was measured on the checkpoint as saved: {applied['rounding']} rounding, "
        f"{applied['changed']:,} of {applied['entries']:,} entries changed, {applied['lost']:,} lost to rounding.",
    ]
    write_page(
        folder,
        summary,
        recipe,
        lines=lines,
        tables=[compared({"before": summary["before"], "after": summary["after"]})],
        figures={},
    )


def _divide(rows: Sequence[Row], settings: Settings) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and the held-out ones, both in the order of the file; equal rows stand on one side."""
    distinct = list(dict.fromkeys(rows))
    if len(distinct) < 2:
        often = f" ({len(rows)} times)" if len(rows) > 1 else ""
        raise SurgeryError(
            f"{settings.file}: 1 row to learn{often}, expected at least 2, since one is held out; add rows"
        )
    count = min(len(distinct) - 1, max(1, round(settings.held_out * len(distinct))))
    drawn = np.random.default_rng(settings.seed).choice(len(distinct), size=count, replace=False)
    held = {distinct[place] for place in drawn.tolist()}
    return [row for row in rows if row not in held], [row for row in rows if row in held]


def _note(encoded: Encoded, learnt: int, held: int, length: int) -> str:
    return (
        f"{learnt} rows to train on, {held} held out; {encoded.cut} cut to {length} tokens, "
        f"{encoded.left_out} left out (no token to learn)"
    )


def _measure(
    model: PreTrainedModel, held: Sequence[Row], asked: Material, settings: Settings, progress: Progress, when: str
) -> dict[str, Any]:
    with progress.work(f"held-out loss {when}", len(held)) as step:
        loss = mean_metric(
            evaluate(model, held, step),
            scorer="mean over rows of the mean token NLL (nats)",
            data=f"{settings.file}, held-out rows",
            ideal=0.0,
            direction="lower",
        )
    scores = measure(model, asked, progress=progress, label=f"measure {when}").scores
    return {"held_out_loss": loss.to_dict(samples=True), **plain(scores, samples=True)}
