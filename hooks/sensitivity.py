"""Attention and cross-attention (CrAWD 4.3) that each layer, head and token gives to sensitive words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hooks import probe
from hooks.anatomy import Stack, find
from hooks.capture import capture, run_base
from hooks.errors import HookError
from hooks.projections import Projection, find_projections, reading
from hooks.ranking import Ranking
from hooks.readout import Prompts, prompts_in_batches
from hooks.remote import anywhere
from hooks.stream import Mean, Progress


@dataclass(frozen=True, eq=False)
class Sensitivity:
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


@dataclass(frozen=True, eq=False)
class CrossWeights:
    """CrAWD's matrix beta of one text: weights (block head pos word); each row sums to 1 over the words."""

    weights: Float[Tensor, "block head pos word"]
    tokens: tuple[str, ...]
    words: tuple[str, ...]


@anywhere
def attention_to(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[str],
    words: Sequence[str],
    *,
    queries: Literal["all", "last"] = "all",
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Sensitivity:
    """Share of each head's attention that goes to `words`, from the tokens that can see them.

        hooks.attention_to(model, tokenizer, ["The nurse said that she left"], ["he", "she"]).ranking().top(5)

    The weights on all tokens of all occurrences are summed (whole words, any case; a word of several tokens
    is noted), then averaged over the queries: all real tokens that are no part of such a word and, in causal
    models, come after one; or the "last" token alone. In causal models a word at a text's very first place is
    not counted, since what stands there draws attention whatever it is (Xiao et al. 2024, attention sinks);
    this is noted. Prompts with nothing left are counted as skipped.
    Of T5 and BART the encoder is read. Evaluation mode, eager attention inside, memory of one batch.

    Raises HookError for no words, a tokenizer without offsets (not "fast"), and prompts that all lack the
    words.
    """
    if queries not in ("all", "last"):
        raise HookError(f"queries is {queries!r}; expected 'all' or 'last'")
    stack = find(model).stacks[0]
    causal = _causal(model, stack)
    flags: dict[int, list[bool]] = {}
    skipped = sinks = 0
    finder = _finder(words)

    def encoded() -> Iterator[list[int]]:
        nonlocal skipped, sinks
        for text in prompts:
            ids, word = _locate(tokenizer, text, finder)
            if causal and word and word[0]:
                sinks += 1
                first = word.index(False) if False in word else len(word)
                word[:first] = [False] * first
            seen = [not w and (any(word[:i]) or not causal) for i, w in enumerate(word)]
            if any(word) and (any(seen) if queries == "all" else seen[-1]):
                flags[len(flags)] = word
                yield ids
            else:
                skipped += 1

    tally = _Tally(stack, tokenizer, progress, len(prompts) if isinstance(prompts, (list, tuple)) else None)
    number = {f"{block.site}.attn.hook_pattern": i for i, block in enumerate(stack.blocks)}
    with probe.unchanged(model):
        try:
            for batch in prompts_in_batches(model, tokenizer, encoded(), batch_tokens=batch_tokens, reads=False):
                word, query = _masks(batch, flags, causal, queries)
                found: dict[int, Tensor] = {}

                def take(site: str, pattern: Tensor, mask: Tensor, word: Tensor = word, found: Any = found) -> None:
                    # (batch head query key) -> (batch head query): weights on the word's tokens
                    on = word.to(pattern.device)[:, None, None]
                    found[number[site]] = pattern.float().masked_fill(~on, 0.0).sum(-1)

                with capture(model, list(number), reducer=take):
                    run_base(model, batch.inputs)
                tally.add(batch, [found[i] for i in range(len(number))], query)
        except HookError as error:
            if not flags and skipped:
                raise HookError(
                    f"none of {skipped} prompts holds one of {', '.join(words)} with a token that can see it; "
                    "check the words"
                ) from error
            raise
    notes = [f"{sinks} words at the very first place of a text are not counted"] if sinks else []
    return tally.result("attention", words, (), notes, data, skipped)


@anywhere
def cross_attention(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[str],
    words: Sequence[str],
    neutral: Sequence[str] = (),
    *,
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Sensitivity:
    """CrAWD 4.3 in every head: attention of the texts' states to the states of reference words.

    beta = softmax(Q K^T / sqrt(d_head)) over the reference tokens, with Q from the texts and K from the
    reference sequence (`words`, then `neutral`, run through the model as one text behind the start token, or
    the first word would be the attention sink), both by the layer's own projections and before any rotation
    by position; CrAWD trains one such layer after the last.

    A token's score: with `neutral` words the share of beta on `words`; without, where shares always sum to 1,
    the largest beta on one word (the weights that CrAWD's top-K picks), from 1 / len(words) to 1. Averaged
    over the tokens of a text that are not special, then over texts. Tokens of a word are summed, and noted.

    Raises HookError for fewer than two words in all, and attention whose query and key cannot be told apart.
    """
    stack = find(model).stacks[0]
    own, keys = _reference(model, tokenizer, stack, words, neutral)
    special = torch.tensor(sorted(set(getattr(tokenizer, "all_special_ids", ()))), dtype=torch.long)
    tally = _Tally(stack, tokenizer, progress, len(prompts) if isinstance(prompts, (list, tuple)) else None)
    with probe.unchanged(model):
        for batch in prompts_in_batches(model, tokenizer, prompts, batch_tokens=batch_tokens, reads=False):
            beta = _beta(model, batch, own, keys, len(words) + len(neutral))
            scores = [weights[..., : len(words)].sum(-1) if neutral else weights.amax(-1) for weights in beta]
            ids = batch.inputs["input_ids"]
            real = batch.inputs["attention_mask"].bool() & ~torch.isin(ids, special.to(ids.device))
            empty = (~real.any(1)).nonzero().flatten().tolist()
            if empty:
                raise HookError(f"prompt {batch.places[empty[0]]} has special tokens only; leave it out")
            tally.add(batch, scores, real)
    return tally.result("cross_attention", words, neutral, [], data, 0)


@anywhere
def cross_attention_weights(model: nn.Module, tokenizer: Any, text: str, words: Sequence[str]) -> CrossWeights:
    """The whole matrix of `cross_attention` for one text, for `hooks.plots.cross_attention_map`."""
    stack = find(model).stacks[0]
    own, keys = _reference(model, tokenizer, stack, words, ())
    with probe.unchanged(model):
        (batch,) = prompts_in_batches(model, tokenizer, [text], batch_tokens=1, reads=False)
        beta = torch.stack([b[0].cpu() for b in _beta(model, batch, own, keys, len(words))])
    tokens = tokenizer.convert_ids_to_tokens(batch.inputs["input_ids"][0].tolist())
    return CrossWeights(beta, tuple(tokens), tuple(words))


class _Tally:
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
            pieces = self._tokenizer.encode(" " + word, add_special_tokens=False)
            if len(pieces) > 1:
                shown = " ".join(self._tokenizer.convert_ids_to_tokens(pieces))
                notes.append(f"{word!r} is {len(pieces)} tokens ({shown}); what they get is summed")
        head_errors = errors["head"].reshape(self._shape)
        return Sensitivity(
            method, tuple(words), tuple(neutral), scores, head_errors, errors["block"], tokens, tuple(notes),
            data, self._done, skipped,
        )  # fmt: skip


def _finder(words: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """Places of the words in a text, as characters; whole words, any case."""
    if isinstance(words, str) or not words or not all(w.strip() for w in words):
        raise HookError(f"words are {words!r}; expected a list of at least one word")
    parts = "|".join(re.escape(w.strip()) for w in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{parts})(?!\w)", re.IGNORECASE)
    return lambda text: [m.span() for m in pattern.finditer(text)]


def _locate(tokenizer: Any, text: str, finder: Callable[[str], list[tuple[int, int]]]) -> tuple[list[int], list[bool]]:
    """Token ids, and which of them hold characters of the words that `finder` finds."""
    if not isinstance(text, str):
        raise HookError(f"a prompt is a {type(text).__name__}; words are found in texts, expected a string")
    if not getattr(tokenizer, "is_fast", False):
        raise HookError("the tokenizer gives no character offsets; load it with use_fast=True")
    found = tokenizer(text, return_offsets_mapping=True)
    spans = finder(text)
    word = [any(a < end and b > start for start, end in spans) for a, b in found["offset_mapping"]]
    return list(found["input_ids"]), word


def _masks(batch: Prompts, flags: dict[int, list[bool]], causal: bool, queries: str) -> tuple[Tensor, Tensor]:
    """Which tokens are of a sensitive word, and which are asked: both (batch pos)."""
    real = batch.inputs["attention_mask"].bool()
    word = torch.zeros_like(real)
    for row, place in enumerate(batch.places):
        held = flags[place]
        flags[place] = []  # the place stays known, its tokens are done with
        word[row, : len(held)] = torch.tensor(held, device=word.device)
    query = real & ~word
    if causal:
        query &= word.cumsum(1) > 0
    if queries == "last":
        query &= torch.arange(real.shape[1], device=real.device) == batch.ends[:, None]
    return word, query


def _causal(model: nn.Module, stack: Stack) -> bool:
    """Whether tokens see only what comes before them: no weight above the diagonal in a pass of 5 tokens."""
    upper: list[Tensor] = []

    def take(site: str, pattern: Tensor, mask: Tensor) -> None:
        upper.append(pattern.triu(1).abs().sum())

    with probe.unchanged(model):
        (batch,) = prompts_in_batches(model, None, [[3, 4, 5, 6, 7]], batch_tokens=5, reads=False)
        with capture(model, f"{stack.blocks[0].site}.attn.hook_pattern", reducer=take):
            run_base(model, batch.inputs)
    return bool(upper[0] == 0)


def _reference(
    model: nn.Module, tokenizer: Any, stack: Stack, words: Sequence[str], neutral: Sequence[str]
) -> tuple[list[Projection], list[tuple[Tensor, Tensor]]]:
    """The query projections; and per block the reference keys (key head d_head) with each key's word."""
    every = [*words, *neutral]
    if isinstance(words, str) or isinstance(neutral, str) or not words or len(every) < 2:
        raise HookError(f"words are {words!r}, neutral {neutral!r}; expected at least two words in all")
    text, spans = "", []
    for word in every:
        spans.append((len(text) + 1, len(text) + 1 + len(word)))
        text += " " + word
    owner: list[int] = []
    columns: list[int] = []
    ids: list[int] = []
    for number, span in enumerate(spans):
        ids, held = _locate(tokenizer, text, lambda _: [span])  # noqa: B023
        columns += [place for place, own in enumerate(held) if own]
        owner += [number] * sum(held)
    candidates = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "eos")]
    start = [token for token in candidates if token is not None]
    if start and ids[0] not in tokenizer.all_special_ids:
        ids, columns = [start[0], *ids], [column + 1 for column in columns]
    projections = find_projections(model, stack)
    shape: list[tuple[int, int]] = [(1, len(ids))]
    with probe.unchanged(model), reading(model, [key for _, key in projections], shape) as store:
        (batch,) = prompts_in_batches(model, tokenizer, [ids], batch_tokens=1, reads=False)
        run_base(model, batch.inputs)
        keys = [(store[i][0, columns], torch.tensor(owner)) for i in range(len(projections))]
    return [query for query, _ in projections], keys


def _beta(
    model: nn.Module, batch: Prompts, own: list[Projection], keys: list[tuple[Tensor, Tensor]], words: int
) -> list[Float[Tensor, "batch head pos word"]]:
    """CrAWD 4.3: softmax(Q K^T / sqrt(d)) per block, over the tokens of all reference words."""
    ids = batch.inputs["input_ids"]
    result = []
    with reading(model, own, [(ids.shape[0], ids.shape[1])]) as store:
        run_base(model, batch.inputs)
    for number, (key, owner) in enumerate(keys):
        query = store[number].float()  # (batch pos head d_head)
        scores = torch.einsum("bphd,khd->bhpk", query, key.float()) / query.shape[-1] ** 0.5
        belongs = nn.functional.one_hot(owner, words).float().to(scores.device)  # (key word)
        result.append(scores.softmax(-1) @ belongs)
    return result
