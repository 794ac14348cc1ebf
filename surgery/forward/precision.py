"""How exactly products of float32 matrices are computed, for a while: torch's own switch, put back afterwards."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Literal

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

Precision = Literal["highest", "high", "medium"]


@contextmanager
def matrix_products(precision: Precision) -> Iterator[None]:
    """Inside, ``torch.set_float32_matmul_precision(precision)`` holds; what held before is back afterwards.

    ``highest`` is float32. ``medium`` rounds the factors to bfloat16 and sums in float32 where the processor has units
    for that (x86 CPUs with AMX); elsewhere it may be float32 all the same.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        # The fused attention of a CPU that rounds gives each head's small product to that rounding alone, which costs
        # more than it saves: of a pass over 32 prompts 0.55 s of 0.95, where the plain one takes 0.05.
        with sdpa_kernel(SDPBackend.MATH) if rounds() else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounds() -> bool:
    """Whether this processor rounds the factors of float32 products now; found out by a product that shows it."""
    nearly_one = torch.full((64, 64), 1 + 2.0**-11)
    return bool((nearly_one @ nearly_one == 64).all())
