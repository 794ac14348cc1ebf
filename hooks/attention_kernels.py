"""Which fused attention kernel runs on a CUDA device: not cuDNN's, which plans anew for every shape of a batch."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_plans() -> Iterator[None]:
    """Inside, torch's own fused kernels are taken; which ones are allowed afterwards is as it was before.

    cuDNN's plan of a shape takes about a tenth of a second, and prompts, options and texts that grow by a token have a
    shape each: of an 8B's measurements on one H100 a third of the time was planning.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
