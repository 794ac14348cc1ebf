"""CrAWD for a classifier of hate speech: accuracy and TPR gaps by target group, plain and adversarial training beside.

HateCheck (and Davidson's tweets) train a new classifier on a pretrained encoder. What comes out is that classifier
before training (``base/``, a plain checkpoint) and the delta that makes it the trained one.
"""

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from surgery import delta as deltas
from surgery.checkpoints import checkpoint_dir
from surgery.data import hate
from surgery.data.rows import sample
from surgery.delta.module import module_delta
from surgery.edits.classifier import WEIGHTS, Examples, Fitted, Method, fit, open_classifier, predict
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics import groups
from surgery.metrics.metric import mean_metric
from surgery.metrics.suite import plain
from surgery.progress import Progress
from surgery.runs.folder import Folder, Run, run_folder
from surgery.runs.page import compared, write_page
from surgery.training import Plan, steps_of


class Settings(surgery.runs.settings.Settings):
    """The paper's decay and module (appendix A.1); the rest are usual values for a BERT, of which it says nothing."""

    data: str = ""
    """Directory of data sets, with toxicity/ in it."""
    source: Literal["hatecheck", "davidson", "both"] = "hatecheck"
    """What is trained on. HateCheck's templates of the test part are not seen in training; Davidson names no group."""
    limit: int = Field(0, ge=0)
    """So many training rows of each source, drawn by the seed, the classes in their proportions; 0 takes all."""
    method: Literal["crawd", "vanilla", "adversarial", "ibm"] = "crawd"
    reference: list[str] = ["woman", "man", "black", "white", "gay", "straight", "Muslim", "Christian", "disabled"]
    """Those of the paper's 21 words that name the groups of HateCheck and their counterparts."""
    top_percent: float = Field(40.0, ge=0, le=100)
    decay: float = Field(0.2, ge=0, le=1)
    scope: Literal["row", "sequence"] = "sequence"
    """What the top K percent are taken of: a classifier reads the whole text before it answers."""
    heads: int = Field(8, ge=1)
    ffn: int = Field(0, ge=0)
    renormalise: bool = False
    weight: float = Field(0.0, ge=0)
    """Of the adversary's reversed gradient, or of IBM's term; 1 where nothing is said. CrAWD has none."""
    lr: float = Field(5e-5, gt=0)
    epochs: int = Field(4, ge=1)
    batch_size: int = Field(32, ge=1)
    max_length: int = Field(64, ge=2)
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = Field(0.01, ge=0)
    dropout: float = Field(0.1, ge=0, lt=1)
    """Inside the module; above 0 the encoder's own dropout is on, too."""
    part: Literal["dev", "test"] = "test"
    controls: list[str] = ["vanilla", "adversarial"]
    dtype: Literal["float32"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        method = values.get("method", "crawd") if isinstance(values, dict) else None
        return {"weight": WEIGHTS[method]} | values if method in WEIGHTS else values


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
    """Put a new classifier on the encoder, train it by each method, write deltas, measure the files put back onto it.

    ``model`` gives the device alone and stays as it was; the encoder is read from ``checkpoint``, the directory that
    ``model`` was loaded from (default: the one of ``settings.model``). Raises ``SurgeryError``.
    """
    progress = progress or Progress(quiet=True)
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("crawd_classifier", settings)
    given = _read(tokenizer, settings)
    methods = {settings.method: _method(settings), **{name: _control(name, settings) for name in settings.controls}}
    with run_folder(Path(out), text, resume=resume) as folder:
        folder.log({"note": given.note})
        progress.say(given.note)
        classifier = open_classifier(directory, 2, seed=settings.seed, device=model.device)
        base = folder.path / "base"
        if not (base / "config.json").is_file():
            shutil.rmtree(base, ignore_errors=True)  # half written
            classifier.save_pretrained(base)
            tokenizer.save_pretrained(base)
        work = _Work(classifier, tokenizer, settings, base, folder, progress, text, given)
        found = {name: work.case(name, method) for name, method in methods.items()}
        main = found.pop(settings.method)
        summary = {
            "recipe": "crawd_classifier",
            "method": settings.method,
            "model": settings.model,
            "seed": settings.seed,
            "before": work.measure(),
            "after": main["scores"],
            "edit": main["edit"],
            "rows": given.counts,
            "delta": main["delta"],
            "controls": {
                name: {"edit": one["edit"], "delta": one["delta"], "after": one["scores"]}
                for name, one in found.items()
            },
            "cases": [],
            "pareto": ["tpr_gap.mean", "accuracy"],
        }
        summary["verdict"] = [
            f"{given.note}.",
            f"{settings.method}: {main['edit']['parameters']:,} numbers trained in {main['edit']['steps']} steps, "
            f"loss {main['edit']['loss_first']:.3f} to {main['edit']['loss_last']:.3f}. "
            "Measured on the saved delta put back onto base/, the encoder with a new classifier.",
            *(
                f"{name}: accuracy {scores['accuracy']['value']:.3f}, TPR gap over groups: mean "
                f"{scores['tpr_gap']['mean']['value']:.3f}, largest {scores['tpr_gap']['max']['value']:.3f}."
                for name, scores in ((settings.method, main["scores"]), *((n, c["scores"]) for n, c in found.items()))
            ),
        ]
        write_json(folder.path / "run.json", summary)
        columns = {settings.method: summary["after"]} | {n: c["after"] for n, c in summary["controls"].items()}
        write_page(
            folder.path,
            title=f"{settings.method} for a classifier on {settings.model}",
            lines=summary["verdict"],
            tables=[compared(columns, caption="The method and its controls")],
            figures={},
            recipe=text,
            delta=summary["delta"],
        )
    return Run(Path(out), summary)


@dataclass(frozen=True)
class Given:
    """The training rows, the measured rows of each source, and how many there are."""

    train: Examples
    tests: dict[str, Examples]
    names: dict[str, str]
    counts: dict[str, int]
    note: str


def _read(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Given:
    if not settings.data:
        raise SurgeryError("crawd_classifier: no data; name the directory of data sets with --set data=DIR")
    readers: dict[str, Any] = {"hatecheck": hate.hatecheck, "davidson": partial(hate.davidson, binary=True)}
    sources = list(readers) if settings.source == "both" else [settings.source]
    train: list[hate.Labelled] = []
    for source in sources:
        rows = readers[source](settings.data, "train", settings.seed)
        train += sample(rows, settings.limit, settings.seed, lambda row: (row.label, row.group))
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
    keys = ("top_percent", "decay", "scope", "heads", "renormalise", "dropout")
    module = {key: getattr(settings, key) for key in keys} | {"ffn": settings.ffn or None}
    return Method(settings.method, tuple(settings.reference), settings.weight, module)


def _control(name: str, settings: Settings) -> Method:
    if name not in WEIGHTS or name == settings.method:
        known = ", ".join(method for method in WEIGHTS if method != settings.method)
        raise SurgeryError(f"controls: got {name!r}, expected some of {known} (the method itself is measured anyway)")
    return _method(settings.model_copy(update={"method": name, "weight": WEIGHTS[name]}))


@dataclass(frozen=True)
class _Work:
    """What every method of one run shares."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    base: Path
    folder: Folder
    progress: Progress
    recipe: str
    given: Given

    def case(self, name: str, method: Method) -> dict[str, Any]:
        """Train by ``method``, write its delta, measure the file on the base; taken up where it was left."""
        main = name == self.settings.method
        # A control's delta is gone from the finished run.
        file = self.folder.path / "delta.safetensors" if main else self.folder.state(f"{name}.safetensors")
        made = self.folder.once(f"train-{name}", partial(self._train, name, method, file))
        return made | self.folder.once(f"after-{name}", partial(self._as_saved, file))

    def _train(self, name: str, method: Method, file: Path) -> dict[str, Any]:
        settings = self.settings
        plan = Plan(
            settings.lr,
            settings.epochs,
            settings.batch_size,
            settings.optimizer,
            settings.weight_decay,
            dropout=settings.dropout > 0,
            schedule="linear",
            warmup=0.1,
        )
        with self.progress.work(f"train {name}", steps_of(len(self.given.train.ids), plan)) as step:
            fitted = fit(
                self.model,
                self.tokenizer,
                self.given.train,
                method,
                plan,
                seed=settings.seed,
                state=self.folder.state(f"{name}.pt"),
                log=lambda row: self.folder.log({"method": name, **row}),
                step_done=step,
            )
        delta = self._delta(fitted)
        written = delta.record(file)
        return {
            "edit": {
                "blocks": "all",
                "part": "all",
                "objective": "cross-entropy of the class" + (f" + {name}'s term" if method.weight else ""),
                "weight": method.weight,
                "parameters": fitted.parameters,
                "steps": len(fitted.losses),
                "loss_first": fitted.losses[0],
                "loss_last": fitted.losses[-1],
            },
            "delta": written,
        }

    def _delta(self, fitted: Fitted) -> deltas.Delta:
        about: Any = {"base": self.settings.model, "recipe": self.recipe, "seed": self.settings.seed}
        if fitted.module is not None:
            return module_delta(fitted.module, self.base, differences=fitted.differences, **about)
        return deltas.make(fitted.differences, self.base, **about)

    def _as_saved(self, file: Path) -> dict[str, Any]:
        with deltas.Delta.load(file).applied(self.model, as_stored=True):
            return {"scores": self.measure()}

    def measure(self) -> dict[str, Any]:
        """Accuracy on each source; on HateCheck the TPR gaps of the hateful class between the target groups."""
        found: dict[str, Any] = {}
        for name, rows in self.given.tests.items():
            guessed = predict(self.model, rows.ids).argmax(1).tolist()
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
        return plain(found)
