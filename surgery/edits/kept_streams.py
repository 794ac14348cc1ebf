"""The streams that enter the edited blocks, kept for training and measuring; computed again where a run lacks them.

The blocks before an edit never change, so a training step and a measurement after it start from these streams. They
are too large to lie in a run's folder: a continued run computes them again when something is left to train or measure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from surgery.forward.next_token import next_words
from surgery.forward.residual_cache import ResidualCache
from surgery.metrics.locality import Reference
from surgery.metrics.material import Material
from surgery.metrics.suite import Measured, measure, plain
from surgery.progress import Progress


@dataclass
class KeptStreams:
    """Streams entering the blocks ``keep``: of the training prompts ``ids``, and of each suite of ``asked``."""

    model: PreTrainedModel
    ids: Sequence[Sequence[int]]
    asked: Material
    progress: Progress
    keep: Sequence[int] = ()
    trained: dict[int, ResidualCache] = field(default_factory=dict)
    measured: dict[int, dict[str, ResidualCache]] = field(default_factory=dict)
    reference: Mapping[str, Any] | None = None
    """What ``before`` gave under that name."""

    def training(self, block: int, *, edited: bool = False) -> ResidualCache:
        """The stream of the training prompts that enters ``block``, one of ``keep``.

        ``edited``: the model is now edited from ``block`` on, so that no other stream may be taken from it.
        """
        if block not in self.trained:
            keep = [block] if edited else self.keep
            with self.progress.work("keep streams", len(self.ids)) as step:
                # Without stems, as a ranking keeps them: a continued run ends in the same bytes.
                asked: Any = {"keep": keep, "stems": False, "step": step}
                self.trained |= next_words(self.model, self.ids, self.asked.words, **asked).prefixes
        return self.trained[block]

    def before(self, label: str) -> dict[str, Any]:
        """``measure`` of the model before any edit; the streams that enter ``keep`` are kept on the way.

        Its ``"reference"`` (or None) is what later measurements have their KL to; a continued run gives it back.
        """
        found = measure(self.model, self.asked, keep=self.keep, progress=self.progress, label=label)
        self.measured |= found.prefixes
        return _values(found) | {"reference": found.reference and found.reference.to_dict()}

    def measure(self, label: str, *, start: int | None) -> dict[str, Any]:
        """``{"scores": ..., "probabilities": P(word) by prompt, or None}`` for JSON, from block ``start`` on.

        ``start`` is not behind the first edited block, so that what enters it is the same before and after the edit:
        where its streams were not kept, as in a continued run, this measurement keeps them on its way.
        """
        keep = [start] if start and start not in self.measured else []
        prefixes = None if start is None else self.measured.get(start)
        known = Reference.of(self.reference) if self.reference else None
        about: Any = {"prefixes": prefixes, "reference": known, "progress": self.progress, "label": label}
        found = measure(self.model, self.asked, keep=keep, **about)
        self.measured |= found.prefixes
        return _values(found)


def _values(found: Measured) -> dict[str, Any]:
    chances = None if found.probabilities is None else found.probabilities.tolist()
    return {"scores": plain(found.scores, samples=True), "probabilities": chances}
