"""hooks.compare and surgery locate: known correlations, an ablation by hand, and a model left as it was."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hooks import HookError, Ranking, anatomy
from hooks.ablation import mean_ablation
from hooks.rank_correlation import compare, rank_map, ranks
from surgery.cli import app
from surgery.data import genbias
from surgery.data.prompts import Subject, load_prompt_set
from surgery.errors import SurgeryError
from surgery.locate import check, halves, pairs, rank
from surgery.locate.summary import spark
from tests.families import build, state

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [18, 19, 20]]


def ranking(method: str, scores: Any, **options: Any) -> Ranking:
    return Ranking(method, options.pop("unit", "block"), np.array(scores, float), "test", 4, settings=options)


def test_spearman_has_the_values_of_the_literature() -> None:
    # Kendall, Rank Correlation Methods, 1.1: ten boys by mathematics and music; S(d^2) = 118, so rho = 0.285
    mathematics = [7, 4, 3, 10, 6, 2, 9, 8, 1, 5]
    music = [5, 7, 3, 10, 1, 9, 6, 2, 8, 4]
    by_hand = 1 - 6 * sum((a - b) ** 2 for a, b in zip(mathematics, music, strict=True)) / (10 * 99)
    found = compare([ranking("a", mathematics), ranking("b", music)]).get("b", "a")
    assert found.value == pytest.approx(by_hand) and -1 <= found.low < found.value < found.high <= 1
    assert ranks(np.array([3.0, 1.0, 3.0, 8.0])).tolist() == [2.5, 1.0, 2.5, 4.0]
    # ties: Pearson on mid-ranks (2.5, 1, 2.5, 4) and (1, 2, 3, 4) is 3 / sqrt(4.5 * 5), and not 1 - 6 S / (n^3 - n)
    tied = compare([ranking("a", [3, 1, 3, 8]), ranking("b", [1, 2, 3, 4])]).get("a", "b")
    assert tied.value == pytest.approx(3 / 22.5**0.5)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-50, 50), min_size=3, max_size=20, unique=True), st.integers(0, 5))
def test_the_order_alone_counts(scores: list[int], seed: int) -> None:
    grown = ranking("grown", np.exp(np.array(scores) / 10.0))
    turned = ranking("turned", [-score for score in scores])
    found = compare([ranking("own", scores), grown], target=turned, resamples=50, seed=seed)
    assert found.get("own", "grown").value == pytest.approx(1) and found.get("own", "grown").low == pytest.approx(1)
    assert found.get("own", "turned").value == pytest.approx(-1) and found.target == "turned"


def test_the_interval_covers_and_narrows_with_units() -> None:
    draw = np.random.default_rng(0)

    def wide(size: int) -> float:
        x = draw.normal(size=size)
        found = compare([ranking("x", x), ranking("y", x + draw.normal(size=size))]).get("x", "y")
        assert found.low < 0.69 < found.high  # 6 / pi arcsin(r / 2) of the normal with r = sqrt(1/2)
        return found.high - found.low

    assert wide(400) < 0.5 * wide(25)


def test_table_json_and_stability() -> None:
    raw, final = ranking("bmi", [1, 2, 3, 4], stream="raw"), ranking("bmi", [1, 2, 3, 0], stream="final_norm")
    flat = ranking("lens", [1, 1, 1, 1])
    halves_of = [ranking("lens", [1, 2, 3, 4]), ranking("lens", [1, 2, 4, 3])]
    found = compare([raw, flat], target=final, repeats=[halves_of])
    lines = found.table().splitlines()
    assert "bmi final_norm" in lines[1] and "bmi raw" in lines[1]  # pairs with the target come first
    assert "none: all scores equal" in found.table()
    assert found.stability["lens"].value == pytest.approx(0.8) and found.tops == {
        "bmi raw": 3, "lens": 0, "bmi final_norm": 2,
    }  # fmt: skip
    plain = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert plain["target"] == "bmi final_norm" and {"first": "bmi raw", "second": "lens"}.items() <= (
        plain["pairs"][0].items()
    )
    assert rank_map([raw, flat, final]).axes[0].get_yticklabels()[2].get_text() == "bmi final-norm"


@pytest.mark.parametrize(
    "given, message",
    [
        ([ranking("a", [1, 2, 3])], "expected at least two"),
        ([ranking("a", [1, 2, 3]), ranking("a", [1, 2, 3])], "give rankings of one method as repeats"),
        ([ranking("a", [1, 2, 3]), ranking("b", [1, 2])], "expected the same units"),
        ([ranking("a", [1, 2, 3]), ranking("b", [1, 2, 3], unit="mlp")], "expected the same units"),
        ([ranking("a", [1, 2]), ranking("b", [1, 2])], "at least three"),
    ],
)
def test_rankings_that_cannot_be_compared(given: list[Ranking], message: str) -> None:
    with pytest.raises(HookError, match=message):
        compare(given)


def test_one_repeat_has_no_stability() -> None:
    with pytest.raises(HookError, match=r"repeats of \['a'\], 1 in all"):
        compare([ranking("a", [1, 2, 3])], repeats=[[ranking("a", [1, 2, 3])]])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_mean_ablation_equals_one_by_hand(family: str) -> None:
    """By forward hooks, one prompt at a time: the block's output becomes its input plus the mean of what it added."""
    model = build(family)
    names = [block.name for block in anatomy.find(model).blocks]
    entered: dict[str, torch.Tensor] = {}
    added: dict[str, list[torch.Tensor]] = {name: [] for name in names}

    def stream_of(args: Any, kwargs: Any) -> torch.Tensor:
        return args[0] if args else kwargs["hidden_states"]

    def difference(ids: list[int], ablate: str | None = None) -> float:
        def hook(module: Any, args: Any, kwargs: Any, out: Any, name: str) -> Any:
            entered[name] = stream_of(args, kwargs)
            left = out[0] if isinstance(out, tuple) else out
            if ablate is None:
                added[name].append((left - entered[name])[0, 1:])
                return None
            if name != ablate:
                return None
            left = torch.cat([left[:, :1], entered[name][:, 1:] + mean[name]], 1)
            return (left, *out[1:]) if isinstance(out, tuple) else left

        handles = [
            model.get_submodule(name).register_forward_hook(
                lambda m, a, k, o, name=name: hook(m, a, k, o, name), with_kwargs=True
            )
            for name in names
        ]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1].double()
        for handle in handles:
            handle.remove()
        return float(logits[3] - logits[4])

    base = np.array([difference(ids) for ids in PROMPTS])
    mean = {name: torch.cat(rows).mean(0) for name, rows in added.items()}
    after = np.array([[difference(ids, name) for ids in PROMPTS] for name in names])
    before = state(model)
    found = mean_ablation(model, None, PROMPTS, contrast=(3, 4), batch_tokens=8)
    assert state(model) == before
    assert found.effects == pytest.approx(np.abs(after - base).mean(1), rel=1e-4, abs=1e-6)
    odds = np.exp(after)  # P3 / P4
    assert found.gaps == pytest.approx(np.abs((odds - 1) / (odds + 1)).mean(1), rel=1e-4, abs=1e-6)
    assert found.count == 4 and found.ranking().top()[0] == int(np.abs(after - base).mean(1).argmax())


def test_a_block_that_adds_the_same_everywhere_has_no_effect() -> None:
    model = build("gpt2")
    block = model.get_submodule(anatomy.find(model).blocks[1].name)
    with torch.no_grad():
        block.attn.c_proj.weight.zero_()
        block.mlp.c_proj.weight.zero_()
        block.mlp.c_proj.bias.fill_(0.3)
    found = mean_ablation(model, None, PROMPTS, [1, 0], contrast=(3, 4))
    assert found.effect(1) == pytest.approx(0, abs=1e-5) and found.effect(0) > 1e-3
    lines = found.against({"lens": 0}, [1]).splitlines()
    assert "more than 1 of 1 random blocks" in lines[1] and "random" in lines[2]
    with pytest.raises(HookError, match="ablate all of them"):
        found.ranking()
    with pytest.raises(HookError, match="was not ablated"):
        found.effect(3)


@pytest.mark.parametrize(
    "prompts, blocks, message",
    [(PROMPTS, [99], "block 99; the model has 0 to"), (PROMPTS, [], "block none"), ([[5, 6], [7]], [0], "one token")],
)
def test_mean_ablation_of_what_is_not_there(prompts: Any, blocks: list[int], message: str) -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(HookError, match=message):
        mean_ablation(model, None, prompts, blocks, contrast=(3, 4))
    assert state(model) == before


def test_nan_weights_are_named() -> None:
    model = build("llama")
    with torch.no_grad():
        next(iter(model.get_submodule(anatomy.find(model).blocks[1].name).parameters())).fill_(torch.nan)
    with pytest.raises(HookError, match="NaN"):
        mean_ablation(model, None, PROMPTS, [0], contrast=(3, 4))


def test_pairs_swap_the_subject_for_one_of_the_opposite_score(tiny: Any) -> None:
    _, tokenizer = tiny
    prompts = load_prompt_set("genbias")
    rows = genbias.records("profession", "train", prompts=prompts)[:12]
    clean, corrupted = pairs(tokenizer, prompts, rows)
    scores = {subject.name: subject.stereotype_score or 0.0 for subject in prompts.subjects}
    of = {template.fill(name): (name, template.name) for name in scores for template in prompts.templates}
    train = {row.profession for row in genbias.records("profession", "train", prompts=prompts)}
    assert len(clean) == len(corrupted) > 8
    for a, b in zip(clean, corrupted, strict=True):
        assert scores[of[a][0]] * scores[of[b][0]] < 0 and of[a][1] == of[b][1]
        assert {of[a][0], of[b][0]} <= train and len(tokenizer(a)["input_ids"]) == len(tokenizer(b)["input_ids"])
    assert clean[::2] == corrupted[1::2] and set(clean[::2]) <= {row.text for row in rows}
    unrated = replace(prompts, subjects=tuple(Subject(subject.name) for subject in prompts.subjects))
    with pytest.raises(SurgeryError, match="stereotype_score"):
        pairs(tokenizer, unrated, genbias.records(prompts=unrated)[:3])


def test_halves_share_nothing_and_small_models_have_fewer_random_blocks(tiny: Any) -> None:
    model, tokenizer = tiny
    prompts = load_prompt_set("genbias")
    rows = genbias.records("profession", "train", prompts=prompts)[:9]
    first, second = halves(rows, 0)
    assert sorted(row.text for row in first + second) == sorted(row.text for row in rows) and len(first) == 5
    with pytest.raises(SurgeryError, match="at least 4"):
        halves(rows[:3], 0)
    rankings = rank(model, tokenizer, prompts, rows, "lens")
    found = check(model, tokenizer, prompts, rows, ["lens"], rankings)
    assert set(found.comparison.stability) == {"lens"} and not found.comparison.pairs
    assert set(found.others) | {rankings[0].top()[0]} == set(range(4))
    with pytest.raises(SurgeryError, match="expected one of gain"):
        rank(model, tokenizer, prompts, rows, "magic")


def test_the_command_compares_all_methods(checkpoint: Path, tmp_path: Path) -> None:
    words = ["locate", checkpoint, "--by", "all", "--compare", "--limit", 6, "--device", "cpu", "--verbose"]
    words += ["--json", tmp_path / "all.json", "--plot", tmp_path / "all.png"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    assert "the first 6 of 945 training prompts of genbias" in result.stdout
    first = result.stdout[result.stdout.index("Where to cut") :].splitlines()
    numbers = json.loads((tmp_path / "all.json").read_text())
    gain = Ranking.from_dict(numbers["gain_depth"])
    assert first[0].startswith(f"Where to cut: block {gain.top()[0]}, first by gain_depth;")
    assert first[1].strip().startswith(spark(gain.scores)) and first[3].startswith("first by: gain_depth")
    assert "half 2 by patching: 3 in" in result.stderr
    assert result.stderr.count("by gain") == 1  # its halves come from the groups of the one measurement
    assert "gain_depth" in numbers["comparison"]["stability"]
    assert "what each predicted of an edit" in result.stdout and "gain_attention" in result.stdout
    assert "Spearman" in result.stdout and "stability" in result.stdout and "mean-ablation" in result.stdout
    methods = {
        "gain_natural",
        "gain_attention",
        "gain_mlp",
        "gain_depth",
        "raw",
        "final_norm",
        "lens",
        "patching",
        "attribution",
        "attention",
        "cross_attention",
    }
    assert set(numbers) == methods | {"comparison", "ablation"}
    assert len(numbers["comparison"]["pairs"]) == 55 and len(numbers["comparison"]["stability"]) == 11
    assert {Ranking.from_dict(numbers[method]).count for method in methods - {"patching", "attribution"}} == {6}
    assert (tmp_path / "all.png").stat().st_size > 5000


def test_the_gain_of_pairs_of_sentences(checkpoint: Path, tmp_path: Path) -> None:
    """DPO's gain of a file of pairs, with matrices and halves on the terminal; what does not go together is refused."""
    rows = [{"more": f"The engineer smiled because he {n} left", "less": f"The nurse {n} smiled"} for n in range(9)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def locate(*words: Any) -> Any:
        given = ["locate", checkpoint, *words, "--quiet", "--device", "cpu"]
        return CliRunner().invoke(app, [str(word) for word in given])

    taken = locate("--by", "gain", "--objective", "dpo", "--pairs", file, "--sketch", "--json", tmp_path / "dpo.json")
    assert taken.exit_code == 0, taken.output
    assert "gain_natural by matrix, pairs of sentences, n = 9" in taken.stdout
    assert re.search(r"two halves of the examples: block [+-]\d\.\d\d, attention .*, mlp .*, matrix ", taken.stdout)
    assert set(json.loads((tmp_path / "dpo.json").read_text())) == {
        "gain_depth",
        "gain_attention",
        "gain_natural",
        "gain_mlp",
    }
    for words, line in {
        ("--by", "gain", "--objective", "npo"): "npo compares two sentences; name a file of them with --pairs",
        ("--by", "gain", "--objective", "log", "--pairs", file): "log is of words after prompts",
        ("--by", "bmi", "--pairs", file): "--pairs: only gain reads pairs of sentences; got --by bmi",
        ("--by", "gain", "--objective", "gains"): "objective: got 'gains', expected one of equalize, log, npo, dpo",
    }.items():
        refused = locate(*words)
        assert refused.exit_code == 1 and line in refused.stderr, refused.output


def test_one_method_and_its_default_number_of_prompts(checkpoint: Path, tmp_path: Path) -> None:
    words = ["locate", checkpoint, "--by", "lens", "--json", tmp_path / "lens.json", "--plot", tmp_path / "lens.png"]
    result = CliRunner().invoke(app, [str(word) for word in [*words, "--quiet", "--device", "cpu"]])
    assert result.exit_code == 0 and "the first 32 of 945" in result.stdout, result.output
    assert set(json.loads((tmp_path / "lens.json").read_text())) == {"lens"}
