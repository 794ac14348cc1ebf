"""The commands as a user types them: results, exit codes, and one clear line for every mistake."""

import gc
import inspect
import json
import math
import os
import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import typer
from safetensors.torch import load_file
from typer.testing import CliRunner

import hooks
import recipes
import surgery as surgery_package
from surgery import __version__
from surgery.catalogue import FOLDER_SUITES, WRITTEN_SUITES
from surgery.cli import app
from surgery.delta import Delta

COMMANDS = (
    "locate", "run", "sweep", "compare", "eval", "list", "apply", "undo", "inspect", "diff", "compose", "export",
    "import", "card", "dose", "fit",
)  # fmt: skip
QUICK = ["--set", "lr=1e-2", "--set", "epochs=1", "--set", "batch_size=256", "--set", "controls=[]", "--device", "cpu"]


def surgery(*words: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command, in this process."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture(scope="module")
def run(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    code, stdout, stderr = surgery("run", "lftf", "--model", checkpoint, "--out", out, *QUICK)
    assert code == 0, stderr
    assert stdout.rstrip().endswith("report.html") and "relative gap" in stdout
    assert "rank the blocks: 945 in" in stderr
    return out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_that_ends_in_examples(name: str) -> None:
    code, stdout, _ = surgery(name, "--help")
    assert code == 0
    assert f"surgery {name}" in stdout[stdout.index("Examples:") :]


def test_the_version_is_that_of_the_package_beside_those_it_stands_on() -> None:
    code, stdout, _ = surgery("--version")
    assert code == 0 and stdout.startswith(f"model-surgery {__version__} (Python 3.")
    assert f"torch {torch.__version__}" in stdout and f"transformers {transformers.__version__}" in stdout


ELSEWHERE = {
    "--merge", "--no-deps", "--force-reinstall", "--num", "--nproc-per-node", "--max-lora-rank",
}  # fmt: skip
"""Options of llama-gguf-split, pip, accelerate, torchrun and vLLM that a message names."""


def test_every_option_that_a_message_names_as_the_remedy_exists() -> None:
    def options(one: Any) -> set[str]:
        inside = [options(under) for under in getattr(one, "commands", {}).values()]
        return {name for each in one.params for name in each.opts}.union(*inside)

    known = options(typer.main.get_command(app)) | ELSEWHERE
    named: dict[str, str] = {}
    for package in (Path(hooks.__file__), Path(surgery_package.__file__), Path(recipes.__file__)):
        for file in package.parent.rglob("*.py"):
            found = re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", file.read_text("utf-8"))
            named |= dict.fromkeys(found, file.name)
    assert "--drop-vectors" in named  # of a delta with norms that is to become an adapter
    assert not {name: file for name, file in named.items() if name not in known}


def test_run_apply_eval_undo(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    code, stdout, _ = surgery("inspect", run / "delta.safetensors", "--against", checkpoint)
    assert code == 0 and "model.layers.3" in stdout and "same" in stdout
    code, stdout, _ = surgery("inspect", run / "delta.safetensors", "--json")
    assert json.loads(stdout)["base"] == str(checkpoint)
    edited = tmp_path / "edited"
    code, stdout, _ = surgery(
        "apply", run / "delta.safetensors", checkpoint, "--out", edited, "--rounding", "stochastic", "--quiet"
    )
    assert code == 0 and "tensors changed" in stdout and "(BF16, stochastic)" in stdout
    code, stdout, _ = surgery("eval", edited, "--json", tmp_path / "e.json", "--quiet", "--device", "cpu")
    assert code == 0 and "genhint ub" in stdout
    measured = json.loads((tmp_path / "e.json").read_text())
    after = json.loads((run / "run.json").read_text())["after"]
    assert measured["genbias"]["afgb"]["all"]["value"] == pytest.approx(
        after["genbias"]["afgb"]["all"]["value"], rel=1e-4
    )
    code, stdout, _ = surgery("undo", edited, "--out", tmp_path / "back")
    assert code == 0 and f"all else is as in {edited}" in stdout
    for file in checkpoint.iterdir():
        assert (tmp_path / "back" / file.name).read_bytes() == file.read_bytes()


def test_eval_with_a_delta_in_memory(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    arguments = ["eval", checkpoint, "--suite", "genbias", "--quiet", "--device", "cpu", "--json"]
    assert surgery(*arguments, tmp_path / "before.json")[0] == 0
    assert surgery(*arguments, tmp_path / "after.json", "--delta", run / "delta.safetensors")[0] == 0
    before, after = (json.loads((tmp_path / name).read_text()) for name in ("before.json", "after.json"))
    assert before["genbias"]["afgb"]["all"]["value"] != after["genbias"]["afgb"]["all"]["value"]
    assert set(before) == {"genbias", "model", "dtype", "deltas"}


def test_eval_of_two_checkpoints_is_paired_and_says_what_got_worse_first(
    run: Path, checkpoint: Path, tmp_path: Path
) -> None:
    options = ["--suite", "genbias", "--suite", "perplexity", "--quiet", "--device", "cpu"]
    delta = ["--delta", run / "delta.safetensors", "--json", tmp_path / "pairs.json"]
    code, stdout, stderr = surgery("eval", checkpoint, "--against", checkpoint, *options, *delta)
    assert code == 0, stderr
    found = json.loads((tmp_path / "pairs.json").read_text())
    gap = found["differences"]["genbias"]["relative_gap"]["all"]
    was, now = (tree["genbias"]["relative_gap"]["all"]["value"] for tree in (found["against"]["scores"], found))
    assert gap["value"] == pytest.approx(now - was) and gap["low"] <= gap["value"] <= gap["high"]
    verdicts = [line.split("  ")[-1].split(";")[0] for line in stdout.splitlines()[1:]]
    assert verdicts == sorted(verdicts, key=["worse", "better", "within noise", "not paired"].index)
    code, same, _ = surgery("eval", checkpoint, "--against", checkpoint, *options)
    assert code == 0 and "+0.0000 [+0.0000, +0.0000]  within noise" in same and "better" not in same


def test_eval_on_a_data_folder(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    (folder / "crows_pairs").mkdir(parents=True)
    rows = [f"{n},The nurse said that he,The doctor{n % 3} said,stereo,gender" for n in range(25)]
    text = "\n".join([",sent_more,sent_less,stereo_antistereo,bias_type", *rows, "25,a,,stereo,gender", ""])
    (folder / "crows_pairs" / "crows_pairs_anonymized.csv").write_text(text)
    arguments = ["eval", checkpoint, "--suite", "crows_pairs", "--data", folder, "--device", "cpu"]
    code, _, stderr = surgery(*arguments)
    assert code == 1 and "neither BOS nor EOS" in stderr  # the tiny tokenizer has none
    told = tmp_path / "with_bos"
    shutil.copytree(checkpoint, told)
    config = json.loads((told / "tokenizer_config.json").read_text())
    (told / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<pad>"}))
    arguments[1] = told
    both = ["--suite", "perplexity", "--scorer", "sum", "--limit", "20", "--json", tmp_path / "e.json"]
    code, stdout, stderr = surgery(*arguments, *both)
    assert code == 0, stderr
    assert "crows pairs metric overall" in stdout and "perplexity" in stdout and "1 rows skipped" in stderr
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["crows_pairs"]["metric"]["overall"]["n"] == 20
    assert found["crows_pairs"]["metric"]["gender"]["scorer"] == "metric score, sum"
    assert "line 27: sent_less is empty" in found["crows_pairs"]["skipped"][0]
    assert found["perplexity"]["n"] == found["perplexity_pronouns"]["n"] == 20  # the shipped texts are limited, too


def test_locate_writes_numbers_and_a_picture(checkpoint: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.png")
    code, stdout, _ = surgery("locate", checkpoint, *files, "--quiet", "--device", "cpu")
    assert code == 0 and "final_norm" in stdout
    assert len(json.loads((tmp_path / "r.json").read_text())["raw"]["scores"]) == 4
    assert (tmp_path / "r.png").stat().st_size > 5000


def test_list_says_what_is_ready() -> None:
    code, stdout, _ = surgery("list")
    assert code == 0 and "lftf" in stdout and "genbias" in stdout and "demo" in stdout


def test_every_suite_is_called_alike() -> None:
    for name in {**FOLDER_SUITES, **WRITTEN_SUITES}:
        parameters = inspect.signature(import_module(f"surgery.metrics.{name}").evaluate).parameters
        assert list(parameters)[:3] == ["model", "tokenizer", "folder"]
        assert {"limit", "seed", "step"} <= {key for key, one in parameters.items() if one.kind is one.KEYWORD_ONLY}


@pytest.mark.parametrize(
    "words, message",
    [
        (["run", "lfft"], "did you mean 'lftf'"),
        (["run", "lftf", "--model", "./nowhere"], "./nowhere: no such directory, and not a hub name"),
        (["run", "lftf", "--set", "epoch=3"], "did you mean 'epochs'"),
        (["run", "lftf", "--set", "lr"], "expected key=value"),
        (["run", "lftf", "--set", "data=", "--model", "CHECKPOINT"], "no prompt set ''"),
        (["run", "lftf", "--model", "CHECKPOINT", "--resume"], "nothing to resume"),
        (["eval", "CHECKPOINT", "--suite", "genbia"], "expected some of genbias, genhint, locality"),
        (["eval", "CHECKPOINT", "--suite", "crows_pairs"], "--data 'genbias' is no folder"),
        (["eval", "CHECKPOINT", "--suite", "crows_pairs", "--data", ".", "--scorer", "mean"], "expected one of bias-b"),
        (["eval", "nothing.gguf"], "no such GGUF file"),
        (["eval", "CHECKPOINT", "--device", "xpu:7"], "but the accelerators here are"),
        (["eval", "CHECKPOINT", "--device", "gpu"], "got 'gpu', expected cpu, cuda"),
        (["locate", "CHECKPOINT", "--by", "magic"], "expected gain"),
        (["inspect", "nothing.safetensors"], "nothing.safetensors"),
        (["apply", "nothing.safetensors", "CHECKPOINT", "--out", "OUT"], "nothing.safetensors"),
        (["undo", "CHECKPOINT", "--out", "OUT"], "undo"),
    ],
)
def test_mistakes_are_one_line_and_exit_code_1(
    words: list[str], message: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    told = [str(checkpoint) if word == "CHECKPOINT" else word for word in words]
    code, stdout, stderr = surgery(*told)
    last = stderr.strip().splitlines()[-1]
    assert code == 1 and stdout == ""
    assert last.startswith("error: ") and message in last
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", sorted(path.stem for path in Path(recipes.__file__).parent.glob("*.toml")))
def test_every_recipe_that_ships_is_found_by_its_name(recipe: str) -> None:
    code, _, stderr = surgery("run", recipe, "--set", "no_such_key=1")
    assert code == 1 and "unknown key 'no_such_key'" in stderr


def test_help_of_a_recipe_shows_its_settings() -> None:
    code, stdout, _ = surgery("run", "lftf", "--help")
    assert code == 0 and "Examples:" in stdout
    assert "\n  lr = 1e-05  (float)\n" in stdout and "last (the paper's), auto" in stdout
    assert "  objective = \"log\"  (one of ['log', 'as_printed'])" in stdout


@pytest.mark.parametrize("words", [["run"], ["fly"], ["apply", "x"], ["run", "lftf", "--sed", "1"]])
def test_wrong_usage_is_exit_code_2(words: list[str]) -> None:
    assert surgery(*words)[0] == 2


def test_where_no_file_can_be_written_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.checkpoints.load", lambda *_, **__: pytest.fail("opened"))
    for words in (
        ["--plot", "picture.nonsense"],
        ["--plot", tmp_path],
        ["--json", tmp_path],
        ["--json", tmp_path / "new" / "n.json"],
    ):
        for command in (["locate", "demo"], ["dose", "delta.safetensors", "demo"]):
            code, _, stderr = surgery(*command, *words)
            assert code == 2 and words[0] in stderr


LONG = "a" * 300  # more than a file system takes as a name


@pytest.mark.parametrize(
    "words",
    [["eval", LONG], ["run", LONG], ["run", "lftf", "--model", LONG], ["compare", LONG], ["undo", LONG, "--out", "x"],
     ["run", "lftf", "--out", LONG], ["data", "check", LONG], ["run", "equalize", "--set", f"hold_file={LONG}"]],
)  # fmt: skip
def test_a_path_that_cannot_be_looked_at_is_one_line(words: list[str]) -> None:
    code, _, stderr = surgery(*words)
    assert code == 1 and stderr.startswith("error: ") and stderr.count("\n") == 1
    assert "File name too long" in stderr and "check the path" in stderr
    with pytest.raises(OSError, match="File name too long"):
        surgery(*words, "--debug")


@pytest.mark.parametrize("command", [["tune"], ["run", "lftf", "--model"]])
def test_a_run_inside_its_model_is_refused_before_that_is_opened(command: list[str], checkpoint: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("surgery.cli.models.import_libraries", lambda: pytest.fail("opened"))
        code, _, stderr = surgery(*command, checkpoint, "--out", checkpoint / "new" / "run")
    assert code == 1 and "lies inside the checkpoint" in stderr and not (checkpoint / "new").exists()


@pytest.mark.parametrize("words", [["run", "lftf"], ["tune", "demo"], ["eval", "demo"], ["locate", "demo"]])
def test_a_seed_that_no_generator_takes_is_refused(words: list[str]) -> None:
    code, _, stderr = surgery(*words, "--seed", 2**32)
    assert code == 2 and "4294967295" in stderr


def test_a_file_that_is_no_delta_and_a_destination_that_exists(checkpoint: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"not a safetensors file")
    code, _, stderr = surgery("apply", tmp_path / "x.safetensors", checkpoint, "--out", tmp_path / "out")
    assert code == 1 and "x.safetensors" in stderr and not (tmp_path / "out").exists()
    broken = (run / "delta.safetensors").read_bytes()[:-100]
    (tmp_path / "y.safetensors").write_bytes(broken)
    code, _, stderr = surgery("apply", tmp_path / "y.safetensors", checkpoint, "--out", tmp_path / "out")
    assert code == 1 and "y.safetensors" in stderr and not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    code, _, stderr = surgery("apply", run / "delta.safetensors", checkpoint, "--out", tmp_path / "out")
    assert code == 1 and "exists" in stderr


HEAVY = ("torch", "transformers", "transformer_lens", "nnsight", "matplotlib", "accelerate")
ANSWERED_WITHOUT_TORCH = (
    ["--help"], ["list"], ["run", "lftf", "--help"], ["run", "equalize", "--set", "epoch=3"], ["run", "lfft"],
    *(["run", recipe, "--set", "seed=x"] for recipe in ("crawd", "crawd_classifier", "bias_diff", "bias_unlearn")),
    ["run", "finetune"], ["run", "finetune", "--set", "file=nowhere.txt"],
    ["run", "lftf", "--set", "prompt_set=nowhere"], ["run", "lftf", "--set", "block=lst"],
    ["run", "lftf", "--set", "controls=rndom"], ["run", "equalize", "--set", "shares=0.5,0.6"],
    ["run", "equalize", "--set", "hold_file=nowhere.txt"], ["run", "equalize", "--set", "pairs=stereoset"],
    ["run", "erase", "--set", "block=99"], ["sweep", "lftf", "--vary", "block=3,99", "--out", "nowhere"],
    ["tune", "demo", "--set", "lrr=1"], ["tune", "demo", "--recipe", "lftf"],
    ["diff", "./a", "./b", "--out", "nowhere"],
    ["survive", "nowhere.safetensors", "demo", "--out", "nowhere"],
    ["run", "lftf", "--model", "./nowhere"], ["run", "crawd", "--set", "data=nowhere"],
    ["run", "demo", "--device", "gpu"],
    ["run", "equalize", "--set", "controls=[\"lft\"]"],
    ["locate", "demo", "--by", "magic"], ["locate", "./nowhere"], ["locate", "demo", "--objective", "none"],
    ["eval", "demo", "--suite", "genbia"], ["eval", "demo", "--part", "tset"], ["eval", "./nowhere"],
    ["eval", "demo", "--delta", "nowhere.safetensors"], ["eval", "demo", "--data", "nowhere.toml"],
    ["inspect", "nowhere.safetensors"], ["apply", "nowhere.safetensors", "demo", "--out", "nowhere"],
    ["dose", "nowhere.safetensors", "demo"], ["data", "check", "nowhere.toml"], ["study", "nowhere.toml"],
    ["sweep", "lftf", "--vary", "lr", "--out", "nowhere"], ["compare", "nowhere"], ["card", "nowhere.safetensors"],
    ["attribute", "score", "./nowhere", "--data", "a.txt", "--probe", "nowhere.txt", "--json", "s.json"],
)  # fmt: skip


def test_what_needs_no_model_is_answered_without_torch(tmp_path: Path) -> None:
    """In one fresh process, each as it would be typed: what it imports stays for those behind it."""
    code = (
        "import contextlib, io, sys\n"
        "import surgery, hooks, surgery.apply, surgery.delta, surgery.cli\n"
        f"for words in {ANSWERED_WITHOUT_TORCH!r}:\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:\n"
        "        try:\n"
        "            surgery.cli.app(words, standalone_mode=False)\n"
        "        except BaseException as error:\n"
        "            assert type(error).__name__ in ('Exit', 'SystemExit'), (words, error)\n"
        "    helped = '--help' in words or words == ['list']\n"
        "    assert helped or said.getvalue().strip(), (words, 'was not answered')\n"
        f"    found = [name for name in {HEAVY!r} if name in sys.modules]\n"
        "    assert not found, (words, found)\n"
    )
    here = os.environ | {"PYTHONPATH": str(Path(recipes.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_importing_the_libraries_leaves_the_collector_on_and_what_they_made_out_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import surgery
    from surgery import checkpoints
    from surgery.cli.models import import_libraries

    before = gc.get_freeze_count()
    import_libraries()
    assert gc.isenabled() and gc.get_freeze_count() == before  # they are there already
    monkeypatch.setattr(surgery, "checkpoints", checkpoints)  # put back afterwards, as it is in sys.modules
    monkeypatch.delitem(sys.modules, "surgery.checkpoints")
    try:
        import_libraries()
        assert gc.isenabled() and gc.get_freeze_count() > before
    finally:
        gc.unfreeze()


def test_an_accelerator_without_room_is_one_line_that_says_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 956.00 MiB. GPU 0 has a capacity of")
        error.add_note("what was finished is kept: go on with --resume")
        raise error

    monkeypatch.setattr("surgery.checkpoints.load", full)
    code, _, stderr = surgery("eval", "demo", "--suite", "genbias")
    assert code == 1 and stderr.count("\n") == 1
    assert stderr.startswith("error: CUDA out of memory. Tried to allocate 956.00 MiB; free") and "--resume" in stderr


def test_export_does_what_every_option_says_or_refuses_it(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    delta, place = run / "delta.safetensors", tmp_path / "half"
    half = ("--scale", "0.5", "--drop-vectors", "--checkpoint", checkpoint)
    code, _, stderr = surgery("export", delta, "--peft", place, *half)
    assert (code, stderr) == (0, "")  # no bar of the libraries either
    factors = load_file(place / "adapter_model.safetensors")
    name = next(name for name in Delta.load(delta).shapes if name.endswith("down_proj.weight"))
    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
    shape = Delta.load(delta).shapes[name]
    whole = Delta.load(delta).read(name, 0, math.prod(shape)).reshape(shape)
    found = factors[key + "B.weight"] @ factors[key + "A.weight"]
    assert torch.allclose(found, torch.tensor(whole) / 2, atol=1e-7)
    for wrong in (("--peft", tmp_path / "x", "--rounding", "nearest"), ("--transformers", tmp_path / "x", "--rank", 4)):
        code, _, stderr = surgery("export", delta, *wrong, "--checkpoint", checkpoint)
        assert code == 1 and f"{wrong[2]} would change nothing there" in stderr and not (tmp_path / "x").exists()


def test_inspect_against_a_checkpoint_never_imports_torch(run: Path, checkpoint: Path) -> None:
    words = ["inspect", str(run / "delta.safetensors"), "--against", str(checkpoint)]
    code = (
        f"import sys, surgery.cli\nsurgery.cli.app({words!r}, standalone_mode=False)\nsys.exit('torch' in sys.modules)"
    )
    here = os.environ | {"PYTHONPATH": str(Path(recipes.__file__).parent.parent)}
    done = subprocess.run([sys.executable, "-c", code], env=here, capture_output=True, text=True)
    assert done.returncode == 0 and "same" in done.stdout, done.stderr


def test_diff_compose_export_import_and_card(run: Path, checkpoint: Path, tmp_path: Path) -> None:
    delta, edited = run / "delta.safetensors", tmp_path / "edited"
    assert surgery("apply", delta, checkpoint, "--out", edited)[0] == 0
    assert surgery("diff", checkpoint, edited, "--out", tmp_path / "d.safetensors")[0] == 0
    weights = ["--weights", "1", "--weights", "-1"]
    code, _, stderr = surgery(
        "compose",
        tmp_path / "d.safetensors",
        tmp_path / "d.safetensors",
        "--out",
        tmp_path / "zero.safetensors",
        *weights,
    )
    assert code == 0, stderr
    code, stdout, _ = surgery("apply", tmp_path / "zero.safetensors", checkpoint, "--out", tmp_path / "same")
    assert code == 0 and " 0 of " in stdout
    code, stdout, stderr = surgery("export", delta, "--peft", tmp_path / "adapter", "--rank", "4", "--drop-vectors")
    assert code == 0 and "rank 4" in stdout and "left out" in stdout, stderr
    code, _, stderr = surgery("import", tmp_path / "adapter", checkpoint, "--out", tmp_path / "l.safetensors")
    assert code == 0, stderr
    code, stdout, _ = surgery("card", delta)
    assert code == 0 and "relative_gap" in stdout and "surgery apply" in stdout
