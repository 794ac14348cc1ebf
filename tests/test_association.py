"""WEAT and SEAT: effect size and p against independent computations, states against a plain pass."""

import json
import os
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from letters import letters
from tiny_tokenizer import tiny_tokenizer

from surgery.data import seat as data
from surgery.data.seat import Association
from surgery.errors import SurgeryError
from surgery.metrics import association, seat, weat

TEXTS = ["the cat", "a dog on the mat", "birds"]


def wefe_effect_size(x: Any, y: Any, a: Any, b: Any) -> float:
    """wefe 1.0.1's published formula, word by word; its deviation divides by n."""

    def cos(u: Any, v: Any) -> float:
        return float(u @ v / np.sqrt(u @ u) / np.sqrt(v @ v))

    def s(w: Any) -> float:
        return sum(cos(w, each) for each in a) / len(a) - sum(cos(w, each) for each in b) / len(b)

    sx, sy = [s(w) for w in x], [s(w) for w in y]
    return float((np.mean(sx) - np.mean(sy)) / np.std(sx + sy))


@pytest.mark.parametrize("seed", range(3))
def test_effect_size_equals_wefes_but_for_the_divisor(seed: int) -> None:
    x, y, a, b = np.random.default_rng(seed).normal(size=(4, 6, 5))
    found = association.effect_size(association.associations(x, a, b), association.associations(y, a, b))
    assert found * np.sqrt(12 / 11) == pytest.approx(wefe_effect_size(x, y, a, b), abs=1e-12)


def test_known_effect_sizes() -> None:
    """X along A, Y along B: s is 1 and -1, the deviation of (1, 1, -1, -1) over n - 1 is sqrt(4/3)."""
    one, two = np.array([[1.0, 0.0]] * 2), np.array([[0.0, 3.0]] * 2)
    x, y = association.associations(one, one, two), association.associations(two, one, two)
    assert x.tolist() == [1, 1] and y.tolist() == [-1, -1]
    assert association.effect_size(x, y) == pytest.approx(2 / np.sqrt(4 / 3))
    assert association.p_value(x, y).p == pytest.approx(1 / 6)  # one of the six partitions
    assert association.p_value(y, x).p == 1.0


@pytest.mark.parametrize("sizes, scipys", [((5, 5), 0.21031746031746032), ((4, 6), 0.4095238095238095)])
def test_exact_p_equals_brute_force_and_scipy(sizes: tuple[int, int], scipys: float) -> None:
    """``scipys``: scipy 1.17.1, ``permutation_test(..., alternative="greater", n_resamples=inf)`` of the means."""
    generator = np.random.default_rng(1)
    x, y = generator.normal(0.4, 1, sizes[0]), generator.normal(0, 1, sizes[1])
    found = association.p_value(x, y)
    both, hits, total = np.concatenate([x, y]), 0, 0
    for chosen in combinations(range(len(both)), len(x)):
        rest = [place for place in range(len(both)) if place not in chosen]
        hits += both[list(chosen)].sum() - both[rest].sum() >= x.sum() - y.sum() - 1e-12
        total += 1
    assert found == association.Permuted(hits / total, total, True)
    assert found.p == pytest.approx(scipys, abs=1e-12)


def test_sampled_p_says_so_and_is_near_the_exact_one(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    x, y = generator.normal(0.5, 1, 8), generator.normal(0, 1, 8)
    exact = association.p_value(x, y)
    assert exact.exact and exact.partitions == 12870
    monkeypatch.setattr(association, "EXACT", 100)
    drawn = association.p_value(x, y, seed=3)
    assert not drawn.exact and drawn.partitions == association.DRAWN + 1
    alone = association.p_value(np.arange(9.0) + 100, np.arange(9.0))  # no draw reaches it: the observed one counts
    assert alone.p == pytest.approx(1 / (association.DRAWN + 1), rel=1e-9)
    assert drawn.p == pytest.approx(exact.p, abs=0.015) and drawn == association.p_value(x, y, seed=3)


def test_p_is_uniform_for_fair_vectors() -> None:
    generator = np.random.default_rng(4)
    found = [association.p_value(*generator.normal(size=(2, 4))).p for _ in range(400)]
    assert np.mean(np.array(found) <= 0.1) == pytest.approx(0.1, abs=0.05)


def test_a_whole_test_has_its_numbers_and_their_names() -> None:
    generator = np.random.default_rng(0)
    base = {word: generator.normal(size=4) for word in "abcdefgh"}
    biased = base | {"a": base["e"] + 0.1, "b": base["f"] + 0.1, "c": base["g"] + 0.1, "d": base["h"] + 0.1}
    test = Association("t", ("a", "b"), ("c", "d"), ("e", "f"), ("g", "h"), "one against two")
    found = association.score([test], biased.__getitem__, scorer="s")
    size = found["t"]["effect_size"]
    assert size.value > 1 and size.ideal == 0 and size.direction == "nearer" and size.n == 4
    assert size.low <= size.value and "2 + 2 targets, 2 + 2 attributes" in size.data
    assert found["t"]["p"].value == pytest.approx(1 / 6) and "all partitions" in found["t"]["p"].scorer
    assert found["mean_abs"].value == pytest.approx(size.value)
    with pytest.raises(SurgeryError, match="'a' has a vector that is zero"):
        association.score([test], (base | {"a": np.zeros(4)}).__getitem__, scorer="s")
    with pytest.raises(SurgeryError, match="same association"):
        association.score([test], dict.fromkeys(base, np.ones(4)).__getitem__, scorer="s")


@pytest.mark.parametrize("family", ["gpt2", "llama", "opt", "bert", "llama_headless"])
def test_states_are_those_of_a_plain_pass(family: str) -> None:
    model, tokenizer = build(family), letters()
    for pool in ("mean", "last"):
        before = state(model)
        found = association.states(model, tokenizer, TEXTS, pool=pool)
        middle = association.states(model, tokenizer, TEXTS, pool=pool, site="blocks.1.hook_resid_post")
        assert state(model) == before
        for row, text in enumerate(TEXTS):
            with torch.no_grad():
                out = model.base_model(torch.tensor([tokenizer(text)["input_ids"]]), output_hidden_states=True)
            for vector, stream in ((found[row], out.last_hidden_state), (middle[row], out.hidden_states[2])):
                expected = stream[0].mean(0) if pool == "mean" else stream[0, -1]
                np.testing.assert_allclose(vector, expected, atol=1e-5)


def test_last_states_see_what_is_attached_before_the_head() -> None:
    model, tokenizer = build("llama"), letters()
    plain = association.states(model, tokenizer, TEXTS)
    hook = model.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    np.testing.assert_allclose(association.states(model, tokenizer, TEXTS), 2 * plain, rtol=1e-6)
    hook.remove()


def test_word_vectors_are_means_of_their_pieces() -> None:
    model, tokenizer = build("llama"), letters()
    weight = model.get_input_embeddings().weight.detach().numpy()
    pieces = [tokenizer.convert_tokens_to_ids(piece) for piece in " ab"]
    np.testing.assert_allclose(weat.embeddings(model, tokenizer, ["ab"])[0], weight[pieces].mean(0), rtol=1e-6)
    with pytest.raises(SurgeryError, match="WEAT word '~': unknown"):
        weat.embeddings(model, tiny_tokenizer(), ["~"])


def test_bad_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "seat").mkdir()
    file = tmp_path / "seat" / "weat6.jsonl"
    with pytest.raises(SurgeryError, match="no such file"):
        data.load(tmp_path, "weat6")
    good = {key: {"category": key, "examples": ["a", "b"]} for key in ("targ1", "targ2", "attr1", "attr2")}
    file.write_text(json.dumps(good, indent=1))
    assert data.load(tmp_path, "weat6").about == "targ1 and targ2 against attr1 and attr2"
    file.write_text(json.dumps(good | {"attr2": {"category": "x", "examples": ["a"]}}))
    with pytest.raises(SurgeryError, match="attr2 has 1 examples"):
        data.load(tmp_path, "weat6")
    file.write_text(json.dumps({"targ1": good["targ1"]}))
    with pytest.raises(SurgeryError, match="expected one JSON object with targ1, targ2, attr1, attr2"):
        data.load(tmp_path, "weat6")


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the directory of the data sets")
def test_every_shipped_test_gives_its_numbers_on_the_data_at_hand() -> None:
    folder, model, tokenizer = Path(os.environ["SURGERY_DATA"]), build("llama", max_position_embeddings=256), letters()
    sentences = seat.evaluate(model, tokenizer, folder, limit=4)
    assert {kind: set(found) - {"mean_abs"} for kind, found in sentences.items()} == {
        kind: set(names) for kind, names in data.SEAT.items()
    }
    words = weat.evaluate(model, tokenizer, folder, limit=4)
    for name in ("embedding", "context"):
        assert {kind: len(found) for kind, found in words[name].items()} == {"gender": 7, "race": 6, "age": 2}
        assert words[name]["gender"]["weat6"]["p"].data.endswith("70 partitions")
    assert data.load(folder, "sent-weat6").about == "MaleNames and FemaleNames against Career and Family"
