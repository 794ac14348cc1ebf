"""The steps of a classifier's run: a new classifier on the encoder, each method, the files put back."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.crawd_classifier.settings import WEIGHTS, Settings
from surgery.data import hate
from surgery.data.rows import sample
from surgery.edits.classifier import Examples, Method, fit, open_classifier, predict
from surgery.errors import SurgeryError
from surgery.metrics import groups
from surgery.metrics.metric import mean_metric
from surgery.metrics.suite import plain
from surgery.operation import Edit, Made, Operation, Outcome, Run, Tracking, Where, control, operation
from surgery.runs import summary
from surgery.runs.report import compared, write_page
from surgery.training import Plan, steps_of


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of a classifier's run: also the method, and how many rows were trained and measured."""

    method: str
    rows: Mapping[str, int]
    pareto: tuple[str, ...] = ("tpr_gap.mean", "accuracy")


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Put a new classifier on the encoder, train it by each method, write deltas, measure the files put back onto it.

    ``model`` gives the device alone and stays as it was; the encoder is read from ``checkpoint``, the directory that
    ``model`` was loaded from (default: the one of ``settings.model``). Raises ``SurgeryError``.
    """
    given = _read(tokenizer, settings)
    methods = {settings.method: _method(settings), **{name: _control(name, settings) for name in settings.controls}}
    with operation("crawd_classifier", model, settings, **where) as op:
        op.note(given.note)
        classifier = open_classifier(op.directory, 2, seed=settings.seed, device=model.device)
        base = op.folder.path / "base"
        if not (base / "config.json").is_file():
            shutil.rmtree(base, ignore_errors=True)  # half written
            classifier.save_pretrained(base)
            tokenizer.save_pretrained(base)
        work = _Work(replace(op, model=classifier, directory=base), tokenizer, settings, given)
        before = op.once("before", work.measure)
        found = {name: work.carry_out(name, method) for name, method in methods.items()}
        main = found.pop(settings.method)
        summary = Summary(
            **op.about(main),
            method=settings.method,
            before=before,
            after=main.measured,
            rows=given.counts,
            controls={name: control(one, one.measured, delta=one.delta) for name, one in found.items()},
            verdict=_verdict(given, settings.method, {settings.method: main, **found}),
        )
        return op.finish(summary, _report)


def _verdict(given: "Given", method: str, found: Mapping[str, Outcome]) -> list[str]:
    edit = found[method].edit
    return [
        f"{given.note}.",
        f"{method}: {edit.parameters:,} numbers trained in {edit.steps} steps, loss {edit.loss_first:.3f} to "
        f"{edit.loss_last:.3f}. Measured on the saved delta put back onto base/, the encoder with a new classifier.",
        *(
            f"{name}: accuracy {one.measured['accuracy']['value']:.3f}, TPR gap over groups: mean "
            f"{one.measured['tpr_gap']['mean']['value']:.3f}, largest {one.measured['tpr_gap']['max']['value']:.3f}."
            for name, one in found.items()
        ),
    ]


def _report(folder: Path, summary: dict[str, Any], recipe: str) -> None:
    columns = {summary["method"]: summary["after"]} | {n: c["after"] for n, c in summary["controls"].items()}
    write_page(
        folder,
        summary,
        recipe,
        lines=summary["verdict"],
        tables=[compared(columns, caption="The method and its controls")],
        figures={},
    )


@dataclass(frozen=True)
class Given:
    """The training rows, the measured rows of each source, and how many there are."""

    train: Examples
    tests: dict[str, Examples]
    names: dict[str, str]
    counts: dict[str, int]
    note: str


def _read(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Given:
    settings.check()
    readers: dict[str, Any] = {"hatecheck": hate.hatecheck, "davidson": partial(hate.davidson, binary=True)}
    sources = list(readers) if settings.source == "both" else [settings.source]
    train: list[hate.Labelled] = []
    for source in sources:
        rows = readers[source](settings.data, "train", settings.seed)
        train += sample(rows, settings.train_rows, settings.seed, lambda row: (row.label, row.group))
    # HateCheck is always measured: it alone says whom a text is about.
    tests = {
        name: readers[name](settings.data, settings.part, settings.seed)
        for name in {"hatecheck": 0, **dict.fromkeys(sources)}
    }
    known = sorted({row.group for row in [*train, *tests["hatecheck"]]} - {""})
    encoded = {name: _encode(tokenizer, rows, known, settings) for name, rows in tests.items()}
    counts = {"trained": len(train), **{f"{name}_{settings.part}": len(rows) for name, rows in tests.items()}}
    names = {name: f"{name}, {settings.part} part of seed {settings.seed}" for name in tests}
    note = f"{len(train)} rows of {' and '.join(sources)} to train on; " + ", ".join(
        f"{len(rows)} of {name} to measure" for name, rows in tests.items()
    )
    return Given(_encode(tokenizer, train, known, settings), encoded, names, counts, note)


def _encode(
    tokenizer: PreTrainedTokenizerBase, rows: list[hate.Labelled], known: list[str], settings: Settings
) -> Examples:
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=settings.max_length)["input_ids"]
    groups = tuple(known.index(row.group) if row.group else -1 for row in rows)
    return Examples(tuple(map(tuple, ids)), tuple(row.label for row in rows), groups)


def _method(settings: Settings) -> Method:
    keys = ("top_percent", "decay", "scope", "heads", "renormalise")
    module: dict[str, Any] = {key: getattr(settings, key) for key in keys}
    module |= {"ffn": settings.ffn or None, "dropout": settings.module_dropout}
    return Method(settings.method, tuple(settings.reference), settings.weight, module)


def _control(name: str, settings: Settings) -> Method:
    if name not in WEIGHTS or name == settings.method:
        known = ", ".join(method for method in WEIGHTS if method != settings.method)
        raise SurgeryError(f"controls: got {name!r}, expected some of {known} (the method itself is measured anyway)")
    return _method(settings.model_copy(update={"method": name, "weight": WEIGHTS[name]}))


@dataclass(frozen=True)
class _Work:
    """The steps that every method of one run goes through, on the classifier before training."""

    op: Operation
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    given: Given

    def carry_out(self, name: str, method: Method) -> Outcome:
        """Train by ``method``, write its delta, measure the file on the base."""
        return self.op.carry_out(
            name,
            partial(self._train, method),
            self.measure,
            trains=[name for name, _ in self.op.model.named_parameters()],
            steps=steps_of(len(self.given.train.ids), self._plan),
            keep=name == self.settings.method,
        )

    @property
    def _plan(self) -> Plan:
        return self.settings.plan(optimizer=self.settings.optimizer, dropout=self.settings.module_dropout > 0)

    def _train(self, method: Method, track: Tracking) -> Made:
        log = track["log"]
        track["log"] = lambda row: log({"method": method.name, **row})
        seed = self.settings.seed
        fitted = fit(self.op.model, self.tokenizer, self.given.train, method, self._plan, seed=seed, **track)
        objective = "cross-entropy of the class" + (f" + {method.name}'s term" if method.weight else "")
        edit = Edit.of(fitted, blocks="all", part="all", objective=objective, weight=method.weight)
        kind = "dense" if fitted.module is None else "module"
        return Made(fitted.differences, edit, kind, fitted.module)

    def measure(self) -> dict[str, Any]:
        """Accuracy on each source; on HateCheck the TPR gaps of the hateful class between the target groups."""
        found: dict[str, Any] = {}
        for name, rows in self.given.tests.items():
            guessed = predict(self.op.model, rows.ids).argmax(1).tolist()
            if name == "hatecheck":
                about = [str(group) if group >= 0 else "" for group in rows.groups]
                found |= groups.score(guessed, rows.labels, about, data=self.given.names[name], positive=[1])
            else:
                right = torch.tensor(guessed) == torch.tensor(rows.labels)
                found[f"accuracy_{name}"] = mean_metric(
                    right.double().numpy(),
                    scorer="accuracy",
                    data=self.given.names[name],
                    ideal=1.0,
                    direction="higher",
                )
        return plain(found, samples=True)
