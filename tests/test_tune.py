"""Tuning: what is tried and chosen, the recipe that it writes, an interruption, and the streams that rounds share."""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from families import state
from typer.testing import CliRunner

import surgery
from recipes import equalize
from recipes.equalize import tuning
from surgery.cli import app
from surgery.edits.equalize import hold_term, prepare, prepare_each, words_term
from surgery.errors import SurgeryError
from surgery.forward.tokens import encode, word_ids
from surgery.runs.settings import build, read_toml
from surgery.runs.tuning import FINAL, OBJECTION

SMALL: dict[str, Any] = {"own": 24, "each": 0, "hints": 24, "settled": 24, "hints_each": 0, "settled_each": 0}
SMALL |= {"lr": 1e-2, "epochs": 1, "batch_size": 32, "shapes": 20, "hold_texts": 0.0, "controls": [], "block": [3]}
SMALL |= {"split": "profession"}


@pytest.fixture(scope="module", autouse=True)
def few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "FEW", {"own": 24})
        patch.setattr(tuning, "SCREEN", {"own": 12})
        patch.setattr(tuning, "ROWS", 12)
        patch.setattr(tuning, "GAIN_LIMIT", 8)
        places = tuning._places
        patch.setattr(tuning, "_places", lambda *args: dict(list(places(*args).items())[:2]))
        patch.setattr(tuning, "material", partial(tuning.material, suites=("genbias", "locality")))
        yield


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tune") / "t"
    return out, tune(surgery.load(checkpoint, device="cpu"), checkpoint, out)


def tune(tiny: Any, checkpoint: Path, out: Path, **where: Any) -> dict[str, Any]:
    model, tokenizer = tiny
    settings = equalize.Settings(model=str(checkpoint), **SMALL)
    before = state(model)
    found = equalize.tune(model, tokenizer, settings, few=True, out=out, **where)
    assert state(model) == before and found.folder == out
    return json.loads((out / "tune.json").read_text())


def test_the_cheapest_finalist_is_written_as_a_recipe_with_the_reason(
    whole: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    out, found = whole
    finals = [row for row in found["tried"] if row["round"] == FINAL]
    assert len(finals) >= 2 and any(not row["changes"] for row in finals)  # the recipe as it is always has a chance
    assert {round(row["price"] - row["left"] - OBJECTION * len(row["objections"]), 12) for row in finals} == {0}
    best = min(finals, key=lambda row: row["price"])
    text = (out / "tuned.toml").read_text()
    assert text.startswith("# Chosen by surgery tune") and f"# {found['why'][0]}" in text
    values = read_toml(out / "tuned.toml")
    chosen = build(equalize.Settings, {key: one for key, one in values.items() if key != "recipe"}, "tuned.toml")
    assert {key: getattr(chosen, key) for key in best["changes"]} == best["changes"]
    assert chosen.model == str(checkpoint) and chosen.own == 24
    page = (out / "report.html").read_text()
    assert "(chosen)" in page and "development parts" in page
    for row in found["tried"]:  # never a test part
        assert " dev" in row["after"]["genbias"]["afgb"]["all"]["data"]
        assert "dev part" in row["after"]["locality"]["names"]["mass"]["data"]


def test_an_interrupted_tuning_goes_on_behind_what_was_tried(
    whole: tuple[Path, dict[str, Any]],
    tiny: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, done = tuning.Work.train, []

    def stops(self: Any, variant: Any, *rest: Any) -> Any:
        if variant.name.startswith(FINAL):
            raise SurgeryError("the power failed")
        done.append(variant.name)
        return train(self, variant, *rest)

    monkeypatch.setattr(tuning.Work, "train", stops)
    with pytest.raises(SurgeryError, match=r"the power failed; what was finished is kept: go on with surgery again "):
        tune(tiny, checkpoint, tmp_path / "u", again="surgery again {recipe}")
    count = len(done)
    monkeypatch.setattr(tuning.Work, "train", lambda *args: (done.append(args[1].name), train(*args))[1])
    assert tune(tiny, checkpoint, tmp_path / "u", resume=True)["tried"] == whole[1]["tried"]
    assert count > 3 and all(name.startswith(FINAL) for name in done[count:])


def test_streams_of_several_places_come_from_one_pass(tiny: Any) -> None:
    model, tokenizer = tiny
    words = word_ids(tokenizer, ["he", "she"])
    texts = ["The nurse smiled because", "The guard slept because", "The nurse who slept smiled because"]
    terms = [words_term(encode(tokenizer, texts), words), hold_term("h", encode(tokenizer, ["A nurse and his"]))]
    passes: list[int] = []
    found = prepare_each(model, terms, [0, 1, 3], step=passes.append)
    assert sum(passes) == 4
    for start, given in found.items():
        alone = prepare(model, terms, start=start)
        assert (given.prefix is None) == (alone.prefix is None) == (start == 0)
        if given.prefix and alone.prefix:
            assert given.prefix.block == start and torch.equal(
                given.prefix.batch([0, 2]).stream, alone.prefix.batch([0, 2]).stream
            )
        for mine, own in zip(given.targets, alone.targets, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(mine, own, strict=True))


@pytest.mark.parametrize(
    "words, message",
    [
        (["--texts", "some"], "--texts some: expected auto, few or all"),
        (["--recipe", "lftf"], "has nothing that could be tuned; expected equalize"),
        (["--set", "lrr=1"], "did you mean 'lr'"),
    ],
)
def test_what_cannot_be_tuned_is_refused_in_one_line(words: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["tune", "demo", *words])
    assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1


def test_pairs_are_refused(tiny: Any, checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text("")
    settings = equalize.Settings(model=str(checkpoint), pairs=str(tmp_path / "p.jsonl"))
    with pytest.raises(SurgeryError, match="pairs choose their own doses"):
        equalize.tune(*tiny, settings, few=True, out=tmp_path / "t")
    assert not (tmp_path / "t").exists()
