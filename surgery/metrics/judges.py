"""The judges of a model: which suites measure it, and on what; what is compared is asked the same rows."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.metrics import lm_eval
from surgery.metrics.locality import Reference
from surgery.metrics.sentences import check_scorer
from surgery.metrics.suite import SUITES, check_suites, evaluate_suites, material, measure
from surgery.progress import Progress


@dataclass(frozen=True, kw_only=True)
class Judges:
    """Suites, and what they are asked: a prompt set, a data folder, the scorer of sentences, so many rows."""

    suites: tuple[str, ...]
    prompts: str = "genbias"
    """The prompt set of the suites that need no data folder."""
    folder: str | Path = ""
    """The data folder of the others."""
    split: str = "profession"
    part: str = "test"
    texts: Path | None = None
    """Of perplexity, instead of the shipped ones."""
    scorer: str = "bias-bench"
    """Of stereoset and crows_pairs."""
    limit: int = 0
    """So many rows of each file of the data folder, drawn by ``seed``; 0 for all."""
    seed: int = 0
    tasks: tuple[str, ...] = ()
    """Of lm-eval."""

    @property
    def shipped(self) -> tuple[str, ...]:
        """The suites that need no data folder."""
        return tuple(name for name in self.suites if name in SUITES)

    @property
    def others(self) -> tuple[str, ...]:
        """The suites that read the data folder."""
        return tuple(name for name in self.suites if name not in SUITES)

    def check(self, where: str) -> None:
        """Name what would be missing later. ``where`` the folder is said, such as "--data". Raises ``SurgeryError``."""
        check_suites(self.others)
        check_scorer(self.scorer)
        if self.tasks:
            lm_eval.check_installed()
        if self.others and not (self.folder and Path(self.folder).is_dir()):
            raise SurgeryError(
                f"suite {self.others[0]}: {where} {str(self.folder)!r} is no folder; give the one that holds its files"
            )
        load_prompt_set(self.prompts)

    def reference(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, progress: Progress
    ) -> Reference | None:
        """The distributions of ``model`` to which a later measurement has its KL; None where locality is not asked."""
        if "locality" not in self.suites:
            return None
        given = material(model, tokenizer, load_prompt_set(self.prompts), suites=("locality",))
        return measure(model, given, progress=progress, label="measure the untouched model").reference

    def judge(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        preamble: str = "",
        reference: Reference | None = None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Every number of ``model`` as it is now, by suite, as ``Metric`` objects, which can be paired.

        ``preamble`` is put before prompts; ``reference`` gives locality its KL. Raises ``SurgeryError``.
        """
        scores: dict[str, Any] = {}
        if self.shipped:
            given = material(
                model,
                tokenizer,
                load_prompt_set(self.prompts),
                split=self.split,
                part=self.part,
                texts=self.texts,
                suites=self.shipped,
                preamble=preamble,
            )
            scores |= measure(model, given, reference=reference, progress=progress).scores
        options: Mapping[str, Any] = {name: {"scorer": self.scorer} for name in ("stereoset", "crows_pairs")}
        rows: Any = {"limit": self.limit, "seed": self.seed}
        scores |= evaluate_suites(
            model, tokenizer, self.others, self.folder, **rows, progress=progress, options=options
        )
        if self.tasks:
            scores["lm_eval"] = lm_eval.evaluate(model, tokenizer, list(self.tasks), **rows)
        return scores
