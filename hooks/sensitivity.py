"""Attention that each layer, head and token gives to sensitive words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import capture, run_base
from hooks.anatomy import Stack, find, require
from hooks.errors import HookError
from hooks.logit_difference import Prompts, prompts_in_batches
from hooks.remote import anywhere
from hooks.running_means import Sensitivity, Tally, locate_words
from hooks.streaming import Progress
from hooks.tokens import reads_whole


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
    require(stack, "pattern", "the attention that words get")
    causal = _causal(model, stack)
    given = _Given(tokenizer, prompts, _finder(words), causal, queries, reads_whole(model))
    tally = Tally(stack, tokenizer, progress, len(prompts) if isinstance(prompts, (list, tuple)) else None)
    number = {f"{block.site}.attn.hook_pattern": i for i, block in enumerate(stack.blocks)}
    with probe.unchanged(model):
        try:
            for batch in prompts_in_batches(model, tokenizer, given, batch_tokens=batch_tokens, reads=False):
                word, query = _masks(batch, given.flags, causal, queries)
                found: dict[int, Tensor] = {}

                def take(site: str, pattern: Tensor, mask: Tensor, word: Tensor = word, found: Any = found) -> None:
                    # (batch head query key) -> (batch head query): weights on the word's tokens
                    on = word.to(pattern.device)[:, None, None]
                    found[number[site]] = pattern.float().masked_fill(~on, 0.0).sum(-1)

                with capture(model, list(number), reducer=take):
                    run_base(model, batch.inputs)
                tally.add(batch, [found[i] for i in range(len(number))], query)
        except HookError as error:
            if not given.flags and given.skipped:
                raise HookError(
                    f"none of {given.skipped} prompts holds one of {', '.join(words)} with a token that can see it; "
                    "check the words"
                ) from error
            raise
    notes = [f"{given.sinks} words at the very first place of a text are not counted"] if given.sinks else []
    return tally.result("attention", words, (), notes, data, given.skipped)


@dataclass
class _Given:
    """The prompts that hold a word and a token that sees it, as ids, one by one; what was left out is counted.

    flags: by number of the prompt, which of its tokens are of a word.
    """

    tokenizer: Any
    prompts: Iterable[str]
    finder: Callable[[str], list[tuple[int, int]]]
    causal: bool
    queries: str
    closed: bool
    flags: dict[int, list[bool]] = field(default_factory=dict)
    skipped: int = 0
    sinks: int = 0

    def __iter__(self) -> Iterator[list[int]]:
        for text in self.prompts:
            ids, word = locate_words(self.tokenizer, text, self.finder, closed=self.closed)
            if self.causal and word and word[0]:
                self.sinks += 1
                first = word.index(False) if False in word else len(word)
                word[:first] = [False] * first
            seen = [not w and (any(word[:i]) or not self.causal) for i, w in enumerate(word)]
            if any(word) and (any(seen) if self.queries == "all" else seen[-1]):
                self.flags[len(self.flags)] = word
                yield ids
            else:
                self.skipped += 1


def _finder(words: Sequence[str]) -> Callable[[str], list[tuple[int, int]]]:
    """Places of the words in a text, as characters; whole words, any case."""
    if isinstance(words, str) or not words or not all(w.strip() for w in words):
        raise HookError(f"words are {words!r}; expected a list of at least one word")
    parts = "|".join(re.escape(w.strip()) for w in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(?<!\w)(?:{parts})(?!\w)", re.IGNORECASE)
    return lambda text: [m.span() for m in pattern.finditer(text)]


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
