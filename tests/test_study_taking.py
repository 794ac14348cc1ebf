"""Cells that another folder, perhaps of another machine, has judged: taken along with their pairing, or named."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from test_cli import surgery

from surgery.cli.models import chosen_recipe
from surgery.errors import SurgeryError
from surgery.metrics.metric import Metric, mean_metric
from surgery.progress import Progress
from surgery.runs.recipe_files import build, dump
from surgery.runs.settings import Settings
from surgery.study import Method, Study
from surgery.study.cells import Judged, cells
from surgery.study.judging import check, details_of, keep, kept
from surgery.study.locks import held
from surgery.study.made_with import refuse_other_settings
from surgery.study.report import write_report
from surgery.study.taking import Ready, Source, look, refuse_another, take, unfinished, whole
from surgery.study.verdict import paired_with

ROWS = np.random.default_rng(0).uniform(0.2, 0.4, 40)
THERE, HERE = Study(models=["/their/m"], seeds=[0, 1]), Study(models=["m"], seeds=[0, 1])
METHODS = [Method(name="edit", recipe="lftf", settings={"epochs": 2})]
JUDGES = check(HERE)[0]


def ready(**changed: Any) -> dict[tuple[str, int, str], Settings]:
    """What the command builds of ``METHODS``, its defaults ``changed``."""
    module, values, _ = chosen_recipe("lftf", None, [], None)
    own = values | {"epochs": 2} | changed
    return {
        ("edit", seed, model): build(module.Settings, own | {"model": model, "seed": seed}, "")
        for seed in (0, 1)
        for model in ("m", "/their/m")
    }


READY = ready()


def seen(source: Path, asked: Study = HERE, methods: list[Method] = METHODS, settings: Ready = READY) -> Source:
    return look(asked, methods, settings, check(asked)[0], source)


def metric(factor: float) -> Metric:
    return mean_metric(ROWS * factor, scorer="s", data="d", ideal=0.0, direction="lower")


def judge(out: Path, factor: float = 1.0, study: Study = THERE, methods: list[Method] = METHODS) -> list[Judged]:
    """A study in ``out`` whose untouched model has numbers ``factor`` times those of another one."""
    found = []
    for cell in cells(study, methods, out):
        value = metric(factor if cell.method is None else factor / (2 + cell.seed))
        found.append(Judged(cell, {"genbias.afgb.all": value, "perplexity": replace(value, ideal=1.0)}))
        keep(found[-1], study, JUDGES, {"words": [cell.seed]})
        if cell.method:
            run = cell.folder / "run"
            run.mkdir()
            (run / "recipe.toml").write_text(dump("lftf", READY[cell.name, cell.seed, cell.model]))
    return found


def test_cells_of_another_machine_bring_their_pairing_and_need_no_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "there", tmp_path / "out"
    theirs = judge(source)
    take(HERE, METHODS, JUDGES, seen(source), out, Progress())
    assert f"3 cells taken from {source}\n" in capsys.readouterr().err
    every = cells(HERE, METHODS, out)
    ours = [kept(cell, HERE, JUDGES) for cell in every]
    for one, other in zip(ours, theirs, strict=True):
        assert (
            one is not None
            and one.scores == other.scores
            and one.differences == (None if one.cell.method is None else paired_with(other, theirs))
        )
    assert details_of(every[2].folder) == {"words": [1]} and whole(HERE, METHODS, JUDGES, out) == {"m"}
    assert whole(HERE, [*METHODS, Method(name="new", preamble="x")], JUDGES, out) == set()
    # The numbers of one machine are not paired with those of another: here the model as it is measured a little more.
    keep(Judged(every[0], judge(tmp_path / "own", 1.005)[0].scores), HERE, JUDGES, {})
    take(HERE, METHODS, JUDGES, seen(source), out, Progress(quiet=True))
    again = [one for cell in every if (one := kept(cell, HERE, JUDGES)) is not None]
    assert paired_with(again[1], again)["perplexity"].value == pytest.approx(-float(ROWS.mean()) / 2)
    page = write_report(out, HERE, again, {}).read_text()
    assert "2 of 3 cells, each paired with the untouched model as it was measured beside it" in page
    assert "lftf" in page and "taken/recipe.toml --model m --out RUN &amp;&amp; surgery apply RUN/delta" in page
    recipe = out / "model=m/edit/seed=0/taken/recipe.toml"
    recipe.write_text(f'{(was := recipe.read_text())}\ndata = "/their/data"\n')
    page = write_report(out, HERE.model_copy(update={"folder": "my data"}), again, {}).read_text()
    assert "--model m --set &#39;data=my data&#39; --out RUN" in page and "/their/data" not in page
    recipe.write_text(was)
    (out / "model=m/edit/seed=0/taken/delta.safetensors").write_bytes(b"")
    assert "apply RUN" not in write_report(out, HERE, again, {}).read_text()
    for cell in every[1:]:
        refuse_other_settings(cell, READY["edit", cell.seed, "m"])
        file = cell.folder / "taken" / "recipe.toml"
        file.write_text("\n".join(line for line in file.read_text().splitlines() if "weight_decay" not in line))
        refuse_other_settings(cell, READY["edit", cell.seed, "m"])  # a setting that came later has its default
        with pytest.raises(SurgeryError, match=r"taken: was made with other settings \(lr is"):
            refuse_other_settings(cell, ready(lr=0.5)["edit", cell.seed, "m"])
    file.write_text(f"{file.read_text()}\nno_more = 1\n")
    with pytest.raises(SurgeryError, match="no_more"):
        refuse_other_settings(every[-1], READY["edit", 1, "m"])
    file.write_text(file.read_text().replace("no_more = 1\n", ""))
    # What was taken can be taken on.
    take(HERE, METHODS, JUDGES, seen(out), tmp_path / "third", Progress(quiet=True))
    third = kept(cells(HERE, METHODS, tmp_path / "third")[1], HERE, JUDGES)
    assert third is not None and third.differences == again[1].differences


def test_what_is_not_of_this_study_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "there", tmp_path / "out"
    judge(source)
    other = [METHODS[0].model_copy(update={"settings": {"epochs": 3}})]
    take(HERE, other, JUDGES, seen(source, methods=other), out, Progress())
    assert "1 cells taken" in (said := capsys.readouterr().err) and "2 not: " in said and "edit is" in said
    # The study says the same, but the recipe's default was another one when the run was made.
    take(HERE, METHODS, JUDGES, seen(source, settings=ready(lr=0.5)), tmp_path / "default", Progress())
    assert "1 cells taken" in (said := capsys.readouterr().err) and "recipe.toml: lr is 1e-05, expected 0.5" in said
    fewer = Study(models=["m"], seeds=[0, 1], limit=3)
    with pytest.raises(SurgeryError, match=r"no cell of this study.*limit is 0, expected 3"):
        seen(source, fewer)
    with pytest.raises(SurgeryError, match="no cell of this study; expected"):
        seen(tmp_path / "nowhere")
    judge(tmp_path / "other", 1.5)
    with pytest.raises(SurgeryError, match=r"has genbias.afgb.all 0.4.* there, and 0.3.* here; expected the same"):
        take(HERE, METHODS, JUDGES, seen(tmp_path / "other"), out, Progress(quiet=True))
    with held(tmp_path / "busy/model=m/edit/seed=1/cell.lock", shared=False):
        take(HERE, METHODS, JUDGES, seen(source), tmp_path / "busy", Progress())
    assert "2 cells taken" in (said := capsys.readouterr().err) and "1 not: " in said and "seed=1: another proc" in said
    (source / "model=m/untouched/judged.json").unlink()
    take(HERE, METHODS, JUDGES, seen(source), tmp_path / "half", Progress())
    assert "0 cells taken" in (said := capsys.readouterr().err) and "no untouched model beside it" in said


@pytest.mark.parametrize("name", ["judged.json", "judged.npz", "details.json", "run/recipe.toml"])
def test_a_damaged_cell_is_named(tmp_path: Path, name: str) -> None:
    judge(tmp_path / "there")
    (tmp_path / "there/model=m/edit/seed=1" / name).write_text("{")
    with pytest.raises(SurgeryError, match=f"seed=1/{name}: (is damaged|not valid TOML)"):
        take(HERE, METHODS, JUDGES, seen(tmp_path / "there"), tmp_path / "out", Progress(quiet=True))


def test_the_command_takes_what_another_folder_has(checkpoint: Path, tmp_path: Path) -> None:
    text = 'suites = ["perplexity"]\nrows = { perplexity = 9 }\nmodels = [MODEL]\n[[methods]]\nname = "p"\n'
    file = tmp_path / "s.toml"
    file.write_text(text.replace("MODEL", json.dumps(str(checkpoint))) + 'decoding = "cafie"\n')
    first: Any = surgery("study", file, "--out", tmp_path / "a", "--device", "cpu")
    assert first[0] == 0, first[2]
    words = ["study", file, "--model", tmp_path / "gone" / checkpoint.name, "--out", tmp_path / "b"]
    code, _, stderr = surgery(*words)
    assert code == 1 and "gone" in stderr
    code, _, stderr = surgery(*words, "--take", tmp_path / "a")
    assert code == 0 and "2 cells taken" in stderr and stderr.count("judged before") == 2
    # The page is that of the study that measured it, but for a sentence, and for where model and folder lie.
    own, taken = ((tmp_path / name / "study.html").read_text().replace(' class="long"', "") for name in "ab")
    said = "Taken from other folders: 1 of 2 cells, each paired with the untouched model as it was measured beside it."
    assert taken.count(said) == 1 and said not in own
    here = {str(tmp_path / "gone" / checkpoint.name): str(checkpoint), str(tmp_path / "b"): str(tmp_path / "a")}
    for there, place in here.items():
        taken = taken.replace(there, place)
    assert [line for line in taken.splitlines() if said not in line] == own.splitlines()

    # Where an edit is left to be measured, the model as it is here comes first, and has to be the one of those cells.
    other = tmp_path / "other" / checkpoint.name
    shutil.copytree(checkpoint, other)
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 1.5 for k, v in weights.items()}, other / "model.safetensors", {"format": "pt"})
    file.write_text(f'{file.read_text()}[[methods]]\nname = "q"\npreamble = "So. "\n')
    words = ["study", file, "--out", tmp_path / "c", "--device", "cpu", "--take", tmp_path / "a"]
    code, _, stderr = surgery(*words, "--model", other)
    assert code == 1 and "1 cells taken" in stderr and "expected the same weights and data" in stderr
    assert not list((tmp_path / "c").rglob("*q*/**/judged.json"))
    code, _, stderr = surgery(*words[:3], tmp_path / "d", *words[4:])
    assert code == 0 and "1 cells taken" in stderr and len(list((tmp_path / "d").rglob("judged.json"))) == 3


def test_an_untouched_model_is_taken_only_where_nothing_is_left_to_measure(tmp_path: Path) -> None:
    source, out = tmp_path / "there", tmp_path / "out"
    judge(source, 1.5)
    more = [*METHODS, Method(name="new", preamble="x")]
    assert unfinished(HERE, METHODS, JUDGES, [seen(source)], out) == set()
    left = unfinished(HERE, more, JUDGES, [seen(source, methods=more)], out)
    take(HERE, more, JUDGES, seen(source, methods=more), out, Progress(quiet=True), left)
    found = [kept(cell, HERE, JUDGES) is not None for cell in cells(HERE, more, out)]
    assert left == {"m"} and found == [False, True, False, True]
    ours = Judged(cells(HERE, more, out)[0], judge(tmp_path / "own")[0].scores)
    with pytest.raises(SurgeryError, match="expected the same weights and data"):
        refuse_another(ours, [seen(source)])
    refuse_another(ours, [seen(tmp_path / "own")])
