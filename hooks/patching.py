"""Causal localisation: put activations of a clean prompt into the run of a corrupted one, or estimate that."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import nn

from hooks import trace_modules as probe
from hooks.counterfactuals import aligned, pairs_in_batches
from hooks.display import Readable
from hooks.errors import HookError
from hooks.interchange import SITES, PatchUnit, Positions, attributed, patched, places_of
from hooks.logit_difference import check_head, logit_difference, word_tokens
from hooks.ranking import Ranking
from hooks.remote import anywhere
from hooks.streaming import Progress, Text
from hooks.tokens import reads_whole


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
    request = _Request("patching", unit, positions, contrast, data, batch_tokens)
    return _measure(request, model, tokenizer, clean, corrupted, progress)


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
    request = _Request("attribution", unit, positions, contrast, data, batch_tokens)
    return _measure(request, model, tokenizer, clean, corrupted, progress)


def attribute(*arguments: Any, **options: Any) -> Patching:
    """The former name of `attribution_patch`."""
    warnings.warn("hooks.attribute is now hooks.attribution_patch", DeprecationWarning, stacklevel=2)
    return attribution_patch(*arguments, **options)


@dataclass(frozen=True)
class _Request:
    """What is asked for: by which method, at which units and positions, on which contrast of which data."""

    method: Literal["patching", "attribution"]
    unit: PatchUnit
    positions: Positions
    contrast: tuple[str | int, str | int]
    data: str
    batch_tokens: int

    def __post_init__(self) -> None:
        if self.unit not in SITES:
            raise HookError(f"unit is {self.unit!r}; expected one of {', '.join(SITES)}")
        if self.positions not in ("all", "changed", "last", "each"):
            raise HookError(f"positions is {self.positions!r}; expected 'all', 'changed', 'last' or 'each'")
        if len(self.contrast) != 2:
            raise HookError(f"contrast is {self.contrast!r}; expected two words such as ('he', 'she')")


class _Slope:
    """The least-squares slope of effects e on differences d through the origin, from running sums over pairs."""

    def __init__(self) -> None:
        self.count = 0
        self._sums: dict[str, Any] = dict.fromkeys(("dd", "dddd", "de", "dde", "ddee", "clean", "corrupted"), 0.0)

    def add(self, clean: NDArray[np.float64], corrupted: NDArray[np.float64], e: NDArray[np.float64]) -> None:
        """clean, corrupted: contrasts of the two runs (pair); e: what patching adds to the second (pair ...)."""
        d = clean - corrupted
        spread = d.reshape(-1, *[1] * (e.ndim - 1))
        terms = {"dd": d**2, "dddd": d**4, "de": spread * e, "dde": spread**3 * e, "ddee": (spread * e) ** 2}
        for name, term in (terms | {"clean": clean, "corrupted": corrupted}).items():
            self._sums[name] = self._sums[name] + term.sum(0)
        self.count += len(d)

    def means(self) -> tuple[float, float]:
        """Mean contrasts of the clean and of the corrupted runs."""
        return float(self._sums["clean"] / self.count), float(self._sums["corrupted"] / self.count)

    def fit(self, method: str, contrast: tuple[Any, ...]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Slope and standard error. Raises HookError for sums that are not finite, and for no differences."""
        sums, n = self._sums, self.count
        if not np.isfinite(sums["dddd"]) or not np.isfinite(sums["ddee"]).all():
            raise HookError(f"{method}: the contrast is NaN or infinite; check the weights and the dtype")
        if (sums["dd"] / n) ** 0.5 < 1e-6:
            raise HookError(
                f"{method}: clean and corrupted prompts give the same contrast {contrast} "
                f"({sums['clean'] / n:+.4f} on average), so there is nothing to restore; choose other pairs"
            )
        slope = np.asarray(sums["de"] / sums["dd"])
        # sandwich error of a slope through the origin: it allows the noise to grow with the difference
        noise = np.maximum(sums["ddee"] - 2 * slope * sums["dde"] + slope**2 * sums["dddd"], 0.0)
        return slope, np.sqrt(noise * (n / (n - 1) if n > 1 else np.nan)) / sums["dd"]


def _measure(
    request: _Request,
    model: nn.Module,
    tokenizer: Any,
    clean: Sequence[Text],
    corrupted: Sequence[Text],
    progress: Progress | None,
) -> Patching:
    pairs = _pairs(request, tokenizer, clean, corrupted, closed=reads_whole(model))
    tokens = word_tokens(tokenizer, request.contrast)
    effects_of = patched if request.method == "patching" else attributed
    slope = _Slope()
    with probe.unchanged(model):
        for first, second in pairs_in_batches(model, tokenizer, pairs, request.batch_tokens):
            if not slope.count:
                check_head(model, first, tokens)
            places = places_of(first, second, request.positions)
            a, b = (logit_difference(model, run, tokens, {}).double().cpu().numpy() for run in (first, second))
            moved = effects_of(model, first, second, tokens, request.unit, places)  # (batch ...)
            slope.add(a, b, moved.double().cpu().numpy())
            if progress is not None:
                progress(slope.count, len(pairs))
    effects, errors = slope.fit(request.method, request.contrast)
    labels = None
    if request.positions == "each":
        row = pairs[0][0]
        labels = tuple(tokenizer.convert_ids_to_tokens(row) if tokenizer else map(str, row))
    words = (str(request.contrast[0]), str(request.contrast[1]))
    return Patching(
        request.method, request.unit, request.positions, effects, errors, words, *slope.means(), labels, request.data,
        slope.count,
    )  # fmt: skip


def _pairs(
    request: _Request, tokenizer: Any, clean: Sequence[Text], corrupted: Sequence[Text], *, closed: bool
) -> list[tuple[list[int], list[int]]]:
    """Token ids of every pair, of one length where effects are by position."""
    if isinstance(clean, str) or isinstance(corrupted, str) or len(clean) != len(corrupted) or not len(clean):
        raise HookError(
            f"{request.method}: got {type(clean).__name__} of {len(clean)} clean and {type(corrupted).__name__} of "
            f"{len(corrupted)} corrupted prompts; expected two lists of the same length, at least 1"
        )
    pairs = [aligned(tokenizer, a, b, i, closed=closed) for i, (a, b) in enumerate(zip(clean, corrupted, strict=True))]
    lengths = {len(first) for first, _ in pairs}
    if request.positions == "each" and len(lengths) > 1:
        raise HookError(
            f"positions='each' needs prompts of one length, got {min(lengths)} to {max(lengths)} tokens; "
            "group the pairs by length, or ask for 'changed' or 'last'"
        )
    return pairs
