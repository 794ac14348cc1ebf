"""Following a training: scores and terms at each evaluation, swaps, the stop, and the checkpoint that is kept."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from surgery.edits.unlearning.batches import BatchSampler, Item
from surgery.edits.unlearning.early_stopping import Decision, EarlyStopping, decide, merit
from surgery.errors import SurgeryError
from surgery.files.atomic import write_json
from surgery.training import Log

# Scores of the development set by name ("ss", "lms", "icat"), then by bias type.
Scores = dict[str, dict[str, float]]


@dataclass
class Watch:
    """Follows the steps of one training; its decisions depend on recorded scores alone, so they can be replayed."""

    control: EarlyStopping
    chunks: BatchSampler
    evaluate: Callable[[int], Scores]
    steps: int
    folder: Path | None
    log: Log | None
    push: Callable[[Sequence[Tensor]], float]
    """By what the weights of what pushes are multiplied, of the parameters as they are after the first step."""
    now: Decision = field(default_factory=Decision)
    record: dict[int, Scores] = field(default_factory=dict)
    pushed: float = 1.0
    exploded: int = 0
    kept: int = 0
    reason: str = ""
    ratio: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    best: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder and (file := self.folder / "evaluations.json").is_file():
            written = json.loads(file.read_text("utf-8"))
            self.exploded, self.record = written["exploded"], {int(k): v for k, v in written["scores"].items()}
            self.pushed = written["pushed"]

    def seen(self, items: Sequence[Item], values: Tensor, ratio: float) -> None:
        """The losses of a step, before its update."""
        for role in self.chunks.sizes:
            mine = [value for item, value in zip(items, values.tolist(), strict=True) if item.role == role]
            if mine:
                self.parts[role] = sum(mine) / len(mine)
        self.ratio = ratio

    def written(self, row: dict[str, object]) -> None:
        """A line of the log, with the parts of the loss."""
        if self.log:
            self.log({**row, **self.parts, "forget_ratio": self.ratio})

    def after(self, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        """Decide what follows step ``step``; see ``surgery.training.After``."""
        if self._exploded(step, optimizer):
            self.reason = f"the forget loss was more than {self.control.explosion:g} x its start at step {step}"
            if not self.kept:
                raise SurgeryError(
                    f"unlearning: {self.reason}, before the first evaluation (every {self.control.every} steps) left a "
                    "good checkpoint; no delta was written; lower lr, or evaluate more often"
                )
            self._restore(optimizer)
            return True
        due = not step % self.control.every or step == self.steps
        if optimizer is not None and step == 1:
            self.pushed = self.push(_parameters(optimizer))
        if optimizer is not None and (due or step == 1):
            if due:
                self.record[step] = self.evaluate(step)
            self._write()
        if not due:
            return False
        self.now = decide(self.control, self.record[step])
        self._keep(step, optimizer)
        if self.log and optimizer is not None:
            said = {"evaluated": step, **self.record[step], "swapped": sorted(self.now.swapped)}
            self.log(said)
        if optimizer is not None and self.control.focus:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                group["factor"] = self.now.factor
        ends = self.now.stop or step == self.steps
        if ends:
            self.reason = (
                f"every bias type was within its tolerance at step {step}"
                if self.now.stop
                else f"all {self.steps} steps were done"
            )
            self._restore(optimizer)
        return ends

    def _exploded(self, step: int, optimizer: torch.optim.Optimizer | None) -> bool:
        if optimizer is None:
            return self.exploded == step
        self.exploded = step if self.ratio > self.control.explosion else 0
        if self.exploded:
            self._write()
        return bool(self.exploded)

    def _keep(self, step: int, optimizer: torch.optim.Optimizer | None) -> None:
        """Remember the parameters at an evaluation that is the best until now, the stopping one, or the last."""
        better = not self.kept or merit(self.control, self.record[step]) > merit(self.control, self.record[self.kept])
        if not (better or self.now.stop or self.control.keep == "last"):
            return
        self.kept, self.best = step, []
        if optimizer is not None:
            self.best = [p.detach().cpu().clone() for p in _parameters(optimizer)]
            if self.folder:
                torch.save(self.best, self.folder / f"kept-{step}.pt")

    def _restore(self, optimizer: torch.optim.Optimizer | None) -> None:
        """The kept parameters into the model; a continued run finds them in the folder."""
        if optimizer is None:
            return  # the state that was taken up was saved after this had been done
        if not self.best and self.folder:
            self.best = torch.load(self.folder / f"kept-{self.kept}.pt", weights_only=True)
        with torch.no_grad():
            for parameter, kept in zip(_parameters(optimizer), self.best, strict=True):
                parameter.copy_(kept)

    def _write(self) -> None:
        if self.folder:
            write_json(
                self.folder / "evaluations.json",
                {"exploded": self.exploded, "scores": self.record, "pushed": self.pushed},
            )


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
