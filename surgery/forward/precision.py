"""How exactly products of float32 matrices are computed, for a while: torch's own switch, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["highest", "high", "medium"]


@contextmanager
def matrix_products(precision: Precision) -> Iterator[None]:
    """Inside, ``torch.set_float32_matmul_precision(precision)`` holds; what held before is back afterwards.

    ``highest`` is float32. ``medium`` rounds the factors to bfloat16 and sums in float32 where the processor has units
    for that (on an x86 CPU with AMX three times as fast); elsewhere it may be float32 all the same.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
