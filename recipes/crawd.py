"""CrAWD: fine-tuning with a decayed cross-attention to a few sensitive words; its baselines; Vanilla beside it.

The texts are Bias in Bios or a file of one's own. What comes out is a delta of kind ``module``, of a baseline one of
kind ``lora`` or ``dense``, and every number stands beside that of plain fine-tuning on the same texts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from hooks.plots import block_bars, cross_attention_map
from hooks.ranking import Ranking
from hooks.reference_attention import cross_attention
from surgery import delta as deltas
from surgery.checkpoints import checkpoint_dir
from surgery.data import bios
from surgery.data.prompts import load_prompt_set
from surgery.data.rows import part, sample
from surgery.data.texts import Columns, Example, examples
from surgery.delta.module import module_delta
from surgery.edits.debiased_tuning import OBJECTIVES, WEIGHTS, Method, Tuned, four_bit, tune
from surgery.edits.supervised import Lora, Row, encode_rows
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import gas, perplexity
from surgery.metrics.suite import check_suites, evaluate_suites, material, measure, plain
from surgery.modules.cross_attention import cross_weights
from surgery.progress import Progress
from surgery.runs.folder import Folder, Run, run_folder
from surgery.runs.page import Table, compared, write_page
from surgery.training import Plan, steps_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROFILES: dict[str, dict[str, Any]] = {
    "paper": {},
    # A model of about 0.1 to 1 billion parameters and some hundred texts: 1e-5 hardly moves what is new in it.
    "small": {"lr": 5e-4, "module_lr": 1e-4, "warmup": 0.1, "epochs": 3},
    "quick": {
        "lr": 5e-4,
        "module_lr": 1e-4,
        "warmup": 0.1,
        "epochs": 1,
        "limit": 160,
        "rows": 20,
        "samples": 2,
        "length": 24,
        "suites": ["gas", "weat"],
    },
}
SHOWN = 6  # prompts whose continuations stand in the report
SENSED = 32  # held-out texts whose attention to the reference words is ranked


class Settings(surgery.runs.settings.Settings):
    """Defaults are the paper's (section 5, appendix A.1) where it says one."""

    data: str = ""
    """Directory of data sets: bias_in_bios/ to train on and to measure, stereoset/, seat/ and so on to measure."""
    file: str = ""
    """Texts of one's own to train on instead: .txt, .jsonl, .csv or .tsv with the column ``text``."""
    text: str = "text"
    accountants: bool = True
    """Train on the thousand biographies of accountants, too, beside those of 28 professions."""
    limit: int = Field(0, ge=0)
    """So many of the training texts, drawn by the seed; 0 takes all."""
    profile: Literal["paper", "small", "quick"] = "paper"
    """small: learning rate and epochs for small models and few texts; quick: that for two CPU cores, GAS and WEAT."""
    method: Literal["crawd", "vanilla", "debias_tuning", "ibm", "deep_soft_debias"] = "crawd"
    reference: list[str] = ["he", "she"]
    """The sensitive words, of one attribute or several: he, she, young, old, ..."""
    top_percent: float = Field(40.0, ge=0, le=100)
    decay: float = Field(0.2, ge=0, le=1)
    scope: Literal["row", "sequence"] = "row"
    """What the top K percent are taken of; "sequence" lets later tokens change earlier predictions."""
    heads: int = Field(8, ge=1)
    ffn: int = Field(0, ge=0)
    """Inner width of the module's feed-forward network; 0 takes four times the model's width."""
    renormalise: bool = False
    decay_stored: float | None = Field(None, ge=0, le=1)
    """Lambda of the module as it is stored; the paper trains and generates with the same one."""
    weight: float = Field(0.0, ge=0)
    """Of the method's own term: 1 for debias_tuning and ibm, 5 for deep_soft_debias where nothing is said.

    CrAWD has none; above 0 the module is trained with Debias Tuning's term, which is not the paper's method."""
    penalised: list[str] = []
    """Words of Debias Tuning's term; the reference words if none."""
    lora: bool = True
    """False trains CrAWD's module alone."""
    four_bit: bool = False
    """Train on the base in 4 bits (QLoRA, appendix A.1), which needs a GPU and bitsandbytes. What comes out is put onto
    the checkpoint as it is, and measured there."""
    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    target_modules: list[str] = []
    dropout: float = Field(0.1, ge=0, lt=1)
    """Of the LoRA factors' input and inside the module (and the model's own, where it has any)."""
    lr: float = Field(1e-5, gt=0)
    module_lr: float | None = Field(None, gt=0)
    """Of the cross-attention module; as lr where nothing is said. Whole matrices bear smaller steps than factors."""
    warmup: float = Field(0.0, ge=0, lt=1)
    """The share of the steps in which the rates rise from 0."""
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1)
    """The paper does not say."""
    max_length: int = Field(32, ge=2)
    """n: longer texts are cut."""
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = Field(0.0, ge=0)
    part: Literal["dev", "test"] = "test"
    """What is measured on: dev (and BOLD's prompts for GAS) while settings are chosen, test for what is reported."""
    suites: list[str] = ["gas", "weat", "stereoset", "bios"]
    rows: int = Field(0, ge=0)
    """So many prompts or rows of each suite, drawn by the seed; 0 takes all."""
    samples: int = Field(4, ge=1)
    """Texts sampled for each prompt of GAS, and their length in tokens."""
    length: int = Field(32, ge=1)
    controls: list[str] = ["vanilla"]
    """Methods that are trained beside, on the same texts in the same order."""
    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""
    prompt: str = "The doctor said that"
    """Of the picture of the cross-attention (Figure 4)."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _usual(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        usual = PROFILES.get(values.get("profile", "paper"), {})
        method = values.get("method", "crawd")
        return usual | ({"weight": WEIGHTS[method]} if method in WEIGHTS else {}) | values


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
    """Train, write the delta, put the file's contents onto the checkpoint, measure that; ``model`` stays as it was.

    ``checkpoint`` is the directory ``model`` was loaded from (default: the one of ``settings.model``). Everything is
    left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.runs.folder.run_folder`` for interruptions.
    """
    progress = progress or Progress(quiet=True)
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("crawd", settings)
    given = _read(tokenizer, settings)
    methods = {settings.method: _method(settings), **{name: _control(name, settings) for name in settings.controls}}
    with run_folder(Path(out), text, resume=resume) as folder:
        folder.log({"note": given.note})
        progress.say(given.note)
        work = _Work(model, tokenizer, settings, directory, folder, progress, text, given)
        before = folder.once("before", partial(work.measure, "before"))
        found = {name: work.case(name, method) for name, method in methods.items()}
        main = found.pop(settings.method)
        summary = {
            "recipe": "crawd",
            "method": settings.method,
            "model": settings.model,
            "seed": settings.seed,
            "before": before["scores"],
            "after": main["scores"],
            "edit": main["edit"],
            "rows": given.counts,
            "delta": main["delta"],
            "applied": {"rounding": settings.rounding},
            "controls": {name: {"edit": one["edit"], "after": one["scores"]} for name, one in found.items()},
            "cases": _cases(before, {settings.method: main, **found}),
            "sensitivity": {"before": before["sensitivity"], "after": main["sensitivity"]},
            "pareto": ["gas.gas", "held_out_perplexity"] if "gas" in settings.suites else [],
        }
        summary["verdict"] = [given.note + ".", *verdict(summary)]
        write_json(folder.path / "run.json", summary)
        _report(work, summary, text)
    return Run(Path(out), summary)


@dataclass(frozen=True)
class Given:
    """The training texts and their tokens, the held-out texts, and how many there were."""

    texts: tuple[str, ...]
    rows: tuple[Row, ...]
    held_out: tuple[str, ...]
    name: str
    counts: dict[str, Any]
    note: str


def _read(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Given:
    if settings.suites:
        check_suites(settings.suites)
    if not settings.data and (settings.suites or not settings.file):
        raise SurgeryError(
            "crawd: no data; name the directory of data sets with --set data=DIR, or a file of texts with file=F and "
            "suites=[]"
        )
    if settings.file:
        every = [row.answer for row in examples(settings.file, columns=Columns(text=settings.text))]
        texts, held = (part(every, which, settings.seed, stratum=lambda _: 0) for which in ("train", settings.part))
        name = f"{settings.file}, {settings.part} part of seed {settings.seed}"
    else:
        texts = [row.text for row in bios.load(settings.data, "train", settings.seed)]
        if settings.accountants:
            known = {row.text for row in bios.load(settings.data)}  # of both files once: no test text is trained on
            more = bios.load(settings.data, files=(bios.ACCOUNTANTS,))
            texts += [row.text for row in more if row.text not in known]
        held = [row.text for row in bios.load(settings.data, settings.part, settings.seed)]
        name = f"Bias in Bios, {Path(bios.FILE).name}, {settings.part} part of seed {settings.seed}"
    if not texts or not held:
        raise SurgeryError(f"{name}: {len(texts)} texts to train on, {len(held)} held out; expected some; add texts")
    chosen = sample(texts, settings.limit, settings.seed)
    encoded = encode_rows(tokenizer, [Example("", text) for text in chosen], max_length=settings.max_length)
    counts = {"read": len(texts), "trained": len(encoded.rows), "held_out": len(held), "cut": encoded.cut}
    note = (
        f"{len(encoded.rows)} of {len(texts)} texts to train on, {encoded.cut} of them cut to {settings.max_length} "
        f"tokens, {encoded.left_out} left out (no token to learn); {len(held)} held out"
    )
    return Given(tuple(chosen), encoded.rows, tuple(held), name, counts | {"left_out": encoded.left_out}, note)


def _method(settings: Settings) -> Method:
    keys = ("top_percent", "decay", "scope", "heads", "renormalise", "dropout")
    module = {key: getattr(settings, key) for key in keys} | {"ffn": settings.ffn or None}
    lora = Lora(settings.rank, settings.alpha, tuple(settings.target_modules), settings.dropout)
    reference, penalised = tuple(settings.reference), tuple(settings.penalised)
    rate = (settings.module_lr or settings.lr) / settings.lr
    return Method(settings.method, reference, settings.weight, penalised, lora if settings.lora else None, module, rate)


def _control(name: str, settings: Settings) -> Method:
    if name not in WEIGHTS or name == settings.method:
        known = ", ".join(method for method in WEIGHTS if method != settings.method)
        raise SurgeryError(f"controls: got {name!r}, expected some of {known} (the method itself is measured anyway)")
    return _method(settings.model_copy(update={"method": name, "weight": WEIGHTS[name], "lora": True}))


@dataclass(frozen=True)
class _Work:
    """What every method of one run shares: the texts, the folder, and how its result is measured."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    directory: Path
    folder: Folder
    progress: Progress
    recipe: str
    given: Given

    def case(self, name: str, method: Method) -> dict[str, Any]:
        """Train by ``method``, write its delta, measure the file on the checkpoint; taken up where it was left."""
        main = name == self.settings.method
        # A control's delta is gone from the finished run.
        file = self.folder.path / "delta.safetensors" if main else self.folder.state(f"{name}.safetensors")
        made = self.folder.once(f"train-{name}", partial(self._train, name, method, file))
        measured = self.folder.once(f"after-{name}", partial(self._as_saved, name, file))
        return made | measured

    def _train(self, name: str, method: Method, file: Path) -> dict[str, Any]:
        settings = self.settings
        plan = Plan(
            settings.lr,
            settings.epochs,
            settings.batch_size,
            settings.optimizer,
            settings.weight_decay,
            dropout=settings.dropout > 0,
            warmup=settings.warmup,
        )
        base = four_bit(self.directory, self.model.device) if settings.four_bit else self.model
        with self.progress.work(f"train {name}", steps_of(len(self.given.rows), plan)) as step:
            tuned = tune(
                base,
                self.tokenizer,
                self.given.rows,
                method,
                plan,
                seed=settings.seed,
                state=self.folder.state(f"{name}.pt"),
                log=lambda row: self.folder.log({"method": name, **row}),
                step_done=step,
            )
        delta = self._delta(tuned)
        written = delta.record(file)
        objective = OBJECTIVES[name]
        if name == "crawd" and method.weight:
            objective += " + weight * Debias Tuning's term (not in the paper)"
        return {
            "edit": {
                "blocks": "all",
                "part": tuned.kind,
                "objective": objective,
                "weight": method.weight,
                "reference": list(method.reference),
                "parameters": tuned.parameters,
                "steps": len(tuned.losses),
                "loss_first": tuned.losses[0],
                "loss_last": tuned.losses[-1],
            },
            "delta": written,
        }

    def _delta(self, tuned: Tuned) -> deltas.Delta:
        about: Any = {"base": self.settings.model, "recipe": self.recipe, "seed": self.settings.seed}
        if tuned.module is not None:
            stored = self.settings.decay_stored
            changed = {} if stored is None else {"decay": stored}
            module = replace(tuned.module, settings={**tuned.module.settings, **changed})
            return module_delta(module, self.directory, differences=tuned.differences, **about)
        return deltas.make(tuned.differences, self.directory, kind=tuned.kind, **about)

    def _as_saved(self, name: str, file: Path) -> dict[str, Any]:
        # Rounded to the checkpoint's dtype, as applying the file on disk rounds it.
        rounding: Any = {"rounding": self.settings.rounding, "seed": self.settings.seed, "as_stored": True}
        with deltas.Delta.load(file).applied(self.model, **rounding):
            return self.measure(name)

    def measure(self, when: str) -> dict[str, Any]:
        """Every suite, perplexity on held-out and on neutral texts, and continuations to read."""
        settings, model, tokenizer = self.settings, self.model, self.tokenizer
        sampling = gas.Sampling(settings.length, samples=settings.samples, seed=settings.seed)
        kind = "bold" if settings.part == "dev" else "professions"
        options: dict[str, Any] = {"gas": {"sampling": sampling, "kind": kind}, "bios": {"part": settings.part}}
        scores: dict[str, Any] = {}
        for suite in settings.suites:
            # BOLD has 7,000 prompts; as many as there are professions' prompts are drawn where nothing is said. The
            # word sets of WEAT and SEAT are small and taken whole.
            rows = {"weat": 0, "seat": 0, "gas": settings.rows or 140}.get(suite, settings.rows)
            given: Any = {"limit": rows, "seed": settings.seed, "progress": self.progress, "options": options}
            scores |= evaluate_suites(model, tokenizer, [suite], settings.data, **given)
        scores.get("bios", {}).pop("perplexity", None)  # the same as the next line's
        scores["held_out_perplexity"] = self._perplexity(self.given.held_out, self.given.name)
        neutral = material(
            model, tokenizer, load_prompt_set("genbias"), suites=["perplexity"], texts=settings.neutral or None
        )
        scores |= measure(model, neutral, progress=self.progress, label=f"perplexity {when}").scores
        texts: list[str] = []
        prompts: list[str] = []
        if "gas" in settings.suites:
            prompts = sample(gas.prompts(settings.data), SHOWN, settings.seed)
            texts = gas.generate(model, tokenizer, prompts, replace(sampling, samples=1))
        return {
            "scores": plain(scores),
            "texts": [list(pair) for pair in zip(prompts, texts, strict=True)],
            "sensitivity": self._sensitivity(when),
        }

    def _sensitivity(self, when: str) -> dict[str, Any] | None:
        """Each block's own attention to the reference words (``hooks.cross_attention``), as a ranking of blocks."""
        if len(self.settings.reference) < 2:  # the share of one word among one is always 1
            return None
        texts = self.given.held_out[:SENSED]
        found = cross_attention(self.model, self.tokenizer, texts, self.settings.reference, data=self.given.name)
        return replace(found.ranking("block"), settings={"stream": when}).to_dict()

    def _perplexity(self, texts: Sequence[str], name: str) -> Any:
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        ids = [row[:limit] for row in encode(self.tokenizer, texts)]
        sums, counts, _ = token_losses(self.model, ids)
        return perplexity.score(sums, counts, data=name)


def _cases(before: dict[str, Any], found: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The same prompts continued by each model (Figure 3)."""
    return [
        {"prompt": prompt, "before": text} | {name: one["texts"][place][1] for name, one in found.items()}
        for place, (prompt, text) in enumerate(before["texts"])
    ]


def _report(work: _Work, summary: dict[str, Any], recipe: str) -> None:
    settings, folder = work.settings, work.folder
    columns = {"before": summary["before"], settings.method: summary["after"]}
    columns |= {name: control["after"] for name, control in summary["controls"].items()}
    tables = [compared(columns, caption="Before, after and controls")]
    if summary["cases"]:
        head = list(summary["cases"][0])
        rows = [[case[key].replace("\n", " ") for key in head] for case in summary["cases"]]
        tables.append(Table("Continuations", head, rows, "One text each, drawn with the same random numbers."))
    rankings = [Ranking.from_dict(one) for one in summary["sensitivity"].values() if one]
    figures: dict[str, Figure] = {"sensitivity": block_bars(*rankings)} if rankings else {}
    if summary["delta"]["kind"] == "module":
        with deltas.Delta.load(folder.path / summary["delta"]["file"]).applied(work.model), torch.no_grad():
            figures["cross_attention"] = cross_attention_map(cross_weights(work.model, work.tokenizer, settings.prompt))
    write_page(
        folder.path,
        title=f"{settings.method} on {settings.model}",
        lines=summary["verdict"],
        tables=tables,
        figures=figures,
        recipe=recipe,
        delta=summary["delta"],
    )


def verdict(summary: dict[str, Any]) -> list[str]:
    """What the method did beside plain fine-tuning, in sentences."""
    edit, after = summary["edit"], summary["after"]
    lines = [
        f"{summary['method']}: {edit['objective']}; {edit['parameters']:,} numbers trained in {edit['steps']} steps, "
        f"loss {edit['loss_first']:.3f} to {edit['loss_last']:.3f}. Everything under after was measured on the saved "
        "delta put back onto the checkpoint, rounded as the checkpoint is."
    ]
    vanilla = summary["controls"].get("vanilla", {}).get("after")
    for path, label in ((("gas", "gas"), "GAS"), (("held_out_perplexity",), "Perplexity on held-out texts")):
        values = [_at(scores, path) for scores in (summary["before"], vanilla, after)]
        if values[0] and values[2]:
            line = f"{label} went from {values[0]['value']:.3f} before to {values[2]['value']:.3f}"
            if values[1]:
                change = 100 * (values[2]["value"] / values[1]["value"] - 1) if values[1]["value"] else float("nan")
                line += f"; plain fine-tuning reaches {values[1]['value']:.3f} ({change:+.0f} % against it)"
            lines.append(line + ".")
    return lines


def _at(scores: Any, path: tuple[str, ...]) -> Any:
    for key in path:
        scores = scores.get(key) if isinstance(scores, dict) else None
    return scores
