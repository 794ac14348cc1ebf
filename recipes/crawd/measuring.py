"""What a CrAWD run measures: suites, perplexity on held-out and neutral texts, continuations, block sensitivity."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from hooks.reference_attention import cross_attention
from recipes.crawd.settings import Settings
from recipes.crawd.texts import Given
from surgery.data.prompts import load_prompt_set
from surgery.data.rows import sample
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import gas, perplexity
from surgery.metrics.material import material
from surgery.metrics.suite import evaluate_suites, measure, plain
from surgery.modules.cross_attention import switched_off
from surgery.progress import Progress

SHOWN = 6  # prompts whose continuations stand in the report
SENSED = 32  # held-out texts whose attention to the reference words is ranked


@dataclass(frozen=True)
class Judge:
    """Measures the model as it is when asked, always by the same settings and texts."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    settings: Settings
    given: Given
    progress: Progress

    def measure(self, when: str) -> dict[str, Any]:
        """``{"scores": ..., "texts": [[prompt, continuation]], "sensitivity": ranking of blocks or None}``."""
        settings, model, tokenizer = self.settings, self.model, self.tokenizer
        neutral = material(
            model, tokenizer, load_prompt_set("genbias"), suites=["perplexity"], texts=settings.neutral or None
        )
        scores = self._suites()
        scores["held_out_perplexity"] = self._perplexity(self.given.held_out, self.given.name)
        scores |= measure(model, neutral, progress=self.progress, label=f"perplexity {when}").scores
        texts: list[str] = []
        prompts: list[str] = []
        if "gas" in settings.suites:
            prompts = sample(gas.prompts(settings.data, self._kind), SHOWN, settings.seed)
            texts = gas.generate(model, tokenizer, prompts, replace(self._sampling, samples=1))
        return {
            "scores": plain(scores, samples=True),
            "texts": [list(pair) for pair in zip(prompts, texts, strict=True)],
            "sensitivity": self._sensitivity(when),
        }

    def measure_with(self, when: str, off: Mapping[str, str]) -> dict[str, Any]:
        """``measure``, and under "off" the same with a part of the live module switched off: {name: part}."""
        found = self.measure(when)
        found["off"] = {}
        for name, part in off.items():
            with switched_off(self.model, part):
                found["off"][name] = self.measure(name)
        return found

    @property
    def _kind(self) -> str:
        return "other_professions" if self.settings.part == "dev" else "professions"

    @property
    def _sampling(self) -> gas.Sampling:
        return gas.Sampling(self.settings.length, samples=self.settings.samples, seed=self.settings.seed)

    def _suites(self) -> dict[str, Any]:
        settings = self.settings
        options: dict[str, Any] = {
            "gas": {"sampling": self._sampling, "kind": self._kind},
            "bios": {"part": settings.part},
        }
        scores: dict[str, Any] = {}
        for suite in settings.suites:
            # The word sets of WEAT and SEAT are small and taken whole.
            rows = 0 if suite in ("weat", "seat") else settings.test_rows
            given: Any = {"limit": rows, "seed": settings.seed, "progress": self.progress, "options": options}
            scores |= evaluate_suites(self.model, self.tokenizer, [suite], settings.data, **given)
        scores.get("bios", {}).pop("perplexity", None)  # the same as that on the held-out texts
        return scores

    def _sensitivity(self, when: str) -> dict[str, Any] | None:
        """Each block's own attention to the reference words, as a ranking of blocks."""
        if len(self.settings.reference) < 2:  # the share of one word among one is always 1
            return None
        texts = self.given.held_out[:SENSED]
        found = cross_attention(self.model, self.tokenizer, texts, self.settings.reference, data=self.given.name)
        return replace(found.ranking("block"), settings={"stream": when}).to_dict()

    def _perplexity(self, texts: Sequence[str], name: str) -> Any:
        limit = context_limit(self.model)
        ids = [row[:limit] for row in encode(self.tokenizer, texts)]
        sums, counts, _ = token_losses(self.model, ids)
        return perplexity.score(sums, counts, data=name)
