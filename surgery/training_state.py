"""What a training keeps beside its parameters: the mean over its last steps, and a file by which another can go on."""

import math
import os
import pickle
import time
from pathlib import Path

import torch
from torch import nn

from surgery.errors import SurgeryError

SAVE_EVERY = 20.0  # seconds between saved states, more where saving is slow; this changes no result


class Mean:
    """Mean of trained parameters over the last steps of a training (Izmailov et al. 2018, arXiv:1803.05407), float32.

    ``share`` of the ``steps`` count, rounded up; none for 0, which keeps nothing.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], share: float, steps: int) -> None:
        self._parameters, self._first = parameters, steps - math.ceil(share * steps)
        self.count, self.values = 0, dict[str, torch.Tensor]()

    @torch.no_grad()
    def add(self, step: int) -> None:
        """Take in the parameters as they are behind step ``step`` (from 0), where it is one of the last."""
        if step < self._first:
            return
        self.count += 1
        for name, parameter in self._parameters.items():
            if self.count == 1:
                self.values[name] = parameter.detach().float().clone()
            else:
                self.values[name].lerp_(parameter.detach().float(), 1 / self.count)

    @torch.no_grad()
    def put(self) -> None:
        """Set the parameters to the mean, where it has any steps."""
        for name, value in self.values.items():
            self._parameters[name].copy_(value)


class TrainingState:
    """The file that keeps a training between its steps, so that another process can go on with it."""

    def __init__(
        self,
        file: Path,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        mean: Mean,
        plan: object,
        seed: int,
    ) -> None:
        self.file, self._parameters, self._optimizer, self._mean = file, parameters, optimizer, mean
        self._mark = f"{plan} {seed} {[(name, tuple(p.shape)) for name, p in parameters.items()]}"
        self._saved = time.monotonic()

    def take_up(self) -> list[float]:
        """Put back what the file holds, where there is one; returns the losses of the steps that it has behind it."""
        if not self.file.is_file():
            return []
        try:
            kept = torch.load(self.file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise SurgeryError(
                f"{self.file}: the saved state cannot be read ({error}); remove it to start again"
            ) from None
        if kept["of"] != self._mark:
            raise SurgeryError(
                f"{self.file}: saved by a run with other settings; expected the same plan, seed and parameters; "
                "remove the .part folder or use the recipe.toml in it"
            )
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(kept["parameters"][name])
        self._optimizer.load_state_dict(kept["optimizer"])
        self._mean.count = kept["averaged"]
        self._mean.values = {name: value.to(self._parameters[name].device) for name, value in kept["mean"].items()}
        return list(kept["losses"])

    def save_when_due(self, done: list[float]) -> None:
        """Write the file anew where the last writing is long enough ago."""
        began = time.monotonic()
        if began - self._saved <= SAVE_EVERY:
            return
        part = self.file.with_name(self.file.name + ".part")
        torch.save(
            {
                "of": self._mark,
                "parameters": {name: p.detach() for name, p in self._parameters.items()},
                "optimizer": self._optimizer.state_dict(),
                "mean": self._mean.values,
                "averaged": self._mean.count,
                "losses": done,
            },
            part,
        )
        os.replace(part, self.file)
        self._saved = time.monotonic()
        if self._saved - began > 1.0:  # a large state: at most a twentieth of the time goes into saving it
            self._saved += 19 * (self._saved - began)
