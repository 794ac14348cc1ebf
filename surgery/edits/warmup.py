"""Warm-up (BIAS DIFF 2.2): LoRA fine-tuning that keeps each epoch's factors, Adam's moments and learning rate.

Influence (Eq. 5) is summed over these epochs; the next phase takes them up from their files.
"""

import os
import pickle
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from surgery.edits.block import Trained
from surgery.edits.supervised import Lora, Row, adapters, factors, fine_tune, target_names
from surgery.errors import SurgeryError
from surgery.progress import Advance
from surgery.training import After, Log, Plan, steps_of, trainable


@dataclass(frozen=True)
class Epoch:
    """The end of an epoch: what training held, under the parameters' names."""

    number: int  # from 1
    parameters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    """Adam's running means of the gradients, without the correction of their start at 0, as torch keeps them."""
    exp_avg_sq: dict[str, Tensor]
    steps: int
    """How many updates made them."""
    rate: float
    """The mean learning rate of the epoch's steps, the weight of its scores in Eq. 5 (as in LESS)."""


def usual_targets(model: PreTrainedModel) -> tuple[str, ...]:
    """q_proj and v_proj (Table 8), or where the model has no such names every linear layer of its blocks."""
    names = {name.rpartition(".")[2] for name in target_names(model, ())}
    for usual in (
        ("q_proj", "v_proj"),
        ("query", "value"),
        ("c_attn",),
        ("query_key_value",),
        ("qkv_proj",),
        ("Wqkv",),
    ):
        if names.issuperset(usual):
            return usual
    return ()


def epoch_file(folder: Path, number: int) -> Path:
    """Where ``warm_up`` keeps the epoch ``number`` (from 1)."""
    return folder / f"epoch-{number}.pt"


def warm_up(
    model: PreTrainedModel,
    rows: Sequence[Row],
    plan: Plan,
    lora: Lora,
    *,
    seed: int,
    folder: Path,
    log: Log | None = None,
    step_done: Advance | None = None,
) -> Trained:
    """``surgery.edits.supervised.fine_tune`` with LoRA that leaves an ``Epoch`` in ``folder`` after each epoch.

    An interrupted call is continued by calling again with the same arguments, to the same result.
    Raises ``SurgeryError`` as ``fine_tune`` does.
    """
    folder.mkdir(parents=True, exist_ok=True)
    return fine_tune(
        model,
        rows,
        plan,
        seed=seed,
        lora=lora,
        state=folder / "training.pt",
        log=log,
        step_done=step_done,
        after=_keeper(model, len(rows), plan, folder),
    )


def _keeper(model: nn.Module, count: int, plan: Plan, folder: Path) -> After:
    steps = steps_of(count, plan)
    portions = steps // plan.epochs

    def keep(step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        # None stands for a step of before an interruption: its epoch was written then.
        if optimizer is not None and step % portions == 0:
            names = {id(parameter): name for name, parameter in model.named_parameters()}
            held = [(names[id(p)], p) for group in optimizer.param_groups for p in group["params"]]
            rates = [plan.rate(each, steps) for each in range(step - portions, step)]
            epoch = Epoch(
                number=step // portions,
                parameters={name: p.detach() for name, p in held},
                exp_avg={name: optimizer.state[p]["exp_avg"] for name, p in held},
                exp_avg_sq={name: optimizer.state[p]["exp_avg_sq"] for name, p in held},
                steps=step,
                rate=float(np.mean(rates)),
            )
            file = epoch_file(folder, epoch.number)
            part = file.with_name(file.name + ".part")
            torch.save({key: _on_cpu(value) for key, value in vars(epoch).items()}, part)
            os.replace(part, file)
        return False

    return keep


def _on_cpu(value: Any) -> Any:
    return {name: tensor.cpu() for name, tensor in value.items()} if isinstance(value, dict) else value


def read_epoch(folder: Path, number: int) -> Epoch:
    """The epoch ``number`` (from 1) that ``warm_up`` left in ``folder``; raises ``SurgeryError`` when it cannot be."""
    file = epoch_file(folder, number)
    try:
        return Epoch(**torch.load(file, map_location="cpu", weights_only=True))
    except (OSError, RuntimeError, EOFError, TypeError, pickle.UnpicklingError) as error:
        raise SurgeryError(
            f"{file}: this epoch of the warm-up cannot be read ({type(error).__name__}); start the run again"
        ) from None


@contextmanager
def at_epoch(
    model: PreTrainedModel, lora: Lora, epoch: Epoch | None, *, seed: int
) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the model is what it was at the end of ``epoch``, in evaluation mode; yields the LoRA parameters.

    They alone require gradients. None stands for the start, with the factors as ``seed`` draws them. Afterwards the
    model is as it was. Raises ``SurgeryError`` when ``epoch`` was made with other targets or another rank.
    """
    with ExitStack() as stack:
        stack.enter_context(adapters(model, lora, seed))
        names = [name for name, _ in model.named_parameters() if ".lora_" in name]
        parameters = stack.enter_context(trainable(model, names))
        if epoch is not None:
            _check(parameters, epoch.parameters)
            with torch.no_grad():
                for name, parameter in parameters.items():
                    parameter.copy_(epoch.parameters[name])
        model.eval()  # a fresh adapter is in training mode: its dropout would make every gradient random
        yield parameters


def low_rank(model: PreTrainedModel, lora: Lora, epoch: Epoch, *, seed: int) -> dict[str, Tensor]:
    """The differences that ``epoch`` stands for, as the factors of a delta of kind lora under the model's names."""
    with at_epoch(model, lora, epoch, seed=seed):
        return factors({name: module for name, module in model.named_modules() if hasattr(module, "lora_A")})


@contextmanager
def merged(model: PreTrainedModel, low_rank: Mapping[str, Tensor]) -> Iterator[None]:
    """Inside, the products of the factors ``low_rank`` are added to the model's weights; no adapter stands beside."""
    named = dict(model.named_parameters())
    chosen = {name: weight for name, weight in named.items() if f"{name}.lora_A" in low_rank}
    before = {name: weight.detach().clone() for name, weight in chosen.items()}
    try:
        with torch.no_grad():
            for name, weight in chosen.items():
                weight.add_((low_rank[f"{name}.lora_B"] @ low_rank[f"{name}.lora_A"]).to(weight))
        yield
    finally:
        with torch.no_grad():
            for name, weight in chosen.items():
                weight.copy_(before[name])


def added(parts: Sequence[tuple[float, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    """The factors of ``sum of scale * B A`` over (scale, factors) of a delta of kind lora; the ranks add up."""
    names = dict.fromkeys(
        name.removesuffix(".lora_A") for _, part in parts for name in part if name.endswith(".lora_A")
    )
    found: dict[str, Tensor] = {}
    for name in names:
        mine = [(scale, part) for scale, part in parts if f"{name}.lora_A" in part]
        found[f"{name}.lora_B"] = torch.cat([scale * part[f"{name}.lora_B"] for scale, part in mine], 1)
        found[f"{name}.lora_A"] = torch.cat([part[f"{name}.lora_A"] for _, part in mine], 0)
    return found


def _check(parameters: Mapping[str, Tensor], kept: Mapping[str, Tensor]) -> None:
    odd = sorted(set(parameters) ^ set(kept)) or [n for n, p in parameters.items() if p.shape != kept[n].shape]
    if odd:
        raise SurgeryError(f"epoch of the warm-up: {odd[0]} does not fit this adapter; expected its targets and rank")
