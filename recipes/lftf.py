"""LFTF: locate the block that turns the stream most, fine-tune it to a fair next word, prove it on the saved file.

Locating First and Then Fine-Tuning (arXiv 2505.15475). One pass over the prompts ranks the blocks (section 4.1),
measures the model before, and keeps the stream that enters the blocks to be trained; training (section 4.2) and
every measurement afterwards start from that stream.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import surgery.runs.settings
from hooks import anatomy
from surgery import apply as disk
from surgery import delta as deltas
from surgery.checkpoints import checkpoint_dir, tensors_of
from surgery.data import genbias
from surgery.data.prompts import PromptSet, WordSet, load_prompt_set
from surgery.edits import block as edit
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.forward.next_token import Located, next_words, rank_blocks
from surgery.forward.residual_cache import ResidualCache, why_not
from surgery.forward.tokens import encode, word_ids
from surgery.metrics.suite import Material, Measured, material, measure, plain
from surgery.progress import Progress
from surgery.runs.folder import Folder, Run, run_folder
from surgery.runs.report import write_report
from surgery.training import Plan, steps_of

CONTROLS = ("last", "random", "first", "middle", "fpft", "pb")
ABLATIONS = ("without_attention", "without_mlp")  # and one for each word, LFTF Table 8


class Settings(surgery.runs.settings.Settings):
    """Defaults are the paper's (section 5.1) where it gives a value."""

    block: str | int | list[int] = "last"
    """last (the paper's), auto (top of the ranking ``rank_by``), first, middle, random, all, or numbers."""
    part: Literal["all", "attention", "mlp", "without_attention", "without_mlp"] = "all"
    objective: Literal["log", "as_printed"] = "log"
    """log: -log P(he) - log P(she). as_printed: P(he) + P(she), Eq. 5, which silences both words."""
    lr: float = Field(1e-5, gt=0)
    epochs: int = Field(2, ge=1)
    batch_size: int = Field(32, ge=1)
    optimizer: Literal["adam", "adamw"] = "adam"
    dropout: bool = False
    """Train with the model's dropout on; the prefix cache is off then."""
    data: str = "genbias"
    """A prompt set: genbias, race, or a .toml / .json file of your own."""
    words: list[str] = []
    """Other words to balance than the prompt set's."""
    trained_words: list[str] = []
    """The words named in the loss; all of them unless this is an ablation."""
    split: Literal["profession", "pairs"] = "profession"
    """profession: test professions are unseen in training. pairs: the paper's, where none is."""
    split_seed: int = genbias.SEED
    neutral: str = ""
    """A file of texts for perplexity instead of the shipped 200 sentences."""
    rank_by: Literal["raw", "final_norm"] = "raw"
    positions: Literal["last", "all"] = "last"
    aggregate: Literal["mean", "sum"] = "mean"
    rounding: Literal["auto", "nearest", "stochastic"] = "auto"
    """auto: stochastic into 16-bit checkpoints, where nearest loses 20-50 % of a small edit's entries."""
    controls: list[str] = ["random"]
    ablations: bool = False
    """All controls and the ablations of Table 8 in one table."""
    preamble: str = "Men and women are equally likely in every profession. "
    """What the prompt baseline (pb) puts before each prompt; the paper's text is not published."""
    prefix_cache: bool = True
    keep_checkpoint: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"


@dataclass(frozen=True)
class Variant:
    """One edit to make: which parameters, and which words stand in the loss."""

    name: str
    blocks: tuple[int, ...] | None
    part: str
    words: tuple[str, ...]


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
    """Rank, train, write the delta, apply it to the checkpoint on disk, measure that; ``model`` stays as it was.

    ``checkpoint`` is the directory ``model`` was loaded from (default: the one of ``settings.model``). Everything
    is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.runs.folder.run_folder`` for interruptions.
    """
    progress = progress or Progress(quiet=True)
    directory = checkpoint_dir(checkpoint or settings.model)
    text = surgery.runs.settings.dump("lftf", settings)
    prompts = _prompt_set(settings)
    train = genbias.records(settings.split, "train", settings.split_seed, prompts)
    ids = encode(tokenizer, [row.text for row in train])
    given = material(
        model, tokenizer, prompts, split=settings.split, seed=settings.split_seed, texts=settings.neutral or None
    )
    count = len(anatomy.find(model).blocks)
    names = _control_names(settings, prompts.words)
    with run_folder(Path(out), text, resume=resume) as folder:
        case = _case(settings, prompts.words, count)
        keep = [] if settings.block == "auto" else _starts(case, names, settings, prompts.words, count)
        with progress.work("rank the blocks", len(ids)) as step:
            located = rank_blocks(
                model,
                ids,
                given.words,
                positions=settings.positions,
                aggregate=settings.aggregate,
                keep=keep,
                step=step,
            )
        streams = located.prefixes
        if settings.block == "auto":
            case = replace(case, blocks=(getattr(located.importance, settings.rank_by).top()[0],))
            keep = _starts(case, names, settings, prompts.words, count)
            streams = next_words(model, ids, given.words, keep=keep).prefixes
        if settings.ablations:  # the edit is not its own control
            names = [name for name in names if _differs(_control(name, settings, prompts.words, count, case), case)]
        before = measure(model, given, keep=keep, progress=progress, label="measure before")
        operation = _Operation(
            model, tokenizer, settings, directory, folder, progress, text, ids, prompts, given, streams, before
        )
        trained, delta = operation.make(case)
        delta_file = folder.path / "delta.safetensors"
        sha256 = delta.save(delta_file, overwrite=True)
        after, applied = operation.as_saved(case, delta_file)
        others = {name: folder.once(f"control-{name}", partial(operation.control, name, count, case)) for name in names}
        summary = {
            "recipe": "lftf",
            "model": settings.model,
            "seed": settings.seed,
            "words": list(prompts.words.words),
            "before": plain(before.scores),
            "after": plain(after.scores),
            "ranking": _ranking(located, settings),
            "edit": {
                "blocks": list(case.blocks) if case.blocks is not None else "all",
                "part": case.part,
                "objective": settings.objective,
                "parameters": trained.parameters,
                "steps": len(trained.losses),
                "loss_first": trained.losses[0],
                "loss_last": trained.losses[-1],
            },
            "delta": {"file": delta_file.name, "bytes": delta_file.stat().st_size, "sha256": sha256},
            "applied": applied,
            "controls": others,
            "cases": _cases(given, before, after),
        }
        write_json(folder.path / "run.json", summary)
        write_report(folder.path, summary, text)
    return Run(Path(out), summary)


def _prompt_set(settings: Settings) -> PromptSet:
    prompts = load_prompt_set(settings.data)
    return replace(prompts, words=WordSet(tuple(settings.words))) if settings.words else prompts


def _case(settings: Settings, words: WordSet, count: int) -> Variant:
    named = tuple(settings.trained_words) or words.words
    unknown = [word for word in named if word not in words.words]
    if unknown:
        raise SurgeryError(f"trained_words: got {unknown[0]!r}, expected some of {', '.join(words.words)}")
    return Variant("lftf", edit.choose(settings.block, count, settings.seed), settings.part, named)


def _control_names(settings: Settings, words: WordSet) -> list[str]:
    known = (*CONTROLS, *ABLATIONS, *(f"without_{word}" for word in words.words))
    names = list(known) if settings.ablations else list(dict.fromkeys(settings.controls))
    unknown = [name for name in names if name not in known]
    if unknown:
        raise SurgeryError(f"controls: got {unknown[0]!r}, expected some of {', '.join(known)}")
    return names


def _control(name: str, settings: Settings, words: WordSet, count: int, case: Variant) -> Variant | None:
    """The edit that stands beside ``case`` for comparison; None for the prompt baseline, which edits nothing."""
    if name == "pb":
        return None
    if name == "fpft":
        return replace(case, name=name, blocks=None, part="all")
    if name == "random":
        # Any block but the edited ones, so that the control is not the claim itself.
        free = [index for index in range(count) if index not in (case.blocks or ())] or [0]
        drawn = free[int(np.random.default_rng(settings.seed).integers(len(free)))]
        return replace(case, name=name, blocks=(drawn,))
    if name in ("first", "middle", "last"):
        return replace(case, name=name, blocks=edit.choose(name, count, settings.seed))
    if name in ABLATIONS:
        return replace(case, name=name, part=name)
    left = tuple(word for word in case.words if f"without_{word}" != name)
    return replace(case, name=name, words=left)


def _starts(case: Variant, names: Sequence[str], settings: Settings, words: WordSet, count: int) -> list[int]:
    """The blocks that the edit and its controls start from, whose entering stream is worth keeping."""
    cases = [case, *(_control(name, settings, words, count, case) for name in names)]
    return sorted({min(each.blocks) for each in cases if each and each.blocks}) if settings.prefix_cache else []


def _differs(control: Variant | None, case: Variant) -> bool:
    return control is None or replace(control, name=case.name) != case


def _ranking(located: Located, settings: Settings) -> dict[str, Any]:
    raw, normed = located.importance.raw, located.importance.final_norm
    return {
        "method": "bmi (LFTF Eq. 4)",
        "raw": raw.scores.tolist(),
        "final_norm": normed.scores.tolist(),
        "order": {"raw": raw.order(), "final_norm": normed.order()},
        "error": None if raw.errors is None else raw.errors.tolist(),
        "positions": settings.positions,
        "aggregate": settings.aggregate,
        "n": raw.count,
        "variance_5x100": located.variances,
    }


def _cases(given: Material, before: Measured, after: Measured, count: int = 5) -> list[dict[str, Any]]:
    """The professions most biased before the edit (mean gap over their test prompts), before and after."""
    if before.probabilities is None or after.probabilities is None:
        return []
    professions = np.array([prompt.profession for prompt in given.prompts])
    rows = []
    for profession in dict.fromkeys(professions.tolist()):
        chosen = professions == profession
        was, now = before.probabilities[chosen], after.probabilities[chosen]
        rows.append(
            {
                "profession": profession,
                "gap": float((was.max(1) - was.min(1)).mean()),
                "before": was.mean(0).tolist(),
                "after": now.mean(0).tolist(),
                "prompts": int(chosen.sum()),
            }
        )
    return sorted(rows, key=lambda row: -row["gap"])[:count]


@dataclass(frozen=True)
class _Operation:
    """What every edit of one run shares: the edit itself and its controls go through the same two steps."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    directory: Path
    folder: Folder
    progress: Progress
    recipe: str
    ids: Sequence[Sequence[int]]
    prompts: PromptSet
    given: Material
    streams: dict[int, ResidualCache]
    before: Measured

    def _start(self, case: Variant) -> int | None:
        """The block whose kept stream this edit can start from, or None for the plain loop."""
        if case.blocks is None or not self.settings.prefix_cache:
            return None
        start = min(case.blocks)
        reason = "dropout is on" if self.settings.dropout else why_not(self.model, self.streams[start])
        if reason:
            self.folder.log({"note": f"prefix cache off for {case.name}: {reason}"})
            self.progress.say(f"prefix cache off for {case.name}: {reason}")
            return None
        return start

    def make(self, case: Variant) -> tuple[edit.Trained, deltas.Delta]:
        """Train ``case`` and write it as a delta of the checkpoint on disk."""
        settings = self.settings
        plan = Plan(
            settings.lr,
            settings.epochs,
            settings.batch_size,
            settings.optimizer,
            dropout=settings.dropout,
        )
        if settings.objective == "as_printed":
            self.progress.say(
                "objective as_printed (Eq. 5) is smallest when the model says neither word: watch the mass"
            )
        start = self._start(case)
        with self.progress.work(f"train {case.name}", steps_of(len(self.ids), plan)) as step:
            trained = edit.fine_tune(
                self.model,
                self.ids,
                word_ids(self.tokenizer, case.words),
                plan,
                blocks=case.blocks,
                part=case.part,
                objective=settings.objective,
                seed=settings.seed,
                prefix=None if start is None else self.streams[start],
                state=self.folder.state(f"{case.name}.pt"),
                log=lambda row: self.folder.log({"edit": case.name, **row}),
                step_done=step,
            )
        made = deltas.make(
            trained.differences, self.directory, base=settings.model, recipe=self.recipe, seed=settings.seed
        )
        return trained, made

    def _measure(self, case: Variant) -> Measured:
        start = self._start(case)
        prefixes = None if start is None else self.before.prefixes[start]
        return measure(self.model, self.given, prefixes=prefixes, progress=self.progress, label=f"measure {case.name}")

    def as_saved(self, case: Variant, delta_file: Path) -> tuple[Measured, dict[str, Any]]:
        """Apply the file to the checkpoint on disk, and measure with the tensors read back from there."""
        saved = self.folder.path / "checkpoint"
        shutil.rmtree(saved, ignore_errors=True)  # of an interrupted run
        report = disk.apply(delta_file, self.directory, saved, rounding=self.settings.rounding, seed=self.settings.seed)
        delta = deltas.Delta.load(delta_file)
        with tensors_of(self.model, delta, saved):
            after = self._measure(case)
        if not self.settings.keep_checkpoint:
            shutil.rmtree(saved)
        return after, {
            "rounding": report.rounding,
            "entries": report.entries,
            "changed": report.changed,
            "lost": report.lost,
        }

    def control(self, name: str, count: int, main: Variant) -> dict[str, Any]:
        """The same measurements for a control; edits are rounded as the checkpoint's dtype would round them."""
        case = _control(name, self.settings, self.prompts.words, count, main)
        if case is None:
            asked = material(
                self.model,
                self.tokenizer,
                self.prompts,
                split=self.settings.split,
                seed=self.settings.split_seed,
                suites=("genbias", "genhint"),
                preamble=self.settings.preamble,
            )
            seen = measure(self.model, asked, progress=self.progress, label="measure pb")
            return {"after": plain(seen.scores), "edit": {"preamble": self.settings.preamble}}
        trained, delta = self.make(case)
        rounding, seed = self.settings.rounding, self.settings.seed
        with delta.applied(self.model, rounding=rounding, seed=seed, as_stored=True):
            after = self._measure(case)
        blocks = list(case.blocks) if case.blocks is not None else "all"
        return {
            "after": plain(after.scores),
            "edit": {
                "blocks": blocks,
                "part": case.part,
                "words": list(case.words),
                "parameters": trained.parameters,
            },
        }
