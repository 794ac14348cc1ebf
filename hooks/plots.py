"""Pictures of what the instruments measured; each function returns the matplotlib figure.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; hatching keeps them apart in grey.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hooks.ranking import Ranking

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8C8C8C"


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and no pyplot state; sizes in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


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
