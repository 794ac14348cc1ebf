"""Prompts in pairs that differ in a word: made from templates, checked position by position, and batched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import nn

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.errors import HookError
from hooks.logit_difference import Prompts, prompts_in_batches
from hooks.streaming import Text
from hooks.tokens import text_tokens


def counterfactual_pairs(
    tokenizer: Any,
    templates: str | Sequence[str],
    words: Sequence[tuple[str, str]],
    *,
    unaligned: Literal["raise", "skip"] = "raise",
) -> tuple[list[str], list[str]]:
    """Clean and corrupted prompts: each template with the first word and with the second, then the other way.

        counterfactual_pairs(tokenizer, "The {} said that", [("nurse", "plumber")])
        # (['The nurse said that', 'The plumber said that'], ['The plumber said that', 'The nurse said that'])

    Raises HookError for a template without exactly one "{}", and for a pair of different token counts,
    showing both tokenisations (or leaves that pair out with unaligned="skip").
    """
    clean: list[str] = []
    corrupted: list[str] = []
    for template in [templates] if isinstance(templates, str) else templates:
        if template.count("{}") != 1:
            raise HookError(f"template {template!r} has {template.count('{}')} places '{{}}'; expected one")
        for first, second in words:
            a, b = template.replace("{}", first), template.replace("{}", second)
            try:
                aligned(tokenizer, a, b, len(clean))
            except HookError:
                if unaligned == "skip":
                    continue
                raise
            clean += [a, b]
            corrupted += [b, a]
    if not clean:
        raise HookError(f"no pair of {len(words)} has the same number of tokens; choose other words")
    return clean, corrupted


def aligned(
    tokenizer: Any, clean: Text, corrupted: Text, place: int, *, closed: bool = False
) -> tuple[list[int], list[int]]:
    """Token ids of both, position by position. Raises HookError where that cannot be."""
    ids = [
        list(text_tokens(tokenizer, [text], closed=closed)[0] if isinstance(text, str) else text)
        for text in (clean, corrupted)
    ]
    shown = [" ".join(tokenizer.convert_ids_to_tokens(row) if tokenizer else map(str, row)) for row in ids]
    if len(ids[0]) != len(ids[1]):
        raise HookError(
            f"pair {place} cannot be aligned: {len(ids[0])} tokens [{shown[0]}] against {len(ids[1])} "
            f"[{shown[1]}]; expected the same number: swap words of as many tokens"
        )
    if ids[0] == ids[1]:
        raise HookError(f"pair {place} is twice the same [{shown[0]}]; expected prompts that differ")
    return ids[0], ids[1]


def pairs_in_batches(
    model: nn.Module, tokenizer: Any, pairs: list[tuple[list[int], list[int]]], batch_tokens: int
) -> Iterator[tuple[Prompts, Prompts]]:
    """Clean prompts, and the corrupted ones in the same rows and columns.

    Raises `HookError` where the mask tokens of a pair stand at different places.
    """
    for first in prompts_in_batches(model, tokenizer, [p[0] for p in pairs], batch_tokens=batch_tokens):
        ids = first.inputs["input_ids"].clone()
        for row, place in enumerate(first.places):
            ids[row, : len(pairs[place][1])] = torch.tensor(pairs[place][1], device=ids.device)
        mask = first.inputs["attention_mask"]
        inputs = model_inputs(model, {"input_ids": ids, "attention_mask": mask})
        rows = torch.arange(len(ids), device=ids.device)
        if not probe.pretrained(model).config.is_encoder_decoder:
            moved = (ids[rows, first.at] != first.inputs["input_ids"][rows, first.at]) & (first.at != first.ends)
            if moved.any():
                place = first.places[int(moved.int().argmax())]
                raise HookError(f"pair {place}: the mask tokens are at different places; expected the same")
        yield first, Prompts(first.places, inputs, first.at, first.ends)
