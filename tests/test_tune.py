"""Tuning: what is tried and chosen, the recipe that it writes, an interruption, and the streams that rounds share."""

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import pytest
import torch
from families import state
from typer.testing import CliRunner

import surgery
from recipes import equalize
from recipes.equalize import tuning
from recipes.equalize.candidates import OWN, Candidate, at_other_places, last_quarter, nearby
from recipes.equalize.rounds import Work
from surgery.cli import app
from surgery.edits.equalize import hold_term, prepare, prepare_each, words_term
from surgery.errors import Diverged, SurgeryError
from surgery.forward.tokens import encode, word_ids
from surgery.runs.recipe_files import build, read_toml
from surgery.runs.report import why
from surgery.runs.tuning import FINAL, OBJECTION, Tried

FEW = dict(tuning.FEW)
SMALL: dict[str, Any] = {"own": 24, "each": 0, "hints": 24, "settled": 16, "facts": 8, "hints_each": 0}
SMALL |= {"lr": 1e-2, "epochs": 1, "batch_size": 32, "shapes": 20, "hold_texts": 0.0, "controls": [], "block": [3]}
SMALL |= {"split": "profession", "settled_each": 0}


@pytest.fixture(scope="module", autouse=True)
def few_rows() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "FEW", {"own": 24})
        patch.setattr(tuning, "SCREEN", {"own": 12})
        patch.setattr(tuning, "ROWS", 12)
        patch.setattr(tuning, "GAIN_LIMIT", 8)
        places = tuning.places_of
        patch.setattr(tuning, "places_of", lambda *args: dict(list(places(*args).items())[:2]))
        patch.setattr(tuning, "material", partial(tuning.material, suites=("genbias", "locality")))
        yield


@pytest.fixture(scope="module")
def whole(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("tune") / "t"
    return out, tune(surgery.load(checkpoint, device="cpu"), checkpoint, out)


def tune(tiny: Any, checkpoint: Path, out: Path, *, few: bool = True, **where: Any) -> dict[str, Any]:
    model, tokenizer = tiny
    settings = equalize.Settings(model=str(checkpoint), **SMALL)
    before = state(model)
    found = equalize.tune(model, tokenizer, settings, few=few, out=out, **where)
    assert state(model) == before and found.folder == out
    return json.loads((out / "tune.json").read_text())


def test_the_cheapest_finalist_is_written_as_a_recipe_with_the_reason(
    whole: tuple[Path, dict[str, Any]], checkpoint: Path
) -> None:
    out, found = whole
    finals = [row for row in found["tried"] if row["round"] == FINAL]
    assert any(row["name"] == "the recipe's own" for row in found["tried"])
    as_learnt, enlarged, further = finals[:3]  # one training, measured three times
    assert enlarged["name"] == as_learnt["name"] + ", delta times 1.1" and enlarged["changes"]["scales"] == [1.1]
    assert further["changes"]["scales"] == [1.2 if enlarged["price"] < as_learnt["price"] else 0.9]
    assert enlarged["edit"] == as_learnt["edit"] | {"scale": 1.1} and enlarged["left"] != as_learnt["left"]
    assert "moved" not in as_learnt["edit"]  # the objective is not asked here, which would take longer than the steps
    assert all(row["perplexity"] == 0 for row in finals)  # not measured here
    assert {round(row["price"] - row["left"] - OBJECTION * len(row["objections"]), 12) for row in finals} == {0}
    assert sum(line.startswith("Not ") for line in found["why"]) == len(finals) / 3 - 1  # each training once
    assert all(line[0].isupper() for row in finals for line in row["objections"])
    best = min(finals, key=lambda row: row["price"])
    text = (out / "tuned.toml").read_text()
    assert text.startswith("# Chosen by surgery tune") and f"# {found['why'][0]}" in text
    values = read_toml(out / "tuned.toml")
    chosen = build(equalize.Settings, {key: one for key, one in values.items() if key != "recipe"}, "tuned.toml")
    assert {key: getattr(chosen, key) for key in best["changes"]} == best["changes"]
    assert chosen.model == str(checkpoint) and chosen.own == 24
    assert chosen.hold_hints == tuning.SUITED_TO_FEW["hold_hints"] and chosen.hold_texts == 0  # a default, a choice
    assert why({"blocks": [2]}, text) == chosen.reason and chosen.reason.startswith("chosen by surgery tune from ")
    page = (out / "report.html").read_text()
    assert "(chosen)" in page and "development parts" in page
    for row in found["tried"]:  # never a test part
        assert " dev" in row["after"]["genbias"]["afgb"]["all"]["data"]
        if row["round"] == FINAL:
            assert "dev part" in row["after"]["locality"]["names"]["mass"]["data"]


def test_an_interrupted_tuning_goes_on_behind_what_was_tried(
    whole: tuple[Path, dict[str, Any]],
    tiny: Any,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, done = Work.train, []

    def stops(self: Any, variant: Any, *rest: Any) -> Any:
        if variant.name.startswith(FINAL):
            raise SurgeryError("the power failed")
        done.append(variant.name)
        return train(self, variant, *rest)

    monkeypatch.setattr(Work, "train", stops)
    with pytest.raises(SurgeryError, match=r"the power failed; what was finished is kept: go on with surgery again "):
        tune(tiny, checkpoint, tmp_path / "u", again="surgery again {recipe}")
    count = len(done)
    monkeypatch.setattr(Work, "train", lambda *args: (done.append(args[1].name), train(*args))[1])
    assert tune(tiny, checkpoint, tmp_path / "u", resume=True)["tried"] == whole[1]["tried"]
    assert count > 3 and all(name.startswith(FINAL) for name in done[count:])


def test_few_texts_stand_at_the_place_and_with_the_weights_of_the_demo() -> None:
    """Which goes through all of the set's own prompts, and through more of the other texts, once."""
    demo = read_toml(Path(equalize.__file__).parents[1] / "demo.toml")
    same = {key: tuning.SUITED_TO_FEW[key] for key in ("hold_hints", "hold_settled", "matmul")}
    known = same | {"block": list(last_quarter(30)), "shapes": FEW["shapes"], "settled_each": FEW["settled_each"]}
    assert {key: demo[key] for key in known} == known
    assert FEW["each"] <= demo["each"] * demo["endings"] and FEW["hints"] <= demo["hints"] and demo["own"] == 0
    assert FEW["settled"] + FEW["facts"] <= demo["settled"] + demo["facts"]


def test_fewer_blocks_take_a_larger_rate_and_the_best_places_finer_ones() -> None:
    settings = equalize.Settings(model="m")
    own = Candidate("the recipe's own", None)
    assert own.changes(settings) == {} and own.name == "the recipe's own"
    assert Candidate("x", (3, 4), rate=0.2).changes(settings) == {"block": [3, 4], "lr": 1e-4}
    larger = settings.model_copy(update={"scales": [1.2]})
    assert replace(own, scale=1.1).changes(larger) == {"scales": [1.32]} and own.changes(larger) == {}
    places = {"the recipe's own": (4, 5, 6, 7), "one": (2,), "half": tuple(range(16))}
    one, half = at_other_places(replace(own, rate=0.2), places, 20)
    assert (one.rate, half.rate) == pytest.approx((0.4, 0.1))
    assert [each.rate for each in nearby(one, pays=False)] == pytest.approx([0.4 * 3**0.5, 1.2, 1.2 * 3**0.5])
    assert [each.rate for each in nearby(one, pays=True)] == pytest.approx([0.4 / 3**0.5, 0.4 / 3, 0.4 / 3**1.5])


def result(left: float, perplexity: float = 50.0) -> Tried:
    def scores(value: float, text: float) -> dict[str, Any]:
        gap = {"relative_gap": {"all": {"value": value}}, "afgb": {"all": {"value": value}}}
        return {"genbias": gap, "perplexity": {"value": text}}

    return Tried("n", "screening", {}, {}, scores(1.0, 50.0), scores(left, perplexity))


def test_each_percent_of_perplexity_is_priced_and_no_number_never_wins() -> None:
    assert result(0.2).price == pytest.approx(0.2) == result(0.2, 50.4).price
    assert result(0.2, 51.5).price == pytest.approx(0.2 + 3 * OBJECTION)  # three percent: an objection, and two more
    assert result(float("nan")).price == result(0.2, float("nan")).price == float("inf")


UP, DOWN = 3**0.5, 3**-0.5


@pytest.mark.parametrize(
    "highest, place, rates, finer",
    [
        (0.5, OWN, [1, 1 / 3], [UP / 3]),  # .58 is too much
        (2, OWN, [1], [UP, 3]),
        (0.5, "upper half", [1, 1 / 3], [UP / 3 / 2**0.5, 1 / 2**0.5]),
        (0, OWN, [1, 1 / 3, 1 / 9, 1 / 27], [DOWN]),  # text pays for all: down from the best of them
    ],
)
def test_the_highest_rate_is_taken_for_which_text_does_not_pay(
    highest: float, place: str, rates: list[float], finer: list[float]
) -> None:
    class Round:
        op = SimpleNamespace(model=families.build("llama"))

        def try_all(self, candidates: Any) -> dict[Candidate, Tried]:
            asked.extend((one.place, one.rate) for one in candidates)
            return {one: paid(one) for one in candidates}

    def paid(one: Candidate) -> Tried:  # more of the rate leaves less; past the highest text pays for it
        return result(0.5 - 0.01 * one.rate - 0.1 * (one.place == place), 50.0 if one.rate <= highest else 51.0)

    asked: list[tuple[str, float]] = []
    tuning._screen(Round(), {OWN: (1,), "upper half": (1, 2)})  # type: ignore[arg-type]
    there = [("upper half", (rates[-1] if highest else rates[0]) / 2**0.5)]  # as many blocks again
    wanted = [*((OWN, rate) for rate in rates), *there, *((place, rate) for rate in finer)]
    assert [one[0] for one in asked] == [one[0] for one in wanted]
    assert [one[1] for one in asked] == pytest.approx([one[1] for one in wanted])


@pytest.mark.parametrize(
    "own, perplexity, finalists",
    [
        (0.5, 50.4, [("b", 1), (OWN, 1)]),  # as it is, however far behind
        (0.3, 51.0, [("b", 1), ("a", 1)]),  # text pays for it; the next is at the same place
        (0.18, 50.0, [(OWN, 1), ("b", 1)]),
    ],
)
def test_beside_the_best_stands_the_recipe_as_it_is_unless_text_pays_else_the_best_elsewhere(
    own: float, perplexity: float, finalists: list[tuple[str, float]]
) -> None:
    places = [Candidate(OWN, None), Candidate("a", (1,)), Candidate("b", (2,)), Candidate("b", (2,), rate=2.0)]
    tried = dict(zip(places, (result(own, perplexity), result(0.22), result(0.2), result(0.21)), strict=True))
    assert [(one.place, one.rate) for one in tuning._finalists(tried)] == finalists


def test_screening_looks_past_the_mass_which_a_few_steps_do_not_settle() -> None:
    silent = result(0.2)
    silent.after["genbias"]["mass"], silent.before["genbias"]["mass"] = ({"all": {"value": x}} for x in (0.5, 1.0))
    assert len(silent.objections) == 1 and silent.price == pytest.approx(0.25)
    assert silent.screened == pytest.approx(0.2) and result(0.2, 51.5).screened == result(0.2, 51.5).price
    assert result(float("nan")).screened == float("inf")


def test_with_all_texts_the_better_finalist_is_trained_again_in_twice_the_steps(
    tiny: Any, checkpoint: Path, tmp_path: Path
) -> None:
    finals = [row for row in tune(tiny, checkpoint, tmp_path / "a", few=False)["tried"] if row["round"] == FINAL]
    first, longer = finals[:-3], finals[-3:]  # each measured three times
    best = min(first, key=lambda row: row["price"])
    assert longer[0]["name"] == best["name"].split(", delta")[0] + ", steps times 2"
    half = tuning.SUITED_TO_ALL["batch_size"] // 2
    wanted = {key: x for key, x in best["changes"].items() if key != "scales"} | {"batch_size": half}
    assert longer[0]["changes"] == wanted
    assert longer[0]["edit"]["steps"] in (2 * best["edit"]["steps"], 2 * best["edit"]["steps"] - 1)


def test_a_rate_that_leaves_the_finite_numbers_is_left_out(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train = Work.train

    def breaks(self: Any, variant: Any, *rest: Any) -> Any:
        if self.plan(variant).lr > 5e-3:
            raise Diverged("training: the loss is nan at step 3")
        return train(self, variant, *rest)

    monkeypatch.setattr(Work, "train", breaks)
    found = tune(tiny, checkpoint, tmp_path / "d")
    assert found["tried"] and all(row["changes"].get("lr", 1e-2) <= 5e-3 for row in found["tried"])


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
        (["--texts", "some"], "--texts some: expected few or all"),
        (["--recipe", "lftf"], "has nothing that could be tuned; expected equalize"),
        (["--set", "lrr=1"], "did you mean 'lr'"),
        (["--set", "words=he,he"], "got 'he' twice, expected each once"),
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
