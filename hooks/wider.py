"""A model's pass in wider numbers, and whether a quicker way to the same values errs more than the plain one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

WIDER = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
NEAR = 1e-4  # of the values' own size (root mean square): no measure here shows a difference that small


class Wider(TorchFunctionMode):
    """Inside, every operation reads its floating-point inputs in `dtype` or wider; weights are converted as they are
    read, one at a time, and nothing of the model is changed.

        with Wider(torch.float64):
            exact = model(**inputs).logits
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self._narrow = {torch.float16, torch.bfloat16, torch.float32} - {dtype, torch.promote_types(dtype, dtype)}
        self._narrow = {each for each in self._narrow if torch.promote_types(each, dtype) == dtype}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "__get__" or func is torch.nn.functional.embedding:  # a property, or a few rows of a large table
            return tree_map(self._widen, func(*args, **kwargs))
        args, kwargs = tree_map(self._widen, (args, kwargs))
        if name in ("float", "half", "bfloat16") and isinstance(args[0], Tensor):
            return args[0] if args[0].is_floating_point() else args[0].to(self.dtype)  # positions, as Llama takes them
        return func(*args, **kwargs)

    def _widen(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(self.dtype) if value.dtype in self._narrow else value
        return self.dtype if isinstance(value, torch.dtype) and value in self._narrow else value


def gap(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The root mean square of the differences, over that of the values of `other`."""
    pairs = [(a.detach().double().cpu(), b.detach().double().cpu()) for a, b in zip(one, other, strict=True)]
    difference = sum(float((a - b).square().sum()) for a, b in pairs)
    return (difference / max(sum(float(b.square().sum()) for _, b in pairs), 1e-300)) ** 0.5


def errs_more(
    quick: Sequence[Tensor], plain: Sequence[Tensor], again: Callable[[], Iterable[Tensor]], dtype: torch.dtype
) -> str | None:
    """Why the `quick` values must not stand for the `plain` ones, or None.

    They may where they differ by less than `NEAR`, or where they lie as near to the pass in the next wider dtype as
    the plain values do, whose distance is the rounding of this dtype in this model (up to a factor of 4: both are
    draws of the same size). `again` runs the plain pass another time, one value after the other, for that distance;
    it is not asked for a second one where the first holds and no value differs by more than that rounding allows.
    """
    if any(a.shape != b.shape for a, b in zip(quick, plain, strict=True)):
        return f"values of shape {tuple(quick[0].shape)} instead of {tuple(plain[0].shape)}"
    apart = gap(quick, plain)
    if apart <= NEAR:
        return None
    wide, own, theirs = WIDER.get(dtype), 0.0, apart
    if wide is not None:
        exact: list[Tensor] = []
        most = max(gap([a], [b]) for a, b in zip(quick, plain, strict=True))
        try:
            with Wider(wide):
                for value in again():
                    exact.append(value)
                    own, theirs = gap(plain[: len(exact)], exact), gap(quick[: len(exact)], exact)
                    if max(theirs, most) <= 4 * own:
                        return None
        except Exception as error:  # a kernel of one dtype only: then the dtype's own precision has to do
            own = 2 * torch.finfo(dtype).eps
            if apart <= 4 * own:
                return None
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
            return f"it differs by {apart:.2g} of the values' size, and no wider pass runs ({why})"
    if theirs <= 4 * own:
        return None
    return f"it is off by {theirs:.2g} of the values' size, where the rounding of {dtype} is {own:.2g}"
