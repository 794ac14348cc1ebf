"""A round of a tuning: settings trained on the same texts and judged on the same rows beside the same baseline."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from hooks import anatomy
from recipes.equalize.candidates import Candidate
from recipes.equalize.measuring import Measuring
from recipes.equalize.settings import Settings
from recipes.equalize.work import Variant, Work, blocks_of, word_terms
from surgery.data.prompts import PromptSet
from surgery.data.shares import check_shares, read_shares
from surgery.delta import Delta, check_edit
from surgery.edits.equalize import Prepared, prepare_each
from surgery.errors import Diverged
from surgery.forward.precision import matrix_products
from surgery.operation import Operation
from surgery.runs.paired import differences, without_samples
from surgery.runs.tuning import Tried

SCALES = (1.0, 1.1)
"""By which what was learnt is multiplied where it is measured at several scales, and then by one of ``FURTHER``."""
FURTHER = (0.9, 1.2)
"""A step on from the better of ``SCALES``."""


@dataclass
class Round:
    """Candidates trained on the same texts and judged on the same rows; targets and streams are made when needed."""

    op: Operation
    name: str
    settings: Settings
    prompts: PromptSet
    ids: Mapping[str, Any]
    words: Sequence[int]
    measuring: Measuring
    before: Mapping[str, Any]
    """Scores of the untouched model with their bootstrap samples, so that those of an edit can be paired with them."""
    starts: Sequence[int]
    """First blocks whose streams are wanted."""
    scaled: bool = False
    """Whether each is measured at several scales: it takes no training."""
    given: dict[int, Prepared] = field(default_factory=dict)

    def try_all(self, candidates: Sequence[Candidate]) -> dict[Candidate, Tried]:
        """Train and judge those that were not done before; the results of all whose training stayed finite."""
        found = {}
        for one in candidates:
            work, variant = self._work(one)
            try:
                done = self.op.once(f"tried-{variant.name.replace(':', '')}", partial(self._try, one, work, variant))
            except Diverged as error:
                self.op.note(f"{variant.name}: left out: {error}")
                continue
            for measured in done["measured"]:
                scaled = replace(one, scale=measured["scale"])
                found[scaled] = self._tried(scaled, work, done["edit"], measured)
                self.op.progress.say(f"{self.name}: {scaled.name}: {found[scaled].said}")
        return found

    def _try(self, one: Candidate, work: Work, variant: Variant) -> dict[str, Any]:
        """Train once, and measure that in memory, rounded as the checkpoint would be, at one scale or at three."""
        check_edit(self.op.model, work.trains(variant), self.op.directory, out=self.op.folder.path)
        edit, delta = work.learnt(variant.name, variant, self._given(work, variant))
        done: dict[str, Any] = {"edit": edit.to_dict(), "measured": []}
        for scale in SCALES if self.scaled else SCALES[:1]:
            done["measured"].append(self._measured(delta, variant, scale))
        if self.scaled:
            as_learnt, enlarged = (self._tried(one, work, done["edit"], each).price for each in done["measured"])
            done["measured"].append(self._measured(delta, variant, FURTHER[enlarged < as_learnt]))
        return done

    def _measured(self, delta: Delta, variant: Variant, scale: float) -> dict[str, Any]:
        with self.op.edited(delta, scale):
            scores = self.measuring.scores(f"measure {variant.name}", variant.start)
        pairs = differences({"before": self.before, "after": scores, "controls": {}}).get("before", {})
        return {"scale": scale, "after": without_samples(scores), "pairs": pairs}

    def _tried(self, one: Candidate, work: Work, edit: Mapping[str, Any], measured: Mapping[str, Any]) -> Tried:
        scale = measured["scale"] * work.scale
        edit = {**edit, **({"scale": scale} if scale != 1 else {})}
        changes, before = one.changes(self.settings), without_samples(self.before)
        return Tried(one.name, self.name, changes, edit, before, measured["after"], measured["pairs"])

    def _work(self, one: Candidate) -> tuple[Work, Variant]:
        settings = self.settings.model_copy(update=one.changes(self.settings))
        words = self.prompts.words.words
        shares = check_shares(words, read_shares(settings.shares, words))
        terms = word_terms(settings, self.ids, self.words, shares)
        count = len(anatomy.find(self.op.model).blocks)
        variant = Variant(
            f"{self.name}: {one.name}", blocks_of(settings.block, count, settings.seed), settings.block_part
        )
        about: Any = {"words": self.words, "scale": settings.scales[0], "asked": 0}
        return Work(self.op, settings, terms, self.measuring.scores, **about), variant

    def _given(self, work: Work, variant: Variant) -> Prepared:
        """Targets and stream; those of all places are made together."""
        if variant.start not in self.given:
            missing = sorted({variant.start, *self.starts} - self.given.keys())
            total = sum(len(term.ids) for term in work.terms)
            rounded = matrix_products(self.settings.matmul)
            with self.op.progress.work(f"targets of {self.name}", total) as step, rounded:
                self.given |= prepare_each(self.op.model, work.terms, missing, step=step)
        # Other weights of the same terms: their targets and streams are the same.
        return replace(self.given[variant.start], terms=tuple(work.terms))
