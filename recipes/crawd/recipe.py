"""The steps of a CrAWD run: the method and its baselines on the same texts, measured as saved."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Unpack

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.crawd.measuring import Judge
from recipes.crawd.report import cases, verdict, write_report
from recipes.crawd.settings import OFF, OWN_CONTROLS, WEIGHTS, Settings
from recipes.crawd.texts import read
from surgery.edits.debiased_methods import OBJECTIVES, Method, factors_of
from surgery.edits.debiased_tuning import Tuned, check, trained_names, tune, with_projection
from surgery.edits.four_bit import four_bit
from surgery.edits.supervised import Lora
from surgery.errors import SurgeryError
from surgery.modules.cross_attention import Weights
from surgery.operation import Edit, Made, Operation, Outcome, OwnPart, Run, Tracking, Where, control, operation
from surgery.runs import summary
from surgery.runs.sharing import untrained
from surgery.training import Plan, steps_of


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of a CrAWD run: also how many texts there were, and each block's attention to the words."""

    method: str
    rows: Mapping[str, Any]
    sensitivity: Mapping[str, Any]
    pareto: list[str]


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Train, write the delta, put the file's contents onto the checkpoint, measure that; ``model`` stays as it was.

    Everything is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.operation`` for interruptions.
    """
    given = read(tokenizer, settings)
    others = [name for name in settings.controls if name not in OFF]
    methods = {settings.method: _method(settings), **{name: _control(name, settings) for name in others}}
    off = _switched_off(settings)
    for method in methods.values():
        check(model, tokenizer, method, seed=settings.seed, bits=4 if settings.four_bit else 16)
    with operation("crawd", model, settings, **where) as op:
        op.note(given.note)
        judge = Judge(model, tokenizer, settings, given, op.progress)
        before = op.once("before", partial(judge.measure, "before"), of=untrained(settings, "method"))
        trained: dict[str, Tuned] = {}
        found = {name: _carry_out(op, judge, name, method, off, trained) for name, method in methods.items()}
        main = found[settings.method]
        without = {name: replace(main, measured=one) for name, one in main.measured["off"].items()}
        beside = {name: one for name, one in found.items() if name != settings.method} | without
        summary = Summary(
            **op.about(main),
            method=settings.method,
            before=before["scores"],
            after=main.measured["scores"],
            rows=given.counts,
            controls={name: control(one, one.measured["scores"]) for name, one in beside.items()},
            cases=cases(before, {name: one.measured for name, one in ({settings.method: main} | beside).items()}),
            sensitivity={"before": before["sensitivity"], "after": main.measured["sensitivity"]},
            pareto=["gas.gas", "held_out_perplexity"] if "gas" in settings.suites else [],
            own_part=_own_part(settings),
        )
        summary = replace(summary, verdict=[given.note + ".", *verdict(summary.to_dict())])
        return op.finish(summary, partial(write_report, model, tokenizer, settings))


def _method(settings: Settings) -> Method:
    keys = ("top_percent", "decay", "scope", "heads", "renormalise")
    module: dict[str, Any] = {key: getattr(settings, key) for key in keys}
    module |= {"ffn": settings.ffn or None, "dropout": settings.lora_dropout}
    lora = Lora(settings.rank, settings.alpha, tuple(settings.target_modules), settings.lora_dropout)
    reference, penalised = tuple(settings.reference), tuple(settings.penalised)
    rate = (settings.module_lr or settings.lr) / settings.lr
    return Method(
        settings.method,
        reference,
        settings.weight,
        penalised,
        lora=lora if settings.lora else None,
        form=settings.form,
        module=module,
        module_rate=rate,
    )


def _control(name: str, settings: Settings) -> Method:
    own = OWN_CONTROLS if settings.method == "crawd" else ()
    if name not in (*WEIGHTS, *own) or name == settings.method:
        known = ", ".join([*(method for method in WEIGHTS if method != settings.method), *own])
        raise SurgeryError(f"controls: got {name!r}, expected some of {known} (the method itself is measured anyway)")
    if name == "lambda_1":
        return _method(settings.model_copy(update={"decay": 1.0}))
    if name == "random_words":
        words, count = settings.random_words, len(settings.reference)
        if len(words) < count or set(words) & set(settings.reference):
            raise SurgeryError(
                f"random_words: got {', '.join(words) or 'none'}; expected at least {count} that are no reference words"
            )
        return _method(settings.model_copy(update={"reference": words[:count]}))
    other: Any = {"method": name, "weight": WEIGHTS[name], "lora": True, "form": "printed"}
    return _method(settings.model_copy(update=other))


def _switched_off(settings: Settings) -> dict[str, str]:
    """{control: the part of the trained module that is off in it}."""
    asked = {name: part for name, part in OFF.items() if name in settings.controls}
    if asked and settings.method != "crawd":
        raise SurgeryError(f"controls: got {next(iter(asked))!r}, but {settings.method} has no module; leave it out")
    if asked and settings.form == "projected":
        raise SurgeryError(
            f"controls: got {next(iter(asked))!r}, but the form projected trains no module; without its projection it "
            "is vanilla: name that"
        )
    return asked


def _own_part(settings: Settings) -> OwnPart | None:
    if settings.method == "vanilla":
        return None
    off = settings.method == "crawd" and settings.form not in (*OFF, "projected")
    part = {"crawd": "the module", "debias_tuning": "the term"}.get(settings.method, settings.method)
    told = ["gas.gas", "gas.male", "gas.female", "held_out_perplexity"]
    return OwnPart(part, "module_off" if off else "vanilla", told)


def _carry_out(
    op: Operation, judge: Judge, name: str, method: Method, off: Mapping[str, str], trained: dict[str, Tuned]
) -> Outcome:
    settings = judge.settings
    main = name == settings.method
    plan = settings.plan(optimizer=settings.optimizer, dropout=settings.lora_dropout > 0)
    return op.carry_out(
        name,
        partial(_train, op, judge, method, plan, trained),
        partial(judge.measure_with, name, off if main else {}),
        trains=trained_names(op.model, method),
        steps=steps_of(len(judge.given.rows), plan),
        keep=main,
    )


def _train(op: Operation, judge: Judge, method: Method, plan: Plan, trained: dict[str, Tuned], track: Tracking) -> Made:
    settings, log = judge.settings, track["log"]
    track["log"] = lambda row: log({"method": method.name, **row})
    projected = method.form == "projected"
    factors = factors_of(method) if projected else method
    tuned = trained.get(factors.name)
    if tuned is None:
        base = four_bit(op.directory, op.model.device) if settings.four_bit else op.model
        tuned = tune(base, judge.tokenizer, judge.given.rows, factors, plan, seed=settings.seed, **track)
    if factors.name == "vanilla":  # which looks for no words, so that all that stand on it have the same factors
        trained["vanilla"] = tuned
    if projected:
        tuned = with_projection(op.model, judge.tokenizer, judge.given.rows, method, tuned)
    objective = OBJECTIVES[factors.name]
    if factors.name == "crawd" and method.weight:
        objective += " + weight * Debias Tuning's term (not in the paper)"
    about: Any = {"weight": method.weight, "reference": list(method.reference)}
    if method.name == "crawd":
        decay = method.module["decay"]
        stored = decay if settings.decay_stored is None else settings.decay_stored
        about |= {"form": method.form, "decay": decay, "decay_stored": stored}
    edit = Edit.of(tuned, blocks="all", part=tuned.kind, objective=objective, **about)
    return Made(tuned.differences, edit, tuned.kind, _stored(tuned, settings))


def _stored(tuned: Tuned, settings: Settings) -> Any:
    """The module as it is stored: with another decay than it was trained with, where the settings say so."""
    if not isinstance(tuned.module, Weights) or settings.decay_stored is None:
        return tuned.module
    return replace(tuned.module, settings={**tuned.module.settings, "decay": settings.decay_stored})
