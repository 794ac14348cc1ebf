"""Measuring leaves a model as it was: no gradients and no dropout inside, every module's own mode back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from hooks.attention_kernels import without_plans


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` is in evaluation mode and no gradient is recorded; also after an exception all is as before."""
    modes = [(module, module.training) for module in model.modules()]
    if any(mode for _, mode in modes):
        model.eval()
    try:
        with torch.no_grad(), without_plans():
            yield
    finally:
        for module, mode in modes:
            if module.training != mode:
                module.training = mode
