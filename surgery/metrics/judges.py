"""The judges of a model: which suites measure it, and on what; what is compared is asked the same rows."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.errors import Note
from surgery.catalogue import FOLDER_SUITES, SUITES, check_lm_eval, check_scorer, check_suites, check_words_as
from surgery.data.genbias import PARTS, SEED, SPLITS
from surgery.data.neutral import sentences
from surgery.data.prompts import load_prompt_set
from surgery.delta.metadata import recipes_of
from surgery.errors import SurgeryError
from surgery.metrics.ledger import LEDGER, ROWS, absent
from surgery.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.metrics.locality import Reference
    from surgery.metrics.material import Material
    from surgery.metrics.suite import Prefixes


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
    words_as: str = "tokens"
    """Whether each compared word is one token, or scored whole as a continuation."""
    texts: Path | None = None
    """Of perplexity, instead of the shipped ones."""
    scorer: str = "bias-bench"
    """Of stereoset and crows_pairs."""
    limit: int = 0
    """So many rows of each suite and each file of the data folder, drawn by ``seed``; 0 for all."""
    rows: Mapping[str, int] = field(default_factory=dict)
    """The same by suite, instead of ``limit``."""
    seed: int = 0
    split_seed: int = SEED
    """Of the split into parts, so that an edit's own test part is unseen; that of the recipe."""
    tasks: tuple[str, ...] = ()
    """Of lm-eval."""

    @property
    def shipped(self) -> tuple[str, ...]:
        """The suites that need no data folder."""
        return tuple(name for name in self.suites if name in SUITES)

    @property
    def others(self) -> tuple[str, ...]:
        """The suites that read the data folder, or have the model write."""
        return tuple(name for name in self.suites if name not in SUITES)

    @property
    def _of_shipped(self) -> dict[str, int]:
        return dict.fromkeys(self.shipped, self.limit) | dict(self.rows)

    def check(self, where: str) -> None:
        """Name what would be missing later. ``where`` the folder is said, such as "--data". Raises ``SurgeryError``."""
        check_suites(self.others)
        check_scorer(self.scorer)
        check_words_as(self.words_as)
        if self.tasks:
            check_lm_eval()
        wanted = [name for name in self.others if name in FOLDER_SUITES]
        if wanted and not (self.folder and Path(self.folder).is_dir()):
            raise SurgeryError(
                f"suite {wanted[0]}: {where} {str(self.folder)!r} is no folder; give the one that holds its files"
            )
        if missing := absent(wanted, self.folder):
            raise SurgeryError("; ".join(f"suite {name}: {reason}" for name, reason in missing.items()))
        load_prompt_set(self.prompts)
        for name, value, known in (("split", self.split, SPLITS), ("part", self.part, PARTS)):
            if value not in known:
                raise SurgeryError(f"{name}: got {value!r}, expected one of {', '.join(known)}")
        if self.texts:
            sentences(self.texts)

    def reference(
        self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", *, progress: Progress
    ) -> "Reference | None":
        """The distributions of ``model`` to which a later measurement has its KL; None where locality is not asked."""
        if "locality" not in self.suites:
            return None
        from surgery.metrics.suite import measure

        given = self._material(model, tokenizer, ("locality",))
        return measure(model, given, progress=progress, label="measure the untouched model").reference

    def _material(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        suites: tuple[str, ...],
        preamble: str = "",
    ) -> "Material":
        """What these of the shipped suites ask: a reference must be of the rows that are measured later."""
        from surgery.metrics.material import fewer, material

        given = material(
            model,
            tokenizer,
            load_prompt_set(self.prompts),
            split=self.split,
            part=self.part,
            seed=self.split_seed,
            texts=self.texts,
            suites=suites,
            preamble=preamble,
            words_as=self.words_as,
        )
        return fewer(given, self._of_shipped, self.seed)

    def judge(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        *,
        preamble: str = "",
        reference: "Reference | None" = None,
        details: dict[str, Any] | None = None,
        keep: Sequence[int] = (),
        prefixes: "Prefixes | None" = None,
        progress: Progress,
    ) -> dict[str, Any]:
        """Every number of ``model`` as it is now, by suite, as ``Metric`` objects, which can be paired.

        ``preamble`` is put before prompts; ``reference`` gives locality its KL. ``details`` is filled with what the
        model wrote ("texts", see ``surgery.metrics.free_text``) and asked ("prompts": the text, its subject, and
        the probability of each word; with ``keep`` also "streams", those that enter these blocks, of the shipped
        suites). ``prefixes`` are such streams, from which the model is measured. Raises ``SurgeryError``.
        """
        from surgery.metrics import lm_eval
        from surgery.metrics.suite import evaluate_suites, measure

        scores: dict[str, Any] = {}
        if self.shipped:
            given = self._material(model, tokenizer, self.shipped, preamble)
            found = measure(model, given, keep=keep, prefixes=prefixes, reference=reference, progress=progress)
            if details is not None and keep:
                details["streams"] = found.prefixes
            scores |= found.scores
            if details is not None and found.probabilities is not None:
                asked = zip(given.prompts, found.probabilities.tolist(), strict=True)
                details["prompts"] = [[row.text, row.profession, *chances] for row, chances in asked]
                details["words"] = list(given.compared)
        options: dict[str, Any] = {name: {"scorer": self.scorer} for name in ("stereoset", "crows_pairs")}
        options["free_text"] = {"preamble": preamble, "details": details, "split_seed": self.split_seed}
        for name, count in self.rows.items():
            if name in SUITES:
                continue
            options[name] = options.get(name, {}) | {"limit": count}
        rows: Any = {"limit": self.limit, "seed": self.seed}
        scores |= evaluate_suites(
            model, tokenizer, self.others, self.folder, **rows, progress=progress, options=options
        )
        if self.tasks:
            scores["lm_eval"] = lm_eval.evaluate(model, tokenizer, list(self.tasks), **rows)
        return scores


def split_seed_of(*metadata: Mapping[str, Any]) -> int:
    """The ``split_seed`` of the recipes that made some deltas, by their ``metadata``; the usual one where none says it.

    Of several the first, with a warning: no part is unseen by all.
    """
    said = [recipe.get("split_seed") for each in metadata for recipe in recipes_of(each)]
    seeds = list(dict.fromkeys(seed for seed in said if isinstance(seed, int)))
    if len(seeds) > 1:
        warnings.warn(
            f"the edits were trained on other parts of the prompts (split_seed {', '.join(map(str, seeds))}): of the "
            f"test part of {seeds[0]}, which is measured, some subjects were learnt by another",
            Note,
            stacklevel=2,
        )
    return seeds[0] if seeds else SEED


def ledger(folder: str | Path, *, suites: Sequence[str] = LEDGER, **asked: Any) -> tuple[Judges, dict[str, str]]:
    """The judges of every axis in their quick form, and which were left out since their data is not in ``folder``.

    ``asked`` are further fields of ``Judges``; its ``rows`` and ``limit`` go before the quick form's. Raises
    ``SurgeryError`` for a ``folder`` that is named and is none; without one those are left out that need it.
    """
    if folder and not Path(folder).is_dir():
        raise SurgeryError(f"{folder}: is no folder; name the one that holds the data sets, or none")
    missing = absent(suites, folder)
    rows = ({} if asked.get("limit") else ROWS) | asked.pop("rows", {})
    kept = tuple(name for name in suites if name not in missing)
    return Judges(suites=kept, folder=folder, rows=rows, **asked), missing
