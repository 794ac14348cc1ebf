"""The one way to carry out an edit: train -> delta -> apply on disk -> measure as saved -> controls -> summary.

A recipe is its settings, its own steps, and these calls:

    def run(model, tokenizer, settings, **where: Unpack[Where]) -> Run:
        data = ...                                    # read, and refuse what is wrong, before anything is written
        with operation("mine", model, settings, **where) as op:
            before = op.once("before", lambda: measure(model, data))

            def train(track: Tracking) -> Made:
                trained = fine_tune(model, data.rows, plan, seed=settings.seed, **track)
                return Made(trained.differences, Edit.of(trained, part="all", objective="cross-entropy"))

            main = op.carry_out("mine", train, lambda: measure(model, data), trains=names, steps=steps_of(...))
            other = op.carry_out("random", ..., keep=False)      # a control: measured in memory
            summary = Summary(**op.about(main), before=before, after=main.measured,
                              controls={"random": control(other, other.measured)})
            return op.finish(summary, write_report)

Each step is done once: its result, plain JSON values, stands in the run's folder as soon as it is there, a failure
keeps it, and ``--resume`` goes on behind it (``surgery.runs.folder``). Headers and the disk's room are checked first.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.natural_gain import Objective
from surgery import apply as disk
from surgery import delta as deltas
from surgery import processes
from surgery.apply.engine import Undo
from surgery.checkpoints import checkpoint_dir, tensors_of
from surgery.delta.module import module_delta
from surgery.devices import peak_memory
from surgery.files.atomic import write_json
from surgery.files.checkpoint_files import open_checkpoint
from surgery.files.rounding import Rounding
from surgery.progress import Progress
from surgery.runs.folder import AGAIN, Folder, Run, check_apart, run_folder
from surgery.runs.interface import Made, Report, Tracking, Train, Where
from surgery.runs.paired import differences, without_samples
from surgery.runs.recipe_files import dump
from surgery.runs.settings import Settings
from surgery.runs.sharing import Shared
from surgery.runs.summary import Applied, Edit, Outcome, OwnPart, Summary, control

__all__ = [
    "Edit", "Made", "Operation", "Outcome", "OwnPart", "Run", "Summary", "Tracking", "Where", "control", "operation",
]  # fmt: skip


@dataclass(frozen=True)
class Operation:
    """A run in progress: the model as it was opened, the checkpoint on disk, the folder that is being written."""

    name: str
    model: PreTrainedModel
    settings: Settings
    directory: Path
    """The checkpoint that ``model`` was loaded from."""
    out: Path
    folder: Folder
    progress: Progress
    recipe: str
    """The resolved settings as TOML, which stand in every delta of the run."""
    shared: Shared
    rounding: Rounding = "auto"
    keep_checkpoint: bool = False

    def note(self, line: str) -> None:
        """Say a line, and write it to the log."""
        self.folder.log({"note": line})
        self.progress.say(line)

    def once(self, name: str, compute: Callable[[], Any], *, of: Any = None) -> Any:
        """The JSON value of ``compute()``, computed once in a run however often that is interrupted.

        Its time counts for the stage called like it, up to a hyphen: "dose" of "dose-0-0.2". Runs of a sweep compute it
        once where ``of``, all that it depends on beside the model, is equal.
        """
        with self.folder.stage(name.partition("-")[0]):
            return self.folder.once(name, partial(self.shared.once, name, of, compute) if of else compute)

    def located(
        self, tokenizer: PreTrainedTokenizerBase, objective: Objective, count: int, *, of: Any = None, **part: Any
    ) -> dict[str, Any]:
        """What ``block = "auto"`` stands for, by ``surgery.locate.gain.auto_block``; ``of``: what ``objective`` is of.

        ``part``: the ``size`` and ``blocks`` of ``auto_part``, where matrices are to be named instead.
        """
        from surgery.locate.gain import GAIN_LIMIT, RETAIN, auto_block, auto_part

        def find() -> dict[str, Any]:
            with self.progress.work("locate by gain", min(count, GAIN_LIMIT) + RETAIN) as step:
                given: Any = {"seed": self.settings.seed, "step": step, **part}
                return (auto_part if part else auto_block)(self.model, tokenizer, objective, count, **given)

        found: dict[str, Any] = self.once("located", find, of=of and (of, self.settings.seed, part))
        self.note(found["said"])
        return found

    @contextmanager
    def tracking(self, name: str, steps: int) -> Iterator[Tracking]:
        """Inside, a training of ``steps`` steps is shown, logged under "edit", and kept so that it can be resumed."""
        with self.progress.work(f"train {name}", steps) as step:
            yield {
                "state": self.folder.state(f"{_plain(name)}.pt"),
                "log": lambda row: self.folder.log({"edit": name, **row}),
                "step_done": step,
            }

    def delta(self, made: Made, *, directory: Path | None = None, base: str = "") -> deltas.Delta:
        """What was made as a delta of the checkpoint (or of the one in ``directory``, called ``base``)."""
        where, seed = directory or self.directory, self.settings.seed
        about: Any = {"base": base or self.settings.model, "recipe": self.recipe, "seed": seed}
        about |= {"rounding": self.rounding}  # a later apply of the file does what is measured here
        if made.module is not None:
            return module_delta(made.module, where, differences=made.differences, **about)
        return deltas.make(made.differences, where, kind=made.kind, **about)

    def apply(self, file: Path, saved: Path, *, undo: Undo = "none") -> Applied:
        """Write the checkpoint with the delta in ``file`` applied to the folder ``saved``, over what stands there.

        Without an undo record: it would hold the changed part of the base again, which stands where it stood. Where
        the folder is to be measured and removed, its weights are hollow where they do not change.
        """
        return Applied(**processes.told(partial(self._apply, file, saved, undo)))

    def _apply(self, file: Path, saved: Path, undo: Undo) -> dict[str, Any]:
        shutil.rmtree(saved, ignore_errors=True)  # of an interrupted run
        how: Any = {"rounding": self.rounding, "seed": self.settings.seed, "undo": undo}
        report = disk.apply(file, self.directory, saved, hollow=not self.keep_checkpoint, **how)
        return Applied(report.rounding, report.entries, report.changed, report.lost).to_dict()

    def carry_out(
        self,
        name: str,
        train: Train,
        measure: Callable[[], Any],
        *,
        trains: Sequence[str],
        steps: int,
        keep: bool = True,
        undo: Undo = "none",
    ) -> Outcome:
        """Train, write the delta, put the file onto the checkpoint, measure that; ``model`` is as before afterwards.

        With ``keep`` this is the run's edit: the file is ``delta.safetensors`` and is applied to the checkpoint on
        disk, which is measured with the tensors read back from there. A control, and a module, is put onto the model
        in memory, rounded as the checkpoint's dtype rounds it; a control's file is gone when it is measured.

        ``trains`` are the parameters that ``train`` changes, ``steps`` the steps that it takes. Raises ``SurgeryError``
        as ``surgery.delta.check_edit`` and the steps themselves do.
        """
        plain = _plain(name)
        if not keep:
            return self._control(plain, partial(self._done, name, train, trains, steps), measure)
        file = self.folder.path / "delta.safetensors"
        made = self.folder.once(f"trained-{plain}", partial(self._done, name, train, trains, steps, file))
        found = self.folder.once(f"measured-{plain}", partial(self._as_saved, file, measure, undo))
        return Outcome(Edit.from_dict(made["edit"]), found["measured"], made["delta"], Applied(**found["applied"]))

    def _control(self, plain: str, train: Callable[[Path], Any], measure: Callable[[], Any]) -> Outcome:
        """A control's delta stands among what outlives an interruption until it is measured."""
        file = self.folder.state(f"control-{plain}.safetensors")
        with self.folder.stage("control"):
            made = self.folder.once(f"trained-control-{plain}", partial(train, file))
            found = self.folder.once(f"control-{plain}", lambda: self._in_memory(deltas.Delta.load(file), measure))
        processes.wait()
        if processes.first():
            file.unlink(missing_ok=True)
        return Outcome(Edit.from_dict(made["edit"]), found["measured"], None, Applied(**found["applied"]))

    def _done(self, name: str, train: Train, trains: Sequence[str], steps: int, file: Path) -> dict[str, Any]:
        with self.folder.stage("train"), self.tracking(name, steps) as track:
            deltas.check_edit(self.model, trains, self.directory, out=self.folder.path, whole=self.keep_checkpoint)
            made = train(track)
        with self.folder.stage("write"):
            return {"edit": made.edit.to_dict(), "delta": processes.told(lambda: self.delta(made).record(file))}

    def _as_saved(self, file: Path, measure: Callable[[], Any], undo: Undo) -> dict[str, Any]:
        saved, delta = self.folder.path / "checkpoint", deltas.open_delta(file)
        if delta.kind == "module":  # which no plain checkpoint holds
            return self._in_memory(deltas.Delta.load(file), measure)
        with self.folder.stage("apply"):
            applied = self.apply(file, saved, undo=undo)
        with self.folder.stage("after"), tensors_of(self.model, delta, saved):
            measured = measure()
        processes.wait()
        if not self.keep_checkpoint and processes.first():
            shutil.rmtree(saved)
        return {"measured": measured, "applied": applied.to_dict()}

    def _in_memory(self, delta: deltas.Delta, measure: Callable[[], Any]) -> dict[str, Any]:
        with self.folder.stage("after"), self.edited(delta):
            return {"measured": measure(), "applied": {"rounding": self.rounding}}

    def edited(self, delta: deltas.Delta, scale: float = 1.0) -> AbstractContextManager[Any]:
        """Inside, the model holds ``delta`` times ``scale``, rounded as the checkpoint would be."""
        rounding: Any = {"rounding": self.rounding, "seed": self.settings.seed, "as_stored": True}
        return delta.applied(self.model, scale=scale, **rounding)

    def about(self, main: Outcome) -> dict[str, Any]:
        """The fields of a ``Summary`` that are the same for every recipe."""
        named = {"recipe": self.name, "model": self.settings.model, "seed": self.settings.seed}
        return named | {"edit": main.edit, "delta": main.delta, "applied": main.applied}

    def finish(self, summary: Summary, report: Report) -> Run:
        """Write ``run.json``, with the paired differences, and the report; leave the ``with`` block with the result.

        Scores that ``measure`` gave with their bootstrap samples (``plain(..., samples=True)``) are paired.
        """
        return Run(self.out, processes.told(partial(self._finish, summary, report)))

    def _finish(self, summary: Summary, report: Report) -> dict[str, Any]:
        values, peak = summary.to_dict(), peak_memory(self.model.device)
        values = without_samples(values | {"differences": differences(values)}) | self.folder.cost(peak)
        with self.folder.stage("report"):
            report(self.folder.path, values, self.recipe)
        values |= self.folder.cost(peak)
        write_json(self.folder.path / "run.json", values)
        return values


@contextmanager
def operation(
    name: str,
    model: PreTrainedModel,
    settings: Settings,
    *,
    out: str | Path,
    checkpoint: str | Path | None = None,
    resume: bool = False,
    progress: Progress | None = None,
    opened: float = 0.0,
    again: str = AGAIN,
    shared: Shared | None = None,
) -> Iterator[Operation]:
    """Inside, the recipe ``name`` works in the folder of its run, which gets its name ``out`` at the end.

    The keyword arguments are those of ``Where``. Raises ``SurgeryError`` for a checkpoint that no delta can be made of,
    a folder that stands in the way or lies inside the checkpoint; see ``surgery.runs.folder.run_folder`` for failures.
    """
    out, directory = Path(out), open_checkpoint(checkpoint_dir(checkpoint or settings.model)).path
    check_apart(out, directory)
    text = dump(name, settings)
    saving = {key: getattr(settings, key) for key in ("rounding", "keep_checkpoint") if hasattr(settings, key)}
    with run_folder(out, text, resume=resume, again=again) as folder:
        if opened:
            folder.log({"stage": "open", "seconds": round(opened, 3)})
        said, kept = progress or Progress(quiet=True), shared or Shared()
        yield Operation(name, model, settings, directory, out, folder, said, text, kept, **saving)


def _plain(name: str) -> str:
    return name.replace(":", "-")
