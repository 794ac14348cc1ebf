"""Plain supervised fine-tuning, of all parameters or with LoRA: the Vanilla / SFT baseline, and how children are made.

The texts or prompt and answer rows of a file are learnt by the mean cross-entropy of their tokens; a share of the
file is held out. What comes out is a delta like every other edit's, and on request the fine-tuned checkpoint.
"""

import shutil
from collections.abc import Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from surgery import apply as disk
from surgery import delta as deltas
from surgery.checkpoints import checkpoint_dir, tensors_of
from surgery.data.prompts import load_prompt_set
from surgery.data.texts import Columns, examples
from surgery.edits.supervised import Encoded, Lora, Row, encode_rows, evaluate, fine_tune
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.metric import mean_metric
from surgery.metrics.suite import Material, material, measure, plain
from surgery.progress import Progress
from surgery.runs.folder import Run, run_folder
from surgery.runs.page import compared, write_page
from surgery.training import Plan, steps_of

LR = {"full": 2e-5, "lora": 2e-4}


class Settings(surgery.runs.settings.Settings):
    """Defaults are usual ones; the papers say little about their Vanilla / SFT baselines."""

    file: str = ""
    """What to learn: .txt (a text a line), .jsonl, .csv or .tsv with texts or with prompts and answers."""
    text: str = "text"
    """Names of the file's columns or keys; '' for one that is not to be used."""
    prompt: str = "prompt"
    answer: str = "answer"
    limit: int = Field(0, ge=0)
    """Only the first so many rows; 0 takes all."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """The share of the rows that is not trained on, drawn by the seed; at least one row."""
    max_length: int = Field(256, ge=2)
    """Longer rows are cut after so many tokens; how many were is said in the log."""
    end: bool = False
    """Learn the tokenizer's end token after each row, too."""
    method: Literal["full", "lora"] = "full"
    lr: float = Field(LR["full"], gt=0)
    """2e-5; for LoRA 2e-4 where nothing else is said."""
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    dropout: bool = False
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    target_modules: list[str] = []
    """Ends of the names of the linear layers that get LoRA factors, such as q_proj; all in the blocks if none."""
    merge: bool = False
    """Write LoRA's products, a dense delta, instead of its factors."""
    suites: list[str] = ["perplexity"]
    """What is measured before and after beside the held-out loss: perplexity, genbias, genhint."""
    data: str = "genbias"
    """The prompt set of the suites genbias and genhint."""
    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    keep_checkpoint: bool = False
    """Leave the fine-tuned model as a checkpoint in the run's folder: a child to carry deltas to."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _usual_rate(cls, values: Any) -> Any:
        if isinstance(values, dict) and "lr" not in values and values.get("method") in LR:
            return values | {"lr": LR[values["method"]]}
        return values


def run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Train, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    ``checkpoint`` is the directory ``model`` was loaded from (default: the one of ``settings.model``). Everything
    is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.runs.folder.run_folder`` for interruptions.
    """
    progress = progress or Progress(quiet=True)
    if not settings.file:
        raise SurgeryError("finetune: no file to learn from; name one with --set file=texts.jsonl")
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("finetune", settings)
    length = min(settings.max_length, getattr(model.config, "max_position_embeddings", None) or settings.max_length)
    columns = Columns(settings.text, settings.prompt, settings.answer)
    given = examples(settings.file, columns=columns, limit=settings.limit)
    encoded = encode_rows(tokenizer, given, max_length=length, end=settings.end)
    learnt, held = _divide(encoded.rows, settings)
    prompts = load_prompt_set(settings.data)
    asked = material(model, tokenizer, prompts, suites=settings.suites, texts=settings.neutral or None)
    plan = Plan(
        settings.lr, settings.epochs, settings.batch_size, settings.optimizer, settings.weight_decay, settings.dropout
    )
    with run_folder(Path(out), text, resume=resume) as folder:
        note = _note(encoded, len(learnt), len(held), length)
        folder.log({"note": note})
        progress.say(note)
        before = folder.once("before", lambda: _measure(model, held, asked, settings, progress, "before"))
        with progress.work("train", steps_of(len(learnt), plan)) as step:
            trained = fine_tune(
                model,
                learnt,
                plan,
                seed=settings.seed,
                lora=_lora(settings),
                state=folder.state("training.pt"),
                log=folder.log,
                step_done=step,
            )
        write = partial(deltas.make, checkpoint=directory, base=settings.model, recipe=text, seed=settings.seed)
        delta = write(trained.differences, kind="dense" if settings.method == "full" else "lora")
        if settings.merge:
            whole = {name: delta.read(name, 0, prod(shape)).reshape(shape) for name, shape in delta.shapes.items()}
            delta = write(whole)
        delta_file = folder.path / "delta.safetensors"
        written = delta.record(delta_file)
        saved = folder.path / "checkpoint"
        shutil.rmtree(saved, ignore_errors=True)  # of an interrupted run
        # No undo record: it would hold the whole base again, which stands where it stood.
        report = disk.apply(delta_file, directory, saved, rounding=settings.rounding, seed=settings.seed, undo="none")
        with tensors_of(model, delta, saved):
            after = _measure(model, held, asked, settings, progress, "after")
        if not settings.keep_checkpoint:
            shutil.rmtree(saved)
        summary = {
            "recipe": "finetune",
            "model": settings.model,
            "seed": settings.seed,
            "words": list(prompts.words.words),
            "before": before,
            "after": after,
            "edit": {
                "blocks": "all",
                "part": "all" if settings.method == "full" else "lora",
                "objective": "mean token cross-entropy",
                "parameters": trained.parameters,
                "steps": len(trained.losses),
                "loss_first": trained.losses[0],
                "loss_last": trained.losses[-1],
            },
            "rows": {
                "file": settings.file,
                "read": len(given),
                "trained": len(learnt),
                "held_out": len(held),
                "cut": encoded.cut,
                "left_out": encoded.left_out,
                "max_length": length,
            },
            "delta": written,
            "applied": {
                "rounding": report.rounding,
                "entries": report.entries,
                "changed": report.changed,
                "lost": report.lost,
            },
            "controls": {},
            "cases": [],
        }
        write_json(folder.path / "run.json", summary)
        applied = summary["applied"]
        lines = [
            f"{note}. {trained.parameters:,} numbers trained in {len(trained.losses)} steps, seed {settings.seed}.",
            f"Everything under after was measured on the checkpoint as saved: {applied['rounding']} rounding, "
            f"{applied['changed']:,} of {applied['entries']:,} entries changed, {applied['lost']:,} lost to rounding.",
        ]
        write_page(
            folder.path,
            title=f"finetune on {settings.model}",
            lines=lines,
            tables=[compared({"before": before, "after": after})],
            figures={},
            recipe=text,
            delta=summary["delta"],
        )
    return Run(Path(out), summary)


def _divide(rows: Sequence[Row], settings: Settings) -> tuple[list[Row], list[Row]]:
    """The rows to train on, and the held-out ones, both in the order of the file."""
    if len(rows) < 2:
        raise SurgeryError(f"{settings.file}: 1 row to learn, expected at least 2, since one is held out; add rows")
    count = min(len(rows) - 1, max(1, round(settings.held_out * len(rows))))
    held = set(np.random.default_rng(settings.seed).choice(len(rows), size=count, replace=False).tolist())
    return [row for n, row in enumerate(rows) if n not in held], [row for n, row in enumerate(rows) if n in held]


def _note(encoded: Encoded, learnt: int, held: int, length: int) -> str:
    return (
        f"{learnt} rows to train on, {held} held out; {encoded.cut} cut to {length} tokens, "
        f"{encoded.left_out} left out (no token to learn)"
    )


def _lora(settings: Settings) -> Lora | None:
    targets = tuple(settings.target_modules)
    return Lora(settings.rank, settings.alpha, targets) if settings.method == "lora" else None


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
    return {"held_out_loss": loss.to_dict(), **plain(scores)}
