"""Pictures of what the instruments measured; each function returns the matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hooks.drawing import (
    BLUE,
    GREEN,
    GREY,
    LIGHTNESS,
    ORANGE,
    PINK,
    SIGNED,
    as_array,
    frame,
    method_name,
    new_figure,
    token_ticks,
    value_map,
    whole_ticks,
)
from hooks.errors import HookError
from hooks.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hooks.gradient_influence import TokenInfluence
    from hooks.logit_lens import Lens
    from hooks.patching import Patching
    from hooks.reference_attention import CrossWeights

# The colours and the empty figure are for pictures of one's own.
__all__ = [
    "BLUE",
    "GREEN",
    "GREY",
    "LIGHTNESS",
    "ORANGE",
    "PINK",
    "SIGNED",
    "attention_pattern",
    "block_bars",
    "cross_attention_map",
    "head_map",
    "lens_curve",
    "new_figure",
    "patching_grid",
    "token_bars",
]


def block_bars(raw: Ranking, other: Ranking | None = None, *, edited: list[int] | None = None) -> Figure:
    """One bar a block with its standard error; ``other`` is a second convention beside it; ``edited`` is marked."""
    figure = new_figure(9, 3.2)
    axes = figure.subplots()
    blocks = np.arange(len(raw.scores))
    columns = [(raw, BLUE, ""), (other, ORANGE, "///")] if other is not None else [(raw, BLUE, "")]
    width = 0.8 / len(columns)
    for number, (ranking, colour, hatch) in enumerate(columns):
        assert ranking is not None
        axes.bar(
            blocks + (number - (len(columns) - 1) / 2) * width,
            ranking.scores,
            width,
            yerr=None if ranking.errors is None else 1.96 * ranking.errors,
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=f"{ranking.settings.get('stream', ranking.method)} (top: block {ranking.top()[0]})",
        )
    for block in edited or []:
        axes.axvspan(block - 0.5, block + 0.5, color=GREY, alpha=0.25, lw=0, zorder=0)
    axes.set_xlabel("block" + (" (shaded: edited)" if edited else ""))
    axes.set_ylabel(raw.method.upper())
    axes.set_xticks(blocks[:: max(1, len(blocks) // 15)])
    axes.set_xlim(-0.7, len(blocks) - 0.3)
    axes.set_title(f"{raw.data}, n = {raw.count}, 95 % intervals", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def head_map(ranking: Ranking, *, mark: int = 3) -> Figure:
    """Blocks x heads as a map, lighter is more; the `mark` best heads are framed. Takes a ranking of heads.

    Raises `HookError` for a ranking of anything else.
    """
    if ranking.unit != "head":
        raise HookError(f"head_map: the ranking is of unit {ranking.unit!r}; expected 'head'")
    blocks, heads = ranking.scores.shape
    figure = new_figure(2.2 + 0.32 * max(heads, 6), 1.3 + 0.19 * max(blocks, 8))
    axes = figure.subplots()
    signed = bool((ranking.scores < 0).any())
    value_map(figure, axes, ranking.scores, signed=signed, label=method_name(ranking.method))
    for block, head in ranking.top(mark):
        corner = (head - 0.5, block - 0.5)
        axes.add_patch(frame(corner, edgecolor="black", linewidth=3))
        axes.add_patch(frame(corner, edgecolor="white", linewidth=1.2))
    axes.set_xlabel(f"head (framed: the {mark} highest)" if mark else "head")
    axes.set_ylabel("block")
    whole_ticks(axes, heads, blocks)
    axes.set_title(f"{method_name(ranking.method)}, {ranking.data}, n = {ranking.count}", fontsize=10)
    return figure


def attention_pattern(
    pattern: Any, tokens: Sequence[str], *, heads: Sequence[int] | None = None, title: str = ""
) -> Figure:
    """Attention weights over tokens, one panel a head: rows ask, columns are looked at, lighter is more.

    pattern: (head query key) or (query key), as `hooks.capture` gives at `blocks.I.attn.hook_pattern` for one
    row of the batch; heads: their numbers for the titles (all from 0 on if left out).

    Raises `HookError` for weights or head numbers that are not those of the tokens.
    """
    values = as_array(pattern)
    values = values[None] if values.ndim == 2 else values
    if values.ndim != 3 or values.shape[1:] != (len(tokens), len(tokens)):
        raise HookError(
            f"attention_pattern: weights of shape {values.shape} for {len(tokens)} tokens; expected "
            "(head, tokens, tokens): take one row of the batch, without its padding"
        )
    names = list(range(len(values))) if heads is None else list(heads)
    if len(names) != len(values):
        raise HookError(f"attention_pattern: {len(names)} head numbers for {len(values)} heads")
    columns = min(4, len(values))
    rows = -(-len(values) // columns)
    size = 1.2 + 0.24 * len(tokens)
    figure = new_figure(columns * size + 0.8, rows * size + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(values) :]:
        axes.set_visible(False)
    for number, (axes, weights) in enumerate(zip(panels.flat, values, strict=False)):
        image = axes.imshow(weights, cmap=LIGHTNESS, vmin=0, vmax=1, aspect="auto")
        axes.set_title(f"head {names[number]}", fontsize=9)
        token_ticks(axes.xaxis, tokens, rotation=90)
        token_ticks(axes.yaxis, tokens if number % columns == 0 else [""] * len(tokens))
    figure.colorbar(image, ax=panels, label="attention weight", shrink=0.8)
    if title:
        figure.suptitle(title, fontsize=10)
    return figure


def lens_curve(result: Lens) -> Figure:
    """The logit difference along the stream with its 95 % band; below, what each attention and MLP adds."""
    first, second = result.contrast
    parts = [n for n in ("attention", "mlp", "cross_attention", "mixer") if n in result.values]
    figure = new_figure(8.5, 5.4 if parts else 3.2)
    panels = figure.subplots(2 if parts else 1, 1, sharex=True, squeeze=False)[:, 0]
    places = np.arange(len(result.cumulative)) - 1  # -1 is the embedding
    curve, band = result.cumulative, 1.96 * np.nan_to_num(result.errors["cumulative"])
    panels[0].fill_between(places, curve - band, curve + band, color=BLUE, alpha=0.25, lw=0)
    panels[0].plot(places, curve, color=BLUE, marker="o", ms=3.5, lw=1.6)
    panels[0].set_ylabel(f"logit {first} - {second}\nif the stream ended here")
    panels[0].set_title(f"lens, {result.data}, n = {result.count}, 95 % intervals", fontsize=10)
    width = 0.8 / max(1, len(parts))
    styles = [(BLUE, ""), (ORANGE, "///"), (GREEN, "..."), (PINK, "xxx")]
    for number, (name, (colour, hatch)) in enumerate(zip(parts, styles, strict=False)):
        panels[1].bar(
            places[1:] + (number - (len(parts) - 1) / 2) * width,
            result.values[name],
            width,
            yerr=1.96 * np.nan_to_num(result.errors[name]),
            error_kw={"lw": 0.8, "ecolor": "black"},
            color=colour,
            hatch=hatch,
            edgecolor="white",
            label=name.replace("_", "-"),
        )
    if parts:
        panels[1].set_ylabel(f"written directly\n(logit {first} - {second})")
        panels[1].legend(frameon=False, ncols=3, loc="lower left", bbox_to_anchor=(0, 0.98))
    for axes in panels:
        axes.axhline(0, color="black", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("block (E: embedding)")
    step = max(1, len(places) // 15)
    panels[-1].set_xticks([-1, *places[1::step]], ["E", *map(str, places[1::step])])
    return figure


def patching_grid(result: Patching) -> Figure:
    """Interchange effects: a grid of blocks by positions or heads, else one bar a block; minus marks harm.

    Raises `HookError` for heads by position, which are three axes.
    """
    name = f"{result.method} by {result.unit}"
    label = f"effect on {result.contrast[0]} - {result.contrast[1]} (0 corrupted, 1 clean)"
    title = f"{name}, {result.data}, n = {result.count}"
    if result.effects.ndim == 3:
        raise HookError("patching_grid: heads by position are three axes; take positions='all' or 'last'")
    if result.effects.ndim == 1:
        figure = new_figure(8.5, 3.2)
        axes = figure.subplots()
        blocks = np.arange(len(result.effects))
        error = 1.96 * np.nan_to_num(result.errors)
        axes.bar(blocks, result.effects, 0.8, yerr=error, color=BLUE, error_kw={"lw": 0.8})
        axes.axhline(0, color="black", lw=0.8)
        axes.set_xticks(blocks[:: max(1, len(blocks) // 15)])
        axes.set_xlabel("block")
        axes.set_ylabel(label.replace(" (", "\n("))
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{title}, 95 % intervals", fontsize=10)
        return figure
    blocks_count, columns = result.effects.shape
    figure = new_figure(3.0 + 0.38 * max(columns, 6), 1.6 + 0.2 * max(blocks_count, 8))
    axes = figure.subplots()
    value_map(figure, axes, result.effects, signed=True, label=label)
    whole_ticks(axes, columns, blocks_count)
    if result.tokens is not None:
        token_ticks(axes.xaxis, result.tokens, rotation=60)
    axes.set_xlabel("head" if result.tokens is None else "position (tokens of the first clean prompt)")
    axes.set_ylabel("block")
    axes.set_title(title, fontsize=10)
    return figure


def cross_attention_map(weights: CrossWeights, *, block: int | None = None, head: int | None = None) -> Figure:
    """CrAWD's beta of one text: its tokens by the reference words, lighter is more; means where none is named.

    block, head: of which to show the weights; left out, the mean over blocks or heads.

    Raises `HookError` for a block or head that the model does not have.
    """
    values = as_array(weights.weights)
    for name, number, size in (("block", block, values.shape[0]), ("head", head, values.shape[1])):
        if number is not None and not 0 <= number < size:
            raise HookError(f"cross_attention_map: {name} is {number}; the model has 0 to {size - 1}")
    values = values.mean(0) if block is None else values[block]
    values = values.mean(0) if head is None else values[head]
    figure = new_figure(2.2 + 0.5 * len(weights.words), 1.2 + 0.24 * len(weights.tokens))
    axes = figure.subplots()
    value_map(figure, axes, values, signed=False, label="beta", top=1.0)
    token_ticks(axes.xaxis, weights.words, rotation=60)
    token_ticks(axes.yaxis, weights.tokens)
    where = ", ".join(f"{n} {v}" if v is not None else f"all {n}s" for n, v in (("block", block), ("head", head)))
    axes.set_title(f"cross-attention, {where}", fontsize=9)
    return figure


def token_bars(text: TokenInfluence, *, probe: int = 0) -> Figure:
    """What each token of a text adds to its score: a bar over each, hatched blue where it lowers it."""
    values = text.values[:, probe]
    figure = new_figure(1.5 + 0.3 * max(len(values), 8), 3.0)
    axes = figure.subplots()
    places = np.arange(len(values))
    for chosen, colour, hatch, label in (
        (values >= 0, ORANGE, "", "raises the score"),
        (values < 0, BLUE, "///", "lowers it"),
    ):
        axes.bar(places[chosen], values[chosen], 0.8, color=colour, hatch=hatch, edgecolor="white", label=label)
    axes.axhline(0, color="black", lw=0.8)
    token_ticks(axes.xaxis, text.tokens, rotation=60)
    axes.set_ylabel("part of the score")
    axes.set_title(f"text {text.place}, probe {text.names[probe]}: score {text.score[probe]:+.4f}", fontsize=10)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
