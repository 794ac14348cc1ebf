"""What a process does with memory that a computation freed."""

import ctypes
import os
import resource

import pytest
import torch

from surgery.devices import keep_freed_memory


@pytest.mark.skipif(os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_taken_up_again_without_the_kernel() -> None:
    """Blocks beyond 32 MB would be given back at every free, and cleared anew page by page."""
    keep_freed_memory()
    counts = []
    for _ in range(6):
        torch.ones(12_000_000)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert counts[-1] - counts[2] < 1000  # of 35,000 pages
