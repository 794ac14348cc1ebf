"""Two accelerators where there is none: every tensor knows which it would lie on, and mixing them is an error.

Inside ``Devices()`` all arithmetic is the CPU's, but ``tensor.device`` answers cuda:0 or cuda:1 after a module was put
there with ``split``; ``to`` moves, factories with ``device=`` place, and an operation on tensors of two devices raises
what torch raises. What the backward pass makes is on no device in particular, and may be mixed with anything.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

CPU = torch.device("cpu")
FREE = {"__setitem__", "copy_", "index_put_", "__getitem__", "set_", "record_stream", "zeros_like", "ones_like"}
FREE |= {"grad", "_fused_adam_"}  # of parameters wherever they lie: torch sorts them by device itself, out of sight


class Devices(TorchFunctionMode):
    """See the top of the file."""

    def __init__(self) -> None:
        super().__init__()
        self._where: dict[int, tuple[Any, torch.device]] = {}

    def put(self, tensor: Tensor, device: torch.device) -> Tensor:
        key = id(tensor)
        self._where[key] = (weakref.ref(tensor, lambda _: self._where.pop(key, None)), device)
        return tensor

    def of(self, tensor: Tensor) -> torch.device | None:
        found = self._where.get(id(tensor))
        return found[1] if found and found[0]() is tensor else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "__get__" and func.__self__ is Tensor.device:
            return self.of(args[0]) or CPU
        if name == "__set__" and func.__self__ is Tensor.data:
            self.put(args[0], self.of(args[1]) or CPU)
            return func(*args, **kwargs)
        tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, Tensor)]
        placed = {device for each in tensors if (device := self.of(each)) is not None and each.dim() > 0}
        if name in ("to", "cpu", "cuda"):
            return self._moved(func, name, args, kwargs)
        asked = kwargs.get("device")
        if asked is not None:
            kwargs["device"] = CPU
        elif name == "new_zeros" or name.endswith("_like"):
            asked = self.of(args[0])
        if len(placed) > 1 and name not in FREE:
            raise RuntimeError(f"{name}: expected all tensors on the same device, but found {sorted(map(str, placed))}")
        if name in ("__getitem__", "__setitem__", "index_put_") and isinstance(args[0], Tensor):
            own = self.of(args[0])
            if own is not None and any(d not in (own, CPU) for d in placed):
                raise RuntimeError(f"{name}: indices on {sorted(map(str, placed))}, tensor on {own}")
            placed = {own} if own else placed
        found = func(*args, **kwargs)
        made = not tensors or asked is not None or name in ("tensor", "from_numpy", "arange")
        place = torch.device(asked) if asked is not None else (next(iter(placed)) if placed else CPU if made else None)
        if place is None and tensors:
            place = next((device for each in tensors if (device := self.of(each)) is not None), None)
        inplace = {id(each) for each in tensors}
        if place is not None:
            for each in tree_flatten(found)[0]:
                if isinstance(each, Tensor) and id(each) not in inplace:
                    self.put(each, place)
        return found

    def _moved(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
        wanted = CPU if name == "cpu" else None
        if name == "to":
            given = [*args[1:], kwargs.get("device"), kwargs.get("other")]
            for each in given:
                if isinstance(each, Tensor):
                    wanted = self.of(each) or CPU
                elif isinstance(each, str | torch.device) and not isinstance(each, torch.dtype):
                    wanted = torch.device(each)
            swap = lambda each: CPU if isinstance(each, str | torch.device) else each  # noqa: E731
            args, kwargs = tree_map(swap, args), tree_map(swap, kwargs)
        own = self.of(args[0])
        wanted = wanted or own
        found = func(*args, **kwargs)
        if wanted is None or wanted == own:
            return self.put(found, own) if own is not None and found is not args[0] else found
        if found is args[0] or found.data_ptr() == args[0].data_ptr():
            with torch._C.DisableTorchFunction():
                found = found.clone()
        return self.put(found, wanted)


@contextmanager
def split(model: Any, blocks: str = "model.layers") -> Iterator[Devices]:
    """Inside, the first half of the blocks and the embedding lie on cuda:0, the rest on cuda:1, as by accelerate."""
    held: Any = model.get_submodule(blocks)
    count = len(held)
    last = [*list(held)[count // 2 :], model.model.norm, model.lm_head]
    one, two = torch.device("cuda", 0), torch.device("cuda", 1)
    places = {id(p): two for module in last for p in (*module.parameters(), *module.buffers())}
    with Devices() as devices:
        for tensor in (*model.parameters(), *model.buffers()):
            devices.put(tensor, places.get(id(tensor), one))

        to = lambda each, place: each.to(place) if isinstance(each, Tensor) else each  # noqa: E731

        def wrapped(forward: Any, place: torch.device, back: torch.device | None) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                found = forward(
                    *tree_map(lambda each: to(each, place), args), **tree_map(partial(to, place=place), kwargs)
                )
                return tree_map(partial(to, place=back), found) if back else found

            return run

        chosen = [
            (model, one, one),
            (model.model, one, None),
            *((each, one, None) for each in list(held)[: count // 2]),
        ]
        chosen += [(each, two, None) for each in last]
        for module, place, back in chosen:
            module.forward = wrapped(module.forward, place, back)
        try:
            yield devices
        finally:
            for module, *_ in chosen:
                del module.forward
