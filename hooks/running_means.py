"""How much each head and token gives to sensitive words: the result of every such measure, and its running means."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hooks.anatomy import Stack
from hooks.display import Readable
from hooks.errors import HookError
from hooks.logit_difference import Prompts
from hooks.ranking import Ranking
from hooks.streaming import Mean, Progress
from hooks.tokens import text_tokens, word_pieces


@dataclass(frozen=True, eq=False, repr=False)
class Sensitivity(Readable):
    """How much each head gives to sensitive words: means over prompts, 0 to 1, with standard errors.

    scores, errors: (block, head). tokens: token -> (mean over heads and occurrences, occurrences), for every
    token of the texts that was measured. notes: what a reader must know, such as words of several tokens.
    count: prompts measured; skipped: prompts in which there was nothing to measure.
    """

    method: Literal["attention", "cross_attention"]
    words: tuple[str, ...]
    neutral: tuple[str, ...]
    scores: NDArray[np.float64]
    errors: NDArray[np.float64]
    block_errors: NDArray[np.float64]
    tokens: Mapping[str, tuple[float, int]]
    notes: tuple[str, ...]
    data: str
    count: int
    skipped: int

    def ranking(self, unit: Literal["head", "block"] = "head") -> Ranking:
        """Heads, or blocks by the mean of their heads."""
        if unit not in ("head", "block"):
            raise HookError(f"sensitivity: unit is {unit!r}; expected 'head' or 'block'")
        scores, errors = (self.scores, self.errors) if unit == "head" else (self.scores.mean(1), self.block_errors)
        settings: dict[str, Any] = {"words": list(self.words), "neutral": list(self.neutral)}
        settings |= {"notes": list(self.notes), "skipped": self.skipped}
        known = errors if self.count > 1 else None
        return Ranking(self.method, unit, scores, self.data, self.count, known, settings=settings)

    def top_tokens(self, count: int = 10, *, at_least: int = 1) -> list[tuple[str, float, int]]:
        """The tokens that give most: (token, mean, occurrences), of those that occur often enough."""
        rows = [(token, mean, n) for token, (mean, n) in self.tokens.items() if n >= at_least]
        return sorted(rows, key=lambda row: (-row[1], row[0]))[:count]


class Tally:
    """Running means over prompts and tokens; memory grows with blocks, heads and the vocabulary only."""

    def __init__(self, stack: Stack, tokenizer: Any, progress: Progress | None, total: int | None) -> None:
        self._shape = (len(stack.blocks), -1)
        self._tokenizer, self._progress, self._total = tokenizer, progress, total
        self._mean, self._done = Mean(), 0
        self._by_token: dict[int, list[float]] = {}

    def add(self, batch: Prompts, scores: list[Tensor], query: Tensor) -> None:
        """scores: per block (batch head pos); query: (batch pos), the tokens that count."""
        values = torch.stack([s.cpu() for s in scores], 1)  # (batch block head pos)
        query = query.cpu()
        of_prompt = (values * query[:, None, None]).sum(-1) / query.sum(1)[:, None, None]
        self._mean("head", of_prompt.flatten(1), torch.empty(0, 0))
        self._mean("block", of_prompt.mean(2), torch.empty(0, 0))
        of_token = values.mean((1, 2))[query].tolist()
        for token, value in zip(batch.inputs["input_ids"].cpu()[query].tolist(), of_token, strict=True):
            entry = self._by_token.setdefault(token, [0.0, 0])
            entry[0] += value
            entry[1] += 1
        self._done += len(batch.places)
        if self._progress is not None:
            self._progress(self._done, self._total)

    def result(
        self,
        method: Any,
        words: Sequence[str],
        neutral: Sequence[str],
        notes: list[str],
        data: str,
        skipped: int,
    ) -> Sensitivity:
        errors = {n: (self._mean.variance(n).double() / self._done).sqrt().numpy() for n in ("head", "block")}
        names = self._tokenizer.convert_ids_to_tokens(list(self._by_token))
        entries = self._by_token.values()
        tokens = {name: (s / n, int(n)) for name, (s, n) in zip(names, entries, strict=True)}
        scores = self._mean.mean("head").double().numpy().reshape(self._shape)
        for word in (*words, *neutral):
            pieces = list(word_pieces(self._tokenizer, word))
            if len(pieces) > 1:
                shown = " ".join(self._tokenizer.convert_ids_to_tokens(pieces))
                notes.append(f"{word!r} is {len(pieces)} tokens ({shown}); what they get is summed")
        head_errors = errors["head"].reshape(self._shape)
        return Sensitivity(
            method, tuple(words), tuple(neutral), scores, head_errors, errors["block"], tokens, tuple(notes),
            data, self._done, skipped,
        )  # fmt: skip


def locate_words(
    tokenizer: Any, text: str, finder: Callable[[str], list[tuple[int, int]]], *, closed: bool = False
) -> tuple[list[int], list[bool]]:
    """Token ids (`hooks.tokens.text_tokens`), and which of them hold characters of the words that `finder` finds.

    Raises `HookError` for a prompt that is no text, and a tokenizer that gives no character offsets.
    """
    if not isinstance(text, str):
        raise HookError(f"a prompt is a {type(text).__name__}; words are found in texts, expected a string")
    if not getattr(tokenizer, "is_fast", False):
        raise HookError("the tokenizer gives no character offsets; load it with use_fast=True")
    found = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)
    spans = finder(text)
    word = [any(a < end and b > start for start, end in spans) for a, b in found["offset_mapping"]]
    (ids,) = text_tokens(tokenizer, [text], closed=closed)
    own = tuple(found["input_ids"])
    before = next(at for at in range(len(ids) + 1) if ids[at : at + len(own)] == own)
    return list(ids), [False] * before + word + [False] * (len(ids) - before - len(own))
