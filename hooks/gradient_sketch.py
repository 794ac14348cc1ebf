"""Short stand-ins for a parameter's gradients that keep their inner products, whitened and plain."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def signed(fisher: Tensor, damping: float, seed: int) -> Tensor:
    """1 / sqrt(F + damping), in place of F, with random signs for the sketch."""
    weight = fisher.add_(damping).rsqrt_()
    draw = torch.Generator(weight.device).manual_seed(seed)
    signs = torch.randint(0, 2, weight.shape, generator=draw, device=weight.device, dtype=torch.int8)
    return weight.mul_(signs.mul_(2).sub_(1))


class Sketch:
    """Count-sketches (Charikar et al. 2002) of a parameter's gradients, one for each group: whitened, and plain.

    Entry i goes to place i mod width with a random sign, so that inner products come out right on average.
    """

    def __init__(self, weight: Tensor, groups: int, width: int | None) -> None:
        self.weight = weight
        self.width = min(weight.numel(), width or weight.numel())
        self.kept = weight.new_zeros((2, groups, self.width))

    def add(self, group: int, gradient: Tensor, size: int) -> None:
        """Add the gradient of a sum over some of the group's `size` examples."""
        gradient = gradient.float()
        whitened = gradient * self.weight
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
