"""The direction of a bias in gradient space: the mean gradient of biased texts, or of texts minus their twins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.errors import HookError
from hooks.gradient_influence.backward import differentiate
from hooks.gradient_influence.examples import Batch, Row, Text, rows, units, windows
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.jobs import Job, job
from hooks.gradient_influence.layers import Preconditioner

Texts = Iterable[Text] | Mapping[str, Iterable[Text]]


@dataclass(frozen=True, eq=False)
class Probe:
    """One or several gradient directions, in float32 on the model's devices.

    vectors: layer name -> (probe, out, in). scales: what a cosine divides by for each probe: 1 for a mean of unit
    gradients, whose product with a unit gradient is the mean cosine over the probe's texts as in LESS, and the
    vector's norm for a plain mean (BIAS DIFF Eq. 5). count: texts (pairs, with a contrast) of each probe.
    digests: of the probe's texts, so that they can be refused among the data.
    """

    names: tuple[str, ...]
    vectors: Mapping[str, Float[Tensor, "probe out in"]]
    scales: Float[Tensor, " probe"]
    count: tuple[int, ...]
    digests: frozenset[bytes]
    settings: Mapping[str, Any]

    @property
    def norms(self) -> Float[Tensor, " probe"]:
        """Euclidean norms over all layers."""
        squares = [vector.flatten(1).square().sum(1).double().cpu() for vector in self.vectors.values()]
        return torch.stack(squares).sum(0).sqrt()

    def refuse(self, row: Row) -> Row:
        """The row again. Raises HookError where it is one of the probe's texts."""
        if row.digest in self.digests:
            raise HookError(
                f"text {row.place} is also a text of the probe; its score would be that of a text with itself: "
                "take it out of the data or of the probe"
            )
        return row


def influence_probe(
    model: nn.Module,
    tokenizer: Any,
    texts: Texts,
    *,
    targets: Sequence[str] | None = None,
    contrast: Texts | None = None,
    mean: Literal["unit", "plain"] = "unit",
    loss: Literal["mean", "sum"] = "mean",
    batch_tokens: int = 2048,
    cut: int | None = None,
    checkpointing: bool = False,
) -> Probe:
    """The mean gradient of `texts` at the model's LoRA factors, or at the linear layers of its blocks.

        probe = hooks.influence_probe(model, tokenizer, stereotypes, contrast=anti_stereotypes)

    texts: the biased texts; a mapping of names to texts gives several probes at once.
    contrast: their twins, in the same order: each gradient is that of the text minus that of its twin, so that what
        the two share (topic, style) cancels. A mapping names the probes that have twins; the others are plain.
    mean: "unit" scales each text's (or pair's) gradient to length 1 first, as LESS's mean of cosines does; "plain" is
        BIAS DIFF's gradient of the mean loss.
    targets: see `find_layers`; the scored texts use the probe's layers. loss: over the tokens of a text.
    cut, batch_tokens, checkpointing: see `influence`.

    Two passes over the texts with "unit", one with "plain". No optimiser: that acts on the training side only.

    Raises HookError for no texts, twins that do not match, and what `influence` refuses.
    """
    if mean not in ("unit", "plain"):
        raise HookError(f"mean is {mean!r}; expected 'unit' or 'plain'")
    work = job(model, targets=targets, loss=loss, checkpointing=checkpointing)
    named = dict(texts) if isinstance(texts, Mapping) else {"probe": texts}
    if not named:
        raise HookError("the probe is empty: got no named texts; expected at least one text")
    twins = dict(contrast) if isinstance(contrast, Mapping) else {} if contrast is None else {"probe": contrast}
    if not set(twins) <= set(named):
        raise HookError(f"contrast has probes {sorted(twins)}; expected some of the texts': {sorted(named)}")
    sums: dict[str, list[Tensor]] = {name: [] for name in work.names}
    count, digests = [], set()
    for name, given in named.items():
        found = _units(tokenizer, name, given, twins.get(name), work, cut)
        count.append(len(found))
        digests |= {row.digest for unit in found for row in unit}
        for layer, total in _mean(work, found, mean, batch_tokens).items():
            sums[layer].append(total)
    settings = {"mean": mean, "contrast": sorted(twins), "loss": loss, "cut": cut}
    vectors = {layer: torch.stack(totals) for layer, totals in sums.items()}
    probe = Probe(tuple(named), vectors, torch.ones(len(named)), tuple(count), frozenset(digests), settings)
    norms = probe.norms
    if not bool((norms > 0).all()):
        flat = probe.names[int((norms > 0).int().argmin())]
        raise HookError(f"probe {flat!r}: its mean gradient is zero at {len(work.layers)} layers; it points nowhere")
    scales = torch.ones(len(named)) if mean == "unit" else norms.float()
    return Probe(probe.names, vectors, scales, probe.count, probe.digests, settings)


def _units(
    tokenizer: Any, name: str, texts: Iterable[Text], twins: Iterable[Text] | None, work: Job, cut: int | None
) -> list[tuple[Row, ...]]:
    first = list(rows(tokenizer, texts, limit=work.limit, cut=cut, what="probe text"))
    if not first:
        raise HookError(f"probe {name!r} is empty; expected at least one text")
    if twins is None:
        return list(units(first, 1))
    second = list(rows(tokenizer, twins, limit=work.limit, cut=cut, what="contrast text"))
    if len(second) != len(first):
        raise HookError(f"probe {name!r} has {len(first)} texts and {len(second)} twins; expected one twin for each")
    for row, twin in zip(first, second, strict=True):
        if row.ids == twin.ids:
            raise HookError(f"probe {name!r}: text {row.place} and its twin are the same; their difference is nothing")
    return list(zip(first, second, strict=True))


def _mean(work: Job, found: list[tuple[Row, ...]], mean: str, batch_tokens: int) -> dict[str, Tensor]:
    """The mean gradient over the units: first their norms, then one weighted sum."""
    signs = [1.0, -1.0][: len(found[0])]
    plain = Preconditioner("none", None, work.layers)
    batches = [batch for window in windows(found, batch_tokens=work.budget(batch_tokens)) for batch in window]
    totals: dict[str, Tensor] = {}

    def add(gradient: Gradient) -> None:
        # The weights are in the loss, so all units and tokens are summed at once: (out, in)
        x, g = gradient.inputs.flatten(0, 1), gradient.outputs.flatten(0, 1)
        total = (
            torch.addmm(totals[gradient.layer.name], g.float().T, x.float())
            if gradient.layer.name in totals
            else (g.float().T @ x.float())
        )
        totals[gradient.layer.name] = total

    for batch in batches:
        lengths = _norms(work, batch, signs, plain) if mean == "unit" else torch.ones(len(batch))
        if not bool((lengths > 0).all()):
            place = batch[int((lengths > 0).int().argmin())][0].place
            raise HookError(f"probe text {place} has no gradient at the layers looked at; leave it out")
        weights = [sign / float(length) / len(found) for length in lengths for sign in signs]
        differentiate(work, batch, add, preconditioner=plain, weights=weights)
    return totals


def _norms(work: Job, batch: Batch, signs: list[float], plain: Preconditioner) -> Tensor:
    squares: list[Tensor] = []

    def take(gradient: Gradient) -> None:
        out, into = gradient.layer.shape
        nothing = torch.zeros(0, out, into, device=gradient.inputs.device)
        squares.append(gradient.dots_and_square(nothing)[1].cpu())

    differentiate(work, batch, take, preconditioner=plain, weights=signs)
    return torch.stack(squares).double().sum(0).sqrt()
