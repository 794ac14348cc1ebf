"""Supervised fine-tuning: the cross-entropy of given tokens, for all parameters or for LoRA factors.

Of a prompt with its answer only the answer's tokens are learnt, of a text all tokens but the first. The model is
left as it was; what training found is handed over as differences.
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from hooks import anatomy
from hooks.errors import Note
from hooks.gradient_influence import left_out
from surgery.data.texts import Example
from surgery.edits.block import Trained
from surgery.errors import SurgeryError
from surgery.forward.batching import Batch, batches_for, logit_budget, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.tokens import answered
from surgery.moved import Moved
from surgery.objective import Losses
from surgery.progress import Advance
from surgery.training import After, Groups, Log, Plan, train, trainable


@dataclass(frozen=True)
class Row:
    """Token ids of one example; those from ``start`` on (at least 1) are targets."""

    ids: tuple[int, ...]
    start: int


@dataclass(frozen=True)
class Encoded:
    """The rows that can be learnt, how many were cut to the length, and how many had nothing left to learn."""

    rows: tuple[Row, ...]
    cut: int
    left_out: int


@dataclass(frozen=True)
class Lora:
    """Low-rank factors (Hu et al. 2021) beside the linear layers whose names end in one of ``targets``.

    No targets: every linear layer of the blocks.
    """

    rank: int = 16
    alpha: float = 32
    targets: tuple[str, ...] = ()
    dropout: float = 0.0
    """Of the factors' input; on only where the plan trains with dropout."""


def encode_rows(
    tokenizer: PreTrainedTokenizerBase, given: Sequence[Example], *, max_length: int, end: bool = False
) -> Encoded:
    """Token ids of each example, cut after ``max_length`` tokens; with ``end`` the end token is learnt, too.

    The boundary of prompt and answer is one of tokens (``surgery.forward.tokens.answered``).

    Raises ``SurgeryError`` when no row has a token to learn, or ``end`` is wanted and the tokenizer has none.
    """
    if end and tokenizer.eos_token_id is None:
        raise SurgeryError("end: this tokenizer has no end token; train without it")
    last = [tokenizer.eos_token_id] if end else []
    rows, cut, left_out = [], 0, 0
    for example in given:
        found, start = answered(tokenizer, example.prompt, example.answer)
        # Nothing stands before the first token, so it cannot be predicted.
        start = max(1, start) if example.prompt else 1
        ids = [*found, *last]
        cut += len(ids) > max_length
        ids = ids[:max_length]
        if start < len(ids):
            rows.append(Row(tuple(ids), start))
        else:
            left_out += 1
    if not rows:
        raise SurgeryError(
            f"none of {len(given)} rows has a token to learn in its first {max_length}; raise max_length"
        )
    return Encoded(tuple(rows), cut, left_out)


def token_losses(
    logits: Float[Tensor, "batch pos vocab"], ids: Int[Tensor, "batch pos"], target_mask: Bool[Tensor, "batch pos"]
) -> Float[Tensor, " batch"]:
    """The mean of -log P(token | tokens before) in nats over each row's targets (not none, nor the first)."""
    scored = target_mask[:, 1:]
    # Flat, since on a CPU the same loss of transposed logits has gradients that are wrong in the third digit.
    flat = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return (flat.view_as(scored) * scored).sum(1) / scored.sum(1)


def target_batch(rows: Sequence[Row], chosen: Sequence[int], device: Any) -> tuple[Batch, Bool[Tensor, "batch pos"]]:
    """The rows numbered ``chosen`` as one batch, and which of its tokens are targets."""
    batch = pad([row.ids for row in rows], chosen, device)
    first = torch.tensor([rows[row].start for row in chosen], device=device)
    behind = torch.arange(batch.ids.shape[1], device=device)[None] >= first[:, None]
    return batch, behind & batch.mask.bool()


def row_losses(module: nn.Module, rows: Sequence[Row], chosen: Sequence[int], device: Any) -> Float[Tensor, " chosen"]:
    """``token_losses`` of the rows numbered ``chosen``, by one call of ``module`` (the model, or a wrapper)."""
    batch, target_mask = target_batch(rows, chosen, device)
    return token_losses(module(**batch.inputs(), use_cache=False).logits, batch.ids, target_mask)


def evaluate(model: PreTrainedModel, rows: Sequence[Row], step: Advance | None = None) -> Float[np.ndarray, " rows"]:
    """The loss of each row (nats, the mean over its targets) without training; the model's mode does not matter."""
    found = np.empty(len(rows))
    with evaluating(model):
        for chosen in batches_for(model, [row.ids for row in rows], tokens=logit_budget(model)):
            found[chosen] = row_losses(model, rows, chosen, model.device).double().cpu().numpy()
            if step:
                step(len(chosen))
    return found


def fine_tune(
    model: PreTrainedModel,
    rows: Sequence[Row],
    plan: Plan,
    *,
    seed: int,
    lora: Lora | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
    after: After | None = None,
) -> Trained:
    """Train all parameters, or the factors of ``lora``, on ``rows``; the model is left as it was.

    ``after`` is called between the steps (``surgery.training.After``). For what is handed over see ``fit``.

    Raises ``SurgeryError`` when the loss is not finite, and for LoRA targets that the model does not have.
    """

    def losses(module: nn.Module, chosen: Sequence[int]) -> Tensor:
        return row_losses(module, rows, chosen, model.device)

    return fit(
        model,
        losses,
        len(rows),
        plan,
        seed=seed,
        lora=lora,
        state=state,
        log=log,
        step_done=step_done,
        after=after,
    )


def fit(
    model: PreTrainedModel,
    losses: Losses,
    count: int,
    plan: Plan,
    *,
    seed: int,
    lora: Lora | None = None,
    names: Sequence[str] | None = None,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Advance | None = None,
    after: After | None = None,
    asked: Losses | None = None,
    groups: Groups = (),
) -> Trained:
    """Minimise any ``losses`` of ``count`` examples over all parameters, those ``names``, or the factors of ``lora``.

    The differences are the parameters' own (trained minus base), or with ``lora`` the two factors of each weight NAME
    as ``NAME.lora_B`` [rows, r], with alpha / r in it, and ``NAME.lora_A`` [r, columns]. The model is left as it was.
    ``asked`` are the losses by which the objective is asked before and after, where ``losses`` change between steps;
    ``groups`` of examples stand in the same steps.

    Raises ``SurgeryError`` when the loss is not finite, and for LoRA targets that the model does not have.
    """

    def run(parameters: dict[str, nn.Parameter]) -> tuple[list[float], Moved | None]:
        how: Any = {"seed": seed, "state": state, "log": log, "step_done": step_done, "after": after, "asked": asked}
        return train(model, parameters, losses, count, plan, groups=groups, **how)

    with ExitStack() as stack:
        if lora is not None:
            layers = stack.enter_context(adapters(model, lora, seed))
            beside = [name for name, _ in model.named_parameters() if ".lora_" in name]
            done = run(stack.enter_context(trainable(model, beside)))
            return Trained(factors(layers), *done)
        wanted = None if names is None else set(names)
        base = {name: p.detach() for name, p in model.named_parameters() if wanted is None or name in wanted}
        parameters = stack.enter_context(trainable(model, list(base)))
        done = run(parameters)
        with torch.no_grad():
            return Trained({name: (p.detach() - base[name].float()).cpu() for name, p in parameters.items()}, *done)


@contextmanager
def adapters(model: PreTrainedModel, lora: Lora, seed: int) -> Iterator[dict[str, Any]]:
    """Inside, PEFT's LoRA layers stand in place of the targets: {module name: layer}. Then all is as it was."""
    from peft import LoraConfig, inject_adapter_in_model

    targets = target_names(model, lora.targets)
    said = None if lora.targets else left_out(model, anatomy.find(model), targets)
    if said:
        warnings.warn(f"LoRA: {said}", Note, stacklevel=2)
    attributes, children = set(model.__dict__), [(module, dict(module._modules)) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    transposed = isinstance(model.get_submodule(targets[0]), Conv1D)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=targets,
        fan_in_fan_out=transposed,
    )
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
        yield {name: model.get_submodule(name) for name in targets}
    finally:
        for module, before in children:
            module._modules.clear()
            module._modules.update(before)
        for name in set(model.__dict__) - attributes:
            del model.__dict__[name]
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def target_names(model: PreTrainedModel, targets: Sequence[str]) -> list[str]:
    """Full names of the linear layers of the blocks, or of those of the model that end in one of ``targets``.

    Raises ``SurgeryError`` for a target that no linear layer's name ends in.
    """
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
    blocks = [block.name + "." for block in anatomy.find(model).blocks]
    inside = [name for name in linear if name.startswith(tuple(blocks))]
    chosen = [name for name in linear if ("." + name).endswith(tuple("." + target for target in targets))]
    for target in targets:
        if not any(("." + name).endswith("." + target) for name in linear):
            known = sorted({name.rpartition(".")[2] for name in inside})
            raise SurgeryError(f"target_modules: got {target!r}, expected linear layers such as {', '.join(known)}")
    if not (chosen or inside):
        raise SurgeryError(f"target_modules: {type(model).__name__} has no linear layer in its blocks; train all of it")
    return chosen if targets else inside


def factors(layers: Mapping[str, Any]) -> dict[str, Tensor]:
    """The factors in the layers of ``adapters``, under the names of a delta of kind lora, alpha / r in the left one."""
    return {key: value for name, layer in layers.items() for key, value in _factors(name, layer)}


def _factors(name: str, layer: Any) -> list[tuple[str, Tensor]]:
    a, b = (getattr(layer, side)["default"].weight.detach().float().cpu() for side in ("lora_A", "lora_B"))
    b = b * layer.scaling["default"]
    # Conv1D stores [in, out], the transpose of nn.Linear, so its difference is (B A)^T = A^T B^T.
    left, right = (a.T, b.T) if layer.fan_in_fan_out else (b, a)
    return [(f"{name}.weight.lora_B", left.clone()), (f"{name}.weight.lora_A", right.clone())]
