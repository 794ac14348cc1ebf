"""Settings files: what is shipped parses, and a mistake is answered with what was expected."""

import re
import tomllib
from importlib import import_module
from pathlib import Path

import pytest

import recipes
from recipes import equalize, lftf
from surgery.cli.models import chosen_recipe
from surgery.errors import SurgeryError
from surgery.runs.recipe_files import build, dump, parse_set, read_toml

SHIPPED = sorted(Path(recipes.__path__[0]).glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_recipe_parses(path: Path) -> None:
    values = read_toml(path)
    module = import_module(f"recipes.{values.pop('recipe')}")
    build(module.Settings, values, str(path))


def test_the_paper_s_values_are_the_defaults() -> None:
    values = read_toml(next(path for path in SHIPPED if path.stem == "lftf"))
    assert values.pop("recipe") == "lftf"
    assert build(lftf.Settings, values, "lftf.toml") == lftf.Settings()
    paper = lftf.Settings()
    assert (paper.lr, paper.epochs, paper.batch_size, paper.optimizer, paper.block) == (1e-5, 2, 32, "adam", "last")


def test_a_resolved_recipe_is_read_back_the_same(tmp_path: Path) -> None:
    settings = lftf.Settings(lr=3e-4, block=[1, 2], words=["white", "black"], seed=7)
    file = tmp_path / "recipe.toml"
    file.write_text(dump("lftf", settings))
    values = read_toml(file)
    assert values.pop("recipe") == "lftf"
    assert build(lftf.Settings, values, str(file)) == settings
    assert dump("lftf", settings) == file.read_text()


def test_a_written_recipe_leaves_out_what_it_does_not_read() -> None:
    """Its defaults may change, and a run of an older recipe would then be refused for a key that nobody chose."""
    words, pairs = equalize.Settings(model="m"), equalize.Settings(model="m", pairs="stereoset", data="d")
    of_words, of_pairs = (tomllib.loads(dump("equalize", each)) for each in (words, pairs))
    assert "hints" in of_words and not {"doses", "folds", "data"} & set(of_words)
    assert of_pairs["data"] == "d" and "doses" in of_pairs and "hints" not in of_pairs


@pytest.mark.parametrize("key", ["seed", "split_seed"])
def test_a_seed_below_0_is_refused_before_anything_is_computed(key: str) -> None:
    with pytest.raises(SurgeryError, match=f"{key}: got -1; input should be greater than or equal to 0"):
        build(equalize.Settings, {"model": "m", key: -1}, "r.toml")


def test_values_from_the_command_line() -> None:
    values = parse_set(
        ["lr=1e-4", "block=25", "ablations=true", "prompt_set=my set.toml", "controls=last,random", "epochs=3"]
    )
    settings = build(lftf.Settings, values, "--set")
    assert (settings.lr, settings.block, settings.ablations, settings.epochs) == (1e-4, 25, True, 3)
    assert settings.controls == ["last", "random"] and settings.prompt_set == "my set.toml"
    for several in ("block=[3, 4]", "block=3,4", "block=3, 4"):
        assert build(lftf.Settings, parse_set([several]), "--set").block == [3, 4]
    assert build(lftf.Settings, parse_set(["block=3,last"]), "--set").block == "3,last"  # refused where it is read
    assert build(lftf.Settings, parse_set(["lr=1"]), "--set").lr == 1.0


@pytest.mark.parametrize(
    "pair, message",
    [
        ("learning_rate=1", "unknown key 'learning_rate'"),
        ("epoch=1", "did you mean 'epochs'"),
        ("epochs=many", "epochs: got 'many'; input should be a valid integer"),
        ("lr=-1", "lr: got -1; input should be greater than 0"),
        ("lr=1e400", "lr: got inf; input should be a finite number"),
        ("seed=4294967296", "seed: got 4294967296; input should be less than or equal to 4294967295"),
        ("split_seed=99999999999999999999", "split_seed: got 9+; input should be less than"),
        ("objective=sum", "objective: got 'sum'; input should be 'log' or 'as_printed'"),
        ("lr", "expected key=value"),
    ],
)
def test_mistakes_are_named(pair: str, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        build(lftf.Settings, parse_set([pair]), "--set")


def test_a_recipe_that_an_editor_began_with_a_mark_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("\ufeffrecipe = 'lftf'\r\nlr = 1e-4\r\n", "utf-8", newline="")
    assert read_toml(tmp_path / "a.toml") == {"recipe": "lftf", "lr": 1e-4}


def test_broken_files_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    with pytest.raises(SurgeryError, match="cannot be read"):
        read_toml(file)
    file.write_text("lr = = 1")
    with pytest.raises(SurgeryError, match="not valid TOML"):
        read_toml(file)
    file.write_text("[train]\nlr = 1")
    with pytest.raises(SurgeryError, match=r"\[train\] is a table"):
        read_toml(file)


def test_a_key_means_the_same_in_every_recipe() -> None:
    """One type for a name, wherever it stands; a recipe may narrow the choices of a shared key."""
    kinds: dict[str, set[str]] = {}
    for module in {read_toml(path)["recipe"] for path in SHIPPED}:
        for name, field in import_module(f"recipes.{module}").Settings.model_fields.items():
            kinds.setdefault(name, set()).add(re.sub(r"Literal\[.*\]", "Literal", str(field.annotation)))
    assert {name: found for name, found in kinds.items() if len(found) > 1} == {}


@pytest.mark.parametrize("recipe", sorted({read_toml(path)["recipe"] for path in SHIPPED}))
def test_old_names_are_understood_and_the_new_one_is_named(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    kind = import_module(f"recipes.{recipe}").Settings
    for old, new in kind.renamed.items():
        assert old not in kind.model_fields, "an old name must not have another meaning now"
        value = getattr(kind(), new)
        assert getattr(build(kind, {old: value}, "--set"), new) == value
        assert capsys.readouterr().err == f"--set: {old!r} is now called {new!r}\n"
        with pytest.raises(SurgeryError, match=f"^--set: '{old}' is now called '{new}', and both are given"):
            build(kind, {old: value, new: value}, "--set")
        capsys.readouterr()


def test_an_old_name_changes_a_shipped_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    """The file says prompt_set, the command line data: that is one key, not two."""
    module, values, _ = chosen_recipe("lftf", None, ["data=race"], None)
    assert build(module.Settings, values, "lftf").prompt_set == "race"
    assert capsys.readouterr().err == "--set: 'data' is now called 'prompt_set'\n"


def test_an_old_name_wins_over_the_profile() -> None:
    quick = import_module("recipes.crawd").Settings(profile="quick", rows=7)
    assert (quick.test_rows, quick.train_rows) == (7, 160)
