"""Which tokens of a text carry its influence: an exact sum over positions, as highlighted text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import HookError
from hooks.gradient_influence.backward import differentiate
from hooks.gradient_influence.examples import Text, rows, units, windows
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.layers import Moments, Preconditioner
from hooks.gradient_influence.query import Probe
from hooks.gradient_influence.scores import job_of


@dataclass(frozen=True, eq=False)
class TokenInfluence:
    """What each token of one text adds to its score: the text's gradient is a sum over positions, and so is this.

    A position's part is that of the weights as they act on that token, with all later losses that they reach; the
    last token's is 0, since nothing behind it is predicted. layers: the same by layer. score: the sum.
    """

    place: int
    names: tuple[str, ...]
    tokens: tuple[str, ...]
    values: Float[np.ndarray, "token probe"]
    layers: Float[np.ndarray, "token probe layer"]
    score: Float[np.ndarray, " probe"]
    norm: float
    layer_names: tuple[str, ...]


def token_influence(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    probe: Probe,
    *,
    optimizer: Literal["none", "frozen_v"] = "none",
    moments: Moments | None = None,
    normalise: Literal["cosine", "dot"] = "cosine",
    batch_tokens: int = 2048,
    cut: int | None = None,
) -> list[TokenInfluence]:
    """Split the texts' scores of `influence` over their tokens: g_t^T P x_t, summed over the layers.

        for text in hooks.token_influence(model, tokenizer, texts, probe):
            print(text.tokens, text.values[:, 0])

    A probe's own texts may be given. Raises HookError for LESS's Adam, in which tokens do not add up, and what
    `influence` refuses.
    """
    if optimizer == "less":
        raise HookError("optimizer 'less' is no sum over tokens (it divides by the text's own square); take 'frozen_v'")
    if normalise not in ("cosine", "dot"):
        raise HookError(f"normalise is {normalise!r}; expected 'cosine' or 'dot'")
    work = job_of(model, probe, False)
    prepared = Preconditioner(optimizer, moments, work.layers)
    folded = {layer.name: prepared.fold(layer, probe.vectors[layer.name]) for layer in work.layers}
    results: list[TokenInfluence] = []
    found = units(rows(tokenizer, texts, limit=work.limit, cut=cut), 1)
    for batch in (batch for window in windows(found, batch_tokens=work.budget(batch_tokens)) for batch in window):
        parts: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}

        def take(gradient: Gradient, parts: Any = parts, squares: Any = squares) -> None:
            name, (out, into) = gradient.layer.name, gradient.layer.shape
            vectors = folded[name].to(gradient.inputs.device)
            parts[name] = gradient.by_token(vectors).cpu()
            squares[name] = gradient.dots_and_square(vectors[:0].reshape(0, out, into))[1].cpu()

        differentiate(work, batch, take, preconditioner=prepared)
        layers = torch.stack([parts[name] for name in work.names], -1)  # (text token probe layer)
        norms = torch.stack([squares[name] for name in work.names]).sum(0).sqrt()
        if normalise == "cosine":
            layers = layers / (norms.clamp(min=1e-30)[:, None, None, None] * probe.scales[:, None])
        for (row,), values, norm in zip(batch, layers.double().numpy(), norms.tolist(), strict=True):
            own = values[: len(row.ids)]
            pieces = tuple(map(str, row.ids)) if tokenizer is None else _pieces(tokenizer, row.ids)
            total = own.sum(-1)
            results.append(TokenInfluence(row.place, probe.names, pieces, total, own, total.sum(0), norm, work.names))
    return sorted(results, key=lambda result: result.place)


def _pieces(tokenizer: Any, ids: Sequence[int]) -> tuple[str, ...]:
    """Each token as the text that it stands for, with its space."""
    return tuple(tokenizer.convert_tokens_to_string([t]) if _marked(t) else t for t in _names(tokenizer, ids))


def _names(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [str(name) for name in tokenizer.convert_ids_to_tokens(list(ids))]


def _marked(token: str) -> bool:
    return token.startswith(("Ġ", "▁", "Ċ"))


def highlighted(texts: Iterable[TokenInfluence], *, probe: int = 0, title: str = "Influence by token") -> str:
    """A page (HTML, without scripts or links) with each text's tokens shaded by what they add to its score.

    Orange adds, purple (underlined) takes away; the scale is the same for all texts. Hover over a token for its value.

    Raises `HookError` for no texts.
    """
    given = list(texts)
    if not given:
        raise HookError("highlighted: got no texts; expected at least one TokenInfluence")
    high = max(float(np.abs(text.values[:, probe]).max(initial=0.0)) for text in given) or 1.0
    lines = "\n".join(_line(text, probe, high) for text in given)
    name = escape(given[0].names[probe])
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>
<style>
body {{ font: 16px/1.9 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem }}
span {{ padding: .15em 0; border-radius: .15em; white-space: pre-wrap }}
.less {{ text-decoration: underline }}
td {{ vertical-align: top; padding: .3rem .8rem .3rem 0 }}
td:first-child {{ font-variant-numeric: tabular-nums; white-space: nowrap; color: #444 }}
</style>
<h1>{escape(title)}</h1>
<p>Probe: {name}. Orange tokens raise the text's score, purple underlined ones lower it; the darkest is
{high:.3g}. The numbers on the left are the place of the text in the data and its score.</p>
<table>
{lines}
</table></html>
"""


def _line(text: TokenInfluence, probe: int, high: float) -> str:
    spans = []
    for token, value in zip(text.tokens, text.values[:, probe], strict=True):
        share = min(1.0, abs(float(value)) / high)
        colour = "230,97,1" if value >= 0 else "94,60,153"
        kind = ' class="less"' if value < 0 and share > 0.05 else ""
        style = f"background:rgba({colour},{0.6 * share:.2f})"
        spans.append(f'<span{kind} style="{style}" title="{value:.3g}">{escape(token)}</span>')
    return f"<tr><td>{text.place}: {text.score[probe]:+.4f}</td><td>{''.join(spans)}</td></tr>"
