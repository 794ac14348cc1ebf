"""Statistics over a data set in one pass with flat memory: token-budget batches, several reducers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import Reducer, capture, model_inputs, run_base
from hooks.batching import mixes_beyond, positions_limit, why_alone
from hooks.errors import HookError
from hooks.tokens import reads_whole, text_tokens

Text = str | Sequence[int]
Progress = Callable[[int, int | None], None]  # texts done, texts in all (None where the data has no length)
WINDOW = 2048  # texts that are sorted by length together; bounds what is held of an endless data set


@dataclass(frozen=True)
class Batch:
    """Texts of like length: their places in the data, and ids and mask (batch pos), padded on the right."""

    places: tuple[int, ...]
    input_ids: Int[Tensor, "batch pos"]
    attention_mask: Int[Tensor, "batch pos"]


def token_batches(
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    batch_tokens: int = 4096,
    window: int = WINDOW,
    model: nn.Module | None = None,
) -> Iterator[Batch]:
    """Batches of at most `batch_tokens` tokens with padding (a longer text goes alone), sorted by length.

    texts: strings (as `hooks.tokens.text_tokens` reads them), or sequences of token ids (then the tokenizer may be
    None). Nothing is cut off. model: what will run them; one that reads whole texts gets their end, and one that
    cannot take several rows at once (`hooks.batching.why_alone`) gets batches of one.
    Raises HookError for an empty data set, and for a text without tokens, naming its place.
    """
    if batch_tokens < 1:
        raise HookError(f"batch_tokens is {batch_tokens}; expected at least 1")
    if isinstance(texts, str):
        raise HookError("the data is one string; expected several texts: wrap it in a list")
    source, start = iter(texts), 0
    closed, border = (False, None) if model is None else (reads_whole(model), mixes_beyond(model))
    while chunk := list(islice(source, window)):
        rows = _ids(tokenizer, chunk, start, closed)
        waiting = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))  # longest first: fails early
        while waiting:
            longest = len(rows[waiting[0]])
            size = max(1, batch_tokens // longest)
            if border is not None and longest > border:
                size = min(size, sum(len(rows[i]) == longest for i in waiting))
            if min(size, len(waiting)) > 1 and model is not None and why_alone(model):
                size = 1
            taken, waiting = waiting[:size], waiting[size:]
            yield _pad([rows[i] for i in taken], tuple(start + i for i in taken))
        start += len(chunk)
    if start == 0:
        raise HookError("the data set is empty; expected at least one text")


def _ids(tokenizer: Any, chunk: Sequence[Text], start: int, closed: bool) -> list[list[int]]:
    strings = {place: text for place, text in enumerate(chunk) if isinstance(text, str)}
    if strings and tokenizer is None:
        raise HookError(f"text {start + min(strings)} is a string and no tokenizer was given; expected token ids")
    rows = [[] if isinstance(text, str) else list(text) for text in chunk]
    coded = text_tokens(tokenizer, list(strings.values()), closed=closed) if strings else []
    for place, ids in zip(strings, coded, strict=True):
        rows[place] = list(ids)
    empty = next((place for place, row in enumerate(rows) if not row), None)
    if empty is not None:
        raise HookError(f"text {start + empty} has no tokens: {chunk[empty]!r}; leave it out")
    return rows


def _pad(rows: list[list[int]], places: tuple[int, ...]) -> Batch:
    """Right padding with id 0 (the mask hides it), so that no tokenizer needs a pad token or is changed."""
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return Batch(places, ids, mask)


def stream(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    reducers: Sequence[tuple[str | Iterable[str], Reducer]],
    *,
    positions: Literal["all", "last"] = "all",
    batch_tokens: int = 4096,
    progress: Progress | None = None,
) -> int:
    """Run `texts` through the model once, handing activations to every reducer; returns how many texts there
    were.

        mean = Mean()
        stream(model, tokenizer, texts, [("blocks.*.hook_resid_post", mean)], positions="last")

    The model is in evaluation mode meanwhile, whatever its mode before and after.

    reducers: pairs of sites (see `hooks.capture`) and reducer(site, tensor, mask). Nothing else is kept, no
    logits over the vocabulary are computed, and no KV cache is built: memory is that of one batch.

    Raises `HookError` for a text that is longer than the model's learned positions.
    """
    limit = positions_limit(model)
    total = len(texts) if isinstance(texts, Sequence) else None
    done = 0
    with ExitStack() as stack:
        stack.enter_context(probe.unchanged(model))
        for wanted, reducer in reducers:
            stack.enter_context(capture(model, wanted, reducer=reducer, positions=positions))
        for batch in token_batches(tokenizer, texts, batch_tokens=batch_tokens, model=model):
            if limit is not None and batch.input_ids.shape[1] > limit:
                raise HookError(
                    f"text {batch.places[0]} has {batch.input_ids.shape[1]} tokens; the model has learned "
                    f"positions for {limit}: shorten it"
                )
            inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
            run_base(model, model_inputs(model, inputs))
            done += len(batch.places)
            if progress is not None:
                progress(done, total)
    return done


class Mean:
    """Running mean and variance over real tokens, per site and entry: what mean-ablation needs."""

    def __init__(self) -> None:
        self._count: dict[str, int] = {}
        self._mean: dict[str, Tensor] = {}
        self._square: dict[str, Tensor] = {}

    def __call__(self, site: str, tensor: Tensor, mask: Tensor) -> None:
        if tensor.shape[:2] == mask.shape and site.rpartition(".")[2] != "hook_pattern" and tensor.ndim > 2:
            tensor = tensor[mask]
        rows = tensor.float()
        count, known = len(rows), self._count.get(site, 0)
        mean = rows.mean(0)
        square = (rows - mean).square().sum(0)
        if known:  # Chan, Golub and LeVeque 1979, eq. 2.1: no cancellation, whatever the number of tokens
            shift = mean - self._mean[site]
            square = square + self._square[site] + shift.square() * (known * count / (known + count))
            mean = self._mean[site] + shift * (count / (known + count))
        self._count[site], self._mean[site], self._square[site] = known + count, mean, square

    def mean(self, site: str) -> Float[Tensor, " d_model"]:
        return self._mean[site]

    def variance(self, site: str) -> Float[Tensor, " d_model"]:
        """Unbiased; NaN for a single token."""
        return self._square[site] / (self._count[site] - 1) if self._count[site] > 1 else self._square[site] * torch.nan

    def count(self, site: str) -> int:
        return self._count[site]
