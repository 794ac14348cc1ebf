"""The steps of a BIAS DIFF run: warm up, score, select, mitigate, with every control."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.bias_diff import dataset
from recipes.bias_diff import report as pages
from recipes.bias_diff.judging import judge
from recipes.bias_diff.measuring import beyond, injected
from recipes.bias_diff.measuring import removed as share
from recipes.bias_diff.phases import Phases
from recipes.bias_diff.settings import Settings
from recipes.bias_diff.variants import Variant, best_of, cases_of
from surgery.attribution.scoring import InfluenceConfig
from surgery.data import mixtures
from surgery.edits.supervised import Lora, target_names
from surgery.edits.warmup import usual_targets
from surgery.operation import Edit, Outcome, OwnPart, Run, Where, control, operation
from surgery.runs import summary
from surgery.runs.folder import Folder
from surgery.runs.sharing import untrained


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of a BIAS DIFF run: also the warm-up, what was selected, and how much of the rise was removed."""

    words: tuple[str, ...] = ()
    warmed: Mapping[str, Any]
    injected: Mapping[str, Any] | None
    removed: Mapping[str, Any]
    selection: Mapping[str, Any]
    selected: Mapping[str, Any]
    delta_from_warmed: Mapping[str, Any]
    warmed_delta: Mapping[str, Any] | None


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Warm up, score, select, mitigate, write both deltas, measure what is saved; ``model`` stays as it was.

    Everything is left in the folder ``out``. Raises ``SurgeryError``; see ``surgery.operation`` for interruptions.
    """
    lora = _lora(model, settings)
    settings.check()
    InfluenceConfig(settings.attribute_at, tuple(settings.attribute_targets), settings.attribute_optimizer)
    target_names(model, lora.targets)
    with operation("bias_diff", model, settings, **where) as op:
        material = _material(settings, op.folder)
        cases = cases_of(settings.mitigation, settings.select_by, settings.controls, material)
        work = Phases(op, tokenizer, settings, lora, material)
        dataset.refuse_shared(work.rows, [*work.probes.texts, *work.probes.antis])
        op.note(work.note)
        before = op.once("before", partial(work.measure, "before"), of=untrained(settings, "mitigation"))
        warmed = work.warm()
        scores = work.scores
        rows, selection, words = judge(material, scores, share=settings.top, seed=settings.seed)
        by = best_of(selection) if settings.select_by == "best" else settings.select_by

        def carry_out(case: Variant, keep: bool = False) -> Outcome:
            if case.mitigation == "prompt":
                return Outcome(Edit(part="prompt", parameters=0), op.once("prompt", work.prompted))
            return work.carry_out(case, rows[by if case.by == "selected" else case.by], keep=keep)

        main = carry_out(cases[0], keep=True)
        found = {case.name: carry_out(case) for case in cases[1:]}
        pages.write_scores(op.folder.path / "scores.jsonl", material, scores, rows[by])
        method = by if by in scores["rows"] else "influence"
        first = np.argsort(-scores["rows"][method], kind="stable")[: settings.tokens_of].tolist()
        texts = pages.strongest(op.folder.path / "tokens.html", material, work.strongest(first, method), method)
        removed = partial(share, material, before, warmed.measured)
        summary = Summary(
            **op.about(replace(main, edit=_with_warm_up(main.edit, warmed.edit))),
            before=before["scores"],
            warmed=warmed.measured["scores"],
            after=main.measured["scores"],
            injected=injected(before, warmed.measured),
            removed=removed(main.measured),
            selection=selection,
            selected={"by": by, "rows": int(rows[by].sum()), "of": len(material.texts), "top": settings.top},
            own_part=_own_part(cases[0], found),
            delta_from_warmed=op.once("from-warmed", dict),
            warmed_delta=warmed.delta,
            controls={
                name: control(
                    one,
                    one.measured["scores"],
                    removed=removed(one.measured),
                    beyond=beyond(main.measured, one.measured),
                )
                for name, one in found.items()
            },
        )
        summary = replace(summary, verdict=pages.said(summary.to_dict(), work.note, words))
        done = op.finish(summary, partial(pages.write_report, texts))
        if settings.keep_checkpoint:
            (op.folder.path / "state" / "warmed").rename(op.folder.path / "warmed")
        return done


def _own_part(case: Variant, found: Mapping[str, Outcome]) -> OwnPart | None:
    """What the selection does: beside the same with random texts, where that was asked for."""
    random = f"{case.mitigation}:random"
    told = ["crows_pairs.margin", "crows_pairs.metric", "perplexity"]
    return OwnPart("the selection", random, told) if random in found else None


def _with_warm_up(edit: Edit, warm_up: Edit) -> Edit:
    return replace(edit, details={**edit.details, "warm_up": warm_up.to_dict()})


def _lora(model: PreTrainedModel, settings: Settings) -> Lora:
    targets = tuple(settings.target_modules) or usual_targets(model)
    return Lora(settings.rank, settings.alpha, targets, settings.lora_dropout)


def _material(settings: Settings, folder: Folder) -> dataset.Material:
    if settings.file:
        found = dataset.of_files(
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
            how: Any = {"seed": settings.seed, "rows": settings.train_rows, "probe": settings.probe_from}
            mixtures.build(settings.mixture, Path(settings.data), made, **how)
        found = dataset.of_folder(made, f"{settings.mixture}, seed {settings.seed}")
    return found.limited(probe=settings.probe_pairs, test=settings.test_pairs)
