"""Where an edit will work: one-shot rankings from the gradients of its objective and of text that must not change.

    found = hooks.gain(model, losses, 256, retain_texts, tokenizer=tokenizer)
    found.ranking("natural").top(3)        # blocks
    found.ranking("natural", "matrix").table(5)

A step along the gradient g of the objective, limited in how far it moves the distribution over the retain text, gains
the sum of g^2 / F, F being the Fisher information of that text (Amari 1998; Kirkpatrick et al. 2017 take the same
diagonal). Only one number a parameter is held: the objective's gradients are sketched as they come.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.anatomy import find
from hooks.errors import HookError
from hooks.gain_rankings import Gain, Place
from hooks.gradient_influence.examples import Row, Text, rows
from hooks.gradient_influence.layers import is_factor
from hooks.gradient_sketch import Sketch, Squares, whitening
from hooks.streaming import Progress, positions_limit

# Losses of the examples `rows`, computed by calling the model: what a training loop minimises.
Objective = Callable[[nn.Module, Sequence[int]], Float[Tensor, " rows"]]


@dataclass(frozen=True)
class GainConfig:
    """How the gradients are measured.

    damping: what is added to F, in multiples of its mean over all ranked parameters. groups: portions of the examples,
    from which the interval and the agreement between halves come. batch: examples in one backward pass. per_draw:
    retain texts in one backward pass; labels are sampled independently for every token, so that the square of their
    summed gradient is an unbiased estimate of the summed Fisher information, whatever their number (Liu et al. 2023,
    Sophia, Algorithm 2). cut: tokens of a retain text. sketch: numbers kept of a parameter's gradient, or None for all
    of them, groups x parameters. An inner product is off by about sqrt(2 / sketch) of the norms' product. factored:
    keep of F only the sums of a matrix's rows and columns, so that no number a parameter is held.
    """

    damping: float = 0.1
    groups: int = 8
    batch: int = 32
    per_draw: int = 2
    cut: int = 64
    sketch: int | None = 8192
    factored: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"groups": 2, "batch": 1, "per_draw": 1, "cut": 2}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise HookError(f"gain: {name} is {getattr(self, name)}; expected at least {low}")
        if self.sketch is not None and self.sketch < 64:
            raise HookError(f"gain: sketch is {self.sketch}; expected at least 64 numbers a parameter, or None for all")
        if not self.damping > 0:
            raise HookError(f"gain: damping is {self.damping}; expected a positive multiple of the mean Fisher")


def gain(
    model: nn.Module,
    objective: Objective,
    count: int,
    retain: Sequence[Text],
    *,
    tokenizer: Any = None,
    config: GainConfig | None = None,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Gain:
    """Measure every parameter of the blocks (of a PEFT model: its LoRA factors) by `objective`'s gradient.

    objective: given the model and places in 0..count-1, the losses of these examples. retain: texts or token ids whose
    distribution should stay. The model is in evaluation mode meanwhile, and afterwards as it was bit for bit.
    Memory above the weights: one float32 for each ranked parameter (none where factored), the sketches, and one
    backward pass.

    Raises HookError for fewer examples than groups, fewer than two retain texts, quantised parameters, an objective
    without a gradient for the ranked parameters, and one that is not finite, naming the block.
    """
    config = config or GainConfig()
    places = find_places(model)
    limit = positions_limit(model)
    texts = list(rows(tokenizer, retain, limit=limit, cut=config.cut, what="retain text"))
    _refuse_few(len(texts), count, config.groups)
    named = dict(model.named_parameters())
    parameters = [named[place.name] for place in places]
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(config.seed)).tolist()
    portions = [shuffled[start :: config.groups] for start in range(config.groups)]
    total = len(texts) + count
    done = 0

    def advance(number: int) -> None:
        nonlocal done
        done += number
        if progress is not None:
            progress(done, total)

    fisher, traces = _fisher(model, places, parameters, texts, config, advance)
    sizes = np.array([parameter.numel() for parameter in parameters])
    mean = traces.sum() / sizes.sum()
    if not mean > 0:
        raise HookError("gain: the retain text has no gradient for the ranked parameters; are they used by the model?")
    damping = config.damping * mean
    sketches = [
        Sketch(parameter, whitening(squares, damping, config.seed + place), config.groups, config.sketch)
        for place, (parameter, squares) in enumerate(zip(parameters, fisher, strict=True))
    ]
    _edit(model, objective, places, parameters, portions, sketches, config, advance)
    whitened, plain = (np.stack([sketch.products(kind) for sketch in sketches]) for kind in (0, 1))
    if not plain.any():
        raise HookError("gain: the objective's gradient is zero for every ranked parameter; is it constant?")
    norms = [torch.linalg.vector_norm(p.detach().float(), dim=-1) for p in parameters]
    weights = np.array([float(each.square().sum(dtype=torch.float64)) for each in norms])
    settings = vars(config) | {"retain": len(texts), "fisher_mean": float(mean)}
    return Gain(places, sizes, whitened, plain, traces, weights, data, count, settings)


def _refuse_few(texts: int, examples: int, groups: int) -> None:
    if texts < 2:
        raise HookError(
            f"gain: the retain text is {texts} sentence; expected at least 2, better 64: its Fisher information "
            "is a mean over texts"
        )
    if examples < groups:
        raise HookError(f"gain: {examples} examples for {groups} groups; give at least one example a group")


def find_places(model: nn.Module) -> tuple[Place, ...]:
    """The parameters that are ranked: those of the blocks, or the active LoRA factors in them where there are any.

    Raises HookError for quantised parameters, by name: they have no gradient of their own.
    """
    anatomy = find(model)
    kind = type(probe.pretrained(model)).__name__
    if anatomy.head is None or len(anatomy.stacks) > 1 or "MaskedLM" in kind:
        raise HookError(f"gain: {kind} is no causal language model with a head; load it with AutoModelForCausalLM")
    adapted = {name for name, _ in model.named_modules() if is_factor(model, name)}
    found = []
    for number, block in enumerate(anatomy.blocks):
        inside = [(name, p) for name, p in model.named_parameters() if name.startswith(block.name + ".")]
        for name, parameter in inside:
            if adapted and name.rpartition(".")[0] not in adapted:
                continue
            if not parameter.is_floating_point() or parameter.element_size() < 2:
                raise HookError(
                    f"gain: {name} is quantised ({str(parameter.dtype).removeprefix('torch.')}); expected a floating "
                    "type: load the model unquantised, or put LoRA on it, whose factors are ranked then"
                )
            part = "other"
            if block.attention and name.startswith(block.attention + "."):
                part = "attention"
            elif any(name.startswith(module + ".") for module in (block.mlp, *block.mlp_modules) if module):
                part = "mlp"
            found.append(Place(name, number, part))
    if not found:
        raise HookError(f"gain: the blocks of {kind} hold no parameters")
    for block in () if adapted else anatomy.blocks:
        held = model.get_submodule(block.name).named_buffers()
        packed = [n for n, b in held if b.ndim > 1 and not b.is_floating_point() and "weight" in n]
        if packed:  # GPTQ and AWQ keep no weight, but integers in buffers
            raise HookError(
                f"gain: {block.name}.{packed[0]} is quantised; load the model unquantised, or put LoRA on it: its "
                "factors are ranked then"
            )
    return tuple(found)


def _fisher(
    model: nn.Module,
    places: Sequence[Place],
    parameters: Sequence[nn.Parameter],
    texts: Sequence[Row],
    config: GainConfig,
    advance: Callable[[int], None],
) -> tuple[list[Squares], Float[np.ndarray, " parameter"]]:
    """The diagonal Fisher information a token of each parameter, and its traces: labels are the model's own draws."""
    squares = [Squares(parameter, factored=config.factored) for parameter in parameters]

    def take(place: int, gradient: Tensor) -> None:
        squares[place].add(gradient)

    ordered = sorted(texts, key=lambda row: (len(row.ids), row.place))
    with _gradients(model, parameters, take):
        core, tokens = probe.pretrained(model), 0
        for start in range(0, len(ordered), config.per_draw):
            part = ordered[start : start + config.per_draw]
            width = max(len(row.ids) for row in part)
            ids = torch.tensor([row.ids + (0,) * (width - len(row.ids)) for row in part])
            mask = torch.tensor([[1] * len(row.ids) + [0] * (width - len(row.ids)) for row in part])
            inputs = model_inputs(model, {"input_ids": ids, "attention_mask": mask})
            logits = core(**inputs, use_cache=False).logits  # (text pos vocab)
            logits = logits[:, :-1][mask[:, 1:].bool().to(logits.device)].float()  # (token vocab)
            if not bool(torch.isfinite(logits.sum())):
                raise HookError(
                    f"gain: the logits of retain text {part[0].place} are not finite ({core.dtype}); check the "
                    "weights, or load the model in float32"
                )
            draw = torch.Generator(logits.device).manual_seed(config.seed * 1_000_003 + start)
            gradient = logits.detach().softmax(-1)
            labels = _sampled(gradient, draw)
            gradient[torch.arange(len(labels), device=labels.device), labels] -= 1  # of -log p(label): p - onehot
            logits.backward(gradient)
            tokens += len(labels)
            advance(len(part))
    traces = np.array([square.divide(tokens) for square in squares])
    if not np.isfinite(traces).all():
        raise _not_finite(model, places[int(np.flatnonzero(~np.isfinite(traces))[0])], "the retain text")
    return squares, traces


def _sampled(probabilities: Float[Tensor, "row label"], draw: torch.Generator) -> Int[Tensor, " row"]:
    """A label of each row, by where a uniform number falls: ten times as fast as torch.multinomial on a CPU."""
    edges = probabilities.cumsum(-1)
    drawn = torch.rand((len(edges), 1), generator=draw, device=edges.device) * edges[:, -1:]
    return torch.searchsorted(edges, drawn)[:, 0].clamp_max(edges.shape[1] - 1)


def _edit(
    model: nn.Module,
    objective: Objective,
    places: Sequence[Place],
    parameters: Sequence[nn.Parameter],
    portions: Sequence[Sequence[int]],
    sketches: Sequence[Sketch],
    config: GainConfig,
    advance: Callable[[int], None],
) -> None:
    """Sketch the mean gradient of each portion's losses."""
    group, size = 0, 1

    def take(place: int, gradient: Tensor) -> None:
        sketches[place].add(group, gradient, size)

    with _gradients(model, parameters, take):
        for group, portion in enumerate(portions):  # noqa: B007 (`take` reads both)
            size = len(portion)
            for start in range(0, size, config.batch):
                part = portion[start : start + config.batch]
                loss = objective(model, part).float().sum()
                if not loss.requires_grad:
                    raise HookError(
                        "gain: the objective has no gradient for the ranked parameters; expected losses computed by "
                        "calling the model that is passed in, with gradients on"
                    )
                loss.backward()
                advance(len(part))
    for place, sketch in zip(places, sketches, strict=True):
        if not sketch.finite():
            raise _not_finite(model, place, "the objective")


def _not_finite(model: nn.Module, place: Place, what: str) -> HookError:
    dtype = str(dict(model.named_parameters())[place.name].dtype).removeprefix("torch.")
    return HookError(
        f"gain: the gradient of {what} is not finite at block {place.block} ({place.name}, {dtype}); check the "
        "weights, or load the model in float32"
    )


@contextmanager
def _gradients(
    model: nn.Module, parameters: Sequence[nn.Parameter], take: Callable[[int, Tensor], None]
) -> Iterator[None]:
    """Inside, a backward pass hands each parameter's gradient over as soon as it is complete, and keeps none."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]

    def hand_over(place: int) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                take(place, gradient)

        return hook

    with probe.unchanged(model), torch.enable_grad(), ExitStack() as stack:
        try:
            for parameter, _, _ in before:
                parameter.requires_grad_(False)
                parameter.grad = None
            for place, parameter in enumerate(parameters):
                parameter.requires_grad_(True)
                stack.callback(parameter.register_post_accumulate_grad_hook(hand_over(place)).remove)
            yield
        finally:
            for parameter, flag, grad in before:
                parameter.requires_grad_(flag)
                parameter.grad = grad
