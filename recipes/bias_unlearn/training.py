"""One unlearning: batches of the training triples, losses of the method, early stopping on the watched rows."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from hooks.batching import context_limit
from recipes.bias_unlearn.settings import Settings
from surgery.edits.equalize.dose import read_doses
from surgery.edits.supervised import Lora
from surgery.edits.unlearning import (
    PUSHES,
    RELEASED_TARGETS,
    BatchSampler,
    Dataset,
    EarlyStopping,
    Objective,
    Scores,
    Unlearned,
    encode_triples,
    reference,
    unlearn,
)
from surgery.errors import SurgeryError
from surgery.operation import Edit, Made, Operation
from surgery.training import Plan

LARGEST_FALL = 1.5  # of LMS, by which the selection by SS is bound; the paper's largest is 1.42
LEAST_TERMS = 3  # of the development set: a type with fewer takes no part in that selection
OBJECTIVES = {
    "bias_unlearn": "forget stereotypes (NPO), retain anti-stereotypes, keep unrelated sentences (KL), Eq. 4",
    "cda": "cross-entropy of anti-stereotypes",
    "sft": "cross-entropy of stereotypes and anti-stereotypes alike",
    "stereotypes": "cross-entropy of stereotypes: a task vector to subtract (scale -1)",
    "dpo": "DPO of anti-stereotypes over stereotypes",
    "ga": "gradient ascent on stereotypes",
    "self_debias": "Self-Debias (Schick et al. 2021): no edit, the next-token distribution is changed",
}


def train(
    op: Operation,
    tokenizer: PreTrainedTokenizerBase,
    given: Dataset,
    settings: Settings,
    evaluate: Callable[[int], Scores],
    track: Mapping[str, Any],
) -> Made:
    """Unlearn by the settings' method; the differences are LoRA factors.

    ``evaluate`` gives the scores that steer it, after the step that it is told; ``track`` is of ``Tracking``, its state
    None where an interrupted training begins anew.
    """
    longest = context_limit(op.model) or 2**30
    coded = encode_triples(
        tokenizer, given.train, max_length=longest, start=settings.start, whole=settings.unit == "mean"
    )
    if coded.skipped:
        op.note(f"{len(coded.skipped)} training triples left out: {'; '.join(coded.skipped[:3])}")
    sizes, weights = parts(settings)
    released = settings.variant == "released"
    chunks = BatchSampler(
        types=tuple(given.train[number].bias_type for number in coded.kept),
        sizes=sizes,
        seed=settings.seed,
        adversarial=settings.adversarial,
        in_order=released,
        balance=settings.balance,
    )
    control = _stopping(given, settings, evaluate)
    sentences, unrelated = chunks.referenced(settings.steps, focus=control.focus)
    with op.progress.work("reference", len(sentences) + len(unrelated)) as step:
        kept = reference(op.model, coded.rows, sentences, unrelated, step=step)
    forget = "ascent" if settings.method == "ga" else "npo_batch" if released else "npo"
    offsets = offsets_of(settings, chunks.types)
    objective = objective_of(settings, weights, forget, offsets)
    found = unlearn(
        op.model,
        coded.rows,
        chunks,
        kept,
        objective,
        control,
        _plan(settings, chunks.size),
        steps=settings.steps,
        lora=Lora(settings.rank, settings.alpha, tuple(settings.target_modules), settings.lora_dropout),
        evaluate=evaluate,
        state=track["state"] and track["state"].with_suffix(""),  # a folder, in which the scores stand, too
        log=track["log"],
        step_done=track["step_done"],
    )
    return Made(found.trained.differences, _edit(settings, found, chunks, weights), "lora")


def _edit(settings: Settings, found: Unlearned, chunks: BatchSampler, weights: Mapping[str, float]) -> Edit:
    """What ``run.json`` says of the training."""
    return Edit.of(
        found.trained,
        blocks="all",
        part="lora",
        objective=OBJECTIVES[settings.method],
        chunk=chunks.sizes,
        triples=found.triples,
        kept_step=found.kept_step,
        stopped=found.stopped,
        evaluations=[{"step": step} | scores for step, scores in sorted(found.evaluations.items())],
        weights={role: weights[role] * (found.pushed if role in PUSHES else 1) for role in chunks.sizes},
        passes=chunks.passes(len(found.trained.losses)),
    )


def offsets_of(settings: Settings, types: Sequence[str]) -> list[float]:
    """The offset of each triple, given their bias types; raises ``SurgeryError`` for a type that has none."""
    kinds = sorted(set(types))
    found = read_doses(settings.offset, kinds, key="offset")
    missing = next((kind for kind in kinds if not isinstance(found[kind], float)), None)
    if missing is not None:
        raise SurgeryError(
            f"offset: got {settings.offset} and none for the bias type {missing}; expected a number for each, or one "
            "for the others (gender=0.3,0.1); name it"
        )
    return [float(found[kind] or 0.0) for kind in types]  # type: ignore[arg-type]


def objective_of(settings: Settings, weights: Mapping[str, float], forget: str, offsets: Sequence[float]) -> Objective:
    """The losses by role: DPO is of the summed log-probabilities unless the unit says otherwise."""
    return Objective(
        weights,
        forget,
        settings.beta,
        settings.kl_direction,
        settings.retain_by,
        settings.unit,
        "dpo" if settings.method == "dpo" else "margin",
        offsets,
        settings.gradient_ratio,
    )


def _stopping(given: Dataset, settings: Settings, evaluate: Callable[[int], Scores]) -> EarlyStopping:
    released = settings.variant == "released"
    by_ss = settings.select != "icat"
    terms = {(row.bias_type, row.target) for row in given.watched.rows}
    many = tuple(kind for kind, count in sorted(Counter(kind for kind, _ in terms).items()) if count >= LEAST_TERMS)
    return EarlyStopping(
        every=settings.evaluate_every,
        rows=dict(sorted(Counter(row.bias_type for row in given.watched.rows).items())),
        threshold=settings.threshold,
        swap=settings.swap,
        early_stop=settings.early_stop,
        focus=released and settings.swap,
        targets=RELEASED_TARGETS if released else {},
        keep=settings.keep,
        swap_when=settings.swap_when,
        select=settings.select,
        lms_floor=evaluate(0)["lms"]["overall"] - LARGEST_FALL if by_ss else 0.0,
        counted=many if by_ss else (),
    )


def _plan(settings: Settings, size: int) -> Plan:
    return Plan(
        settings.lr,
        epochs=1,
        batch_size=size,
        optimizer="adamw",
        weight_decay=settings.weight_decay,
        dropout=settings.lora_dropout > 0,
        schedule=settings.schedule,
        warmup=settings.warmup,
        shuffle=False,
    )


def parts(settings: Settings) -> tuple[dict[str, int], dict[str, float]]:
    """How many places of a batch each role has, and its weight; raises ``SurgeryError`` where all weights are 0."""
    both = settings.forget_batch + settings.retain_batch
    alone = {"cda": ("retain", both), "sft": ("both", both), "stereotypes": ("learn", both)}
    alone["dpo"] = ("prefer", both // 2)  # a pair is two sentences
    weights = {"forget": settings.weight_forget, "retain": settings.weight_retain}
    sizes = {"forget": settings.forget_batch, "retain": settings.retain_batch}
    if settings.method in alone:
        role, size = alone[settings.method]
        weights, sizes = {role: 1.0}, {role: max(1, size)}
    weights |= {"prefer": settings.weight_prefer} if settings.method == "bias_unlearn" else {}
    sizes |= {"prefer": settings.prefer_batch} if settings.method == "bias_unlearn" else {}
    weights["unrelated"], sizes["unrelated"] = settings.weight_kl, settings.unrelated_batch
    chosen = {role: size for role, size in sizes.items() if weights[role]}
    pushes, kept = {"forget", "prefer"} & set(chosen), "retain" in chosen
    if settings.gradient_ratio and not (pushes and kept):
        raise SurgeryError(
            f"gradient_ratio: got {settings.gradient_ratio:g} and the terms {', '.join(chosen)}; expected retain and "
            "one of forget, prefer among them; give both a weight, or leave it out"
        )
    if not chosen:
        raise SurgeryError("weight_forget, weight_retain, weight_kl: got 0 for all, expected at least one above 0")
    return chosen, weights
