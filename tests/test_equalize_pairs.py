"""The recipe equalize on pairs of sentences: doses given and chosen, what is measured, resuming, what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import MakeCheckpoint
from families import state

import surgery
from hooks import anatomy
from hooks.tokens import ids_of
from recipes import equalize
from recipes.equalize import doses as dosing
from recipes.equalize import pairs
from recipes.equalize.pairs_terms import repeated, terms_of
from recipes.equalize.work import Work
from surgery.data import facts_of_gender, shapes
from surgery.data.pairs import Pair, folds
from surgery.edits.equalize import hold_term, losses_of, prepare, prepare_each, words_term
from surgery.edits.equalize.dose import read_doses
from surgery.edits.equalize.passes import passes
from surgery.errors import SurgeryError
from surgery.forward.tokens import start_token
from surgery.runs.folder import Folder
from surgery.runs.recipe_files import build, parse_set

QUICK: dict[str, Any] = {"lr": 5e-3, "epochs": 6, "batch_size": 32, "dose": [0.0], "hold_texts": 0.0, "samples": 0}
QUICK |= {"hold_settled": 0.0}
NAMES = ("nurse", "plumber", "teacher", "doctor", "farmer", "lawyer", "engineer", "secretary", "chef", "pilot", "guard")
NAMES += ("writer", "dancer", "singer", "artist")
ENDS = (("smiled", "laughed"), ("waited", "slept"), ("called a friend", "took a long break"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: MakeCheckpoint) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("models") / "tiny", torch.float32)
    model, tokenizer = surgery.load(path, device="cpu")
    tokenizer.bos_token = "<pad>"
    tokenizer.save_pretrained(path)
    assert model.dtype == torch.float32
    return path


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """45 pairs about 15 people with the same three endings, so that what is learnt of some holds for the others."""
    found = []
    for name in NAMES:
        for more, less in ENDS:
            sides = {"more": f"The {name} {more} because he was late", "less": f"The {name} {less} because he was late"}
            unrelated = f"The {name} stopped because it was hot"
            found.append({**sides, "group": name, "bias_type": "gender", "unrelated": unrelated})
    return found


def written(rows: list[dict[str, str]], path: Path) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def operate(checkpoint: Path, out: Path, resume: bool = False, **settings: Any) -> dict[str, Any]:
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    ready = equalize.Settings(**({"model": str(checkpoint)} | QUICK | settings))
    before = state(model)
    found = equalize.run(model, tokenizer, ready, out=out, resume=resume).summary
    assert state(model) == before
    return found


def score(summary: dict[str, Any], when: str, name: str) -> float:
    return float(np.mean([summary[when][key][name]["overall"]["value"] for key in ("pairs", "pairs, bias-bench")]))


def test_the_margin_falls_and_ss_follows_the_dose(
    checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, found = written(rows, tmp_path / "own.jsonl"), {}
    for dose in (0.0, 0.5, -0.5):
        found[dose] = operate(checkpoint, tmp_path / f"{dose}", pairs=file, dose=[dose])
        monkeypatch.setattr("recipes.equalize.pairs.SHIPPED", ("perplexity",))  # the others once, for the time
    plain = found[0.0]
    assert json.loads((tmp_path / "0.0" / "run.json").read_text()) == json.loads(json.dumps(plain))
    assert plain["rows"]["trained"] == 36 and plain["rows"]["kept_back"] == 9
    assert plain["edit"]["terms"] == {"pairs": 72, "unrelated": 24}  # each with a start token and without
    assert plain["edit"]["blocks"] == [0, 1, 2, 3]
    assert score(plain, "after", "margin") < 0.8 * score(plain, "before", "margin")
    assert score(found[0.5], "after", "ss") < 50 < score(found[-0.5], "after", "ss")
    assert {"locality", "facts_of_gender", "perplexity", "perplexity_pronouns"} <= set(plain["after"])
    page = (tmp_path / "0.0" / "report.html").read_text()
    assert "SS (ideal 50), after" in page and "Dose of gender: 0, as given" in page and "scorer bias-bench" in page


def test_a_chosen_dose_has_its_interval_and_resumes(
    checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two trainings on groups apart, two at the chosen doses, one on all; cut inside the second, it goes on alike."""
    settings: dict[str, Any] = {"pairs": written(rows, tmp_path / "own.jsonl"), "dose": ["auto"], "epochs": 1}
    settings |= {"doses": [0.0, 0.4], "folds": 2, "scales": [0.5, 1.0], "margin_gone": 0.01}
    settings |= {"samples": 5, "hold_texts": 1.0}
    monkeypatch.setattr("recipes.equalize.pairs.SHIPPED", ("locality",))
    few = shapes.texts()[:6]
    monkeypatch.setattr(shapes, "texts", lambda: few)
    monkeypatch.setattr("surgery.data.neutral.with_pronouns", lambda: few)
    whole = operate(checkpoint, tmp_path / "whole", **settings)
    assert set(whole["doses"]) == {"gender"}
    for chosen in whole["doses"].values():
        assert set(chosen) == {"dose", "low", "high", "curve", "groups", "reached"} and chosen["groups"] == 12
        assert chosen["low"] <= chosen["dose"] <= chosen["high"] and set(chosen["curve"]) == {"0", "0.4"}
    assert [row["scale"] for row in whole["scales"]] == [0.5, 1.0] * 2 and whole["scale"] in (0.5, 1.0)
    for row in whole["scales"]:
        assert row["margin_gone"] < 1 and np.isfinite(row["perplexity"]) and set(row["doses"]) == {"gender"}
    # What is held: the shipped sentences and 5 of the model's own, of which every other one has a start token.
    assert whole["edit"]["terms"]["texts"] == 2 * len(shapes.texts()) + 5
    log = [json.loads(line) for line in (tmp_path / "whole" / "log.jsonl").open()]
    trained = [row["edit"] for row in log if "edit" in row]
    # A fold learns of 6 of 12 groups 18 pairs and 6 unrelated sentences, each in both forms, 48 examples beside texts.
    batches = 2 * -(-(48 + whole["edit"]["terms"]["texts"]) // 32)  # twice through half: the steps of the last training
    assert {name: trained.count(name) for name in trained if name != "equalize"} == {
        f"{said} doses, fold {fold} of 2": batches for said in ("grid", "own") for fold in (1, 2)
    }
    write = Folder.log

    def interrupt(folder: Any, row: dict[str, Any]) -> None:
        write(folder, row)
        if row.get("edit") == "grid doses, fold 2 of 2" and row["step"] == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("surgery.runs.folder.Folder.log", interrupt)
        with pytest.raises(KeyboardInterrupt):
            operate(checkpoint, tmp_path / "cut", **settings)
    rest = operate(checkpoint, tmp_path / "cut", resume=True, **settings)
    assert rest["delta"]["sha256"] == whole["delta"]["sha256"] and rest["doses"] == whole["doses"]
    assert rest["after"] == whole["after"] and "kl" in rest["after"]["locality"]["things"]  # to the first model
    again = [json.loads(line) for line in (tmp_path / "cut" / "log.jsonl").open()]
    assert sum(row.get("edit") == "grid doses, fold 1 of 2" for row in again) == batches  # not trained a second time


def test_all_trainings_share_targets_that_are_computed_once(
    checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each training's are those of its own terms, and doses and delta are as where each computes them anew.

    Some sides are another pair's unrelated sentence: held in no training, nor where they are among what judges it.
    """
    odd = [{**row, "less": other["unrelated"]} for row, other in zip(rows[::3], rows[3::3], strict=False)]
    file = written([*rows, *odd], tmp_path / "own.jsonl")
    settings: dict[str, Any] = {"pairs": file, "dose": ["auto"], "epochs": 1, "doses": [0.0, 0.4], "folds": 2}
    settings |= {"block": [2, 3], "controls": ["random", "no_hold"]}
    monkeypatch.setattr("recipes.equalize.pairs.SHIPPED", ("perplexity",))
    computed: list[tuple[int, list[str]]] = []

    def counted(model: Any, terms: Any, starts: Any, *, step: Any) -> Any:
        computed.extend((start, [term.name for term in terms]) for start in starts)
        return prepare_each(model, terms, starts, step=step)

    def same(work: Work, variant: Any, given: Any, track: Any) -> Any:
        alone = prepare(work.op.model, given.terms, start=variant.start)
        assert list(given.ids) == list(alone.ids) and given.first == alone.first
        for one, other in zip(given.targets, alone.targets, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(one, other, strict=True))
        assert (given.prefix is None) == (variant.start == 0)
        if given.prefix:
            assert given.prefix.ids == alone.prefix.ids and torch.allclose(given.prefix.flat, alone.prefix.flat)
        return train(work, variant, given, track)

    train = Work.train
    with monkeypatch.context() as patch:
        patch.setattr("recipes.equalize.work.prepare_each", counted)
        patch.setattr(Work, "train", same)
        shared = operate(checkpoint, tmp_path / "shared", **settings)
    starts = {2} | {min(shared["controls"]["random"]["edit"]["blocks"])}
    assert sorted(computed) == [(start, ["pairs", "unrelated"]) for start in sorted(starts)]
    monkeypatch.setattr(Work, "prepare", Work._prepared)
    anew = operate(checkpoint, tmp_path / "anew", **settings)
    assert {name: each["dose"] for name, each in shared["doses"].items()} == {
        name: each["dose"] for name, each in anew["doses"].items()
    }
    for mine, theirs in zip(shared["scales"], anew["scales"], strict=True):
        assert mine["margin_gone"] == pytest.approx(theirs["margin_gone"], abs=1e-4)
    assert shared["delta"]["sha256"] == anew["delta"]["sha256"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"words": ["he", "she"]}, r"words: got .* and pairs = .*one at a time"),
        ({"test_texts": 5}, r"test_texts: got 5 and pairs = .*one at a time"),
        ({"pairs": ""}, "dose: got .0.0., which only pairs of sentences read"),
        ({"pairs": "other"}, "pairs: got 'other', expected stereoset, crows_pairs or a .jsonl file"),
        ({"pairs": "none.jsonl"}, "none.jsonl: no such file"),
        ({"pairs": "stereoset"}, "pairs: stereoset is read from a folder of data sets; name it with data=DIR"),
        ({"pairs": "crows_pairs", "data": "tests"}, r"crows_pairs_anonymized\.csv: no such file"),
        ({"dose": ["race=0.1"]}, "dose: got 'race=0.1'; the pairs have the bias types gender"),
        ({"dose": ["much"]}, "dose: got 'much', expected a number"),
        ({"dose": [0.1, 0.2]}, "dose: 'of the other types' is given twice"),
        ({"dose": ["auto"], "doses": [0.1]}, "doses: got .0.1. for gender, expected at least 2"),
        ({"dose": ["auto"], "doses": [0, 0.1, 0.2], "folds": 2}, "doses: got 3 for gender and 2 folds, which"),
        ({"dose": ["auto"], "doses": ["race=0:1"]}, "doses: got 'race=0:1'; the pairs have the bias types gender"),
        ({"dose": ["auto"], "doses": ["gender=0-1"]}, "doses: got 'gender=0-1', expected a number .* or TYPE=LOW:HIGH"),
        ({"dose": ["auto"], "doses": ["gender=0:1", "gender=0:2"]}, "doses: 'gender' is given twice"),
        ({"scales": [1.0, 3.0]}, r"scales: got .1.0, 3.0., expected numbers above 0 up to 2"),
        ({"scales": [0.5, 1.0]}, "scales: got .* and a dose for every bias type"),
        ({"scorers": ["bos", "bos"]}, "scorers: 'bos' is named twice"),
        ({"controls": ["lftf"]}, "controls: got 'lftf', which learns words"),
    ],
)
def test_bad_input_is_one_line_before_anything_is_written(
    checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    given = {"pairs": written(rows, tmp_path / "own.jsonl")} | settings
    with pytest.raises(SurgeryError, match=message) as said:
        operate(checkpoint, tmp_path / "run", **given)
    assert "\n" not in str(said.value) and not list(tmp_path.glob("run*"))


def test_rows_that_cannot_be_used_are_named(checkpoint: Path, rows: list[dict[str, str]], tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    for bad, settings, message in (
        ([*rows, {"more": "a b", "less": "a b"}], {}, "row 46: both sides are 'a b'"),
        (rows[:33], {"dose": ["auto"]}, "'gender': 8 groups, expected at least 10 to choose its dose"),
        (rows[:9], {}, "'gender': 3 groups, expected at least 5 to keep one of 5 back"),
    ):
        with pytest.raises(SurgeryError, match=message):
            operate(checkpoint, tmp_path / "run", pairs=written(bad, file), **settings)
    held = tmp_path / "mine.txt"
    held.write_text(f"The sun is hot.\n{rows[0]['more']}\n")
    with pytest.raises(SurgeryError, match=r"mine\.txt: also holds a side of .*own\.jsonl"):
        operate(checkpoint, tmp_path / "run", pairs=written(rows, file), hold_file=str(held), hold_texts=1.0)


def test_a_tokenizer_without_a_start_token_needs_another_scorer(
    make_checkpoint: MakeCheckpoint, rows: list[dict[str, str]], tmp_path: Path
) -> None:
    plain = make_checkpoint(tmp_path / "plain", torch.float32)
    with pytest.raises(SurgeryError, match=r"neither BOS nor EOS, and scorer 'bos'.*use scorer 'no-start'"):
        operate(plain, tmp_path / "run", pairs=written(rows, tmp_path / "own.jsonl"))
    assert not list(tmp_path.glob("run*"))


def chosen_by(
    monkeypatch: pytest.MonkeyPatch, pairs: list[Pair], wanted: Any, margin: Any, before: Any, **settings: Any
) -> Any:
    """``choose_doses`` where a training leaves ``margin(pair, doses, scale)`` of a pair, a number for each scorer."""

    def held_out(work: Any, variant: Any, judged: Any, fixed: Any, said: Any, doses: Any, scales: Any, **_: Any) -> Any:
        fold_of = {place: number for number, part in enumerate(folds(judged, 2, seed=0)) for place in part}
        found = {
            scale: np.array([margin(pair, doses[fold_of[place]], scale) for place, pair in enumerate(judged)])
            for scale in scales
        }
        return found, {scale: [np.log(10 * (1 + 0.1 * scale**2))] * 2 for scale in scales}

    monkeypatch.setattr(dosing, "_held_out", held_out)
    monkeypatch.setattr(dosing, "check_edit", lambda *_, **__: None)
    op = SimpleNamespace(
        once=lambda _, compute: compute(), model=None, directory=None, folder=SimpleNamespace(path=None)
    )
    usual = {"scales": [1.0], "doses": [0.0, 1.0], "margin_gone": 0.3, "seed": 0, "folds": 2, "split_seed": 0}
    usual |= {"scorers": ["bos"], "ss_within": 0.0}
    work: Any = SimpleNamespace(op=op, settings=SimpleNamespace(**usual | settings), trains=lambda _: [])
    variant: Any = None
    return dosing.choose_doses(
        work, variant, pairs, wanted, lambda *_: [], lambda judged: (np.array([before for _ in judged]), 10.0)
    )


def some_pairs(types: str) -> list[Pair]:
    """Two pairs of each of twelve groups of each type."""
    return [Pair("a", "b", kind, f"{kind}{group}", "") for kind in types for group in range(12) for _ in range(2)]


def test_the_scale_is_the_smallest_at_which_enough_of_the_margin_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins that fall in proportion to scale and dose; untouched they are all .4. Each fold has one dose alone."""

    def margin(pair: Pair, doses: Any, scale: float) -> list[float]:
        return [0.4 * (1 - scale) - scale * doses["t"] + 0.01]

    for wanted, scale in ((0.999, 1.0), (0.3, 0.5)):
        given = {"scales": [0.2, 0.5, 1.0], "margin_gone": wanted}
        chosen = chosen_by(monkeypatch, some_pairs("t"), {"t": None}, margin, [0.4], **given)
        assert chosen.scale == scale and [row["own"] for row in chosen.scales] == [False] * 3 + [True] * 3
    # At .2 it would take a dose of 1.65.
    assert [row["reached"] for row in chosen.scales] == [False, True, True] * 2
    assert chosen.scales[1]["perplexity"] == pytest.approx(0.025)
    assert chosen.scales[1]["doses"]["t"] == pytest.approx(0.42, abs=0.05)
    # At the doses of the grid .21 and .29 are left, by the line between them .244 at .425; measured there nearly none.
    assert chosen.scales[1]["margin_gone"] == pytest.approx(1 - 0.244 / 0.4, abs=0.01)
    assert chosen.scales[4]["margin_gone"] > 0.95


def test_no_training_has_rows_of_a_group_that_judges_it() -> None:
    """Also not where another type, whose dose is given, has rows of the group."""
    judged, fixed = ([Pair("a", "b", kind, f"{n}", "") for n in range(count)] for kind, count in (("t", 12), ("u", 15)))
    seen: list[tuple[set[str], set[str]]] = []

    def build(train: Any, doses: Any) -> list[Any]:
        groups = [{pair.group for pair in train if pair.bias_type == kind} for kind in "tu"]
        seen.append((groups[0], groups[1]))
        return []

    op: Any = SimpleNamespace(once=lambda name, compute: [{"margins": [[0.0]], "perplexity": 1.0}])
    ready, given = equalize.Settings(model="demo", pairs="own.jsonl", folds=2), {"t": 0.0, "u": 0.0}
    nothing: Any = None
    work = Work(op, ready, (), nothing)
    dosing._held_out(work, nothing, judged, fixed, "", [given] * 2, [1.0], build=build, judge=lambda _: nothing)
    every = {pair.group for pair in fixed}
    assert len(seen) == 2 and all(len(t) == 6 and u == every - (set(map(str, range(12))) - t) for t, u in seen)


def test_types_that_move_each_other_are_settled_at_their_own_doses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins .6 - t - u / 2 of type t, .15 - u of u: in the grid, beside u at 0, t seems to need .6."""

    def margin(pair: Pair, doses: Any, scale: float) -> list[float]:
        return [0.6 - doses["t"] - doses["u"] / 2 if pair.bias_type == "t" else 0.15 - doses["u"]]

    chosen = chosen_by(monkeypatch, some_pairs("tu"), {"t": None, "u": None}, margin, [0.4], doses=["t=0.2:1", 0, 0.5])
    grid, own = chosen.scales
    assert grid["doses"] == pytest.approx({"t": 0.6, "u": 0.15}, abs=0.03) and not grid["own"] and own["own"]
    assert chosen.doses == own["doses"] == pytest.approx({"t": 0.525, "u": 0.15}, abs=0.05)
    assert set(chosen.told["t"]["curve"]) == {"0.2", "1"} and set(chosen.told["u"]["curve"]) == {"0", "0.5"}


def test_a_dose_is_chosen_on_all_scorers_together_and_no_larger_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Margins .6 - dose by one scorer and .2 - dose by the other, .4 before: one dose for both; what goes is the least.

    From .2 on half of them prefer the one side and from .6 on none: SS 100, 50, 0. At .2 the first still has its .4.
    """

    def margin(pair: Pair, doses: Any, scale: float) -> list[float]:
        return [0.2 - doses["t"], 0.6 - doses["t"]]

    for within, dose in ((0.0, 0.2), (49.0, 0.15)):  # between .15 and .2 SS falls from 100 to 50
        given = {"scorers": ["bias-bench", "bos"], "ss_within": within}
        chosen = chosen_by(monkeypatch, some_pairs("t"), {"t": None, "u": 0.1}, margin, [0.4, 0.4], **given)
        assert chosen.doses == {"u": 0.1, "t": pytest.approx(dose, abs=0.01)} and set(chosen.told) == {"u", "t"}
        assert chosen.scales[-1]["margin_gone"] == pytest.approx(1 - (0.6 - dose) / 0.4, abs=0.05)


def test_settled_pronouns_are_held_where_they_would_stand(checkpoint: Path, rows: list[dict[str, str]]) -> None:
    """Subjects of a settled gender, none of the texts that judge, in both forms, at their last token."""
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    file = {"pairs": "own.jsonl", "samples": 0, "settled": 0, "shapes": 100, "settled_each": 1}
    usual = build(equalize.Settings, {"pairs": "own.jsonl"}, "--set")
    assert (usual.hold_settled, usual.settled) == (4.0, 400)
    ready = usual.model_copy(update=file | {"hold_emphasis": 0.5})
    lines = pairs._settled(ready)
    assert any("nun" in line or "king" in line for line in lines) and len(pairs._settled(usual)) == 400
    judged = {row.text for part in ("dev", "test") for row in facts_of_gender.records(part)}
    assert not judged & set(lines)
    given = [Pair(row["more"], row["less"], "gender", row["group"], "here") for row in rows]
    term = terms_of(model, tokenizer, ready, {"texts": [], "settled": lines}, given, {"gender": 0.0})[-1]
    plain_rows = set(map(tuple, ids_of(tokenizer, lines)))
    assert term.name == "settled" and term.only_last and term.weight == 4.0
    assert set(term.ids) == plain_rows | {(start_token(tokenizer), *row) for row in plain_rows}
    assert pairs._settled(ready.model_copy(update={"hold_settled": 0.0})) == []


def test_a_type_of_fewer_pairs_is_gone_through_more_often() -> None:
    counts = {"race": 9, "gender": 5, "profession": 2, "religion": 1}
    pairs = [Pair(f"a {n}", f"b {n}", kind, kind, "x") for kind, count in counts.items() for n in range(count)]
    for most, times in ((1, (1, 1, 1, 1)), (4, (1, 2, 4, 4)), (9, (1, 2, 4, 9))):
        found = repeated(pairs, most)
        kinds = [pair.bias_type for pair in found]
        assert [kinds.count(kind) / counts[kind] for kind in counts] == list(times) and set(found) == set(pairs)


def test_doses_as_they_are_written() -> None:
    types = ["gender", "race"]
    for text, wanted in (
        ("0.2", {"gender": 0.2, "race": 0.2}),
        ("auto", {"gender": None, "race": None}),
        ("gender=0.2,race=1", {"gender": 0.2, "race": 1.0}),
        ("gender=0.2", {"gender": 0.2, "race": None}),
        ("1,race=auto", {"gender": 1.0, "race": None}),
        ("gender=0.4/0.2,race=1", {"gender": (0.4, 0.2), "race": 1.0}),
    ):
        settings = build(equalize.Settings, parse_set([f"dose={text}", "pairs=own.jsonl"]), "--set")
        assert read_doses(settings.dose, types) == wanted
        assert settings.block == "blocks" and settings.lr == 2e-4
    assert build(equalize.Settings, parse_set(["shares=0.6,0.4"]), "--set").shares == [0.6, 0.4]


def test_a_processor_takes_a_step_in_one_pass_of_trees_to_the_same_losses(tiny: Any) -> None:
    """Prompts at their end, sentences at every token and pairs together: as each alone, and so are the gradients."""
    model, _ = tiny
    prompts = [[2] * 3 + [place % 7, place] for place in range(12)]
    texts = [[3, 4, 5, place] for place in range(3)] + [[2, 2, 2, 1, 9, 9, 9], [7] * 30]
    terms = [words_term(prompts, [5, 6]), hold_term("texts", texts, positions="all")]
    for start in (0, 1):
        given = prepare(model, terms, start=start)
        chosen = [given.examples()[place] for place in torch.randperm(17, generator=torch.Generator().manual_seed(3))]
        plain = replace(given, trees=False)
        assert given.trees and passes(given, chosen) == [dict(enumerate(chosen))]
        found = losses_of(model, model, given, chosen)
        alone = torch.cat([losses_of(model, model, plain, [one]) for one in chosen])
        assert torch.allclose(found, alone, atol=1e-6)
        trained = list(model.get_submodule(anatomy.find(model).blocks[-1].name).parameters())
        quick, slow = (torch.autograd.grad(each.sum(), trained) for each in (found, alone))
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(quick, slow, strict=True))


def test_elsewhere_texts_of_like_length_go_through_the_model_together(tiny: Any) -> None:
    model, _ = tiny
    texts = [[2] * length for length in (30, 4, 5, 28, 6, 7)]
    given = replace(prepare(model, [hold_term("texts", texts, positions="all")]), trees=False)
    groups = passes(given, [(0, number) for number in range(6)])
    assert [[len(texts[number]) for number in group] for group in groups] == [[4, 5, 6, 7], [28, 30]]
    accelerated = replace(given, accelerated=True)
    assert len(passes(accelerated, [(0, number) for number in range(6)])) == 1
    many = [(0, number % 6) for number in range(6 * 46)]  # of 30 tokens each with padding: 8,280
    assert len(passes(accelerated, many)) == 2
    given = replace(prepare(model, [hold_term("held", texts)]), trees=False)
    assert len(passes(given, [(0, number) for number in range(6)])) == 1
