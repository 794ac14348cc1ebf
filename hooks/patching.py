"""Causal localisation: put activations of a clean prompt into the run of a corrupted one, or estimate that."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.display import Readable
from hooks.errors import HookError
from hooks.interchange import SITES, PatchUnit, Positions, attributed, patched, places_of
from hooks.logit_difference import Prompts, check_head, logit_difference, prompts_in_batches, word_tokens
from hooks.ranking import Ranking
from hooks.remote import anywhere
from hooks.streaming import Progress, Text
from hooks.tokens import reads_whole, text_tokens


@dataclass(frozen=True, eq=False, repr=False)
class Patching(Readable):
    """Interchange effects on a contrast: 0 leaves the corrupted run's value, 1 restores the clean run's.

    effects, errors (standard error over pairs, NaN for one pair): (block), for heads (block, head), with a
    last axis of positions where `positions` is "each"; tokens then labels it by the first pair's tokens.
    clean, corrupted: mean logit differences of the unpatched runs.
    """

    method: Literal["patching", "attribution"]
    unit: PatchUnit
    positions: Positions
    effects: NDArray[np.float64]
    errors: NDArray[np.float64]
    contrast: tuple[str, str]
    clean: float
    corrupted: float
    tokens: tuple[str, ...] | None
    data: str
    count: int

    def ranking(self) -> Ranking:
        """Units by the size of their effect, whatever its sign; the settings hold the signs.

        Raises HookError for effects by position, which no ranking of blocks can hold.
        """
        if self.positions == "each":
            raise HookError("patching: effects are by position; for a ranking ask for positions='all'")
        settings = {
            "contrast": list(self.contrast),
            "positions": self.positions,
            "unit": self.unit,
            "signs": np.sign(self.effects).astype(int).tolist(),
        }
        unit = "block" if self.unit == "stream" else self.unit
        errors = self.errors if self.count > 1 else None
        return Ranking(self.method, unit, np.abs(self.effects), self.data, self.count, errors, settings=settings)


@anywhere
def patch(
    model: nn.Module,
    tokenizer: Any,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    contrast: tuple[str | int, str | int] = ("he", "she"),
    *,
    unit: PatchUnit = "block",
    positions: Positions = "all",
    batch_tokens: int = 4096,
    data: str = "pairs",
    progress: Progress | None = None,
) -> Patching:
    """Activation patching (Vig et al. 2020; Meng et al. 2022): one corrupted run per unit with its clean
    activation.

        clean, corrupted = hooks.counterfactual_pairs(tokenizer, "The {} said that", [("nurse", "plumber")])
        hooks.patch(model, tokenizer, clean, corrupted, unit="attention").ranking()

    unit: what a "block" adds to the stream, what "attention" or "mlp" adds, a "head"'s z, or the whole
    "stream" after a block (all of it at all positions always restores the clean run).
    positions: "all"; those of the tokens that are "changed"; the "last" prompt token; or "each" by itself.
    The effect is the least-squares slope of (patched - corrupted) on (clean - corrupted) through the origin
    over the pairs, so that pairs with hardly any difference weigh little. Of T5 and BART the encoder is
    patched. Evaluation mode; memory of one batch; the model is left as it was.

    Raises HookError for pairs of different token counts (showing both), equal prompts, pairs that do not
    differ in the contrast, "each" with prompts of several lengths, and as `hooks.lens` does.
    """
    return _measure(
        "patching", model, tokenizer, clean, corrupted, contrast, unit, positions, batch_tokens, data, progress
    )


@anywhere
def attribution_patch(
    model: nn.Module,
    tokenizer: Any,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    contrast: tuple[str | int, str | int] = ("he", "she"),
    *,
    unit: PatchUnit = "block",
    positions: Positions = "all",
    batch_tokens: int = 4096,
    data: str = "pairs",
    progress: Progress | None = None,
) -> Patching:
    """Attribution patching (Nanda 2023; Syed et al. 2023): the cheap stand-in for `patch`, of all units at
    once.

    Gradient of the contrast in the corrupted run times (clean - corrupted) activation: `patch` to first
    order, from two forward passes and one backward pass. Arguments, scale and errors are those of `patch`.
    """
    return _measure(
        "attribution", model, tokenizer, clean, corrupted, contrast, unit, positions, batch_tokens, data, progress
    )


def attribute(*arguments: Any, **options: Any) -> Patching:
    """The former name of `attribution_patch`."""
    warnings.warn("hooks.attribute is now hooks.attribution_patch", DeprecationWarning, stacklevel=2)
    return attribution_patch(*arguments, **options)


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
                _aligned(tokenizer, a, b, len(clean))
            except HookError:
                if unaligned == "skip":
                    continue
                raise
            clean += [a, b]
            corrupted += [b, a]
    if not clean:
        raise HookError(f"no pair of {len(words)} has the same number of tokens; choose other words")
    return clean, corrupted


def _aligned(
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


def _measure(
    method: Literal["patching", "attribution"],
    model: nn.Module,
    tokenizer: Any,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    contrast: tuple[str | int, str | int],
    unit: PatchUnit,
    positions: Positions,
    batch_tokens: int,
    data: str,
    progress: Progress | None,
) -> Patching:
    if unit not in SITES:
        raise HookError(f"unit is {unit!r}; expected one of {', '.join(SITES)}")
    if positions not in ("all", "changed", "last", "each"):
        raise HookError(f"positions is {positions!r}; expected 'all', 'changed', 'last' or 'each'")
    if isinstance(clean, str) or isinstance(corrupted, str) or len(clean) != len(corrupted) or not len(clean):
        raise HookError(
            f"{method}: got {type(clean).__name__} of {len(clean)} clean and {type(corrupted).__name__} of "
            f"{len(corrupted)} corrupted prompts; expected two lists of the same length, at least 1"
        )
    if len(contrast) != 2:
        raise HookError(f"contrast is {contrast!r}; expected two words such as ('he', 'she')")
    tokens, closed = word_tokens(tokenizer, contrast), reads_whole(model)
    pairs = [_aligned(tokenizer, a, b, i, closed=closed) for i, (a, b) in enumerate(zip(clean, corrupted, strict=True))]
    lengths = {len(first) for first, _ in pairs}
    if positions == "each" and len(lengths) > 1:
        raise HookError(
            f"positions='each' needs prompts of one length, got {min(lengths)} to {max(lengths)} tokens; "
            "group the pairs by length, or ask for 'changed' or 'last'"
        )
    sums: dict[str, NDArray[np.float64] | float] = dict.fromkeys(("dd", "dddd", "de", "dde", "ddee"), 0.0)
    sums |= {"clean": 0.0, "corrupted": 0.0}
    effects_of = patched if method == "patching" else attributed
    done = 0
    with probe.unchanged(model):
        for first, second in _batches(model, tokenizer, pairs, batch_tokens):
            if not done:
                check_head(model, first, tokens)
            places = places_of(first, second, positions)
            values = [logit_difference(model, b, tokens, {}).double().cpu() for b in (first, second)]
            moved = effects_of(model, first, second, tokens, unit, places).double().cpu()  # (batch ...)
            d = (values[0] - values[1]).numpy()
            e = moved.numpy()
            spread = d.reshape(-1, *[1] * (e.ndim - 1))
            terms = {"dd": d**2, "dddd": d**4, "de": spread * e, "dde": spread**3 * e, "ddee": (spread * e) ** 2}
            terms |= {"clean": values[0].numpy(), "corrupted": values[1].numpy()}
            for name, term in terms.items():
                sums[name] = sums[name] + term.sum(0)
            done += len(d)
            if progress is not None:
                progress(done, len(pairs))
    if not np.isfinite(sums["dddd"]) or not np.isfinite(sums["ddee"]).all():
        raise HookError(f"{method}: the contrast is NaN or infinite; check the weights and the dtype")
    if (sums["dd"] / done) ** 0.5 < 1e-6:
        raise HookError(
            f"{method}: clean and corrupted prompts give the same contrast {contrast} "
            f"({sums['clean'] / done:+.4f} on average), so there is nothing to restore; choose other pairs"
        )
    slope = np.asarray(sums["de"] / sums["dd"])
    # sandwich error of a slope through the origin: it allows the noise to grow with the difference
    noise = np.maximum(sums["ddee"] - 2 * slope * sums["dde"] + slope**2 * sums["dddd"], 0.0)
    errors = np.sqrt(noise * (done / (done - 1) if done > 1 else np.nan)) / sums["dd"]
    labels = None
    if positions == "each":
        row = pairs[0][0]
        labels = tuple(tokenizer.convert_ids_to_tokens(row) if tokenizer else map(str, row))
    words = (str(contrast[0]), str(contrast[1]))
    means = (float(sums["clean"] / done), float(sums["corrupted"] / done))
    return Patching(method, unit, positions, slope, errors, words, *means, labels, data, done)


def _batches(
    model: nn.Module, tokenizer: Any, pairs: list[tuple[list[int], list[int]]], batch_tokens: int
) -> Iterator[tuple[Prompts, Prompts]]:
    """Clean prompts, and the corrupted ones in the same rows and columns."""
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
