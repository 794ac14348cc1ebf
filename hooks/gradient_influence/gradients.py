"""The gradients of one layer's weight for the texts of a batch, and their products without multiplying them out.

The gradient of a linear layer's weight is sum over tokens of g_t x_t^T, so it is known per text from the layer's
input and its output's gradient.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooks.gradient_influence.layers import Layer, Preconditioner

MATERIALISED = 2**25  # entries of per-text gradients that are held at a time
VISIT = 16  # what reading or writing one entry of memory costs, in multiply-adds


@dataclass(frozen=True, eq=False)
class Gradient:
    """The gradients of one layer's weight for the units of a batch, unmultiplied.

    inputs, outputs: what the layer read, and the loss's gradient at what it wrote; zero where there is padding.
    """

    layer: Layer
    inputs: Float[Tensor, "unit token in"]
    outputs: Float[Tensor, "unit token out"]
    preconditioner: Preconditioner

    def matrix(self) -> Float[Tensor, "unit out in"]:
        """Multiplied out, in float32, after the optimiser."""
        return self.preconditioner.apply(self.layer, _product(self.outputs.mT, self.inputs))

    def chunks(self) -> Iterator[Gradient]:
        """The same in portions of units whose matrices fit into memory."""
        size = max(1, MATERIALISED // (self.layer.shape[0] * self.layer.shape[1]))
        for start in range(0, len(self.inputs), size):
            part = slice(start, start + size)
            yield Gradient(self.layer, self.inputs[part], self.outputs[part], self.preconditioner)

    def dots_and_square(
        self, vectors: Float[Tensor, "probe out in"]
    ) -> tuple[Float[Tensor, "unit probe"], Float[Tensor, " unit"]]:
        """Dot products with the probes, and the squared norm: by the cheaper of two exact ways."""
        out, into = self.layer.shape
        tokens, count = self.inputs.shape[1], len(vectors)
        multiplied_out = out * into * (2 * tokens + VISIT * (2 + count))
        by_tokens = 2 * tokens * tokens * (out + into) + 2 * tokens * out * into * count
        if self.preconditioner.kind == "none" and by_tokens < multiplied_out:
            return self.by_token(vectors).sum(1), self._gram()
        dots, squares = [], []
        for part in self.chunks():
            flat = part.matrix().flatten(1)
            dots.append(flat @ vectors.flatten(1).T)
            squares.append(torch.linalg.vector_norm(flat, dim=1).square())
        return torch.cat(dots), torch.cat(squares)

    def by_token(self, vectors: Float[Tensor, "probe out in"]) -> Float[Tensor, "unit token probe"]:
        """g_t^T P x_t of each token: what sums to the dot product of the raw gradient with P."""
        found = self.inputs.new_empty((*self.inputs.shape[:2], len(vectors)), dtype=torch.float32)
        for number, vector in enumerate(vectors):
            found[..., number] = (_product(self.inputs, vector.T) * self.outputs.float()).sum(-1)
        return found

    def _gram(self) -> Float[Tensor, " unit"]:
        """The squared norm without the matrix: sum over t, s of (x_t . x_s)(g_t . g_s)."""
        x, g = self.inputs, self.outputs
        return (_product(x, x.mT) * _product(g, g.mT)).sum((1, 2)).clamp(min=0.0)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, summed and returned in float32."""
    if a.dtype == torch.float32 or a.device.type != "cuda":
        return a.float() @ b.float()
    if b.ndim == 2:
        return torch.mm(a.flatten(0, 1), b.to(a.dtype), out_dtype=torch.float32).unflatten(0, a.shape[:2])
    return torch.bmm(a, b.to(a.dtype), out_dtype=torch.float32)
