"""The cells of a study: one method on one model with one seed, and what was measured there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from surgery.metrics.metric import Difference, Metric
from surgery.runs.sweep import folder_name
from surgery.study.settings import Method, Study, seeds_of

Flat = dict[str, Metric]
"""Numbers by place, such as "genbias.afgb.all"."""

TAKEN = "taken"
"""In the folder of a cell that another folder had: the recipe of its run, and its delta where it was there."""


@dataclass(frozen=True)
class Cell:
    """One method on one model with one seed; ``method`` None is the model as it is."""

    model: str
    method: Method | None
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """The row it belongs to; its seeds share it."""
        return self.method.name if self.method else "untouched"


@dataclass(frozen=True)
class Judged:
    """A cell with its numbers, or with the reason why it has none."""

    cell: Cell
    scores: Flat
    refused: str = ""
    differences: Mapping[str, Difference] | None = None
    """From the untouched model as it was measured beside it, of a cell of another folder; None: those of the draws."""


def cells(study: Study, methods: Sequence[Method], out: Path) -> list[Cell]:
    """Every cell, models outermost, the untouched model first, then every method's first seed, second seed, ...

    What does not depend on a seed has only the first.
    """
    found = []
    for model in study.models:
        place = out / folder_name({"model": Path(model).name})
        found.append(Cell(model, None, study.seeds[0], place / "untouched"))
        of = [(method, seeds_of(study, method)) for method in methods]
        for turn in range(max(len(seeds) for _, seeds in of)):
            for method, seeds in of:
                folder = folder_name({"method": method.name}).removeprefix("method=")
                found += [Cell(model, method, seed, place / folder / f"seed={seed}") for seed in seeds[turn : turn + 1]]
    return found
