"""The only training loop: chosen parameters of a live model, per-example losses, any number of processes.

Alone in a notebook or data parallel under ``accelerate launch``: the parts of a step (``Plan.parts``) are then shared
over the processes, and their gradients added in the order of the parts, so that the result does not depend on how many
processes there are. A step of one part is computed by every process alike.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from surgery.errors import Diverged, SurgeryError
from surgery.gradients import backward, deterministic
from surgery.objective import ASKED, Losses, Moved, ask, check_gradient, moved
from surgery.processes import count as processes
from surgery.processes import first as is_first
from surgery.processes import wait
from surgery.training_state import Mean, TrainingState

Log = Callable[[dict[str, Any]], None]
Groups = Sequence[Sequence[int]]
# Called after each step with the number of steps done and the optimizer; True ends the training there. For the steps
# that a continued run takes up it is called again, with None, so that what it decided then can be decided again.
After = Callable[[int, torch.optim.Optimizer | None], bool]


@dataclass(frozen=True)
class Plan:
    """How long, how fast and in what portions to train."""

    lr: float
    epochs: int
    batch_size: int
    optimizer: str = "adam"  # "adam" | "adamw"
    weight_decay: float = 0.0
    dropout: bool = False
    """Train with the model's own dropout on."""
    schedule: str = "constant"  # "constant" | "linear": down to 0 at the last step
    warmup: float = 0.0
    """The share of the steps in which the learning rate rises linearly from 0."""
    shuffle: bool = True
    """Take the examples of each epoch in an order drawn by the seed, not as they are numbered."""
    parts: int = 1
    """In how many passes a step's examples are taken: so many processes can share them. To rounding the same result."""
    average: float = 0.0
    """The last share of the steps, of which the mean of the parameters is what is learnt; 0: the last step's own."""
    clip: float = 0.0
    """The largest norm of a step's gradient, all parameters together; a longer one is shortened to it. 0: none is."""
    asked: int = ASKED
    """On how many examples, in whole batches and at least one, the objective is asked before and after; 0: on none."""

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step ``step`` (from 0) of ``steps``."""
        rising = math.ceil(self.warmup * steps)
        if step < rising:
            return self.lr * (step + 1) / rising
        return self.lr * (steps - step) / max(1, steps - rising) if self.schedule == "linear" else self.lr


@contextmanager
def trainable(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, exactly the parameters ``names`` train, as float32 copies; afterwards the model is what it was.

    The originals are set aside, not overwritten, so that weights, ``requires_grad``, ``.grad`` and the training
    mode of every module return bit for bit, also after an exception. Raises ``SurgeryError`` for an unknown name.
    """
    named = dict(model.named_parameters())
    wanted = list(names)
    unknown = [name for name in wanted if name not in named]
    if unknown or not wanted:
        raise SurgeryError(
            f"{type(model).__name__}: got {unknown[0] if unknown else 'no name'} to train, expected names of its "
            f"{len(named)} parameters; check the blocks and the part"
        )
    before = [(p, p.data, p.requires_grad, p.grad) for p in named.values()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        for parameter in named.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name in wanted:
            named[name].data = named[name].data.to(torch.float32, copy=True)
            named[name].requires_grad_(True)
        yield {name: named[name] for name in wanted}
    finally:
        for parameter, data, flag, grad in before:
            parameter.data = data
            parameter.requires_grad_(flag)
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode


def train(
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    losses: Losses,
    count: int,
    plan: Plan,
    *,
    seed: int,
    state: Path | None = None,
    log: Log | None = None,
    step_done: Callable[[int], None] | None = None,
    after: After | None = None,
    rates: Mapping[str, float] | None = None,
    asked: Losses | None = None,
    groups: Groups = (),
) -> tuple[list[float], Moved | None]:
    """Minimise the mean loss over ``count`` examples: the loss of each step (before its update), and how far it moved.

    That is asked of the first examples before and after (``surgery.objective``), by ``asked`` where ``losses`` change
    between the steps; where the plan asks none, it is None. ``rates`` multiply the plan's learning rate for the
    parameters that they name.
    ``after`` may evaluate the model between steps (before any averaging), and ends the training when it returns True.

    ``groups`` of examples follow one another in every epoch, so that most of them stand in one step.

    The order of examples depends on ``seed`` and the epoch alone. With ``state`` (a file) progress is saved about
    every 20 seconds and taken up from there, to the same result; the file is removed at the end.

    Raises ``SurgeryError`` for an objective without a gradient, and for a loss or parameter that is not finite.
    """
    if plan.schedule not in ("constant", "linear"):
        raise SurgeryError(f"schedule: got {plan.schedule!r}, expected constant or linear")
    device = next(iter(parameters.values())).device
    half = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    groups = groups or [[row] for row in range(count)]
    first = _first(groups, plan, seed)
    with deterministic(device):
        before = ask(model, parameters, asked or losses, first, half=half) if first else None
    if before:
        check_gradient(before, len(parameters))
    model.train(plan.dropout)
    optimizer = _optimizer(parameters, plan, rates or {}, device)
    steps = steps_of(count, plan)
    mean = Mean(parameters, plan.average, steps)
    kept = TrainingState(state, parameters, optimizer, mean, plan, seed) if state is not None else None
    done = kept.take_up() if kept else []
    ended = [after(step + 1, None) for step in range(len(done))] if after else []
    if processes() > 1:
        wait()  # the state was read by all before one writes it anew
    with deterministic(device), torch.random.fork_rng(enabled=plan.dropout):
        for step, rows in enumerate(portions(groups, plan, seed)):
            if step < len(done):
                continue
            if any(ended):
                break
            rate = plan.rate(step, steps)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["factor"]  # of ``rates``, or set by ``after``; saved with the optimizer
            optimizer.zero_grad()
            drawn = seed * 1_000_003 + step if plan.dropout else None
            value = backward(model, parameters, losses, rows, plan.parts, half, drawn)
            _check_loss(value, plan, step + 1)
            if plan.clip:
                nn.utils.clip_grad_norm_(parameters.values(), plan.clip)
            optimizer.step()
            mean.add(step)
            done.append(value)
            if log:
                log({"step": step + 1, "loss": value, "lr": rate})
            if step_done:
                step_done(1)
            if after:
                ended.append(after(step + 1, optimizer))
                model.train(plan.dropout)
            if kept and is_first():
                kept.save_when_due(done)
    mean.put()
    _check_finite(parameters, plan, len(done))
    optimizer.zero_grad()
    with deterministic(device):
        far = moved(before, ask(model, parameters, asked or losses, first, half=half)) if before else None
    if kept and is_first():
        kept.file.unlink(missing_ok=True)
    return done, far


def _optimizer(
    parameters: dict[str, nn.Parameter], plan: Plan, rates: Mapping[str, float], device: torch.device
) -> torch.optim.Optimizer:
    """The plan's optimizer with one group for each rate, so without ``rates`` with all parameters in one."""
    kinds = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if plan.optimizer not in kinds:
        raise SurgeryError(f"optimizer: got {plan.optimizer!r}, expected one of {', '.join(kinds)}")
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in parameters.items():
        groups.setdefault(rates.get(name, 1.0), []).append(parameter)
    return kinds[plan.optimizer](
        [{"params": members, "factor": factor} for factor, members in groups.items()],
        lr=plan.lr,
        weight_decay=plan.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )


def steps_of(count: int, plan: Plan) -> int:
    """How many optimiser steps ``train`` takes."""
    return plan.epochs * math.ceil(count / plan.batch_size)


def portions(groups: Groups, plan: Plan, seed: int) -> Iterator[list[int]]:
    """The examples of each step, epoch after epoch; the order of the groups is drawn by the seed and the epoch."""
    for epoch in range(plan.epochs):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        turns = torch.randperm(len(groups), generator=generator).tolist() if plan.shuffle else range(len(groups))
        order = [row for turn in turns for row in groups[turn]]
        for start in range(0, len(order), plan.batch_size):
            yield order[start : start + plan.batch_size]


def _first(groups: Groups, plan: Plan, seed: int) -> list[list[int]]:
    """The first batches that a training takes up, until they hold ``plan.asked`` examples or the first epoch ends."""
    found: list[list[int]] = []
    if not plan.asked:
        return found
    steps = math.ceil(sum(map(len, groups)) / plan.batch_size)
    for rows in islice(portions(groups, plan, seed), steps):
        if found and sum(map(len, found)) >= plan.asked:
            break
        found.append(rows)
    return found


def _check_loss(value: float, plan: Plan, step: int) -> None:
    if not math.isfinite(value):
        raise Diverged(
            f"training: the loss is {value} at step {step} with learning rate {plan.lr:g}; expected a "
            "finite number; no delta was written; lower lr, or use float32"
        )


def _check_finite(parameters: dict[str, nn.Parameter], plan: Plan, steps: int) -> None:
    for name, parameter in parameters.items():
        if not bool(torch.isfinite(parameter).all()):
            raise Diverged(
                f"training: {name} is not finite after step {steps} with learning rate {plan.lr:g}; "
                "no delta was written; lower lr, or use float32"
            )
