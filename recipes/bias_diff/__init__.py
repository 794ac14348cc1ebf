"""BIAS DIFF: find the training texts that carry a bias by their gradients, and unlearn them, beside every control.

Bias Data Attribution with Influence Function. A warm-up trains the model on a mixture (2.2); each text is scored by
how far its gradient points along that of biased sentences (2.3); what is selected is taken out of the data, or
unlearned (2.4). Everything is measured on checkpoints as saved.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool
from pydantic import Field, model_validator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from hooks.batching import context_limit
from hooks.gradient_influence import TokenInfluence
from recipes.bias_diff import dataset as given
from recipes.bias_diff import report as pages
from recipes.bias_diff.judging import judge
from recipes.bias_diff.measuring import injected, measure
from recipes.bias_diff.measuring import removed as share
from recipes.bias_diff.variants import Variant, best_of, cases_of
from surgery import apply as disk
from surgery import delta as deltas
from surgery.attribution.scoring import InfluenceConfig, Probes, combined, scores_at, tokens_at
from surgery.checkpoints import checkpoint_dir, tensors_of
from surgery.data import mixtures
from surgery.delta import Delta
from surgery.edits.forgetting import Forgetting, forget, steps_to_forget
from surgery.edits.supervised import Lora, Row, fine_tune
from surgery.edits.warmup import added, low_rank, read_epoch, usual_targets, warm_up
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.sentences import SCORERS
from surgery.metrics.suite import check_suites
from surgery.progress import Progress
from surgery.runs.folder import Folder, Run, run_folder
from surgery.training import Plan, steps_of

PROFILES: dict[str, dict[str, Any]] = {
    "demo": {},
    # Table 8. At these rates a small model hardly moves; 50 epochs of retraining stand against 5 of the warm-up.
    "paper": {"lr": 1.5e-6, "retrain_epochs": 50, "unlearn_lr": 3e-7, "unlearn_epochs": 10},
    # Two cores, ten minutes, the demo model.
    "quick": {
        "rows": 160,
        "max_length": 40,
        "epochs": 3,
        "lr": 1e-3,
        "probe_pairs": 60,
        "test_pairs": 80,
        "checkpoints": "last",
        "limit": 24,
        "tokens_of": 6,
    },
}


class Settings(surgery.runs.settings.Settings):
    """Defaults train a small model visibly; ``profile = "paper"`` has the values of Table 8."""

    profile: Literal["demo", "quick", "paper"] = "demo"
    """Sets what the others leave unsaid: quick for two cores and ten minutes, paper for Table 8's learning rates."""
    data: str = ""
    """The folder of the data sets; mixtures, probe and test pairs are made of its files."""
    mixture: Literal["crows_agnews", "rtp_agnews", "crows_trex"] = "crows_agnews"
    """3 biased rows to 7 neutral ones (appendix C)."""
    rows: int = Field(0, ge=0)
    """The size of the mixture; 0 is as large as the files allow."""
    file: str = ""
    """Your own training texts instead of a mixture: .txt, .jsonl, .csv or .tsv."""
    text: str = "text"
    label: str = "biased"
    """The columns of the text and, where there is one, of a true-or-false label, which only judges the selection."""
    probe: str = ""
    """With ``file``: biased sentences (column text), with their anti-stereotypes (column anti) where you have them."""
    probe_pairs: int = Field(0, ge=0)
    """Probe with so many sentences or pairs; 0 takes all."""
    test: str = ""
    """With ``file``: other such pairs to measure with; without it half of the probe's pairs are held out for that."""
    max_length: int = Field(128, ge=2)
    """Longer texts are cut after so many tokens; how many were is said in the log."""

    rank: int = Field(16, ge=1)
    alpha: float = Field(32.0, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    target_modules: list[str] = []
    """Ends of the names of the layers that get LoRA factors; none: q_proj and v_proj, or the model's own."""
    lr: float = Field(5e-4, gt=0)
    """Of warm-up and retraining; the paper's 1.5e-6 leaves a small model where it was."""
    epochs: int = Field(5, ge=1)
    batch_size: int = Field(16, ge=1)
    """The paper does not say."""
    warmup: float = Field(0.2, ge=0, le=1)
    schedule: Literal["constant", "linear"] = "linear"
    weight_decay: float = Field(0.001, ge=0)

    checkpoints: Literal["all", "last"] = "all"
    """Of the warm-up: Eq. 5 sums over them, weighted by their learning rates; Eq. 6 takes the last."""
    attribute_at: Literal["lora", "weights"] = "lora"
    attribute_targets: list[str] = []
    """Ends of the names of the layers whose gradients are compared; none: all that ``attribute_at`` has."""
    optimizer: Literal["less", "frozen_v", "none"] = "less"
    """What Adam makes of a text's gradient (Gamma in Eq. 5): LESS's form, v alone, or nothing."""
    normalise: Literal["cosine", "dot"] = "cosine"
    """cosine: Eq. 5. dot: Eq. 6."""
    layers: Literal["summed", "equal"] = "summed"
    """equal: the probe's part in each layer is scaled to length 1; it tells more stereotypes from their twins."""
    select_by: Literal["influence", "contrast", "tfidf", "tfidf_contrast", "minus_loss", "random", "labels", "best"] = (
        "influence"
    )
    """best: the score that covers most of the labelled rows, so it needs the labels, as labels does."""
    top: float = Field(0.35, gt=0, lt=1)
    """The share of the texts that is selected (section 3.2)."""

    mitigation: Literal["retrain", "npo", "multi", "ascent"] = "npo"
    """retrain: the original model on what is left. npo: Eq. 7. multi: Eq. 8. ascent: gradient ascent."""
    npo_form: Literal["original", "printed"] = "original"
    """original: NPO's own 2/beta. printed: 1/beta in Eq. 7; per token and without pi_ref in Eq. 8."""
    beta: float = Field(0.1, gt=0)
    retain: float = Field(1.0, ge=0)
    """Of multi: the weight of what is kept beside what is forgotten."""
    unlearn_lr: float = Field(1e-4, gt=0)
    unlearn_epochs: int = Field(2, ge=1)
    retrain_epochs: int = Field(0, ge=0)
    """0: as many as the warm-up's."""
    controls: list[str] = ["random"]
    """What else is done from the same warm-up: a score (random, tfidf, labels, ...) takes its rows instead, a
    mitigation (retrain, npo, multi, ascent, prompt) treats the same rows, and npo:random is both."""
    preamble: str = "Please write a sentence without any bias. "
    """What the prompt baseline puts before each sentence; the paper's text is that of its NPO prompt (appendix E)."""

    scorer: str = "bias-bench"
    """Of the CrowS-Pairs sentences; Eq. 15 is a masked model's and is not defined for a causal one."""
    test_pairs: int = Field(0, ge=0)
    """Measure with so many test pairs; 0 takes all."""
    suites: list[str] = []
    """What is measured beside CrowS-Pairs and perplexity with files of ``data``: cloze, seat, stereoset and others.
    cloze where ``data`` is given and nothing is said."""
    limit: int = Field(500, ge=0)
    """Rows of each suite, and texts of perplexity; 0 takes all."""
    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""
    tokens_of: int = Field(20, ge=0)
    """How many of the top texts are shown with what each of their tokens adds."""
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    keep_checkpoint: bool = False
    """Leave the warmed-up and the final model as checkpoints in the run's folder."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"

    @model_validator(mode="before")
    @classmethod
    def _profile(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        usual: dict[str, Any] = {"suites": ["cloze"]} if values.get("data") else {}
        return usual | PROFILES.get(str(values.get("profile")), {}) | values


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
    """Warm up, score, select, mitigate, write both deltas, measure what is saved; ``model`` stays as it was.

    ``checkpoint`` is the directory ``model`` was loaded from (default: the one of ``settings.model``). Everything
    is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.runs.folder.run_folder`` for interruptions.
    """
    progress = progress or Progress(quiet=True)
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("bias_diff", settings)
    lora = _lora(model, settings)
    _check(settings)
    with run_folder(Path(out), text, resume=resume) as folder:
        material = _material(settings, folder)
        cases = cases_of(settings.mitigation, settings.select_by, settings.controls, material)
        work = _Operation(model, tokenizer, settings, directory, folder, progress, text, lora, material)
        folder.log({"note": work.note})
        progress.say(work.note)
        before = folder.once("before", lambda: work.measure("before"))
        warmed = folder.once("warmed", work.warm)
        scores = work.scores
        rows, selection, words = judge(material, scores, share=settings.top, seed=settings.seed)
        by = best_of(selection) if settings.select_by == "best" else settings.select_by
        chosen = {case: rows[by if case.by == "selected" else case.by] for case in cases if case.mitigation != "prompt"}
        main, *others = cases
        after = folder.once("after", partial(work.mitigate, main, chosen[main], keep=True))
        found = {
            case.name: folder.once(
                f"control-{case.name.replace(':', '-')}",
                work.prompted if case.mitigation == "prompt" else partial(work.mitigate, case, chosen[case]),
            )
            for case in others
        }
        pages.write_scores(folder.path / "scores.jsonl", material, scores, rows[by])
        method = by if by in scores["rows"] else "influence"
        first = np.argsort(-scores["rows"][method], kind="stable")[: settings.tokens_of].tolist()
        texts = pages.strongest(folder.path / "tokens.html", material, work.strongest(first, method), method)
        removed = {name: share(material, before, warmed, result) for name, result in {"after": after, **found}.items()}
        summary = {
            "recipe": "bias_diff",
            "model": settings.model,
            "seed": settings.seed,
            "words": [],
            "before": before["scores"],
            "warmed": warmed["scores"],
            "after": after["scores"],
            "injected": injected(before, warmed),
            "removed": removed["after"],
            "selection": selection,
            "selected": {"by": by, "rows": int(rows[by].sum()), "of": len(material.texts), "top": settings.top},
            "edit": after["edit"] | {"warm_up": warmed["edit"]},
            "delta": after["delta"],
            "delta_from_warmed": after["delta_from_warmed"],
            "warmed_delta": warmed["delta"],
            "applied": after["applied"],
            "controls": {
                name: {"edit": each["edit"], "after": each["scores"], "removed": removed[name]}
                for name, each in found.items()
            },
            "cases": [],
        }
        summary["verdict"] = pages.said(summary, work.note, words)
        write_json(folder.path / "run.json", summary)
        pages.write_report(folder.path, summary, texts, text)
        if settings.keep_checkpoint:
            (folder.path / "state" / "warmed").rename(folder.path / "warmed")
    return Run(Path(out), summary)


def _lora(model: PreTrainedModel, settings: Settings) -> Lora:
    targets = tuple(settings.target_modules) or usual_targets(model)
    return Lora(settings.rank, settings.alpha, targets, settings.lora_dropout)


def _check(settings: Settings) -> None:
    if not (settings.file or settings.data):
        raise SurgeryError("bias_diff: no data; name the data folder (--set data=DIR), or your own file and probe")
    if settings.file and not settings.probe:
        raise SurgeryError(f"{settings.file}: no probe; name a file of biased sentences with --set probe=FILE")
    if settings.suites and not settings.data:
        raise SurgeryError(f"suites: {', '.join(settings.suites)} need the data folder; set data, or suites to []")
    if settings.scorer not in SCORERS:
        raise SurgeryError(f"scorer: got {settings.scorer!r}, expected one of {', '.join(SCORERS)}")
    check_suites(settings.suites)
    InfluenceConfig(settings.attribute_at, tuple(settings.attribute_targets), settings.optimizer)


def _material(settings: Settings, folder: Folder) -> given.Material:
    if settings.file:
        found = given.of_files(
            Path(settings.file),
            Path(settings.probe),
            Path(settings.test) if settings.test else None,
            text=settings.text,
            label=settings.label,
            seed=settings.seed,
        )
    else:
        made = folder.path / "mixture"
        if not made.exists():  # a mixture is complete or not there
            mixtures.build(settings.mixture, Path(settings.data), made, seed=settings.seed, rows=settings.rows)
        found = given.of_folder(made, f"{settings.mixture}, seed {settings.seed}")
    return found.limited(probe=settings.probe_pairs, test=settings.test_pairs)


@dataclass(frozen=True)
class _Operation:
    """What all phases of one run share; each phase is done once, also over interruptions."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    directory: Path
    folder: Folder
    progress: Progress
    recipe: str
    lora: Lora
    material: given.Material

    @cached_property
    def _coded(self) -> tuple[list[Row], int]:
        length = min(self.settings.max_length, self._context)
        return given.encoded(self.tokenizer, self.material.texts, max_length=length, what=self.material.name)

    @property
    def _context(self) -> int:
        return context_limit(self.model) or 2**20

    @property
    def rows(self) -> list[Row]:
        """The training texts as tokens, in their order."""
        return self._coded[0]

    def _pairs(self, pairs: Sequence[mixtures.Pair], what: str) -> Probes:
        # In full: a pair that is cut may lose the words in which its sentences differ.
        encode_all = partial(given.encoded, self.tokenizer, max_length=self._context, what=what)
        if not pairs:
            return Probes((), ())
        twins = encode_all([pair.anti for pair in pairs])[0] if all(pair.anti for pair in pairs) else []
        return Probes(encode_all([pair.text for pair in pairs])[0], twins)

    @cached_property
    def probes(self) -> Probes:
        """The probe as tokens."""
        return self._pairs(self.material.probe, "probe text")

    @cached_property
    def note(self) -> str:
        """What the data are, in a sentence."""
        labelled = "no labels" if self.material.biased is None else f"{int(self.material.biased.sum())} of them biased"
        return (
            f"{len(self.rows)} texts of {self.material.name} ({labelled}), {self._coded[1]} cut to "
            f"{self.settings.max_length} tokens; {len(self.material.probe)} probe "
            f"{'pairs' if self.material.twinned else 'sentences'}, {len(self.material.test)} test pairs"
        )

    @property
    def plan(self) -> Plan:
        """Of the warm-up and, but for its epochs, of retraining."""
        s = self.settings
        dropout = s.lora_dropout > 0
        return Plan(s.lr, s.epochs, s.batch_size, "adamw", s.weight_decay, dropout, s.schedule, s.warmup)

    @property
    def way(self) -> InfluenceConfig:
        """Which gradients are compared."""
        s = self.settings
        return InfluenceConfig(s.attribute_at, tuple(s.attribute_targets), s.optimizer, s.normalise, s.layers)

    def measure(self, when: str, prompt: str = "") -> dict[str, Any]:
        """``recipes.bias_diff.measuring.measure`` of the model as it is."""
        s = self.settings
        return measure(
            self.model,
            self.tokenizer,
            self.material,
            scorer=s.scorer,
            neutral=s.neutral,
            suites=s.suites,
            data=s.data,
            limit=s.limit,
            seed=s.seed,
            prompt=prompt,
            progress=self.progress,
            when=when,
        )

    # Phases

    def _delta(self, differences: Any, directory: Path, base: str) -> Delta:
        return deltas.make(differences, directory, base=base, recipe=self.recipe, seed=self.settings.seed, kind="lora")

    def _apply(self, delta_file: Path, name: str) -> tuple[Path, dict[str, Any]]:
        saved = self.folder.state(name)
        shutil.rmtree(saved, ignore_errors=True)  # of an interrupted run
        report = disk.apply(
            delta_file,
            self.directory,
            saved,
            rounding=self.settings.rounding,
            seed=self.settings.seed,
            undo="none",
        )
        return saved, {key: getattr(report, key) for key in ("rounding", "entries", "changed", "lost")}

    @property
    def _warm_file(self) -> Path:
        return self.folder.path / "warmed.safetensors"

    def warm(self) -> dict[str, Any]:
        """Train the warm-up, write ``warmed.safetensors``, and measure the checkpoint that it gives."""
        with self.progress.work("warm up", steps_of(len(self.rows), self.plan)) as step:
            trained = warm_up(
                self.model,
                self.rows,
                self.plan,
                self.lora,
                seed=self.settings.seed,
                folder=self.folder.state("warmup"),
                log=lambda row: self.folder.log({"edit": "warm-up", **row}),
                step_done=step,
            )
        delta = self._delta(trained.differences, self.directory, self.settings.model)
        written = delta.record(self._warm_file)
        saved, applied = self._apply(self._warm_file, "warmed")
        with tensors_of(self.model, delta, saved):
            result = self.measure("warmed up")
        return result | {
            "edit": _edit("warm-up", trained.losses, trained.parameters),
            "delta": written,
            "applied": applied,
        }

    @cached_property
    def scores(self) -> dict[str, Any]:
        """Every score of the texts and of the twins, summed over the epochs by learning rate; and each epoch's."""
        settings = self.settings
        numbers = range(1, settings.epochs + 1) if settings.checkpoints == "all" else [settings.epochs]
        twins = self._pairs(self.material.test, "test text")
        columns, rates = [], []
        for number in numbers:
            epoch = read_epoch(self.folder.state("warmup"), number)
            with self.progress.work(f"influence after epoch {number}", len(self.rows)) as step:
                one = self.folder.once(
                    f"scores-{number}",
                    partial(
                        scores_at,
                        self.model,
                        self.tokenizer,
                        self.rows,
                        self.probes,
                        twins,
                        self.lora,
                        epoch,
                        self.way,
                        seed=settings.seed,
                    ),
                )
                step(len(self.rows))
            columns.append(one)
            rates.append(epoch.rate)
        found = combined(columns, rates)
        return found | {"epochs": {number: one["rows"] for number, one in zip(numbers, columns, strict=True)}}

    def mitigate(self, case: Variant, chosen: Bool[np.ndarray, " texts"], keep: bool = False) -> dict[str, Any]:
        """Do ``case`` with the rows ``chosen``; with ``keep`` the two deltas are left in the folder."""
        settings, name = self.settings, case.name.replace(":", "-")
        selected = [row for row, take in zip(self.rows, chosen, strict=True) if take]
        left = [row for row, take in zip(self.rows, chosen, strict=True) if not take]
        epoch = read_epoch(self.folder.state("warmup"), settings.epochs)
        warm = low_rank(self.model, self.lora, epoch, seed=settings.seed)
        warmed, warmed_directory = Delta.load(self._warm_file), self.folder.state("warmed")
        options: Any = {
            "seed": settings.seed,
            "lora": self.lora,
            "state": self.folder.state(f"{name}.pt"),
            "log": lambda row: self.folder.log({"edit": case.name, **row}),
        }
        if case.mitigation == "retrain":
            plan = replace(self.plan, epochs=settings.retrain_epochs or settings.epochs)
            with self.progress.work(case.name, steps_of(len(left), plan)) as step:
                trained = fine_tune(self.model, left, plan, step_done=step, **options)
            from_base, from_warmed = trained.differences, added([(1.0, trained.differences), (-1.0, warm)])
        else:
            plan = replace(self.plan, lr=settings.unlearn_lr, epochs=settings.unlearn_epochs, dropout=False)
            how = Forgetting(case.mitigation, settings.npo_form, settings.beta, settings.retain)
            with (
                tensors_of(self.model, warmed, warmed_directory),  # NPO's reference is the warmed-up model
                self.progress.work(case.name, steps_to_forget(len(selected), plan)) as step,
            ):
                trained = forget(self.model, selected, left, plan, how, step_done=step, **options)
            from_base, from_warmed = added([(1.0, warm), (1.0, trained.differences)]), trained.differences
        delta_file = self.folder.path / "delta.safetensors" if keep else self.folder.state(f"{name}.safetensors")
        delta = self._delta(from_base, self.directory, settings.model)
        written = delta.record(delta_file)
        saved, applied = self._apply(delta_file, "checkpoint")
        with tensors_of(self.model, delta, saved):
            result = self.measure(case.name)
        result |= {
            "edit": _edit(case.name, trained.losses, trained.parameters) | {"rows": len(selected)},
            "delta": written,
            "applied": applied,
        }
        if keep:
            other_file = self.folder.path / "delta_from_warmed.safetensors"
            other = self._delta(from_warmed, warmed_directory, f"{settings.model} after the warm-up")
            result["delta_from_warmed"] = other.record(other_file)
        if keep and settings.keep_checkpoint:
            shutil.rmtree(self.folder.path / "checkpoint", ignore_errors=True)
            saved.rename(self.folder.path / "checkpoint")
        else:
            shutil.rmtree(saved)
        return result

    def prompted(self) -> dict[str, Any]:
        """The prompt baseline: the warmed-up model with the preamble before each sentence; no weight changes."""
        with tensors_of(self.model, Delta.load(self._warm_file), self.folder.state("warmed")):
            return self.measure("prompt", self.settings.preamble) | {"edit": {"part": "prompt", "parameters": 0}}

    def strongest(self, places: Sequence[int], method: str) -> list[TokenInfluence]:
        """The texts at ``places`` with what each token adds to their score after the last epoch."""
        if not places:
            return []
        found = tokens_at(
            self.model,
            self.tokenizer,
            [self.rows[place] for place in places],
            self.probes,
            self.lora,
            read_epoch(self.folder.state("warmup"), self.settings.epochs),
            self.way,
            method=method,
            seed=self.settings.seed,
        )
        return [replace(one, place=int(place)) for place, one in zip(places, found, strict=True)]


def _edit(part: str, losses: Sequence[float], parameters: int) -> dict[str, Any]:
    return {
        "blocks": "all",
        "part": part,
        "parameters": parameters,
        "steps": len(losses),
        "loss_first": losses[0],
        "loss_last": losses[-1],
    }
