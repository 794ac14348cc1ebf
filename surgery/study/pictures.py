"""A study's pictures: bias against cost for each pair of numbers, what another method beats in grey."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooks.plots import BLUE, GREY, ORANGE, new_figure
from surgery.runs.compare import front, loss
from surgery.study.settings import Study
from surgery.study.verdict import Row, axes, plain_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def drawn(found: Sequence[Row], study: Study) -> dict[str, "Figure"]:
    """Bias against cost for each pair of axes; methods that another one beats on both are grey."""
    figures: dict[str, Figure] = {}
    for model in dict.fromkeys(row.model for row in found):
        own = [row for row in found if row.model == model]
        bias, cost = axes(study, own[0].scores)
        for x, y in product(cost, bias):
            shown = [row for row in own if x in row.scores and y in row.scores]
            if len(shown) > 1:
                figures[f"{Path(model).name}_{y}_{x}".replace(".", "_")] = _picture(model, shown, x, y)
    return figures


def _picture(model: str, shown: Sequence[Row], x: str, y: str) -> "Figure":
    figure = new_figure(7, 4.2)
    plot = figure.subplots()
    pairs: list[tuple[Mapping[str, Any], Mapping[str, Any]]] = [(row.scores[x], row.scores[y]) for row in shown]
    best = front([(loss(a), loss(b)) for a, b in pairs])
    for number, (row, (a, b)) in enumerate(zip(shown, pairs, strict=True)):
        colour = ORANGE if row.method is None else BLUE if number in best else GREY
        error: Any = [[abs(b["value"] - b["low"])], [abs(b["high"] - b["value"])]]
        plot.errorbar(
            a["value"], b["value"], yerr=error, color=colour, marker="s" if row.method is None else "o", lw=0.8
        )
    for name, place, metric in (("x", x, pairs[0][0]), ("y", y, pairs[0][1])):
        ways = {"nearer": f"ideal {metric['ideal']:g}", "same": f"as before: {metric['ideal']:.3g}"}
        way = ways.get(metric["direction"], f"{metric['direction']} is better")
        getattr(plot, f"set_{name}label")(f"{plain_words(place)} ({way})")
    figure.set_label(f"{plain_words(y)} against {plain_words(x)}, {model}")
    plot.set_title(f"{model}. Orange: untouched; grey: another method is better on both axes.", fontsize=9)
    plot.spines[["top", "right"]].set_visible(False)
    _label(plot, [(a["value"], b["value"], row.name) for row, (a, b) in zip(shown, pairs, strict=True)])
    return figure


def _label(plot: "Axes", points: Sequence[tuple[float, float, str]]) -> None:
    """Write each point's name at the nearest place beside it where no other name stands."""
    low, high = (pick(y for _, y, _ in points) for pick in (min, max))
    room = 0.08 * ((high - low) or 1.0)
    plot.set_ylim(low - room, high + 2 * room)  # a wide interval may be cut; the table has it
    plot.set_xlim(*plot.get_xlim())  # as it will be painted
    scale = 72 / plot.figure.dpi  # from pixels to typographic points
    sides = [(side, shift) for shift in (3, -8, 10, -15, 17, -22, 24, 31, 38) for side in (1, -1)]
    at = {point: plot.transData.transform(point[:2]) * scale for point in points}
    taken = [(x - 4, x + 4, y - 3) for x, y in at.values()]
    for (x, y, name), (left, bottom) in at.items():
        width = 4.4 * len(name)

        def covered(side: int, shift: int, left: float = left, bottom: float = bottom, width: float = width) -> int:
            start = left + 5 if side > 0 else left - 5 - width
            over = sum(start < b and a < start + width and abs(bottom + shift - c) < 8 for a, b, c in taken)
            return over + (start < plot.bbox.x0 * scale)  # on the axis

        side, shift = min(sides, key=lambda place: covered(*place))
        start = left + 5 if side > 0 else left - 5 - width
        taken.append((start, start + width, bottom + shift))
        how: Any = {"xytext": (5 * side, shift), "textcoords": "offset points", "ha": "left" if side > 0 else "right"}
        plot.annotate(name, (x, y), fontsize=7, **how)
