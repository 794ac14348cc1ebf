"""Three distances from what was trained on: the set's own templates, unseen ones, and other shapes of text."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from recipes.equalize.dataset import of_people
from surgery.data import genbias, shapes
from surgery.data.genbias import Prompt
from surgery.data.genhint import HintPrompt
from surgery.data.prompts import PromptSet
from surgery.data.rows import sample
from surgery.forward.next_token import next_words
from surgery.forward.residual_cache import ResidualCache
from surgery.forward.tokens import Ids, encode
from surgery.metrics import genbias as genbias_metric
from surgery.metrics import genhint as genhint_metric
from surgery.metrics import material
from surgery.metrics.locality import Reference
from surgery.metrics.material import Material
from surgery.metrics.metric import Metric
from surgery.metrics.suite import measure, plain
from surgery.progress import Progress

UNSEEN = 60  # templates of the test part
EACH = {"unseen templates": 3, "unseen hints": 2, **dict.fromkeys(shapes.OTHERS, 1)}

Rows = Sequence[Prompt | HintPrompt]
Far = dict[str, tuple[Rows, Ids]]  # by kind of text


@dataclass
class Measuring:
    """The suites, and prompts further and further from the training ones; streams before an edit are kept.

    The first measurement is of the untouched model: its streams are kept, and its distributions, to which the later
    ones have their KL.
    """

    model: PreTrainedModel
    asked: Material
    far: Far
    words: Sequence[int]
    progress: Progress
    keep: Sequence[int] = ()
    streams: dict[int, ResidualCache] = field(default_factory=dict)
    suites: dict[int, dict[str, ResidualCache]] = field(default_factory=dict)
    reference: Reference | None = None
    untouched: bool = True
    """Whether the untouched model is still to be measured."""
    probabilities: Any = None
    """P(word) by prompt of the last measurement, or None."""

    def before(self) -> dict[str, Any]:
        """The scores of the untouched model, and what a run that goes on later needs of it (``take_up``)."""
        return self.with_probabilities("measure before") | self.kept()

    def kept(self) -> dict[str, Any]:
        """What ``take_up`` needs of a first measurement."""
        return {"reference": self.reference.to_dict() if self.reference else None}

    def take_up(self, before: Mapping[str, Any]) -> None:
        """Go on behind ``before``, measured now or by an interrupted run."""
        self.untouched = False
        self.reference = Reference.of(before["reference"]) if before["reference"] else None

    def with_probabilities(self, label: str, start: int = 0) -> dict[str, Any]:
        """``{"scores": ..., "probabilities": P(word) by prompt, or None}`` for JSON."""
        scores = self.scores(label, start)
        chances = self.probabilities
        return {"scores": scores, "probabilities": None if chances is None else chances.tolist()}

    def scores(self, label: str, start: int = 0) -> dict[str, Any]:
        """Every score as plain values, from the kept streams entering block ``start``.

        Where there are none, as in a continued run, they are kept now: an edit from ``start`` on leaves them alone.
        """
        keep = self.keep if self.untouched else [start] if start and start not in self.suites else ()
        found = measure(
            self.model,
            self.asked,
            keep=keep,
            prefixes=self.suites.get(start),
            reference=self.reference,
            progress=self.progress,
            label=label,
        )
        self.untouched, self.reference = False, found.reference
        self.suites |= found.prefixes
        self.probabilities = found.probabilities
        values = plain(found.scores, samples=True)
        if not self.far:
            return values
        far: dict[str, Any] = {}
        ids = [row for _, own in self.far.values() for row in own]  # in one pass, so that their trees are full
        with self.progress.work(f"{label}, other shapes", len(ids)) as step:
            seen = next_words(self.model, ids, self.words, keep=keep, prefix=self.streams.get(start), step=step)
        self.streams |= seen.prefixes
        ends = np.cumsum([len(own) for _, own in self.far.values()])
        chances = np.split(seen.probabilities, ends[:-1])
        for (kind, (rows, _)), own in zip(self.far.items(), chances, strict=True):
            told = _scored(own, rows, f"{kind}, {len(rows)} prompts, professions unseen")
            far[kind] = plain(told, samples=True)
        return values | {"distances": far}


def _scored(probabilities: Float[np.ndarray, "prompts words"], rows: Rows, data: str) -> dict[str, Metric]:
    """Gap, AFGB and mass of prompts without a hint, UB-Score and mass of those with one."""
    if isinstance(rows[0], HintPrompt):
        return genhint_metric.score(probabilities, cast(Sequence[HintPrompt], rows), data=data)
    found = genbias_metric.score(probabilities, cast(Sequence[Prompt], rows), data=data)
    return {name: scales["all"] for name, scales in found.items()}


def fewer(asked: Material, far: Far, limit: int, texts: int, seed: int) -> tuple[Material, Far]:
    """At most ``limit`` prompts of each set, drawn by the seed, templates in their proportions; 0 takes all.

    So are at most ``texts`` sentences of each set of perplexity.
    """

    def drawn(rows: Sequence[Any]) -> list[int]:
        return sample(range(len(rows)), limit, seed, lambda place: rows[place].template)

    asked = material.fewer(asked, {"genbias": limit, "genhint": limit, "perplexity": texts}, seed)
    return asked, {
        kind: ([rows[at] for at in drawn(rows)], tuple(ids[at] for at in drawn(rows)))
        for kind, (rows, ids) in far.items()
    }


def distances(tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, seed: int, part: str = "test") -> Far:
    """Prompts of ``part`` whose templates and people training never sees, and kinds of text that it never sees."""
    if not of_people(prompts):
        return {}
    own = dict.fromkeys(row.profession for row in genbias.records("profession", part, seed, prompts))
    people = [*own, *shapes.people(part)]
    fill = partial(shapes.prompts, subjects=people)
    found = {"unseen templates": fill(shapes.shapes(part, UNSEEN), each=EACH["unseen templates"])}
    found |= {kind: fill(shapes.others(kind, part), each=EACH[kind]) for kind in shapes.OTHERS}
    rows: dict[str, Rows] = dict(found)
    if prompts.words.hints:
        rows["unseen hints"] = _hints(prompts.words.words, prompts.words.hints, people, part)
    return {kind: (each, encode(tokenizer, [row.text for row in each])) for kind, each in rows.items()}


def _hints(words: Sequence[str], hints: Sequence[str], people: Sequence[str], part: str) -> list[HintPrompt]:
    """Each person in two hint templates that training never sees, templates and hints going round."""
    templates, found = shapes.hint_templates(part), []
    for turn in range(len(people) * EACH["unseen hints"]):
        template, hint = templates[turn % len(templates)], (turn + turn // len(templates)) % len(words)
        person = people[turn // EACH["unseen hints"]]
        text = shapes.fill(template, person).replace("{hint}", hints[hint])
        found.append(HintPrompt(text, person, template, hint, hints[hint], words[hint]))
    return found
