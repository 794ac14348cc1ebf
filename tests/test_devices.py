"""What a process does with memory that a computation freed, and what it says of a card without any."""

import ctypes
import os
import resource

import pytest
import torch

from surgery.devices import free_memory, keep_freed_memory
from surgery.errors import NoRoom


@pytest.mark.skipif(os.name != "posix" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_freed_memory_is_taken_up_again_without_the_kernel() -> None:
    """Blocks beyond 32 MB would be given back at every free, and cleared anew page by page."""
    keep_freed_memory()
    counts = []
    for _ in range(16):  # the heap may grow a few times before it is large enough
        torch.ones(12_000_000)
        counts.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
    assert counts[-1] - counts[-4] < 1000  # of 35,000 pages


def test_a_card_that_is_full_to_the_brim_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(place: torch.device) -> tuple[int, int]:
        raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr("torch.cuda.mem_get_info", full)
    with pytest.raises(
        NoRoom, match=r"^cuda:1: does not answer .*\(CUDA error: out of memory\); expected room"
    ) as told:
        free_memory(torch.device("cuda:1"))
    assert "\n" not in str(told.value) and free_memory(torch.device("cpu")) is None
