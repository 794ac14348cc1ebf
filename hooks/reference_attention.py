"""Cross-attention of a text's states to those of reference words (CrAWD 4.3), by every head's own projections."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import run_base
from hooks.anatomy import Stack, find
from hooks.display import Readable
from hooks.errors import HookError
from hooks.logit_difference import Prompts, prompts_in_batches
from hooks.qk_channels import QKChannels, find_qk_channels, reading
from hooks.remote import anywhere
from hooks.running_means import Sensitivity, Tally, locate_words
from hooks.streaming import Progress
from hooks.tokens import reads_whole


@dataclass(frozen=True, eq=False, repr=False)
class CrossWeights(Readable):
    """CrAWD's matrix beta of one text: weights (block head pos word); each row sums to 1 over the words."""

    weights: Float[Tensor, "block head pos word"]
    tokens: tuple[str, ...]
    words: tuple[str, ...]


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
    tally = Tally(stack, tokenizer, progress, len(prompts) if isinstance(prompts, (list, tuple)) else None)
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


def _reference(
    model: nn.Module, tokenizer: Any, stack: Stack, words: Sequence[str], neutral: Sequence[str]
) -> tuple[list[QKChannels], list[tuple[Tensor, Tensor]]]:
    """The query projections; and per block the reference keys (key head d_head) with each key's word."""
    every, closed = [*words, *neutral], reads_whole(model)
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
        ids, held = locate_words(tokenizer, text, lambda _: [span], closed=closed)  # noqa: B023
        columns += [place for place, own in enumerate(held) if own]
        owner += [number] * sum(held)
    candidates = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "eos")]
    start = [token for token in candidates if token is not None]
    if start and ids[0] not in tokenizer.all_special_ids:
        ids, columns = [start[0], *ids], [column + 1 for column in columns]
    projections = find_qk_channels(model, stack)
    shape: list[tuple[int, int]] = [(1, len(ids))]
    with probe.unchanged(model), reading(model, [key for _, key in projections], shape) as store:
        (batch,) = prompts_in_batches(model, tokenizer, [ids], batch_tokens=1, reads=False)
        run_base(model, batch.inputs)
        keys = [(store[i][0, columns], torch.tensor(owner)) for i in range(len(projections))]
    return [query for query, _ in projections], keys


def _beta(
    model: nn.Module, batch: Prompts, own: list[QKChannels], keys: list[tuple[Tensor, Tensor]], words: int
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
