"""What every picture shares: the figure, the colours, a map with its scale, and tokens as labels.

Colours are Okabe and Ito's, which stay apart for colour-blind readers; hatching keeps them apart in grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#8C8C8C"
LIGHTNESS = "cividis"  # even in lightness, so that it reads the same in grey and to colour-blind eyes
SIGNED = "PuOr"  # purple and orange stay apart for colour-blind eyes


def new_figure(width: float, height: float) -> Figure:
    """An empty figure that belongs to no window and no pyplot state, and shows itself in a notebook; in inches."""
    from io import BytesIO

    from matplotlib.figure import Figure

    class Shown(Figure):
        """A figure that a notebook draws although nobody imported pyplot there."""

        def _repr_png_(self) -> bytes:
            data = BytesIO()
            self.savefig(data, format="png")
            return data.getvalue()

    return Shown(figsize=(width, height), layout="constrained")


def value_map(
    figure: Figure,
    axes: Axes,
    values: NDArray[np.float64],
    *,
    signed: bool,
    label: str,
    top: float | None = None,
) -> None:
    """A map with its scale. Signed maps are the same at +x and -x in grey, so a minus marks the negative."""
    high = float(np.abs(values).max()) or 1.0
    image = axes.imshow(
        values,
        cmap=SIGNED if signed else LIGHTNESS,
        vmin=-high if signed else 0.0,
        vmax=high if top is None else top,
        aspect="auto",
    )
    if signed:
        for row, column in np.argwhere(values < -0.1 * high):
            dark = values[row, column] < -0.6 * high
            axes.text(
                column, row, "\N{MINUS SIGN}", ha="center", va="center", fontsize=12, weight="bold",
                color="white" if dark else "black",
            )  # fmt: skip
    figure.colorbar(image, ax=axes, label=label)


def frame(corner: tuple[float, float], **style: Any) -> Any:
    """The outline of one cell of a map, from its lower corner."""
    from matplotlib.patches import Rectangle

    return Rectangle(corner, 1, 1, fill=False, clip_on=False, **style)


def whole_ticks(axes: Axes, columns: int, rows: int) -> None:
    """Whole numbers as ticks, at most about a dozen."""
    axes.set_xticks(range(0, columns, max(1, columns // 12)))
    axes.set_yticks(range(0, rows, max(1, rows // 15)))


def token_ticks(axis: Any, tokens: Sequence[str], rotation: int = 0) -> None:
    """Tokens as labels, a space shown as such: the marks of byte-level BPE and SentencePiece become one."""
    names = [token.replace("Ġ", "·").replace("▁", "·").replace("Ċ", "\\n") for token in tokens]
    axis.set_ticks(range(len(names)), [name.replace("$", r"\$") for name in names])
    axis.set_tick_params(labelrotation=rotation, labelsize=8)


def method_name(method: str) -> str:
    """A method as a title says it."""
    return method.replace("_", "-")


def as_array(values: Any) -> NDArray[np.float64]:
    """A tensor on any device and of any dtype, or an array, as float64."""
    if hasattr(values, "detach"):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, dtype=np.float64)
