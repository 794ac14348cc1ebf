"""BiasUnlearn: forget stereotypes, learn anti-stereotypes, keep everything else, and stop where neither is preferred.

LoRA factors train on chunks of StereoSet's test split (the training source); a development set with other target
terms, cut from that source, decides swaps, the stop and the kept checkpoint; StereoSet's dev file is the test.
"""

import shutil
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from recipes.bias_unlearn.measuring import measure, skipped_rows, watched_scores
from recipes.bias_unlearn.report import picture, tables, verdict
from surgery import apply as disk
from surgery import delta as deltas
from surgery.checkpoints import checkpoint_dir, tensors_of
from surgery.data.stereoset import Kind
from surgery.delta import Delta
from surgery.edits.supervised import Lora
from surgery.edits.unlearning import (
    RELEASED_TARGETS,
    BatchSampler,
    Dataset,
    EarlyStopping,
    Objective,
    Unlearned,
    encode_triples,
    read_dataset,
    reference,
    unlearn,
)
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.suite import check_suites
from surgery.progress import Progress
from surgery.runs.folder import Folder, Run, run_folder
from surgery.runs.page import write_page
from surgery.training import Plan

TRAIN, TEST = "stereoset/stereoset_train_union.jsonl", "stereoset/stereoset_dev.jsonl"
OBJECTIVES = {
    "bias_unlearn": "forget stereotypes (NPO), retain anti-stereotypes, keep unrelated sentences (KL), Eq. 4",
    "cda": "cross-entropy of anti-stereotypes",
    "sft": "cross-entropy of stereotypes and anti-stereotypes alike",
    "dpo": "DPO of anti-stereotypes over stereotypes",
    "ga": "gradient ascent on stereotypes",
    "self_debias": "Self-Debias (Schick et al. 2021): no edit, the next-token distribution is changed",
}

# What a variant, a profile or a method changes where nothing else is said; later ones win.
CHANGES: dict[tuple[str, str], dict[str, Any]] = {
    ("variant", "released"): {
        "weight_forget": 0.5,
        "weight_retain": 0.3,
        "weight_kl": 0.2,
        "retain_by": "token",
        "lr": 4e-5,
        "dev_rows": 100,
        "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
    },
    # Chosen on the development sets of SmolLM2-135M among 14 settings; docs/recipes/bias_unlearn.md has them.
    ("profile", "small"): {"lr": 2e-4, "steps": 250, "weight_forget": 0.05, "dev_rows": 1000},
    # For two cores and the demo model. So few steps need a high rate, at which the paper's weights (beta 0.1, forget
    # 0.4) make every sentence unlikely: NPO's gradient then fades only once a stereotype is e^10 times less likely.
    ("profile", "quick"): {
        "lr": 1e-3,
        "steps": 40,
        "beta": 1.0,
        "weight_forget": 0.1,
        "retain_batch": 12,
        "balance": "types",
        "evaluate_every": 8,
        "dev_rows": 40,
        "limit": 400,
    },
    # Fine-tuning on anti-stereotypes; on both sides alike; preferring one to the other: no other part of Eq. 4 unless
    # weight_kl asks for it.
    ("method", "cda"): {"swap": False, "retain_by": "token", "weight_kl": 0.0},
    ("method", "sft"): {"swap": False, "retain_by": "token", "weight_kl": 0.0},
    ("method", "dpo"): {"swap": False, "weight_kl": 0.0},
    ("method", "ga"): {"swap": False, "weight_forget": 1.0, "weight_retain": 0.0, "weight_kl": 0.0, "adversarial": 0.0},
}


class Settings(surgery.runs.settings.Settings):
    """Defaults are the paper's (appendix A.2) where it says one."""

    data: str = ""
    """Directory of data sets, with stereoset/stereoset_train_union.jsonl and stereoset/stereoset_dev.jsonl in it."""
    train: str = ""
    """Another training source, and another test file; any form that surgery.data.stereoset reads."""
    test: str = ""
    kind: Kind = "intrasentence"
    """Which rows of the test file: intrasentence (what bias-bench and the paper score), intersentence or all."""
    profile: Literal["paper", "small", "quick"] = "paper"
    """small: for models of about 0.1 billion parameters; quick: fewer steps and rows, for two CPU cores."""
    method: Literal["bias_unlearn", "cda", "sft", "dpo", "ga", "self_debias"] = "bias_unlearn"
    """Or a baseline: CDA (anti-stereotypes only), SFT (both sides), DPO, gradient ascent, Self-Debias (no edit)."""
    variant: Literal["paper", "released"] = "paper"
    """released: as the authors' code: one sigmoid a batch, one type after another, selection on the test file."""
    forget_batch: int = Field(4, ge=1)
    retain_batch: int = Field(28, ge=1)
    unrelated_batch: int = Field(4, ge=1)
    """Unrelated sentences of a chunk, for the KL divergence; the paper gives no number."""
    beta: float = Field(0.1, gt=0)
    weight_forget: float = Field(0.4, ge=0)
    weight_retain: float = Field(0.4, ge=0)
    weight_kl: float = Field(0.2, ge=0)
    """Eq. 4; 0 leaves a part out (Table 5)."""
    retain_by: Literal["sentence", "token"] = "sentence"
    """Eq. 2's cross-entropy summed over a sentence, as NPO's argument is, or per token, as the released code has it.

    Held per token, every sentence of the development set became less likely by 1 nat a token in ten steps of the demo
    model at 2e-3, stereotypes and others alike, and LMS fell by 4 to 10 points; summed, LMS stayed.
    """
    kl_direction: Literal["forward", "reverse"] = "forward"
    """KL(reference || model); reverse is Eq. 3 as printed."""
    adversarial: float = Field(0.25, ge=0, le=1)
    """The share of anti-stereotypes mixed into the forget set; "a small portion" in the paper, 25 % in its code."""
    swap: bool = True
    """Exchange the two sets of a bias type while its score on the development set is below 50."""
    balance: Literal["rows", "types"] = "rows"
    """Draw from all triples alike, as the paper does, or from each bias type equally often."""
    start: Literal["tokenizer", "always", "never"] = "tokenizer"
    """A start token before each training sentence where the tokenizer puts one by itself, always, or never."""
    lr: float = Field(5e-5, gt=0)
    steps: int = Field(1000, ge=1)
    """At most so many chunks."""
    schedule: Literal["constant", "linear"] = "linear"
    warmup: float = Field(0.0, ge=0, lt=1)
    weight_decay: float = Field(0.0, ge=0)
    rank: int = Field(8, ge=1)
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the LoRA factors' input (and the model's own dropout, where it has any); 0 trains without any."""
    target_modules: list[str] = []
    """Ends of the names of the layers that get factors, such as q_proj; every linear layer of the blocks if none."""
    dev_share: float = Field(0.2, gt=0, lt=1)
    """The share of each bias type's target terms that is not trained on."""
    dev_rows: int = Field(50, ge=2)
    """At most so many rows of each bias type are scored while training."""
    evaluate_every: int = Field(25, ge=1)
    threshold: float = Field(2.0, gt=0)
    """Training ends when each type's score on the development set is so near 50 (or one row of that set, if larger)."""
    early_stop: bool = True
    keep: Literal["best", "last"] = "best"
    """Without an early stop: the checkpoint with the highest ICAT on the development set, or the last one."""
    scorer: str = "bias-bench"
    limit: int = Field(0, ge=0)
    """So many rows are measured before and after, drawn by the seed from each set of rows; 0 takes all."""
    suites: list[str] = []
    """What is measured before and after besides: crows_pairs, bbq, capability."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    keep_checkpoint: bool = False
    """Leave the edited model as a checkpoint in the run's folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _changes(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        changed: dict[str, Any] = {}
        for (key, value), more in CHANGES.items():
            if values.get(key) == value:
                changed |= more
        return changed | values


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
    """Unlearn, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    ``checkpoint`` is the directory ``model`` was loaded from (default: the one of ``settings.model``). Everything is
    left in the folder ``out``. Self-Debias trains nothing and leaves no delta. Raises ``SurgeryError``; see
    ``surgery.runs.folder.run_folder`` for interruptions.
    """
    progress = progress or Progress(quiet=True)
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("bias_unlearn", settings)
    given = _read(settings)
    with run_folder(Path(out), text, resume=resume) as folder:
        for note in given.notes:
            folder.log({"note": note})
            progress.say(note)
        wanted: Any = {key: getattr(settings, key) for key in ("scorer", "suites", "limit", "seed")}
        measured = partial(measure, model, tokenizer, given, **wanted, folder=settings.data, progress=progress)
        delta_file, saved = folder.path / "delta.safetensors", folder.path / "checkpoint"

        def trained() -> dict[str, Any]:
            found = _train(model, tokenizer, given, settings, folder, progress)
            about: Any = {"base": settings.model, "recipe": text, "seed": settings.seed}
            delta = deltas.make(found.trained.differences, directory, kind="lora", **about)
            return {"edit": _edit(found, settings), "delta": delta.record(delta_file)}

        def as_saved() -> dict[str, Any]:
            shutil.rmtree(saved, ignore_errors=True)  # of an interrupted run
            # No undo record: it would hold the whole base again, which stands where it stood.
            report = disk.apply(
                delta_file, directory, saved, rounding=settings.rounding, seed=settings.seed, undo="none"
            )
            with tensors_of(model, Delta.load(delta_file), saved):
                scores = measured(when="after")
            if not settings.keep_checkpoint:
                shutil.rmtree(saved)
            keys = ("rounding", "entries", "changed", "lost")
            return scores | {"applied": {key: getattr(report, key) for key in keys}}

        before = folder.once("before", partial(measured, when="before"))
        if settings.method == "self_debias":
            made: dict[str, Any] = {"edit": {"objective": OBJECTIVES[settings.method]}}
            after = folder.once("after", partial(measured, when="after", debiased=True))
        else:
            made = folder.once("trained", trained)
            after = folder.once("after", as_saved)
            made["applied"] = after["applied"]
        summary: dict[str, Any] = {
            "recipe": "bias_unlearn",
            "method": settings.method,
            "variant": settings.variant,
            "model": settings.model,
            "seed": settings.seed,
            "before": before["test"],
            "after": after["test"],
            "dev": {"before": before["dev"], "after": after["dev"]},
            "rows": {key: len(getattr(given, key).rows) for key in ("watched", "held_out", "test")}
            | {"trained": len(given.train), "skipped": given.skipped},
            "controls": {},
            "cases": [],
            **made,
        }
        summary["verdict"] = verdict(summary)
        write_json(folder.path / "run.json", summary)
        steps = made["edit"].get("evaluations")
        write_page(
            folder.path,
            title=f"{settings.method} on {settings.model}",
            lines=[*summary["verdict"], *given.notes, *skipped_rows(before)],
            tables=tables(summary),
            figures={"steps": picture(steps, made["edit"]["kept_step"])} if steps else {},
            recipe=text,
            delta=made.get("delta"),
        )
    return Run(Path(out), summary)


def _read(settings: Settings) -> Dataset:
    files = {
        key: chosen or (f"{settings.data}/{usual}" if settings.data else "")
        for key, chosen, usual in (("train", settings.train, TRAIN), ("test", settings.test, TEST))
    }
    if not all(files.values()):
        raise SurgeryError("bias_unlearn: no data; name the directory with --set data=DIR, or two files: train, test")
    check_suites(settings.suites)
    if settings.suites and not settings.data:
        raise SurgeryError(f"suites: {', '.join(settings.suites)} need a directory of data sets; name it with data=DIR")
    if "stereoset" in settings.suites:
        raise SurgeryError("suites: got stereoset, which is measured in every run, on the test file; leave it out")
    if settings.suites and settings.method == "self_debias":
        raise SurgeryError(
            f"suites: got {', '.join(settings.suites)}; under Self-Debias StereoSet alone is scored; leave them out"
        )
    return read_dataset(
        files["train"],
        files["test"],
        share=settings.dev_share,
        watched=settings.dev_rows,
        seed=settings.seed,
        kind=settings.kind,
        limit=settings.limit,
        released=settings.variant == "released",
    )


def _train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Dataset,
    settings: Settings,
    folder: Folder,
    progress: Progress,
) -> Unlearned:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    coded = encode_triples(tokenizer, given.train, max_length=longest, start=settings.start)
    if coded.skipped:
        note = f"{len(coded.skipped)} training triples left out: {'; '.join(coded.skipped[:3])}"
        folder.log({"note": note})
        progress.say(note)
    sizes, weights = _parts(settings)
    released = settings.variant == "released"
    chunks = BatchSampler(
        types=tuple(given.train[number].bias_type for number in coded.kept),
        sizes=sizes,
        seed=settings.seed,
        adversarial=settings.adversarial,
        in_order=released,
        balance=settings.balance,
    )
    forget = "ascent" if settings.method == "ga" else "npo_batch" if released else "npo"
    control = EarlyStopping(
        every=settings.evaluate_every,
        rows=dict(sorted(Counter(row.bias_type for row in given.watched.rows).items())),
        threshold=settings.threshold,
        swap=settings.swap,
        early_stop=settings.early_stop,
        focus=released and settings.swap,
        targets=RELEASED_TARGETS if released else {},
        keep=settings.keep,
    )
    sentences, unrelated = chunks.referenced(settings.steps, focus=control.focus)
    with progress.work("reference", len(sentences) + len(unrelated)) as step:
        kept = reference(model, coded.rows, sentences, unrelated, step=step)
    plan = Plan(
        settings.lr,
        epochs=1,
        batch_size=chunks.size,
        optimizer="adamw",
        weight_decay=settings.weight_decay,
        dropout=settings.dropout > 0,
        schedule=settings.schedule,
        warmup=settings.warmup,
        shuffle=False,
    )

    with progress.work("unlearn", settings.steps) as step:
        return unlearn(
            model,
            coded.rows,
            chunks,
            kept,
            Objective(weights, forget, settings.beta, settings.kl_direction, settings.retain_by),
            control,
            plan,
            steps=settings.steps,
            lora=Lora(settings.rank, settings.alpha, tuple(settings.target_modules), settings.dropout),
            evaluate=partial(watched_scores, model, tokenizer, given, settings.scorer, progress),
            state=folder.state("unlearn"),
            log=folder.log,
            step_done=step,
        )


def _parts(settings: Settings) -> tuple[dict[str, int], dict[str, float]]:
    """How many places of a chunk each role has, and its weight."""
    both = settings.forget_batch + settings.retain_batch
    alone = {"cda": ("retain", both), "sft": ("both", both), "dpo": ("prefer", both // 2)}  # a pair is two sentences
    weights = {"forget": settings.weight_forget, "retain": settings.weight_retain}
    sizes = {"forget": settings.forget_batch, "retain": settings.retain_batch}
    if settings.method in alone:
        role, size = alone[settings.method]
        weights, sizes = {role: 1.0}, {role: max(1, size)}
    weights["unrelated"], sizes["unrelated"] = settings.weight_kl, settings.unrelated_batch
    chosen = {role: size for role, size in sizes.items() if weights[role]}
    if not chosen:
        raise SurgeryError("weight_forget, weight_retain, weight_kl: got 0 for all, expected at least one above 0")
    return chosen, weights


def _edit(found: Unlearned, settings: Settings) -> dict[str, Any]:
    return {
        "blocks": "all",
        "part": "lora",
        "objective": OBJECTIVES[settings.method],
        "chunk": _parts(settings)[0],
        "triples": found.triples,
        "parameters": found.trained.parameters,
        "steps": len(found.trained.losses),
        "kept_step": found.kept_step,
        "stopped": found.stopped,
        "loss_first": found.trained.losses[0],
        "loss_last": found.trained.losses[-1],
        "evaluations": [{"step": step} | scores for step, scores in sorted(found.evaluations.items())],
    }
