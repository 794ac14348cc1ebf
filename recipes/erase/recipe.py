"""The steps of an erasure's run: fit and fold, or put a projection before the head; a random one beside."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from recipes.erase.settings import Settings
from surgery.data import genbias, genhint
from surgery.data.prompts import PromptSet, load_prompt_set
from surgery.data.rows import sample
from surgery.edits.erasure import closed_form, erase, erase_last, writers_of
from surgery.edits.erasure.dama_values import Search, fit_dama, subjects
from surgery.edits.erasure.folding import Fit
from surgery.edits.kept_streams import KeptStreams
from surgery.edits.places import choose
from surgery.errors import SurgeryError
from surgery.forward.residual_cache import why_not
from surgery.forward.tokens import Ids, encode, word_ids
from surgery.locate.objectives import words_objective
from surgery.metrics.material import fewer, material
from surgery.modules.projection import Projection
from surgery.operation import Edit, Made, Operation, Run, Tracking, Where, control, operation
from surgery.runs import summary
from surgery.runs.caveats import caveats
from surgery.runs.report import compared, write_page
from surgery.runs.summary import Scores
from surgery.runs.words_report import find

SOURCES = {
    "leace": "LEACE (arXiv 2306.03819), the library concept-erasure",
    "inlp": "INLP (arXiv 2004.07667), logistic regressions where the authors take support vector machines",
    "sentence_debias": "SentenceDebias (arXiv 2007.08100), hint prompts where the authors take sentences from corpora",
    "dama": "DAMA (arXiv 2310.18913), its values sought in each block, without whitening by Wikipedia",
}


DAMA_PROMPTS = 64


@dataclass(frozen=True, kw_only=True)
class Summary(summary.Summary):
    """``run.json`` of an erasure: also the words, the method and where it comes from."""

    words: Sequence[str]
    method: str
    source: str


def run(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: Settings, **where: Unpack[Where]) -> Run:
    """Fit, write the delta, apply it to the checkpoint, measure that; ``model`` stays as it was.

    Raises ``SurgeryError`` for other than two words, a prompt set without hints, and a block that has no matrix to fold
    a projection into.
    """
    prompts = load_prompt_set(settings.prompt_set)
    if len(prompts.words.words) != 2:
        raise SurgeryError(f"erase: the prompt set {prompts.name} has {len(prompts.words.words)} words, expected two")
    if settings.method == "dama" and settings.site != "mlp":
        raise SurgeryError(f"erase: DAMA projects what MLPs write; got site {settings.site!r}, expected mlp")
    unknown = next((name for name in settings.controls if name != "random"), None)
    if unknown is not None:
        raise SurgeryError(f"controls: got {unknown!r}, expected random or none")
    work = _Work(model, tokenizer, settings, prompts, _writers(model, settings))
    asked = material(model, tokenizer, prompts, seed=settings.split_seed, texts=settings.neutral or None)
    asked = fewer(asked, {"genbias": settings.test_rows, "genhint": settings.test_rows}, settings.seed)
    with operation("erase", model, settings, **where) as op:
        if settings.block == "auto" and settings.site != "head":
            train = genbias.records("profession", "train", settings.split_seed, prompts)
            ids = encode(tokenizer, [row.text for row in train])
            located = op.located(tokenizer, words_objective(model, ids, asked.words), len(ids), of=(ids, asked.words))
            work = replace(work, writers=_writers(model, settings, located["block"]), located=located)
        first = work.first
        keep = [first] if first else []
        streams = op.shared.get("streams", (asked, keep), partial(KeptStreams, model, (), asked, op.progress, keep))
        before = op.once("before", partial(streams.before, "measure before"), of=(asked, keep))["scores"]
        kept = streams.measured.get(first)  # none in a continued run, which measures by plain passes
        start = first if kept and why_not(model, next(iter(kept.values()))) is None else None
        look = lambda: streams.measure("measure", start=start)["scores"]  # noqa: E731
        trains = [f"{name}.weight" for name in work.writers]
        steps = max(1, len(work.writers))
        carry_out = partial(op.carry_out, measure=look, trains=trains, steps=steps)
        main = carry_out(settings.method, partial(work.make, op, settings.method, None))
        ranks = main.edit.details["ranks"]
        found = {name: carry_out(name, partial(work.make, op, name, ranks), keep=False) for name in settings.controls}
        random = found["random"].measured if found else None
        done = Summary(
            **op.about(main),
            verdict=_verdict(SOURCES[settings.method], main.edit, before, main.measured, random),
            before=before,
            after=main.measured,
            words=list(prompts.words.words),
            method=settings.method,
            source=SOURCES[settings.method],
            controls={name: control(one, one.measured) for name, one in found.items()},
        )
        return op.finish(done, _report)


def _writers(model: PreTrainedModel, settings: Settings, located: int | None = None) -> list[str]:
    """The modules to fold into, those of the block that auto found; none where the head's input is projected."""
    if settings.site == "head":
        return []
    count = len(anatomy.find(model).blocks)
    blocks = choose(settings.block if located is None else located, count, settings.seed)
    parts = ["attention", "mlp"] if settings.site == "both" else [settings.site]
    return writers_of(model, range(count) if blocks is None else blocks, parts)


@dataclass(frozen=True)
class _Work:
    """What the projections are fitted on, and where they go."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    prompts: PromptSet
    writers: Sequence[str]
    located: Mapping[str, Any] | None = None

    @property
    def first(self) -> int:
        """The first block that changes; the last one where the head's input is projected."""
        return min(map(self._block_of, self.writers), default=len(anatomy.find(self.model).blocks) - 1)

    def _block_of(self, writer: str) -> int:
        """The number of the block that a module stands in."""
        blocks = enumerate(anatomy.find(self.model).blocks)
        return next(number for number, block in blocks if writer.startswith(f"{block.name}."))

    def make(self, op: Operation, method: str, ranks: Mapping[str, int] | None, track: Tracking) -> Made:
        """The edit by ``method``; ``ranks`` are those of the run's own edit, which the random control takes over."""
        with_step = track["step_done"]
        if method == "dama":
            given, fit = self._dama()
        else:
            given, fit = self._pairs(method, ranks or {})
        if not self.writers:
            projection = erase_last(self.model, given, fit)
            edit = Edit(
                blocks=None, part="the head's input", objective=method, details=self._details(projection, given)
            )
            return Made({}, edit, "module", projection)
        made = erase(self.model, given, self.writers, fit, step=with_step)
        if made.mean_lost:
            op.note(f"{method}: {len(made.mean_lost)} matrices have no bias, so the erased mean is not put back")
        details = {"ranks": made.ranks, "prompts": len(given), "mean_lost": len(made.mean_lost)}
        details |= {"located": self.located} if self.located else {}
        edit = Edit(
            blocks=sorted({self._block_of(name) for name in made.ranks}),
            part=self.settings.site,
            objective=method,
            parameters=made.parameters,
            details=details,
        )
        return Made(made.differences, edit)

    def _pairs(self, method: str, ranks: Mapping[str, int]) -> tuple[Ids, Fit]:
        """Hint prompts in pairs that differ in the hint alone, and what fits a projection to the states there."""
        rows = genhint.records("train", self.settings.split_seed, both=True, prompts=self.prompts)
        pairs = [rows[place : place + 2] for place in range(0, len(rows), 2)]
        chosen = [row for pair in sample(pairs, self.settings.prompts, self.settings.seed) for row in pair]
        labels = torch.tensor([row.hint for row in chosen])
        width = anatomy.find(self.model).d_model
        usual = {"inlp": min(80, max(1, width // 8))}.get(method, 1)

        def fit(name: str, states: Tensor) -> Projection:
            rank = ranks.get(name, self.settings.rank or usual)
            return closed_form.fit(method, states, labels, rank=rank, seed=self.settings.seed)

        return encode(self.tokenizer, [row.text for row in chosen]), fit

    def _dama(self) -> tuple[Ids, Fit]:
        rows = genbias.records("profession", "train", self.settings.split_seed, self.prompts)
        chosen = sample(rows, self.settings.prompts or DAMA_PROMPTS, self.settings.seed)
        given = subjects(self.tokenizer, [row.text for row in chosen], [row.profession for row in chosen])
        words = word_ids(self.tokenizer, self.prompts.words.words)
        rank = self.settings.rank or max(1, anatomy.find(self.model).d_model // 16)
        search = Search(steps=self.settings.search_steps)
        return given.ids, fit_dama(self.model, given, words, rank=rank, search=search)

    def _details(self, projection: Projection, given: Ids) -> dict[str, Any]:
        return {"ranks": {"ln_final": projection.settings["rank"]}, "prompts": len(given), "mean_lost": 0}


def _verdict(source: str, edit: Edit, before: Scores, after: Scores, random: Scores | None) -> list[str]:
    """What went, from where, and what it did to the words' gap; a random projection of the same rank beside."""
    ranks = edit.details["ranks"]
    lines = [
        f"{source}: {sum(ranks.values())} directions at {len(ranks)} places ({edit.part}), from "
        f"{edit.details['prompts']} prompts."
    ]
    for name, place in (("Relative gap", "relative_gap"), ("AFGB", "afgb"), ("Mass of the words", "mass")):
        was, now = (find(scores, ("genbias", place, "all")) for scores in (before, after))
        drawn = find(random, ("genbias", place, "all")) if random else None
        if was and now:
            beside = f"; with random directions {drawn['value']:.3f}" if drawn else ""
            lines.append(f"{name}: {was['value']:.3f} to {now['value']:.3f}{beside}.")
    return [*lines, *caveats(before, after)]


def _report(folder: Path, summary: dict[str, Any], recipe: str) -> None:
    columns = {"before": summary["before"], "after": summary["after"]}
    columns |= {name: each["after"] for name, each in summary["controls"].items()}
    tables = [compared(columns, ideal=False)]
    write_page(folder, summary, recipe, lines=summary["verdict"], tables=tables, figures={})
