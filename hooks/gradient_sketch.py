"""Short stand-ins for a parameter's gradients that keep their inner products, whitened and plain."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


class Squares:
    """The sum of a parameter's squared gradients: of each entry, or (factored) of each row and column of a matrix.

    Factored: F_ij = r_i c_j / sum of r, which has the same rows, columns and sum (Shazeer and Stern 2018, Adafactor,
    algorithm 1), for the memory of its edges.
    """

    def __init__(self, parameter: Tensor, *, factored: bool = False) -> None:
        self.factored = factored and parameter.ndim > 1
        shape = parameter.shape
        edges = (shape[:-1], (*shape[:-2], shape[-1])) if self.factored else (shape,)
        self.sums = [torch.zeros(edge, dtype=torch.float32, device=parameter.device) for edge in edges]

    def add(self, gradient: Tensor) -> None:
        """Add the square of one gradient."""
        gradient = gradient.float()
        if self.factored:
            square = gradient.square()
            self.sums[0].add_(square.sum(-1))
            self.sums[1].add_(square.sum(-2))
        else:
            self.sums[0].addcmul_(gradient, gradient)

    def divide(self, count: int) -> float:
        """Make a mean of the sum; gives the trace, which is not finite where an entry is not."""
        for one in self.sums:
            one.div_(count)
        # Rows first: what is summed in float64 is copied, which on a CPU costs more than all the squares.
        return float(self.sums[0].sum(-1).sum(dtype=torch.float64))

    def whole(self) -> Tensor:
        """One number an entry: the sums themselves or, factored, a new tensor."""
        if not self.factored:
            return self.sums[0]
        rows, columns = self.sums
        total = rows.sum(-1, keepdim=True)[..., None].clamp_min(1e-38)
        return rows[..., :, None] / total * columns[..., None, :]


def whitening(squares: Squares, damping: float, seed: int) -> Callable[[], Tensor]:
    """Gives 1 / sqrt(F + damping) with random signs for the sketch, in place of F or, factored, made anew each time."""
    if squares.factored:
        return lambda: signed(squares.whole(), damping, seed)
    weight = signed(squares.whole(), damping, seed)
    return lambda: weight


def signed(fisher: Tensor, damping: float, seed: int) -> Tensor:
    """1 / sqrt(F + damping), in place of F, with random signs for the sketch."""
    weight = fisher.add_(damping).rsqrt_()
    draw = torch.Generator(weight.device).manual_seed(seed)
    drawn = torch.randint(256, (-(-weight.numel() // 8),), generator=draw, device=weight.device, dtype=torch.uint8)
    bits = (drawn[:, None] >> torch.arange(8, dtype=torch.uint8, device=weight.device)) & 1
    signs = bits.flatten()[: weight.numel()].view(weight.shape).to(torch.int8)
    return weight.mul_(signs.mul_(2).sub_(1))


class Sketch:
    """Count-sketches (Charikar et al. 2002) of a parameter's gradients, one for each group: whitened, and plain.

    Entry i goes to place i mod width with a random sign, so that inner products come out right on average.
    """

    def __init__(self, parameter: Tensor, weight: Callable[[], Tensor], groups: int, width: int | None) -> None:
        self.weight = weight
        self.width = min(parameter.numel(), width or parameter.numel())
        self.kept = torch.zeros((2, groups, self.width), dtype=torch.float32, device=parameter.device)

    def add(self, group: int, gradient: Tensor, size: int) -> None:
        """Add the gradient of a sum over some of the group's `size` examples."""
        gradient = gradient.float()
        whitened = gradient * self.weight()
        plain = torch.copysign(gradient, whitened) if self.width < gradient.numel() else gradient
        # copysign gives |g| sign(g w): the gradient with the weight's random sign
        for kind, values in enumerate((whitened, plain)):
            flat = values.reshape(-1)
            whole = len(flat) // self.width * self.width
            self.kept[kind, group] += flat[:whole].view(-1, self.width).sum(0) / size
            self.kept[kind, group, : len(flat) - whole] += flat[whole:] / size

    def finite(self) -> bool:
        """Whether every sum is."""
        return bool(torch.isfinite(self.kept).all())

    def products(self, kind: int) -> Float[np.ndarray, "group group"]:
        """Inner products of the groups' gradients."""
        kept = self.kept[kind].double()
        return (kept @ kept.T).cpu().numpy()
