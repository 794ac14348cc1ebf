"""surgery survive: formats against their published definitions, shares by hand, and a whole run on a tiny model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import painted
from deltakit import edit, hashes, load
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import surgery

from surgery import delta as deltas
from surgery.data import genbias
from surgery.data import pairs as pairs_data
from surgery.data.prompts import load_prompt_set
from surgery.delta import Delta
from surgery.errors import SurgeryError
from surgery.files.q4_k import quantise_q4_k
from surgery.metrics.material import material
from surgery.metrics.metric import Metric
from surgery.survive import pairs_question, question_of, share, survive, words_question
from surgery.survive.formats import FORMATS, NF4, int8, matrices, nf4

MATRIX = "model.layers.2.mlp.down_proj.weight"
FEW = ["--limit", "30", "--steps", "4", "--quiet", "--device", "cpu"]


def test_nf4_and_int8_are_what_bitsandbytes_stores() -> None:
    row = ((torch.arange(64) * 37 % 64 - 31.3) / 64)[None]
    # The bytes of bitsandbytes 0.50.2: quantize_4bit(row, blocksize=64, quant_type="nf4", compress_statistics=False)
    # and int8_vectorwise_quant(row.half()).
    four = bytes.fromhex("091c3e70a2d4f81b2e5f91c3e60a2d4f71b2e5f81c3e60a1d4e70b2d5f81c3e6")
    eight = np.frombuffer(
        bytes.fromhex(
            "8317ab3fd367fb8f23b74bdf73079b2fc357eb7f13a73bcf63f78b1fb347db6f03972bbf53e77b0fa337cb5ff3871baf43d7"
            "6bff9327bb4fe3770b9f33c75bef"
        ),
        np.int8,
    )
    codes = [code for byte in four for code in (byte >> 4, byte & 15)]
    assert nf4(row)[0].tolist() == pytest.approx([NF4[code] * float(row.abs().max()) for code in codes])
    half = row.half().float()
    wanted = eight * float(half.abs().max()) / 127
    assert int8(half)[0].tolist() == pytest.approx(wanted.tolist(), abs=1e-6)


def test_a_format_is_a_fixed_point_and_bf16_is_torch_s() -> None:
    weights = torch.randn(6, 512, generator=torch.Generator().manual_seed(0)) * 0.05
    error = {}
    for name, back in FORMATS.items():
        once = back(weights)
        assert once.shape == weights.shape and once.dtype == weights.dtype
        error[name] = float((once - weights).norm() / weights.norm())
        if name != "Q4_K":  # whose scales are searched anew
            assert torch.allclose(back(once), once, rtol=1e-3, atol=1e-5), name
    assert torch.equal(FORMATS["bf16"](weights), weights.bfloat16().float())
    assert error["bf16"] < error["Q8_0"] < error["int8"] < error["Q4_K"] < error["Q4_0"] < 0.12


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1e-4, 1.0, 300.0]), st.sampled_from([-2.0, 0.0, 5.0]))
def test_q4_k_is_read_back_by_the_library(seed: int, size: float, middle: float) -> None:
    rows = (size * (np.random.default_rng(seed).standard_normal((3, 512)) + middle)).astype(np.float32)
    stored = quantise_q4_k(rows)
    assert stored.shape == (3, 2 * 144) and stored.dtype == np.uint8
    found = dequantize(stored, GGMLQuantizationType.Q4_K)
    parts = rows.reshape(-1, 32)
    # No farther from a weight than half a step of its part, and what rounding scale and minimum to 6 bits adds.
    width = np.maximum(parts.max(axis=1), 0) - np.minimum(parts.min(axis=1), 0)
    largest = width.reshape(-1, 8).max(axis=1).repeat(8)
    rest = np.abs(found.reshape(-1, 32) - parts).max(axis=1)
    assert (rest <= 0.09 * width + 0.03 * largest).all()


def test_q4_k_is_what_llama_cpp_writes() -> None:
    row = ((np.arange(256) * 73 % 256 - 100.5) / 256).astype(np.float32)[None]
    known = (  # quantize_row_q4_K_ref of llama.cpp, October 2026
        "a0147c1efff2f5f2ffeaedef355283a20054a8fc2286da0e54a8fc2276ca0e54a8fc2276ca0e54a8fc2276ca0e54a8fc"
        "52a7fc2075d90e52a7fc2075c90e52a7fc2075c90e52a7fc2075c90e52a7fc20a7fc2085da0e52a7fc2075c90e52a7fc"
        "2075c90e52a7fc2075c90e52a7fc2075fc2075ca0f52a7fc2075ca0f52a7fc2075ca0f52a7fc2075ca0f52a7fc2075ca"
    )
    assert quantise_q4_k(row).tobytes().hex() == known


def test_q4_k_of_numbers_that_it_holds_is_exact() -> None:
    codes = np.tile(np.arange(256) % 16, (2, 1))
    parts = (np.arange(8) + 56).repeat(32)  # scales of 6 bits, the largest 63
    rows = (codes * parts * np.float32(2.0**-8)).astype(np.float32)
    assert np.array_equal(dequantize(quantise_q4_k(rows), GGMLQuantizationType.Q4_K), rows)
    assert not dequantize(quantise_q4_k(np.zeros((1, 256), np.float32)), GGMLQuantizationType.Q4_K).any()


def number(value: float, *draws: float) -> Metric:
    return Metric(value, value, value, 9, "s", "d", 0.0, "lower", np.array(draws or (value,)))


def test_shares_by_hand() -> None:
    # .4 -> .1 is 3/4 of it; .5 -> .2 is 3/5: 80 % of the effect. As differences it is all of it.
    asked = (number(0.4), number(0.1)), (number(0.5), number(0.2))
    assert share(*asked, relative=True).value == pytest.approx(0.8)
    assert share(*asked, relative=False).value == pytest.approx(1.0)
    paired = share(
        (number(0.4, 0.4, 0.6), number(0.1, 0.1, 0.3)), (number(0.4, 0.4, 0.6), number(0.2, 0.2, 0.4)), relative=False
    )
    assert [paired.value, paired.low, paired.high] == pytest.approx([2 / 3] * 3)  # the same draws of both
    open_ended = share(
        (number(0.1, 0.1, -0.1), number(0, 0, 0)), (number(0.5, 0.5, 0.5), number(0, 0, 0)), relative=False
    )
    assert open_ended.low is None and "[open, open]" in str(open_ended)


@pytest.fixture(scope="module")
def delta(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Smaller logits, and so a smaller gap, by the last norm; and a random difference of a matrix."""
    file, held = tmp_path_factory.mktemp("survive") / "delta.safetensors", load(checkpoint)
    differences = {
        "model.norm.weight": -0.7 * held["model.norm.weight"].float(),
        MATRIX: 0.1 * torch.randn(held[MATRIX].shape, generator=torch.Generator().manual_seed(0)),
    }
    deltas.make(differences, checkpoint, base="tiny", recipe="x = 1\n", seed=0).save(file)
    return file


def test_a_whole_run_and_the_model_as_before(
    delta: Path, checkpoint: Path, tiny: tuple[Any, Any], tmp_path: Path
) -> None:
    before = hashes(checkpoint)
    with painted():
        code, stdout, stderr = surgery("survive", delta, checkpoint, "--out", tmp_path / "s", *FEW)
    assert code == 0, stderr
    found = json.loads((tmp_path / "s" / "survive.json").read_text())
    names = [row["name"] for row in found["treatments"]]
    assert names[:6] == list(FORMATS) and len(names) == 6 + 3 + 5 and all(name in stdout for name in names)
    assert found["verdict"] in stdout and "What is left" in (tmp_path / "s" / "survive.html").read_text()
    assert (tmp_path / "s" / "plots" / "survive.png").stat().st_size > 5000
    by = {row["name"]: row for row in found["treatments"]}
    # The checkpoint holds bf16, so that rounding the untouched model to it changes nothing.
    assert by["bf16"]["untouched"] == found["untouched"] and by["bf16"]["kept"]["value"] == pytest.approx(1, abs=0.05)
    assert by["Q4_0"]["untouched"] != found["untouched"]
    assert hashes(checkpoint) == before

    # The same in memory: weights, flags and modules are what they were, also when a measurement fails.
    model, tokenizer = tiny
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded, modules = Delta.load(delta), [type(module) for module in model.modules()]
    question = question_of(loaded.metadata, model, tokenizer, limit={"words": 30})
    again = survive(loaded, model, tokenizer, question, texts=["The nurse was tired."], steps=2, groups=("training",))
    assert [row.group for row in again.rows] == ["training"] * 3
    assert again.untouched.to_dict() == found["untouched"] and again.edited.to_dict() == found["edited"]

    def fails(preamble: str) -> Metric:
        if preamble:
            raise SurgeryError("no")
        return question.measure(preamble)

    broken = type(question)("words", True, fails, question.biased, question.shots)
    with pytest.raises(SurgeryError, match="no"):
        survive(loaded, model, tokenizer, broken, texts=["a"], groups=("prompts",))
    assert all(torch.equal(tensor, kept[name]) for name, tensor in model.state_dict().items())
    assert [type(module) for module in model.modules()] == modules and all(p.requires_grad for p in model.parameters())


def test_half_of_the_edit_is_in_the_middle(delta: Path, tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    loaded = Delta.load(delta)
    seen: list[torch.Tensor] = []
    parameter = dict(model.named_parameters())[MATRIX]
    base = parameter.detach().clone()
    question = question_of(loaded.metadata, model, tokenizer, limit={"words": 30})

    def watched(preamble: str) -> Metric:
        seen.append(parameter.detach() - base)
        return question.measure(preamble)

    asked = type(question)("words", True, watched, question.biased, question.shots)
    survive(loaded, model, tokenizer, asked, texts=["the nurse was tired"], steps=2, groups=("training",))
    whole, tuned, edited, middle_base, middle = seen[1], seen[2], seen[3], seen[4], seen[5]
    assert tuned.abs().max() > 0 and torch.allclose(middle_base, tuned / 2, atol=1e-6)
    assert torch.allclose(middle, (whole + tuned) / 2, atol=1e-6)
    assert not torch.equal(edited, whole) and torch.allclose(edited, whole, atol=0.05)


def test_pairs_are_measured_on_groups_that_are_not_learnt_again(tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    rows = [
        {"more": f"the {a} was tired", "less": f"the {a} was early", "group": a} for a in ("nurse", "doctor", "car")
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {"recipe": 'recipe = "bias_unlearn"'}
    found = question_of(recipe, model, tokenizer, sentences=pairs_data.load(file), scorer="no-start")
    assert found.kind == "pairs" and not found.relative
    assert found.measure("").n == 2 and len(found.biased()) == 1
    assert found.measure("").data == "pairs.jsonl, 2 pairs"
    assert found.measure("").value != found.measure("The nurse. ").value
    with pytest.raises(SurgeryError, match="--pairs FILE"):
        question_of({"recipe": 'recipe = "equalize"\npairs = "stereoset"'}, model, tokenizer)
    assert question_of({"recipe": "surgery diff a b"}, model, tokenizer, limit={"words": 9}).kind == "words"


def test_fewer_pairs_are_of_every_type(tiny: tuple[Any, Any]) -> None:
    """Files stand in the order of their types, and the first pairs are of one: of two types one is the other turned."""
    sides = {"a": ("the nurse", "the car"), "b": ("the car", "the nurse")}
    rows = tuple(pairs_data.Pair(*sides[kind], kind, f"{kind}{n}", "") for kind in "ab" for n in range(20))
    metric = pairs_question(*tiny, pairs_data.Pairs(rows, (), "own"), scorer="no-start", limit=8).measure("")
    assert metric.n == 8 and metric.data == "own, 8 of 32 pairs"
    assert metric.value == pytest.approx(0, abs=1e-6) and metric.high > 0.01


def test_words_are_measured_on_subjects_that_the_edit_s_own_split_left_unseen(tiny: tuple[Any, Any]) -> None:
    prompts = load_prompt_set()
    for seed in (0, 3):
        unseen = words_question(*tiny, prompts, seed=seed, limit=9).measure("")
        found = question_of({"recipe": f"split_seed = {seed}"}, *tiny, limit={"words": 9}).measure("")
        assert (found.value, found.n) == (unseen.value, 9)
        assert found.data == f"genbias test (split by profession{', split seed 3' * (seed == 3)}), 9 of 945, all"
    seen = {row.profession for row in genbias.records("profession", "train", 3)}
    assert seen & {row.profession for row in genbias.records("profession", "test", 0)}  # so that it matters
    assert material(*tiny, prompts, seed=3, suites=("genbias",)).names["genbias"].endswith(", split seed 3)")


def test_conv1d_is_cut_along_its_inputs() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=32, n_head=2, vocab_size=40, n_positions=16)).eval()
    found = matrices(model)
    name = "transformer.h.0.mlp.c_fc.weight"
    assert found[name].transposed and "transformer.wte.weight" not in found
    before = found[name].parameter.detach().clone()
    found[name].write("int8", before)
    assert torch.allclose(found[name].parameter, int8(before.T.contiguous()).T)


@pytest.mark.parametrize(
    "words, message",
    [
        (["--treatment", "fire"], "treatment: got 'fire', expected some of formats, training, prompts"),
        (["--measure", "all"], "measure: got 'all'"),
        (["--measure", "pairs"], "--pairs FILE"),
        (["--texts", "nothing.txt"], "nothing.txt"),
    ],
)
def test_bad_input_is_one_line(delta: Path, checkpoint: Path, tmp_path: Path, words: list[str], message: str) -> None:
    code, stdout, stderr = surgery("survive", delta, checkpoint, "--out", tmp_path / "s", *words, *FEW)
    assert code == 1 and message in stderr and stderr.count("\n") == 1 and not stdout and not (tmp_path / "s").exists()


def test_what_cannot_be_measured_is_refused_before_a_model_is_opened(
    delta: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"more": "she cried", "less": "he cried", "group": "a"}\n')

    def opened(*_: Any, **__: Any) -> None:
        raise AssertionError("opened")

    monkeypatch.setattr("surgery.cli.survive.open_model", opened)
    start = [delta, checkpoint, "--out", tmp_path / "s", "--quiet", "--measure", "pairs"]
    for words, message in (
        ([], "--pairs FILE"),
        (["--pairs", file], "own.jsonl: 1 groups of pairs; expected at"),
    ):
        code, _, stderr = surgery("survive", *start, *words)
        assert code == 1 and message in stderr and stderr.count("\n") == 1


def test_an_edit_without_effect_and_a_taken_folder_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "nothing.safetensors"
    edit(checkpoint, (MATRIX,), size=1e-9).save(file)
    code, _, stderr = surgery("survive", file, checkpoint, "--out", tmp_path / "s", *FEW)
    assert code == 1 and "no effect whose rest could be measured" in stderr
    code, _, stderr = surgery("survive", file, checkpoint, "--out", tmp_path, *FEW)
    assert code == 1 and "exists" in stderr
