"""Which weights' gradients are looked at, and what Adam knows of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hooks.anatomy import Anatomy
from hooks.errors import HookError
from hooks.trace_modules import nearest


@dataclass(frozen=True)
class Layer:
    """A linear layer: the module's name, its weight's name, and (out, in).

    transposed: the weight is stored (in, out), as GPT-2's; gradients here are always (out, in).
    """

    name: str
    weight: str
    shape: tuple[int, int]
    transposed: bool


@dataclass(frozen=True)
class Moments:
    """Adam's running means of the gradient and of its square, by parameter name and in the parameter's shape."""

    mean: Mapping[str, Tensor]
    square: Mapping[str, Tensor]
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


def adam_moments(model: nn.Module, optimizer: Any) -> Moments:
    """Copies of what a torch Adam or AdamW holds for parameters of `model`.

    Raises HookError where it holds nothing (no step was made), or groups with different betas or eps.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    mean: dict[str, Tensor] = {}
    square: dict[str, Tensor] = {}
    for parameter, state in optimizer.state.items():
        if parameter in names and "exp_avg_sq" in state:
            mean[names[parameter]] = state["exp_avg"].detach().clone()
            square[names[parameter]] = state["exp_avg_sq"].detach().clone()
    if not mean:
        raise HookError(
            f"{type(optimizer).__name__} holds no moments of this model's parameters; expected an Adam that has made "
            "at least one step on them"
        )
    settings = {(tuple(group["betas"]), group["eps"]) for group in optimizer.param_groups}
    if len(settings) > 1:
        raise HookError(f"the optimizer's groups differ in betas or eps: {sorted(settings)}; expected one setting")
    ((betas, eps),) = settings
    return Moments(mean, square, (float(betas[0]), float(betas[1])), float(eps))


def find_layers(model: nn.Module, anatomy: Anatomy, targets: Sequence[str] | None = None) -> tuple[Layer, ...]:
    """The active LoRA factors where the model has any, else the linear layers of the blocks; weights, not biases.

    targets: names, or ends of names at a dot, of linear layers (of those that LoRA wraps, where it does). The head
    over the vocabulary and the embeddings have no part: tied or not, they are taken as frozen.

    Raises HookError for a target that no such layer's name ends in.
    """
    if isinstance(targets, str):
        raise HookError(f"targets is the string {targets!r}; expected a list of names")
    found = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    adapted = {name: name.rpartition(".lora_")[0] for name in found if is_factor(model, name)}
    if adapted:
        base = adapted
    else:
        blocks = tuple(block.name + "." for stack in anatomy.stacks for block in stack.blocks)
        base = {name: name for name in found if name.startswith(blocks)}
    for target in targets or ():
        if not any(_ends(name, target) for name in base.values()):
            known = sorted({name.rpartition(".")[2] for name in base.values()})
            kind = "LoRA-adapted layer" if adapted else "linear layer of a block"
            raise HookError(
                f"targets: no {kind} is named {target!r}{nearest(target, known)}; expected some of {', '.join(known)}"
            )
    chosen = [name for name, own in base.items() if targets is None or any(_ends(own, t) for t in targets)]
    if not chosen:
        raise HookError(f"{type(model).__name__} has no linear layer in its blocks; name some with targets")
    return tuple(_layer(name, found[name]) for name in chosen)


def left_out(model: nn.Module, anatomy: Anatomy, chosen: Iterable[str]) -> str | None:
    """What a reader must know of weights in the blocks that are no linear layers, or None where there are none.

    Mixtures of experts keep all experts' matrices in one 3-D parameter, which neither influence nor LoRA looks at.
    chosen: names of the layers that are looked at.
    """
    blocks = tuple(block.name + "." for stack in anatomy.stacks for block in stack.blocks)
    inside = {name: p for name, p in model.named_parameters() if name.startswith(blocks) and ".lora_" not in name}
    experts = {n: p for n, p in inside.items() if p.ndim == 3 and not isinstance(_owner(model, n), nn.Conv1d)}
    if not experts or not any(name.startswith(blocks) for name in chosen):
        return None
    share = sum(p.numel() for p in experts.values()) / sum(p.numel() for p in inside.values())
    ends = ", ".join(sorted({".".join(name.split(".")[-2:]) for name in experts}))
    return (
        f"the experts' matrices ({ends}) have no part: {share:.0%} of the blocks' parameters, which are stored as one "
        "tensor for all experts and not as linear layers"
    )


def _owner(model: nn.Module, parameter: str) -> nn.Module:
    return model.get_submodule(parameter.rpartition(".")[0])


def is_factor(model: nn.Module, name: str) -> bool:
    """Whether the module `name` is a factor of an active LoRA adapter."""
    owner, _, last = name.rpartition(".")
    wrapper, _, side = owner.rpartition(".")
    if side not in ("lora_A", "lora_B"):
        return False
    active = getattr(model.get_submodule(wrapper), "active_adapters", [last])
    return last in active


def _ends(name: str, target: str) -> bool:
    return ("." + name).endswith("." + target)


def _layer(name: str, module: nn.Module) -> Layer:
    if isinstance(module, nn.Linear):
        return Layer(name, f"{name}.weight", (module.out_features, module.in_features), False)
    weight: Any = module.weight
    return Layer(name, f"{name}.weight", (weight.shape[1], weight.shape[0]), True)


class Preconditioner:
    """What an optimiser makes of a gradient (out, in), per layer; nothing with kind "none".

    less: LESS's Adam (Xia et al. 2024, get_info/collect_grad_reps.py): m' = b1 m + (1 - b1) g and
        v' = b2 v + (1 - b2) g^2 with the example's own gradient, then m' / sqrt(v' + eps), no bias correction.
    frozen_v: g / (sqrt(v) + eps): linear in g, so that tokens and examples add up.
    """

    def __init__(self, kind: str, moments: Moments | None, layers: Sequence[Layer]) -> None:
        if kind not in ("none", "less", "frozen_v"):
            raise HookError(f"optimizer is {kind!r}; expected 'none', 'less' or 'frozen_v'")
        if (moments is None) != (kind == "none"):
            got = "got no moments" if moments is None else "moments were given"
            raise HookError(f"optimizer is {kind!r} and {got}; expected Adam's moments with 'less' and 'frozen_v' only")
        self.kind, self._moments, self._ready = kind, moments, dict[str, tuple[Tensor, Tensor]]()
        for layer in layers if moments is not None else ():
            for held in (moments.mean, moments.square):  # type: ignore[union-attr]
                shape = layer.shape[::-1] if layer.transposed else layer.shape
                if layer.weight not in held or tuple(held[layer.weight].shape) != shape:
                    got = str(tuple(held[layer.weight].shape)) if layer.weight in held else "nothing"
                    raise HookError(
                        f"the moments hold {got} for {layer.weight}, expected {shape}; take them with adam_moments "
                        "from the optimizer of this model's training, or name the trained layers with targets"
                    )

    def _of(self, layer: Layer, device: torch.device) -> tuple[Tensor, Tensor]:
        """Two terms that no example changes, computed once a layer."""
        if layer.name not in self._ready:
            moments = self._moments
            assert moments is not None
            mean, square = (
                (held[layer.weight].T if layer.transposed else held[layer.weight]).to(device, torch.float32)
                for held in (moments.mean, moments.square)
            )
            if self.kind == "less":
                self._ready[layer.name] = (moments.betas[0] * mean, moments.betas[1] * square + moments.eps)
            else:
                self._ready[layer.name] = (mean, 1.0 / (square.sqrt() + moments.eps))
        return self._ready[layer.name]

    def apply(self, layer: Layer, gradient: Tensor) -> Tensor:
        """`gradient` (unit, out, in) float32, which may be overwritten."""
        if self.kind == "none":
            return gradient
        first, second = self._of(layer, gradient.device)
        if self.kind == "frozen_v":
            return gradient.mul_(second)
        assert self._moments is not None
        b1, b2 = self._moments.betas
        root = gradient.square().mul_(1.0 - b2).add_(second).sqrt_()
        return gradient.mul_(1.0 - b1).add_(first).div_(root)

    def fold(self, layer: Layer, probe: Tensor) -> Tensor:
        """The probe (..., out, in) with which a raw gradient has the dot product that the changed one has."""
        if self.kind == "less":
            raise HookError("optimizer 'less' is not linear in the gradient; expected 'none' or 'frozen_v' here")
        return probe if self.kind == "none" else probe * self._of(layer, probe.device)[1]
