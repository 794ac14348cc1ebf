"""Texts as token ids with the tokens whose loss counts, in batches of whole units and a budget of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from typing import Any, Protocol

import numpy as np

from hooks.errors import HookError
from hooks.tokens import text_tokens

WINDOW = 2048  # texts that are sorted by length together; bounds what is held of an endless data set


class WithTargets(Protocol):
    """Token ids of which those from `start` on are targets, such as an answer behind its prompt."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def start(self) -> int: ...


class WithMask(Protocol):
    """Token ids, and the places of those whose loss counts (``hooks.content_tokens``); place 0 is never predicted."""

    @property
    def ids(self) -> Sequence[int]: ...

    @property
    def counted(self) -> Sequence[int]: ...


Text = str | Sequence[int] | WithTargets | WithMask


@dataclass(frozen=True)
class Row:
    """One text: its place in the data, its token ids, and the places (at least 1) of those whose loss counts."""

    place: int
    ids: tuple[int, ...]
    counted: Sequence[int]

    @property
    def targets(self) -> int:
        """How many tokens have a loss."""
        return len(self.counted)

    @property
    def digest(self) -> bytes:
        """16 bytes that stand for the tokens."""
        return blake2b(np.asarray(self.ids, dtype=np.int64).tobytes(), digest_size=16).digest()


# Rows whose gradients are summed before anything is done with them: one text, a pair of twins, or a batch.
Unit = tuple[Row, ...]
Batch = list[Unit]  # units of the same number of rows


def rows(
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    limit: int | None,
    cut: int | None = None,
    what: str = "text",
    first: int = 0,
) -> Iterator[Row]:
    """Each text with its place, counted from `first`.

    cut: take the first so many tokens of longer texts; without it a text longer than `limit` is refused.

    Raises HookError, naming the place: for a text without tokens, without one to learn, or too long.
    """
    if isinstance(texts, str):
        raise HookError(f"{what}s are one string; expected several: wrap it in a list")
    if cut is not None and cut < 2:
        raise HookError(f"cut is {cut}; expected at least 2 tokens: the first is never predicted")
    for place, text in enumerate(texts, first):
        if isinstance(text, str):
            if tokenizer is None:
                raise HookError(f"{what} {place} is a string and no tokenizer was given; expected token ids")
            (ids,), counted = text_tokens(tokenizer, [text]), None
        elif isinstance(text, Sequence):
            ids, counted = tuple(int(token) for token in text), None
        else:
            ids = tuple(text.ids)
            counted = text.counted if hasattr(text, "counted") else range(text.start, len(ids))
        ids = ids[:cut]
        places = range(1, len(ids)) if counted is None else sorted(set(counted))
        row = Row(place, ids, [at for at in places if 0 < at < len(ids)])
        if not row.ids:
            raise HookError(f"{what} {place} has no tokens: {text!r}; leave it out")
        if row.targets < 1:
            raise HookError(
                f"{what} {place} has {len(row.ids)} tokens and none to predict: {str(text)[:60]!r}; leave it out"
            )
        if limit is not None and len(row.ids) > limit:
            raise HookError(
                f"{what} {place} has {len(row.ids)} tokens, the model's context is {limit}: {str(text)[:40]!r}...; "
                f"shorten it, or cut={limit}"
            )
        yield row


def units(found: Iterable[Row], size: int) -> Iterator[Unit]:
    """`size` rows in a row; the last unit may have fewer."""
    source = iter(found)
    while unit := tuple(islice(source, size)):
        yield unit


def windows(found: Iterable[Unit], *, batch_tokens: int, window: int = WINDOW) -> Iterator[list[Batch]]:
    """Batches of each window of about `window` texts: of like length, at most `batch_tokens` with padding.

    A unit that is longer goes alone. The batches of a window depend on nothing but its texts.

    Raises `HookError` for fewer than 1 token a batch.
    """
    if batch_tokens < 1:
        raise HookError(f"batch_tokens is {batch_tokens}; expected at least 1")
    source = iter(found)
    while first := next(source, None):
        held = [first, *islice(source, max(0, window // len(first) - 1))]
        # Longest first: what does not fit into memory fails at once.
        waiting = sorted(held, key=lambda unit: (-len(unit), -_width(unit), unit[0].place))
        batches: list[Batch] = []
        for unit in waiting:
            last = batches[-1] if batches else []
            fits = last and len(last[0]) == len(unit)
            if fits and (len(last) + 1) * len(unit) * _width(last[0]) <= batch_tokens:
                last.append(unit)
            else:
                batches.append([unit])
        yield batches


def _width(unit: Unit) -> int:
    return max(len(row.ids) for row in unit)
