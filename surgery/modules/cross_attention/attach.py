"""Put a cross-attention module into a live model, for the time of a `with` block or for good."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from hooks import trace_modules as probe
from surgery.errors import SurgeryError
from surgery.modules.cross_attention.modeling_crawd import CrossAttention, insert
from surgery.modules.cross_attention.reference import NAME, ReferenceRun, place_of, read_reference
from surgery.modules.cross_attention.weights import Weights


@contextmanager
def attached(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reference: Sequence[str] = ("he", "she"),
    top_percent: float = 40.0,
    decay: float = 0.2,
    scope: str = "row",
    heads: int = 8,
    ffn: int | None = None,
    renormalise: bool = False,
    dropout: float = 0.1,
    seed: int = 0,
    live: bool = False,
) -> Iterator[CrossAttention]:
    """Inside, a new module stands behind the last block of `model`; afterwards the model is bit for bit as before.

        with cross_attention.attached(model, tokenizer, reference=["he", "she"]) as module:
            model.generate(**inputs)  # as without it, until the module is trained

    It changes the last hidden states H_x (behind the final norm, before whatever the model does next: head, pooler
    or classifier), so `model(...)`, `generate` with and without cache, and losses see the edited model. The module
    is `model.cross_attention`, its parameters train under that name (`surgery.training.trainable`), in the model's
    dtype and on its device. `weights_of(module)` takes it out.

    The reference words run through the same model without the module, as one text, as the paper's sequence b does;
    in decoders behind the start token, or the first word would be the attention sink (as `hooks.cross_attention`
    has it). Of encoder-decoders H_x is the decoder's, and H_b the encoder's, which is where the model reads text.
    The states are computed once, which is right while the weights of the model stay. With `live` they follow the
    weights (LoRA training): computed anew when a weight changed, and in every pass that needs gradients, with
    gradients, since the paper feeds x and b through the same network.

    The settings are those of `CrossAttention`; `seed` draws its initial weights.

    Raises SurgeryError for reference words that are none, unknown or named twice, settings out of range, and a
    model that has a module already. Words of several tokens are warned about; each of their tokens is a key.
    """
    core = _free(model)
    run = ReferenceRun(core, read_reference(tokenizer, reference, decoder=not core.config.is_encoder_decoder))
    with probe.unchanged(core):
        states = run.states()
    if states.shape[-1] != _width(core):
        raise SurgeryError(
            f"{type(core).__name__}: its encoder gives states of width {states.shape[-1]}, its decoder {_width(core)}; "
            "expected one width"
        )
    settings = {"width": _width(core), "words": run.reference.words, "heads": heads, "ffn": ffn}
    settings |= {"top_percent": top_percent, "decay": decay, "scope": scope, "renormalise": renormalise}
    module = _initialised(_empty(settings | {"dropout": dropout}), states, seed)
    undo = _put(core, module, states.dtype)
    try:
        module.renew = run.renew if live else None
        yield module
    finally:
        undo()


@contextmanager
def reattached(model: PreTrainedModel, weights: Weights, *, scale: float = 1.0) -> Iterator[CrossAttention]:
    """Inside, the trained module stands in `model`, with the reference states that it was stored with.

    `scale` multiplies what it adds to H_x. Raises SurgeryError as `attach` does.
    """
    core = _free(model)
    module = _loaded(core, weights, scale)
    undo = _put(core, module, _dtype(core))
    try:
        yield module
    finally:
        undo()


def attach(model: PreTrainedModel, weights: Weights, *, scale: float = 1.0) -> CrossAttention:
    """Put a trained module into `model` for good; see `reattached`.

    Raises SurgeryError where it does not fit: another width, other tensors, a model that has a module already.
    """
    core = _free(model)
    module = _loaded(core, weights, scale)
    _put(core, module, _dtype(core))
    return module


PARTS = ("module", "cross")


def without(fusion: Float[Tensor, "d_model both"], part: str) -> Float[Tensor, "d_model both"]:
    """What stands beside [I, 0] in the map from [H_x, H_cross], without what ``part`` adds.

    module: all of it, which leaves H_x. cross: what is read of H_cross; the map of H_x stays.

    Raises ``SurgeryError`` for an unknown part.
    """
    if part not in PARTS:
        raise SurgeryError(f"cross_attention: got the part {part!r} to switch off, expected one of {', '.join(PARTS)}")
    kept = torch.zeros_like(fusion)
    width = 0 if part == "module" else len(fusion)
    kept[:, :width] = fusion[:, :width]
    return kept


@contextmanager
def switched_off(model: PreTrainedModel, part: str = "module") -> Iterator[None]:
    """Inside, the module in `model` adds nothing, or (`part` "cross") nothing of the cross-attention; then as before.

    Raises SurgeryError for an unknown part, and a model without a module.
    """
    core = probe.pretrained(model)
    if not hasattr(core, NAME):
        raise SurgeryError(f"{type(core).__name__}: it has no {NAME!r} to switch off; attach one first")
    fusion = core.get_submodule(NAME).get_parameter("fusion.weight")
    whole = fusion.data
    try:
        fusion.data = without(whole, part)
        yield
    finally:
        fusion.data = whole


def _free(model: PreTrainedModel) -> Any:
    """The transformers model inside `model`. Raises SurgeryError when something stands at the module's place."""
    core = probe.pretrained(model)
    if hasattr(core, NAME):
        raise SurgeryError(
            f"{type(core).__name__}: it has a {NAME!r} already; expected a model without one: leave the with block, "
            "or load the checkpoint again"
        )
    return core


def _empty(settings: Mapping[str, Any]) -> CrossAttention:
    """A module without values; drawing them here would move the caller's random state."""
    try:
        with torch.device("meta"):
            return CrossAttention(**settings)
    except ValueError as error:
        raise SurgeryError(f"cross_attention: {error}") from None


def _initialised(module: CrossAttention, states: Float[Tensor, "token d_model"], seed: int) -> CrossAttention:
    """Matrices by Glorot and Bengio 2010, as nn.MultiheadAttention has them; biases 0, norms 1, fusion [I, 0].

    W_Q and W_K are divided by the root mean square of the reference states: the scores then begin with variance
    near 1 whatever the scale of the model's final norm, and the softmax is not saturated before training.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 2 and not name.startswith("fusion."):
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.fill_(1.0 if "norm.weight" in name else 0.0)
        size = states.float().square().mean().sqrt().cpu().clamp(min=1e-6)
        module.query.weight.div_(size)
        module.key.weight.div_(size)
        module.reference.copy_(states)
    return module


def _loaded(core: PreTrainedModel, weights: Weights, scale: float) -> CrossAttention:
    width, own = _width(core), weights.settings["width"]
    if width != own:
        raise SurgeryError(
            f"{type(core).__name__}: its hidden states have width {width}, the module's have {own}; expected a "
            "checkpoint of the same architecture as the one it was trained on"
        )
    module = _empty(weights.settings)
    wanted = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
    for name in sorted(wanted.keys() | given.keys()):
        if wanted.get(name) != given.get(name):
            raise SurgeryError(
                f"cross_attention: tensor {name!r} has shape {given.get(name)}, expected {wanted.get(name)}; the file "
                "contradicts itself: make it again"
            )
    module.to_empty(device="cpu")
    module.load_state_dict(dict(weights.tensors))
    with torch.no_grad():
        module.fusion.weight.mul_(scale)
    return module


def _width(core: PreTrainedModel) -> int:
    """The width of the last hidden states."""
    return anatomy.find(core).d_model


def _dtype(core: PreTrainedModel) -> torch.dtype:
    return next(p.dtype for p in core.get_submodule(place_of(core)).parameters() if p.is_floating_point())


def _put(core: PreTrainedModel, module: CrossAttention, dtype: torch.dtype) -> Any:
    """Add the module to the model; returns what takes it out again."""
    place = place_of(core)  # found before the module stands in the model
    device = next(core.get_submodule(place).parameters()).device
    nn.Module.to(module, device=device, dtype=dtype)
    module.train(core.training)
    handles = insert(core, module, place)
    core.add_module(NAME, module)

    def undo() -> None:
        for handle in handles:
            handle.remove()
        del core._modules[NAME]

    return undo
