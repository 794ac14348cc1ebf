"""A figure as a page holds it, and as a file beside the page."""

import html
import io
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def svg(name: str, figure: "Figure") -> str:
    """The figure as an SVG element whose black is the page's ink, so that it can be read on a dark page too."""
    from matplotlib import rc_context

    data = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None})
    text = data.getvalue()
    text = text[text.index("<svg") :].replace("#000000", "currentColor")
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text, count=2)  # a page needs none
    label = html.escape(str(figure.get_label() or name.replace("_", " ")), quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)


def bytes_of(figure: "Figure", kind: str = "png") -> bytes:
    """The figure as the bytes of a file of this kind: png, svg or pdf."""
    data = io.BytesIO()
    figure.savefig(data, format=kind, dpi=130)
    return data.getvalue()
