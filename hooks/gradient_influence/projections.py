"""Projected gradients of texts, streamed: what an index of them keeps; memory is that of one batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooks.gradient_influence.backward import differentiate
from hooks.gradient_influence.examples import WINDOW, Batch, Text, rows, units, windows
from hooks.gradient_influence.gradients import Gradient
from hooks.gradient_influence.jobs import Job, job
from hooks.gradient_influence.layers import Moments, Preconditioner

Project = Callable[[Gradient], Float[Tensor, "unit dim"]]


@dataclass(frozen=True, eq=False)
class Projected:
    """Projected gradients of one batch: `values` belong to the texts at `places`, in that order.

    norms: of the gradients before the projection; losses, tokens: as in `Influence`.
    """

    places: tuple[int, ...]
    values: Float[Tensor, "text dim"]
    norms: Float[Tensor, " text"]
    losses: Float[Tensor, " text"]
    tokens: tuple[int, ...]


def example_gradients(
    model: nn.Module,
    tokenizer: Any,
    texts: Iterable[Text],
    *,
    project: Project,
    targets: Sequence[str] | None = None,
    optimizer: Literal["none", "less", "frozen_v"] = "none",
    moments: Moments | None = None,
    loss: Literal["mean", "sum"] = "mean",
    batch_tokens: int = 2048,
    cut: int | None = None,
    checkpointing: bool = False,
    window: int = WINDOW,
) -> Iterator[Projected]:
    """Projected gradients of the texts, batch by batch; within a window of texts the longest come first.

        def project(gradient):  # called for every layer of every batch, while the backward pass runs
            return sketch[gradient.layer.name](gradient.matrix())  # (unit, dim)

        for batch in hooks.example_gradients(model, tokenizer, texts, project=project):
            store[list(batch.places)] = batch.values

    project: gets a `Gradient` (its layer's name and (out, in), the layer's inputs (unit, token, in) and output
        gradients (unit, token, out), or `matrix()`, or `chunks()` of it) and returns (unit, dim); what it returns for
        the layers is summed. Gradients of two layers are never held at once.

    The batches, and so the bits, depend only on the texts of a window, counted from the first text given, and on
    the settings. Other arguments and errors as for `influence`.
    """
    work = job(model, targets=targets, loss=loss, checkpointing=checkpointing)
    prepared = Preconditioner(optimizer, moments, work.layers)
    for batches in windows(
        units(rows(tokenizer, texts, limit=work.limit, cut=cut), 1),
        batch_tokens=work.budget(batch_tokens),
        window=window,
    ):
        for batch in batches:
            yield _project(work, batch, project, prepared)


def _project(work: Job, batch: Batch, project: Project, prepared: Preconditioner) -> Projected:
    values: dict[str, Tensor] = {}
    squares: dict[str, Tensor] = {}

    def take(gradient: Gradient) -> None:
        name, (out, into) = gradient.layer.name, gradient.layer.shape
        nothing = torch.zeros(0, out, into, device=gradient.inputs.device)
        values[name], squares[name] = project(gradient), gradient.dots_and_square(nothing)[1]

    losses = differentiate(work, batch, take, preconditioner=prepared)
    members = [row for unit in batch for row in unit]
    # in the layers' own order, so that the sum has the same bits every time
    total = torch.stack([values[name].to(losses.device) for name in work.names]).sum(0)
    norms = torch.stack([squares[name].to(losses.device) for name in work.names]).sum(0).sqrt()
    return Projected(tuple(row.place for row in members), total, norms, losses, tuple(row.targets for row in members))
