"""Causal localisation: put activations of a clean prompt into the run of a corrupted one, or estimate that."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hooks import probe
from hooks.anatomy import find
from hooks.capture import capture, model_inputs, run_base
from hooks.edit import edit
from hooks.errors import HookError
from hooks.ranking import Ranking
from hooks.readout import Prompts, head_logits, prompts_in_batches, word_tokens
from hooks.remote import anywhere
from hooks.stream import Progress, Text

PatchUnit = Literal["block", "attention", "mlp", "head", "stream"]
Positions = Literal["all", "changed", "last", "each"]
Changes = dict[str, Callable[[Tensor], Tensor]]
_SITES = {
    "block": "hook_resid_post",  # and what entered: a block's unit is what it adds
    "attention": "hook_attn_out",
    "mlp": "hook_mlp_out",
    "head": "attn.hook_z",
    "stream": "hook_resid_post",
}


@dataclass(frozen=True, eq=False)
class Patching:
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
def attribute(
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


def _aligned(tokenizer: Any, clean: Text, corrupted: Text, place: int) -> tuple[list[int], list[int]]:
    """Token ids of both, position by position. Raises HookError where that cannot be."""
    ids = [list(tokenizer(text)["input_ids"]) if isinstance(text, str) else list(text) for text in (clean, corrupted)]
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
    if unit not in _SITES:
        raise HookError(f"unit is {unit!r}; expected one of {', '.join(_SITES)}")
    if positions not in ("all", "changed", "last", "each"):
        raise HookError(f"positions is {positions!r}; expected 'all', 'changed', 'last' or 'each'")
    if isinstance(clean, str) or isinstance(corrupted, str) or len(clean) != len(corrupted) or not len(clean):
        raise HookError(
            f"{method}: got {type(clean).__name__} of {len(clean)} clean and {type(corrupted).__name__} of "
            f"{len(corrupted)} corrupted prompts; expected two lists of the same length, at least 1"
        )
    if len(contrast) != 2:
        raise HookError(f"contrast is {contrast!r}; expected two words such as ('he', 'she')")
    tokens = word_tokens(tokenizer, contrast)
    pairs = [_aligned(tokenizer, a, b, i) for i, (a, b) in enumerate(zip(clean, corrupted, strict=True))]
    lengths = {len(first) for first, _ in pairs}
    if positions == "each" and len(lengths) > 1:
        raise HookError(
            f"positions='each' needs prompts of one length, got {min(lengths)} to {max(lengths)} tokens; "
            "group the pairs by length, or ask for 'changed' or 'last'"
        )
    sums: dict[str, NDArray[np.float64] | float] = dict.fromkeys(("dd", "dddd", "de", "dde", "ddee"), 0.0)
    sums |= {"clean": 0.0, "corrupted": 0.0}
    effects_of = _patched if method == "patching" else _attributed
    done = 0
    with probe.unchanged(model):
        for first, second in _batches(model, tokenizer, pairs, batch_tokens):
            places = _places(first, second, positions)
            values = [_contrast(model, b, tokens, {}).double().cpu() for b in (first, second)]
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


def _places(first: Prompts, second: Prompts, positions: Positions) -> list[Bool[Tensor, "batch pos"]]:
    """The positions to patch: one mask, or with "each" one mask a position."""
    mask = first.inputs["attention_mask"].bool()
    columns = torch.arange(mask.shape[1], device=mask.device)
    if positions == "each":
        return [mask & (columns == column) for column in columns]
    if positions == "changed":
        return [mask & (first.inputs["input_ids"] != second.inputs["input_ids"])]
    return [mask & (columns == first.ends[:, None])] if positions == "last" else [mask]


def _contrast(model: nn.Module, batch: Prompts, tokens: list[int], changes: Changes) -> Float[Tensor, " batch"]:
    """logit(first word) - logit(second) at the position that is read, with `changes` made on the way."""
    kept: list[Tensor] = []
    rows = torch.arange(len(batch.at), device=batch.at.device)

    def keep(tensor: Tensor) -> Tensor:
        kept[:] = [tensor[rows.to(tensor.device), batch.at.to(tensor.device)]]
        return tensor

    # the reading edit is entered first: a later one at the same site runs before it
    with edit(model, {f"{find(model).blocks[-1].site}.hook_resid_post": keep}), edit(model, changes):
        run_base(model, batch.inputs)
    logits = head_logits(model, kept[0], tokens)
    return logits[:, 0] - logits[:, 1]


def _clean(model: nn.Module, batch: Prompts, unit: PatchUnit) -> dict[str, Tensor]:
    """Block site -> the unit's activation in the clean run."""
    sites = [block.site for block in find(model).stacks[0].blocks]
    wanted = [f"{site}.{_SITES[unit]}" for site in sites]
    wanted += [f"{site}.hook_resid_pre" for site in sites] if unit == "block" else []
    with torch.no_grad(), capture(model, wanted) as store:
        run_base(model, batch.inputs)
    found = {site: store[f"{site}.{_SITES[unit]}"] for site in sites}
    return {s: x - store[f"{s}.hook_resid_pre"] for s, x in found.items()} if unit == "block" else found


def _patched(
    model: nn.Module, first: Prompts, second: Prompts, tokens: list[int], unit: PatchUnit, places: list[Tensor]
) -> Tensor:
    """patched - corrupted for each pair: (batch block [head] [pos]); one forward pass each."""
    clean = _clean(model, first, unit)
    base = _contrast(model, second, tokens, {})
    columns = []
    for site, activation in clean.items():
        heads = list(range(activation.shape[2])) if unit == "head" else [None]
        for head in heads:
            for place in places:
                changes = _swap(site, activation, unit, head, place)
                columns.append(_contrast(model, second, tokens, changes) - base)
    moved = torch.stack(columns, 1).reshape(len(base), len(clean), -1, len(places))
    moved = moved if unit == "head" else moved[:, :, 0]
    return moved if len(places) > 1 else moved[..., 0]


def _swap(site: str, clean: Tensor, unit: PatchUnit, head: int | None, place: Tensor) -> Changes:
    entering: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        entering[:] = [tensor.clone()]
        return tensor

    def change(tensor: Tensor) -> Tensor:
        where = place.to(tensor.device)[..., None]
        if head is not None:
            new = tensor.clone()
            new[:, :, head] = torch.where(where, clean[:, :, head], tensor[:, :, head])
            return new
        return torch.where(where, entering[0] + clean if unit == "block" else clean, tensor)

    changes: Changes = {f"{site}.hook_resid_pre": note} if unit == "block" else {}
    return changes | {f"{site}.{_SITES[unit]}": change}


def _attributed(
    model: nn.Module, first: Prompts, second: Prompts, tokens: list[int], unit: PatchUnit, places: list[Tensor]
) -> Tensor:
    """The same to first order, all units from one backward pass: (batch block [head] [pos])."""
    clean = _clean(model, first, unit)
    entering: dict[str, Tensor] = {}
    at_hand: dict[str, Tensor] = {}
    added: dict[str, Tensor] = {}
    changes: Changes = {}
    for site in clean:

        def note(tensor: Tensor, site: str = site) -> Tensor:
            entering[site] = tensor.detach().clone()
            return tensor

        def watch(tensor: Tensor, site: str = site) -> Tensor:
            at_hand[site] = tensor.detach().clone()
            added[site] = torch.zeros_like(tensor, requires_grad=True)
            return tensor + added[site]

        changes |= {f"{site}.hook_resid_pre": note} if unit == "block" else {}
        changes[f"{site}.{_SITES[unit]}"] = watch
    with torch.enable_grad():
        value = _contrast(model, second, tokens, changes)
        gradients = torch.autograd.grad(value.sum(), [added[site] for site in clean])
    columns = []
    for gradient, (site, activation) in zip(gradients, clean.items(), strict=True):
        corrupted = at_hand[site] - entering[site] if unit == "block" else at_hand[site]
        wide = torch.promote_types(gradient.dtype, torch.float32)
        product = (gradient.to(wide) * (activation - corrupted)).sum(-1)  # (batch pos [head])
        chosen = [place.reshape(*place.shape, *[1] * (product.ndim - 2)) for place in places]
        columns.append(torch.stack([(product * c.to(product.device)).sum(1) for c in chosen], -1))
    moved = torch.stack([c.to(columns[0].device) for c in columns], 1)  # (batch block [head] place)
    return moved if len(places) > 1 else moved[..., 0]
