"""Where a concept is erased: in what matrices write into the stream, one after the other, or in what the head reads."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from hooks import anatomy
from hooks.activations import capture
from surgery.errors import SurgeryError
from surgery.forward.batching import Ids, batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.modules.projection import Projection
from surgery.progress import Advance

PARTS = ("attention", "mlp")
# What a method makes of the place (a module's name) and what is written there, batch after batch.
Fit = Callable[[str, Float[Tensor, "n width"]], Projection]


@dataclass(frozen=True)
class Erased:
    """Differences of the weights, as ``surgery.delta.make`` takes them, and what stands in ``run.json`` of them."""

    differences: dict[str, Tensor]
    ranks: dict[str, int]
    """How many directions went at each place."""
    mean_lost: tuple[str, ...]
    """Places without a bias, whose erased mean could not be put back."""

    @property
    def parameters(self) -> int:
        """How many numbers changed."""
        return sum(tensor.numel() for tensor in self.differences.values())


def writers_of(model: PreTrainedModel, blocks: Sequence[int], parts: Sequence[str]) -> list[str]:
    """The modules that write into the stream, in the order in which they run.

    Raises ``SurgeryError`` for a block or part that does not exist, and one that is no plain matrix (fused experts).
    """
    unknown = next((part for part in parts if part not in PARTS), None)
    if unknown is not None or not parts:
        raise SurgeryError(f"parts: got {unknown or 'none'!r}, expected some of {', '.join(PARTS)}")
    every = anatomy.find(model).blocks
    found = []
    for index in blocks:
        if not 0 <= index < len(every):
            raise SurgeryError(f"block {index}: the model has blocks 0 to {len(every) - 1}; choose one of them")
        for part in (part for part in PARTS if part in parts):
            name = getattr(every[index], f"{part}_writer")
            module = None if name is None else model.get_submodule(name)
            if name is None or getattr(module, "weight", None) is None or module.weight.ndim != 2:  # type: ignore
                raise SurgeryError(
                    f"block {index}: its {part} has no single matrix that writes into the stream "
                    f"({every[index].missing.get(f'{part}_writer', type(module).__name__)}); "
                    "choose the other part, or other blocks"
                )
            found.append(name)
    return found


def fold(module: nn.Module, projection: Projection) -> tuple[Tensor, Tensor | None]:
    """What a matrix's weight and bias become when what it writes is projected: W' = P W, b' = P b + offset.

    The bias is None where the module has none. GPT-2's transposed weights are projected on their own side.
    """
    weight, bias = module.weight.detach().double(), getattr(module, "bias", None)  # type: ignore
    here = projection.to(weight)
    left, right = here.left, here.right
    linear = isinstance(module, nn.Linear)  # a Conv1D holds (in, out)
    weight = weight - (left @ (right @ weight) if linear else (weight @ right.mT) @ left.mT)
    return weight, None if bias is None else here(bias.detach().double())


@torch.no_grad()
def erase(model: PreTrainedModel, ids: Ids, writers: Sequence[str], fit: Fit, *, step: Advance | None = None) -> Erased:
    """Project what each of ``writers`` writes at the last token of each prompt, one after the other.

    Each projection is fitted with those before it in place (Belrose et al. 2023, section 6; DAMA's iterative update).
    ``fit`` is asked for each. The model is as it was afterwards. ``step`` is told of each place.
    """
    differences: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    lost: list[str] = []
    with _restored(model, writers), evaluating(model):
        for name in writers:
            module = model.get_submodule(name)
            projection = fit(name, written(model, ids, name))
            weight, bias = fold(module, projection)
            for key, value in (("weight", weight), ("bias", bias)):
                if value is None:
                    continue
                held: Any = getattr(module, key)
                differences[f"{name}.{key}"] = (value - held.detach().double()).float().cpu()
                setattr(module, key, nn.Parameter(value.to(held), requires_grad=False))
            ranks[name] = projection.left.shape[1]
            if bias is None and bool(projection.offset.any()):
                lost.append(name)
            if step:
                step(1)
    return Erased(differences, ranks, tuple(lost))


@torch.no_grad()
def erase_last(model: PreTrainedModel, ids: Ids, fit: Fit) -> Projection:
    """The projection of what the head reads, fitted at the last token of each prompt."""
    rows = torch.empty(len(ids), anatomy.find(model).d_model, dtype=torch.float64)
    with evaluating(model), capture(model, "ln_final.hook_out", positions="last") as store:
        for chosen in batches_for(model, ids):
            model(**pad(ids, chosen, model.device).inputs(), use_cache=False)
            rows[chosen] = store["ln_final.hook_out"].double().cpu()
    return fit("ln_final", rows)


@torch.no_grad()
def written(
    model: PreTrainedModel, ids: Ids, name: str, places: Int[Tensor, " n"] | None = None
) -> Float[Tensor, "n width"]:
    """What the module writes at a place of each prompt (its last token where none is given), float64 on the CPU."""
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_hook(lambda _, __, output: found.append(output))
    rows: Tensor | None = None
    try:
        for chosen in batches_for(model, ids):
            batch = pad(ids, chosen, model.device)
            found.clear()
            model(**batch.inputs(), use_cache=False)
            at = batch.last if places is None else places[list(chosen)].to(model.device)
            output = found[-1].reshape(*batch.ids.shape, -1)  # OPT writes a flat (batch * pos, width)
            picked = output[torch.arange(len(chosen), device=at.device), at].double().cpu()
            rows = torch.empty(len(ids), picked.shape[1], dtype=torch.float64) if rows is None else rows
            rows[list(chosen)] = picked
    finally:
        handle.remove()
    assert rows is not None  # ids are never empty
    return rows


@contextmanager
def _restored(model: PreTrainedModel, names: Sequence[str]) -> Iterator[None]:
    """Inside, parameters of the modules may be replaced; afterwards the very ones from before stand there again."""
    with ExitStack() as stack:
        for name in names:
            module = model.get_submodule(name)
            for key in ("weight", "bias"):
                held = getattr(module, key, None)
                if held is not None:
                    stack.callback(setattr, module, key, held)
        yield
