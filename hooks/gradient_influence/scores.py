"""Scores of training texts against a probe, streamed: memory is that of one batch, whatever the data's length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks.display import Readable
from hooks.errors import HookError
from hooks.gradient_influence.backward import differentiate
from hooks.gradient_influence.examples import WINDOW, Batch, Row, Text, rows, units, windows
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.jobs import Job, job
from hooks.gradient_influence.layers import Moments, Preconditioner
from hooks.gradient_influence.query import Probe
from hooks.streaming import Progress


@dataclass(frozen=True, eq=False, repr=False)
class Influence(Readable):
    """How far the gradients of texts point along each probe; a step on a text with a high score feeds the bias.

    scores: cosines or dot products. norms: of the texts' gradients, after the optimiser. layers: what each layer
    adds to the score (they sum to it). losses: nats, reduced over the text's tokens as `settings["loss"]` says.
    tokens: how many tokens of each text are targets. first: place of the first text in the data.
    notes: what a reader must know. checkpoints: each one's own scores where several were combined.
    """

    names: tuple[str, ...]
    scores: Float[np.ndarray, "text probe"]
    norms: Float[np.ndarray, " text"]
    layers: Float[np.ndarray, "text probe layer"]
    layer_names: tuple[str, ...]
    losses: Float[np.ndarray, " text"]
    tokens: Int[np.ndarray, " text"]
    settings: dict[str, Any]
    first: int = 0
    notes: tuple[str, ...] = ()
    checkpoints: Float[np.ndarray, "text probe checkpoint"] | None = field(default=None)

    def top(self, count: int = 10, probe: int = 0) -> list[tuple[int, float]]:
        """The `count` texts with the highest scores, as (place, score); ties in the order of the data."""
        scores = self.scores[:, probe]
        order = np.lexsort((np.arange(len(scores)), -scores))[:count]
        return [(self.first + int(place), float(scores[place])) for place in order]


def influence(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    probe: Probe,
    *,
    optimizer: Literal["none", "less", "frozen_v"] = "none",
    moments: Moments | None = None,
    normalise: Literal["cosine", "dot"] = "cosine",
    unit: Literal["example", "batch"] = "example",
    unit_size: int = 8,
    batch_tokens: int = 2048,
    cut: int | None = None,
    checkpointing: bool = False,
    progress: Progress | None = None,
) -> Influence:
    """Score every text by its gradient against the probe's (BIAS DIFF Eq. 5; Xia et al. 2024, LESS).

        probe = hooks.influence_probe(model, tokenizer, biased_sentences)
        hooks.influence(model, tokenizer, training_texts, probe).top(10)

    texts: strings, token ids, or objects with `ids` and `start`, from which on tokens are targets.
    optimizer, moments: "less" is what Adam would do with the text's gradient, "frozen_v" divides it by Adam's root
        of v, both from `adam_moments`; see `Preconditioner`.
    normalise: "cosine" divides by the norm of the text's gradient (and see `Probe.scales`); "dot" (Eq. 6) does not.
    unit: "batch" gives every text the score of its batch of `unit_size` texts in the order of the data, as the
        paper does in practice; it is for reproduction only.
    batch_tokens: tokens run together, with padding; no result depends on it but by rounding.
    cut: take the first so many tokens of longer texts; without it texts longer than the context are refused.
    checkpointing: recompute each block on the way back instead of keeping its activations.

    Nothing per text is kept but the results; for a file that is too long even for them see `influence_windows`.
    Model, mode, flags and hooks are as before afterwards, and between batches.

    Raises HookError for no texts, a text without tokens or with none to predict, one longer than the context, one
    that is also a probe's, moments that do not fit, and layers that do not see every token.
    """
    total, parts = len(texts) if isinstance(texts, Sequence) else None, []
    found = influence_windows(
        model, tokenizer, texts, probe, optimizer=optimizer, moments=moments, normalise=normalise, unit=unit,
        unit_size=unit_size, batch_tokens=batch_tokens, cut=cut, checkpointing=checkpointing,
        progress=None if progress is None else lambda done, _: progress(done, total),
    )  # fmt: skip
    for part in found:
        parts.append(part)
    if not parts:
        raise HookError("the data set is empty; expected at least one text")
    joined: dict[str, Any] = {
        key: np.concatenate([getattr(part, key) for part in parts])
        for key in ("scores", "norms", "layers", "losses", "tokens")
    }
    return replace(parts[0], **joined)


def influence_windows(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    probe: Probe,
    *,
    optimizer: Literal["none", "less", "frozen_v"] = "none",
    moments: Moments | None = None,
    normalise: Literal["cosine", "dot"] = "cosine",
    unit: Literal["example", "batch"] = "example",
    unit_size: int = 8,
    batch_tokens: int = 2048,
    cut: int | None = None,
    checkpointing: bool = False,
    window: int = WINDOW,
    first: int = 0,
    progress: Progress | None = None,
) -> Iterator[Influence]:
    """`influence` in pieces of about `window` texts, in the order of the data: flat memory for any length.

    first: the place of the first text, where `texts` are the rest of a longer file.

    Raises `HookError` for another `normalise` or `unit`, and as `influence` does.
    """
    if normalise not in ("cosine", "dot"):
        raise HookError(f"normalise is {normalise!r}; expected 'cosine' or 'dot'")
    if unit not in ("example", "batch") or unit_size < 1:
        raise HookError(f"unit is {unit!r} of {unit_size}; expected 'example', or 'batch' of at least 1 text")
    work = job_of(model, probe, checkpointing)
    prepared = Preconditioner(optimizer, moments, work.layers)
    settings = {
        "optimizer": optimizer,
        "normalise": normalise,
        "unit": unit if unit == "example" else f"batch of {unit_size}",
        "loss": work.loss,
        "cut": cut,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layers": len(work.layers),
        "probes": dict(zip(probe.names, probe.count, strict=True)),
        "mean": probe.settings["mean"],
        "contrast": probe.settings["contrast"],
    }
    warning = (
        f"scores are those of batches of {unit_size} texts in the data's order: where texts of a kind stand together "
        "they give the kind away; shuffle, and compare with unit='example'"
    )
    source = (probe.refuse(row) for row in rows(tokenizer, texts, limit=work.limit, cut=cut, first=first))
    size = 1 if unit == "example" else unit_size
    done = 0
    for batches in windows(units(source, size), batch_tokens=work.budget(batch_tokens), window=window):
        found = []
        for batch in batches:
            found.append((batch, _score(work, batch, probe, prepared, normalise)))
            done += sum(len(members) for members in batch)
            if progress is not None:
                progress(done, None)
        notes = ((warning,) if unit == "batch" else ()) + ((work.note,) if work.note else ())
        yield _in_order(found, work, probe, settings, notes)


def check_texts(
    model: nn.Module, tokenizer: Any, texts: Iterable[Text], probe: Probe, *, cut: int | None = None
) -> int:
    """How many texts there are. Raises HookError for the first that `influence` would refuse, without a gradient."""
    limit = job_of(model, probe, False).limit
    return sum(1 for _ in map(probe.refuse, rows(tokenizer, texts, limit=limit, cut=cut)))


@dataclass(frozen=True, eq=False)
class _Scored:
    """Results of one batch: layers (unit, probe, layer), norms (unit), losses (row)."""

    layers: Float[np.ndarray, "unit probe layer"]
    norms: Float[np.ndarray, " unit"]
    losses: Float[np.ndarray, " row"]


def job_of(model: nn.Module, probe: Probe, checkpointing: bool) -> Job:
    """What has to be computed for the layers of `probe`. Raises `HookError` where they are not those of the model."""
    work = job(model, loss=probe.settings["loss"], checkpointing=checkpointing)
    work = replace(work, layers=tuple(layer for layer in work.layers if layer.name in probe.vectors))
    if set(work.names) != set(probe.vectors):
        raise HookError(
            f"the probe was made at {len(probe.vectors)} layers, this model has {len(work.layers)} of them; make the "
            "probe with this model and its adapters"
        )
    for layer in work.layers:
        if tuple(probe.vectors[layer.name].shape[1:]) != layer.shape:
            raise HookError(f"the probe has {tuple(probe.vectors[layer.name].shape[1:])} for {layer}; make it anew")
    return work


def _score(work: Job, batch: Batch, probe: Probe, prepared: Preconditioner, normalise: str) -> _Scored:
    dots: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def take(gradient: Gradient) -> None:
        name = gradient.layer.name
        vectors = probe.vectors[name].to(gradient.inputs.device)
        dots[name], squares[name] = gradient.dots_and_square(vectors)

    losses = differentiate(work, batch, take, preconditioner=prepared)
    layers = torch.stack([dots[name].to(losses.device) for name in work.names], -1)
    norms = torch.stack([squares[name].to(losses.device) for name in work.names]).sum(0).sqrt()
    if normalise == "cosine":  # a text without any gradient points nowhere: 0, not NaN
        layers = layers / (norms[:, None, None].clamp(min=1e-30) * probe.scales.to(losses.device)[None, :, None])
    scored = _Scored(*(tensor.cpu().numpy() for tensor in (layers, norms, losses)))
    if not np.isfinite(scored.layers).all():
        place = batch[int((~np.isfinite(scored.layers)).any((1, 2)).argmax())][0].place
        raise HookError(f"the gradient of text {place} is not finite; use float32 or bfloat16, or leave it out")
    return scored


def _in_order(
    found: list[tuple[Batch, _Scored]], work: Job, probe: Probe, settings: dict[str, Any], notes: tuple[str, ...]
) -> Influence:
    """Every text of a window with the score of its unit."""
    members: list[Row] = [row for batch, _ in found for unit in batch for row in unit]
    repeats = np.concatenate([[len(unit) for unit in batch] for batch, _ in found])
    order = np.argsort([row.place for row in members])
    layers = np.repeat(np.concatenate([scored.layers for _, scored in found]), repeats, axis=0)[order]
    return Influence(
        names=probe.names,
        scores=layers.sum(-1, dtype=np.float64),
        norms=np.repeat(np.concatenate([scored.norms for _, scored in found]), repeats)[order],
        layers=layers,
        layer_names=work.names,
        losses=np.concatenate([scored.losses for _, scored in found])[order],
        tokens=np.array([row.targets for row in members])[order],
        settings=settings,
        first=min(row.place for row in members),
        notes=notes,
    )


def combine(results: Sequence[Influence], weights: Sequence[float]) -> Influence:
    """The sum of several checkpoints' scores, weighted by their learning rates (Eq. 5); each one's are kept.

    norms and losses are those of the last checkpoint. Raises HookError for results that are not of the same texts,
    probes and settings.
    """
    if not results or len(results) != len(weights):
        raise HookError(f"combine: got {len(results)} results and {len(weights)} weights; expected one weight for each")
    last = results[-1]
    for result in results:
        same = (result.names, result.first, result.settings) == (last.names, last.first, last.settings)
        if not same or result.scores.shape != last.scores.shape or (result.tokens != last.tokens).any():
            raise HookError("combine: the results differ in texts, probes or settings; score the same data each time")
    share = np.asarray(weights, dtype=np.float64)
    columns = np.stack([result.scores for result in results], -1)
    layers = sum(weight * result.layers for weight, result in zip(share, results, strict=True))
    return replace(
        last,
        scores=columns @ share,
        layers=np.asarray(layers),
        checkpoints=columns,
        settings=last.settings | {"checkpoint_weights": [float(weight) for weight in share]},
    )
