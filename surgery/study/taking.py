"""Finished cells of the same study out of another folder, perhaps of another machine, so that nothing is done twice."""

import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.metrics.judges import Judges
from surgery.metrics.metric import difference, points
from surgery.progress import Progress
from surgery.runs.settings import Settings
from surgery.study.cells import TAKEN, Cell, Judged, cells
from surgery.study.judging import details_of, identity, judged_in, keep, kept, written
from surgery.study.locks import BlockedError, held
from surgery.study.made_with import other
from surgery.study.settings import Method, Study
from surgery.study.verdict import paired_with

SAME = 1.0  # points by which two measurements of one model may differ beyond noise
Ready = Mapping[tuple[str, int, str], Settings]
"""The settings of every recipe's run, by method, seed and model."""


@dataclass(frozen=True)
class Source:
    """Another folder of the study, as it was looked through once."""

    folder: Path
    cells: Mapping[Path, Cell]
    """By its place in the folder every cell that this study would measure in the same way."""
    others: tuple[str, ...]
    """What differs in those that are judged there in another way."""


def look(asked: Study, methods: Sequence[Method], ready: Ready, judges: Judges, folder: Path) -> Source:
    """What ``folder`` has judged by the same judges, of runs with the settings ``ready``, their defaults included.

    Models and data may lie elsewhere there: a model is known by the last part of its path.

    Raises ``SurgeryError`` for a folder without a cell of this study.
    """
    every = cells(asked, methods, folder)
    differs = [_differs(cell, asked, ready, judges) for cell in every]
    found = {cell.folder.relative_to(folder): cell for cell, why in zip(every, differs, strict=True) if why == ""}
    others = tuple(why for why in differs if why)
    if not found:
        raise SurgeryError(
            f"--take {folder}: has no cell of this study{f' ({others[0]})' if others else ''}; expected the folder of "
            "a study of the same methods, settings and judges"
        )
    return Source(folder, found, others)


def take(
    asked: Study,
    methods: Sequence[Method],
    judges: Judges,
    source: Source,
    out: Path,
    progress: Progress,
    unfinished: Collection[str] = (),
) -> None:
    """Copy the cells of ``source`` that are not in ``out``; how many, and what is left there, is said.

    Every cell is paired with the untouched model as it was measured there, and keeps these differences; its details
    come along, and its run's recipe and delta. Of the models ``unfinished``, some cells of which are still to be
    measured, the untouched model is left there: what is measured here is paired with the model as it is here
    (``refuse_another``).

    Raises ``SurgeryError`` where the untouched model of ``source`` is another one than that of ``out``: a number
    differs beyond noise and by more than a point.
    """
    count, left = 0, list(source.others)
    before: dict[str, Judged] = {}
    for here in cells(asked, methods, out):
        there = source.cells.get(here.folder.relative_to(out))
        if there is None:
            continue
        if there.method is None:
            before[there.model] = judged_in(there)
            if here.model in unfinished and kept(here, asked, judges) is None:
                continue
        try:
            with held(here.folder / "cell.lock", shared=False):
                if (ours := kept(here, asked, judges)) is not None:
                    if there.method is None:
                        _same(ours, before[there.model], source.folder)
                    continue
                found = judged_in(there)
                if found.differences is None and there.method is not None:
                    if there.model not in before:
                        left.append(f"{there.folder}: no untouched model beside it to pair it with")
                        continue
                    found = replace(found, differences=paired_with(found, [before[there.model], found]))
                keep(replace(found, cell=here), asked, judges, details_of(there.folder))
                _bring(there.folder, here.folder)
                count += 1
        except BlockedError:
            left.append(f"{there.folder}: another process is at work on it here")
    progress.say(f"{count} cells taken from {source.folder}" + (f", {len(left)} not: {left[0]}" if left else ""))


def unfinished(
    asked: Study, methods: Sequence[Method], judges: Judges, sources: Sequence[Source], out: Path
) -> set[str]:
    """The models with an edit that neither ``out`` nor any of ``sources`` has judged."""
    return {
        here.model
        for here in cells(asked, methods, out)
        if here.method is not None
        and not here.method.absent
        and _judges(here.folder) != identity(here, asked, judges)
        and not any(here.folder.relative_to(out) in source.cells for source in sources)
    }


def refuse_another(ours: Judged, sources: Sequence[Source]) -> None:
    """Raises ``SurgeryError`` where the untouched model ``ours`` is another one than that of ``sources``."""
    for source in sources:
        for cell in source.cells.values():
            if cell.method is None and cell.model == ours.cell.model:
                _same(ours, judged_in(cell), source.folder)


def whole(asked: Study, methods: Sequence[Method], judges: Judges, out: Path) -> set[str]:
    """The models of which every cell that can be measured is judged in ``out``, so that they need not be opened."""
    every = [cell for cell in cells(asked, methods, out) if not (cell.method and cell.method.absent)]
    left = {cell.model for cell in every if _judges(cell.folder) != identity(cell, asked, judges)}
    return set(asked.models) - left


def _judges(folder: Path) -> dict[str, Any] | None:
    found = written(folder)
    return None if found is None else found["judges"]


def _differs(cell: Cell, asked: Study, ready: Ready, judges: Judges) -> str | None:
    """What differs in the cell as it is judged there, "" for nothing; None where it is not judged."""
    there = _judges(cell.folder)
    if there is None:
        return None
    for key, value in identity(cell, asked, judges).items():
        got = there.get(key)
        if key == "folder" or (key == "model" and Path(str(got)).name == Path(cell.model).name):
            continue
        if got != value:
            return f"{cell.folder}: {key} is {str(got)[:200]}, expected {str(value)[:200]}"
    if cell.method and cell.method.recipe:
        file = _brought(cell.folder, "recipe.toml")
        if file is None:
            return f"{cell.folder}: without its run's recipe.toml, by which its settings are known"
        if differs := other(file, ready[cell.name, cell.seed, cell.model]):
            return f"{file}: {differs}"
    return ""


def _same(ours: Judged, theirs: Judged, source: Path) -> None:
    """Raises ``SurgeryError`` where two measurements of the untouched model are not of one model on one data."""
    for place, metric in theirs.scores.items():
        found = place in ours.scores and difference(ours.scores[place], metric, axes=len(theirs.scores))
        if found and found.verdict != "within noise" and abs(points(metric.to_dict(), found.value)) > SAME:
            raise SurgeryError(
                f"--take {source}: {ours.cell.model} as it is has {place} {metric.value:.4g} there, and "
                f"{ours.scores[place].value:.4g} here; expected the same weights and data"
            )


def _bring(there: Path, here: Path) -> None:
    """The recipe and the delta of a run, linked where one disk holds both, else copied."""
    for name in ("recipe.toml", "delta.safetensors"):
        file = _brought(there, name)
        target = here / TAKEN / name
        if file is None or target.exists():
            continue
        target.parent.mkdir(exist_ok=True)
        try:
            os.link(file, target)
        except OSError:
            shutil.copy2(file, target)


def _brought(folder: Path, name: str) -> Path | None:
    return next((path for kind in ("run", TAKEN) if (path := folder / kind / name).is_file()), None)
