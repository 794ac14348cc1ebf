"""The one way to carry out an edit: what is kept, what is refused before the first step, and one process at a time."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import state
from safetensors.torch import load_file

import surgery.apply
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import open_checkpoint, same_bytes
from surgery.operation import Edit, Made, Summary, Tracking, control, operation
from surgery.runs.folder import check_free, run_folder
from surgery.runs.settings import Settings

NAME = "model.layers.1.mlp.up_proj.weight"


class Trained:
    parameters, losses, moved = 3, [2.0, 1.0], None


def carry_out(tiny: Any, checkpoint: Path, out: Path, train: Any, trains: Any = (NAME,), **more: Any) -> Any:
    """A recipe of nothing but the calls of ``surgery.operation``: measures one row of the weight."""
    model, _ = tiny
    where: Any = {"checkpoint": checkpoint, "out": out}
    with operation("toy", model, Settings(model="toy"), **where, **more) as op:
        measure = lambda: {"row": model.get_parameter(NAME)[0].tolist()}  # noqa: E731
        before = op.once("before", measure)
        main = op.carry_out("toy", train, measure, trains=trains, steps=2)
        other = op.carry_out("other", train, measure, trains=trains, steps=2, keep=False)
        others = {"other": control(other, other.measured)}
        summary = Summary(**op.about(main), before=before, after=main.measured, controls=others)
        return op.finish(summary, lambda folder, values, recipe: None)


def adds(value: float, model: Any) -> Any:
    def train(track: Tracking) -> Made:
        track["log"]({"step": 1})
        difference = torch.full_like(model.get_parameter(NAME), value)
        return Made({NAME: difference}, Edit.of(Trained(), blocks=[1], part="mlp", rows=7))

    return train


def test_a_control_is_measured_as_it_would_be_saved(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    before = state(tiny[0])
    found = carry_out(tiny, checkpoint, tmp_path / "run", adds(0.3, tiny[0]), opened=1.5).summary
    assert state(tiny[0]) == before
    assert found["after"] == found["controls"]["other"]["after"] != found["before"]
    stored = torch.tensor(found["after"]["row"])
    surgery.apply.apply(tmp_path / "run" / "delta.safetensors", checkpoint, tmp_path / "again")  # as measured, unasked
    assert surgery.load(tmp_path / "again")[0].get_parameter(NAME)[0].tolist() == found["after"]["row"]
    assert torch.equal(stored, stored.to(torch.bfloat16).float())  # what 16 bits can hold
    assert found["applied"]["entries"] == tiny[0].get_parameter(NAME).numel()
    wanted = {"blocks": [1], "part": "mlp", "parameters": 3, "steps": 2, "loss_first": 2.0, "loss_last": 1.0, "rows": 7}
    assert found["edit"] == found["controls"]["other"]["edit"] == wanted
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"delta.safetensors", "log.jsonl", "recipe.toml", "run.json"}
    # The time of each stage, the control's own steps in one; the log holds what run.json adds up.
    assert list(found["seconds"]) == ["open", "before", "train", "write", "apply", "after", "control", "report"]
    assert found["seconds"]["open"] == 1.5 and all(seconds >= 0 for seconds in found["seconds"].values())
    assert found == json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_checkpoint_that_goes_again_holds_what_changes_and_nothing_else(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    real = surgery.apply.apply

    def apply(delta: Any, source: Path, out: Path, **options: Any) -> Any:
        found = real(delta, source, out, **options)
        whole = tmp_path / f"whole{len(seen)}"
        real(delta, source, whole, undo="none")
        here, there = (open_checkpoint(folder) for folder in (out, whole))
        same = {name: same_bytes(here, name, there, name) for name in here.places}
        seen.append((same.pop(NAME), any(same.values())))
        assert here.places == there.places and here.files == there.files
        return found

    monkeypatch.setattr("surgery.apply.apply", apply)
    carry_out(tiny, checkpoint, tmp_path / "run", adds(0.3, tiny[0]))
    assert seen == [(True, False)]  # the tensor that changes is there, every other one is a hole


def test_a_delta_that_is_made_is_kept_and_what_is_half_written_goes(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        (tmp_path / "run.part" / "state" / "measured-toy.json.part").write_text("{")
        raise SurgeryError("nothing can be applied today")

    part = tmp_path / "run.part"
    with monkeypatch.context() as patch:
        patch.setattr("surgery.apply.apply", broken)
        with pytest.raises(SurgeryError, match=r"today; what was finished is kept: go on with surgery run .*--resume"):
            carry_out(tiny, checkpoint, tmp_path / "run", adds(0.3, tiny[0]))
    kept = (part / "delta.safetensors").read_bytes()
    assert {path.name for path in (part / "state").iterdir()} == {"before.json", "trained-toy.json", "pid"}
    trained: list[int] = []

    def once_more(track: Tracking) -> Made:
        trained.append(1)
        return adds(0.3, tiny[0])(track)

    run = carry_out(tiny, checkpoint, tmp_path / "run", once_more, resume=True)
    assert (run.folder / "delta.safetensors").read_bytes() == kept
    assert len(trained) == 1  # the control alone


def test_a_control_that_cannot_be_measured_is_not_trained_again(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    model, left = tiny[0], set[str]()

    def control_of(run: str, train: Any, measure: Any, **more: Any) -> Any:
        where: Any = {"checkpoint": checkpoint, "out": tmp_path / run}
        with operation("toy", model, Settings(model="toy"), **where, **more) as op:
            found = op.carry_out("random:0", train, measure, trains=[NAME], steps=1, keep=False)
            left.update(path.name for path in op.folder.state("").iterdir())
        return found

    def broken() -> Any:
        raise SurgeryError("nothing can be measured today")

    measure = lambda: model.get_parameter(NAME)[0].tolist()  # noqa: E731
    with pytest.raises(SurgeryError, match=r"measured today; what was finished is kept"):
        control_of("run", adds(0.3, model), broken)
    again = control_of("run", lambda _: pytest.fail("trained"), measure, resume=True)
    assert again == control_of("whole", adds(0.3, model), measure) and again.measured != measure()
    assert left == {"trained-control-random-0.json", "control-random-0.json", "pid"}  # the control's file is gone


def test_what_would_fail_after_the_training_is_refused_before_the_first_step(
    tiny: Any, checkpoint: Path, tmp_path: Path
) -> None:
    tiny[0].extra = torch.nn.Linear(2, 2)
    with pytest.raises(SurgeryError, match=r"has no tensor 'extra.weight'"):
        carry_out(tiny, checkpoint, tmp_path / "run", lambda _: pytest.fail("trained"), ["extra.weight"])


def test_a_run_inside_its_own_checkpoint_is_refused(tiny: Any, checkpoint: Path) -> None:
    with pytest.raises(SurgeryError, match="lies inside the checkpoint"):
        carry_out(tiny, checkpoint, checkpoint / "run", lambda _: pytest.fail("trained"))
    assert not (checkpoint / "run.part").exists()


def test_where_no_folder_can_be_made_is_said_before_anything_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "run", tmp_path / "file" / "new" / "run"):
        with pytest.raises(SurgeryError, match=r"run\.part: cannot be made in .*file \(Not a directory\); choose"):
            check_free(out)
    assert check_free(tmp_path / "new" / "run") == tmp_path / "new" / "run.part"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]  # nothing is left of having tried


def test_weights_that_no_delta_can_be_made_of_are_refused_before_anything(
    tiny: Any, checkpoint: Path, tmp_path: Path
) -> None:
    """transformers opens .bin files, so that a run could measure for an hour before it fails to write its delta."""
    shutil.copytree(checkpoint, tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    torch.save(tensors, tmp_path / "base" / "pytorch_model.bin")
    (tmp_path / "base" / "model.safetensors").unlink()
    with pytest.raises(SurgeryError, match=r"found pytorch_model.bin"):
        carry_out(tiny, tmp_path / "base", tmp_path / "run", adds(0.3, tiny[0]))
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_a_second_process_is_refused_and_told_of_the_first(tmp_path: Path) -> None:
    """Also with --resume; and the lock of a process that was killed is open."""
    out = tmp_path / "run"
    code = f"""
import sys
from pathlib import Path
from surgery.runs.folder import run_folder
with run_folder(Path({str(out)!r}), "a = 1"):
    print("in", flush=True)
    sys.stdin.read()
"""
    first = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdout and first.stdout.readline() == "in\n"
    for resume in (True, False):
        with pytest.raises(SurgeryError, match=f"process {first.pid} is writing this run"):
            check_free(out, resume=resume)
        with (
            pytest.raises(SurgeryError, match=f"process {first.pid} is writing this run"),
            run_folder(out, "a = 1", resume=resume),
        ):
            pass
    first.kill()
    first.wait()
    with run_folder(out, "a = 1", resume=True) as folder:
        assert (folder.path / "state" / "pid").read_text() == str(os.getpid())
    assert {path.name for path in out.iterdir()} == {"recipe.toml"}


def test_a_failure_before_anything_was_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"^no$"), run_folder(tmp_path / "run", "a = 1") as folder:
        folder.log({"note": "here"})
        raise SurgeryError("no")
    assert list(tmp_path.iterdir()) == []
