"""The gradient of one step of a training: in parts that several processes share, by kernels that repeat their bytes."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.objective import Losses, total
from surgery.processes import count as processes
from surgery.processes import joined, mine


def backward(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    losses: Losses,
    rows: list[int],
    parts: int,
    half: torch.dtype | None,
    drawn: int | None,
) -> float:
    """The mean loss of ``rows``; its gradient is left in the parameters, the same however many processes there are.

    A part's random numbers (dropout) are those of ``drawn`` and its number.
    """
    device = next(iter(parameters.values())).device
    pieces = [piece.tolist() for piece in np.array_split(rows, min(parts, len(rows)))]
    shared = len(pieces) > 1 and processes() > 1
    values = np.zeros(len(pieces))
    found: dict[int, tuple[Tensor | None, ...]] = {}
    for number in mine(range(len(pieces))) if shared else range(len(pieces)):
        if drawn is not None:
            torch.manual_seed(drawn + 7_368_787 * number)
        with torch.autocast(device.type, dtype=half, enabled=half is not None):
            loss = total(losses(model, pieces[number])).float().mean() * (len(pieces[number]) / len(rows))
        values[number] = float(loss.detach())
        if shared:
            found[number] = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        else:
            loss.backward()
    if not shared:
        return float(sum(values))
    for place, parameter in enumerate(parameters.values()):
        every = parameter.new_zeros(len(pieces), *parameter.shape)
        for number, gradients in found.items():
            if (gradient := gradients[place]) is not None:
                every[number] = gradient
        every = joined(every)
        parameter.grad = every[0]
        for gradient in every[1:]:  # in this order, as one process adds them up
            parameter.grad = parameter.grad + gradient
    return float(sum(joined(values)))


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels where there is a choice, so that the same recipe gives the same bytes."""
    mode = torch.get_deterministic_debug_mode()
    how: Any = torch.utils.deterministic
    filled = how.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Else every new tensor is filled with NaN, to show reads of what was never written: an eighth of a step's time.
    how.fill_uninitialized_memory = False
    try:
        # On a GPU the fused attention kernels add up gradients in no fixed order; the plain one does not.
        with sdpa_kernel(SDPBackend.MATH) if device.type == "cuda" else nullcontext():
            yield
    finally:
        how.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(mode)
