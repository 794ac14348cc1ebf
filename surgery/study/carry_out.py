"""Carry out a study: run every cell that is not finished, judge each on the same rows, and write the page."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.errors import HookError
from surgery.checkpoints import load
from surgery.delta import Delta
from surgery.edits.cafie import counterfactual
from surgery.errors import NoRoom, SurgeryError
from surgery.files.atomic import write_json
from surgery.metrics.judges import Judges
from surgery.progress import Progress
from surgery.runs.sharing import Shared
from surgery.study.cells import Cell, Judged, cells
from surgery.study.judging import check, judge, keep, kept
from surgery.study.locks import BlockedError, held
from surgery.study.report import write_report
from surgery.study.settings import Method, Study
from surgery.study.streams import Streams, first_edited

Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase, Shared]
"""A model, and what the runs on it share."""


RunRecipe = Callable[[Cell, Opened, bool], object]
"""Run the recipe of a cell into ``cell.folder / "run"`` if it is not there; the last argument says whether an
interrupted one goes on."""

FULL = (NoRoom, torch.OutOfMemoryError)
"""The accelerator holds too much at the moment, of this process or of others."""


def carry_out(
    study: Study,
    methods: Sequence[Method],
    out: Path,
    run: RunRecipe,
    untouched: Callable[[Judged], None] = lambda _: None,
    *,
    share: bool = False,
    device: str | None = None,
    progress: Progress | None = None,
) -> Path:
    """Run, judge, report; the page's path. Runs and judgements that exist are taken, interrupted ones go on.

    A method that is refused on a model (no head, wrong family) becomes a row that says so. A cell for which the
    accelerator is too full is tried once more behind all others. ``untouched`` is called with each untouched model's
    numbers before any edit of it is run. ``share``: several processes work on the folder; each
    takes the cells that no other holds.

    Raises ``SurgeryError`` for judges without their data, before anything is run, and for a folder in which another
    study is at work (unless ``share``).
    """
    progress = progress or Progress(quiet=True)
    judges, missing = check(study)
    for name, reason in missing.items():
        progress.say(f"without the judge {name}: {reason}")
    out.mkdir(parents=True, exist_ok=True)
    every = cells(study, methods, out)
    judged: dict[Path, Judged] = {}
    with held(out / "study.lock", shared=share):
        opened: dict[str, tuple[Opened, Streams]] = {}
        again = list(enumerate(every, 1))
        for _ in range(2):
            todo, again, elsewhere = again, [], []
            for number, cell in todo:
                label = f"{number}/{len(every)} {cell.model}, {cell.name}, seed {cell.seed}"
                try:
                    with held(cell.folder / "cell.lock", shared=False):
                        judged[cell.folder] = _one(cell, study, judges, run, opened, device, progress, label)
                    if cell.method is None:
                        untouched(judged[cell.folder])
                except BlockedError:
                    elsewhere.append(label)
                    again.append((number, cell))
                    progress.say(f"{label}: another process has it")
                except FULL as error:
                    again.append((number, cell))
                    judged[cell.folder] = _refused(cell, error, progress, label)
                torch.cuda.empty_cache()  # what other processes on the accelerator may need
        if elsewhere:
            raise SurgeryError(
                f"{out}: other processes are at work on {len(elsewhere)} of {len(every)} cells ({elsewhere[0]}); "
                "the last one to finish writes the page, or run the command again"
            )
        return write_report(out, study, [judged[cell.folder] for cell in every], missing)


def _one(
    cell: Cell,
    study: Study,
    judges: Judges,
    run: RunRecipe,
    opened: dict[str, tuple[Opened, Streams]],
    device: str | None,
    progress: Progress,
    label: str,
) -> Judged:
    """The cell's numbers, from disk if they are there; raises one of ``FULL`` where there is no room for them now."""
    known = kept(cell, study, judges)
    if known is not None:
        progress.say(f"{label}: judged before")
        return known
    if cell.method is not None and cell.method.absent:
        return Judged(cell, {}, cell.method.absent)
    progress.say(label)
    try:
        if cell.model not in opened:
            opened.clear()  # one model at a time
            opened[cell.model] = (*load(cell.model, dtype=study.dtype, device=device), Shared()), Streams()
        (model, tokenizer, shared), streams = opened[cell.model]
        with _edited(cell, (model, tokenizer, shared), run) as first:
            details: dict[str, Any] = {}
            given: Any = {"details": details, "streams": streams, "first": first, "progress": progress}
            scores = judge(model, tokenizer, judges, cell.method, **given)
    except FULL:
        raise
    except (SurgeryError, HookError) as error:
        return _refused(cell, error, progress, label)
    (cell.folder / "refused.json").unlink(missing_ok=True)
    found = Judged(cell, scores)
    keep(found, study, judges, details)
    return found


def _refused(cell: Cell, error: Exception, progress: Progress, label: str) -> Judged:
    """A row that says why, and that was not judged, so that a later call tries it again."""
    reason = " ".join(str(error).split())
    progress.say(f"{label}: refused: {reason}")
    write_json(cell.folder / "refused.json", {"reason": reason})
    return Judged(cell, {}, reason)


@contextmanager
def _edited(cell: Cell, opened: Opened, run: RunRecipe) -> Iterator[int]:
    """Inside, the model is edited as its checkpoint on disk would be; afterwards it is as before.

    Gives the first block that the edit changes, 0 where nothing is known of it.
    """
    method = cell.method
    if method is None or method.preamble:
        yield 0
        return
    if method.decoding:
        with counterfactual(*opened[:2]):
            yield 0
        return
    file = Path(method.delta)
    if method.recipe:
        run(cell, opened, (cell.folder / "run.part").exists())
        file = cell.folder / "run" / "delta.safetensors"
    delta = Delta.load(file)
    with delta.applied(opened[0], scale=method.scale, as_stored=True):
        yield first_edited(opened[0], delta)
