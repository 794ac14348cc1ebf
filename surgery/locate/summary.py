"""The first lines of a comparison of rankings: where to cut, by which of them, how sure that is, and its picture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from hooks.ablation import Ablation
from hooks.rank_correlation import Comparison, name
from hooks.ranking import Ranking
from surgery.locate.gain import KNOWN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STEPS = "▁▂▃▄▅▆▇█"


def trusted(rankings: Sequence[Ranking]) -> Ranking:
    """The ranking to cut by: the first of ``KNOWN``, whose order is that of how well they predicted, that is there."""
    by = {name(ranking): ranking for ranking in rankings}
    return next((by[known] for known in KNOWN if known in by), rankings[0])


def spark(scores: Float[np.ndarray, " blocks"]) -> str:
    """One mark a block from the first to the last, by the size of its score; a minus stands before a negative one.

    >>> spark(np.array([0.0, 1.0, -0.5]))
    '▁█-▅'
    """
    high = float(np.abs(scores).max()) or 1.0
    places = np.round(np.abs(scores) / high * (len(STEPS) - 1)).astype(int)
    return "".join(("-" if score < 0 else "") + STEPS[place] for score, place in zip(scores, places, strict=True))


def summary(rankings: Sequence[Ranking], comparison: Comparison, ablation: Ablation, others: Sequence[int]) -> str:
    """Plain text: one line that says where to cut, the chosen ranking's picture, a line for each ranking's first block.

    How sure: the ranking's correlation with itself on two halves of the prompts, what such a ranking predicted where
    that was measured (``KNOWN``), and what mean-ablating the block does beside random blocks.
    """
    chosen = trusted(rankings)
    label, block = name(chosen), chosen.top()[0]
    same = [other for other in comparison.tops if other != label and comparison.tops[other] == block]
    stable = comparison.stability.get(label)
    effect = ablation.effect(block)
    above = sum(abs(effect) > abs(ablation.effect(other)) for other in others)
    lines = [
        f"Where to cut: block {block}, first by {label}; "
        + (f"also first by {', '.join(same)}" if same else "no other ranking puts it first")
        + f". Halves of the prompts agree at {stable if stable else 'not measured'} (Spearman). "
        + f"Mean-ablating it moves {ablation.contrast[0]} - {ablation.contrast[1]} by {effect:+.3f} logits, more than "
        f"{above} of {len(others)} random blocks do.",
        f"  {spark(chosen.scores)}  {label}, blocks 0 to {chosen.scores.size - 1}",
        KNOWN.get(label, "what this ranking predicts of an edit was not measured"),
        "first by: " + ", ".join(f"{other} {top}" for other, top in comparison.tops.items()),
        "Rankings, correlations, halves and ablations: --verbose, or --json FILE.",
    ]
    return "\n".join(lines)


def picture(rankings: Sequence[Ranking]) -> "Figure":
    """The trusted ranking's bars above, the map of all rankings below."""
    from hooks.plots import BLUE, GREY, new_figure

    chosen = trusted(rankings)
    figure = new_figure(7.5, 2.6 + 0.32 * len(rankings))
    above, below = figure.subplots(2, 1, height_ratios=[2.2, 0.32 * len(rankings)], sharex=True)
    top = chosen.top()[0]
    above.bar(
        range(chosen.scores.size), chosen.scores, color=[BLUE if n == top else GREY for n in range(chosen.scores.size)]
    )
    above.axhline(0, color="black", lw=0.6)
    above.set_title(f"{name(chosen)}: block {top} is first", fontsize=9)
    above.spines[["top", "right"]].set_visible(False)
    order = np.array([np.argsort(np.argsort(-ranking.scores)) + 1 for ranking in rankings])
    image = below.imshow(order, aspect="auto", cmap="cividis_r", interpolation="nearest")
    below.set_yticks(range(len(rankings)), [name(ranking) for ranking in rankings], fontsize=8)
    below.set_xlabel("block")
    figure.colorbar(image, ax=below, label="rank (1: first)")
    figure.set_label("The ranking to cut by, and the rank of every block by every method")
    return figure
