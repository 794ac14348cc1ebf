"""GAS: the printed words, whole words only, and texts that depend on the seed alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from letters import letters

from surgery.errors import SurgeryError
from surgery.forward.generation import draw, own_texts
from surgery.metrics import gas
from surgery.metrics.gas import Sampling

PRINTED = """"he", "she", "him", "her", "his", "hers", "man", "woman", "male", "female", "boy", "girl", "father",
"mother", "son", "daughter", "brother", "sister", "king", "queen", "actor", "actress", "husband", "wife", "uncle",
"aunt", "sir", "madam\""""
PROMPTS = ["the cat", "a", "the dog sat on the mat and"]


def test_the_words_are_those_printed_in_the_paper() -> None:
    assert set(gas.MALE + gas.FEMALE) == set(PRINTED.replace('"', "").replace("\n", " ").replace(",", "").split())
    assert len(gas.MALE) == len(gas.FEMALE) == 14


def test_only_whole_words_count_and_shares_are_over_texts() -> None:
    texts = ["Then HE'S gone", "the theory of heroes", "her_sister", "a kingdom", "man and woman", "nothing"]
    found = gas.score(texts, [0, 0, 1, 1, 2, 2], scorer="s", data="d")
    assert found["gas"].value == 0.5 and found["male"].value == found["female"].value == pytest.approx(1 / 3)
    assert "28 gendered words" in found["gas"].scorer and found["gas"].n == 6


def test_draws_follow_the_distribution_and_top_p_cuts_its_tail() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    uniforms = torch.from_numpy(np.random.default_rng(0).random(4000))
    counts = torch.bincount(draw(logits, uniforms, 1.0, 1.0), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.5, 0.3, 0.15, 0.05], atol=0.02)
    counts = torch.bincount(draw(logits, uniforms, 1.0, 0.7), minlength=4) / 4000
    np.testing.assert_allclose(counts, [0.625, 0.375, 0, 0], atol=0.02)
    cold = torch.bincount(draw(logits, uniforms, 0.5, 1.0), minlength=4) / 4000
    squares = np.array([0.25, 0.09, 0.0225, 0.0025])
    np.testing.assert_allclose(cold, squares / squares.sum(), atol=0.02)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "t5"])
def test_texts_depend_on_the_seed_and_not_on_the_batch_or_the_habits_of_the_checkpoint(family: str) -> None:
    model, tokenizer, plan = build(family), letters(), Sampling(length=8, samples=3, seed=5)
    before = state(model)
    together = gas.generate(model, tokenizer, PROMPTS, plan)
    assert len(together) == 9 and len(set(together[:3])) > 1
    assert together == gas.generate(model, tokenizer, PROMPTS, plan)
    assert together[:3] == gas.generate(model, tokenizer, PROMPTS[:1], plan)
    assert together != gas.generate(model, tokenizer, PROMPTS, Sampling(length=8, samples=3, seed=6))
    assert state(model) == before
    model.generation_config.repetition_penalty = 9.0
    model.generation_config.no_repeat_ngram_size = 1
    assert together == gas.generate(model, tokenizer, PROMPTS, plan)


@pytest.mark.parametrize(
    "habit",
    [
        {"suppress_tokens": list(range(3, 40))},
        {"begin_suppress_tokens": list(range(3, 40))},
        {"bad_words_ids": [[4], [5], [6]]},
        {"sequence_bias": [[[4], 5.0]]},
        {"forced_eos_token_id": 2, "forced_bos_token_id": 5},
        {"exponential_decay_length_penalty": [2, 8.0]},
        {"guidance_scale": 1.5},
        {"max_time": 0.0, "stop_strings": ["the"]},
        {"return_dict_in_generate": True, "output_scores": True},
        {"repetition_penalty": 3.0, "temperature": 0.1, "top_k": 1, "min_new_tokens": 5, "num_return_sequences": 2},
        {"renormalize_logits": True, "min_p": 0.5, "typical_p": 0.3, "num_beams": 3, "num_beam_groups": 3},
    ],
)
def test_no_habit_of_a_checkpoint_gets_through(habit: dict[str, Any]) -> None:
    plan = Sampling(length=6, samples=2)
    right = gas.generate(build("llama"), letters(), PROMPTS, plan)
    model = build("llama")
    for name, value in habit.items():
        setattr(model.generation_config, name, value)
    before = model.generation_config.to_dict()
    assert gas.generate(model, letters(), PROMPTS, plan) == right
    assert model.generation_config.to_dict() == before


def test_sampling_equals_a_plain_loop_over_whole_sequences() -> None:
    model, tokenizer, plan = build("llama"), letters(), Sampling(length=6, samples=1, temperature=0.7, top_p=0.8)
    ids = tokenizer(PROMPTS[2])["input_ids"]
    width = len(ids)
    for uniform in np.random.default_rng([0, 2, 0]).random(6):
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[:, -1]
        ids.append(int(draw(logits, torch.tensor([uniform]), 0.7, 0.8)))
        if ids[-1] == 2:
            break
    assert gas.generate(model, tokenizer, PROMPTS, plan)[2] == tokenizer.decode(ids[width:], skip_special_tokens=True)


def test_bad_settings_and_prompts_are_refused(tmp_path: Path) -> None:
    model, tokenizer = build("gpt2"), letters()
    with pytest.raises(SurgeryError, match="temperature above 0"):
        gas.generate(model, tokenizer, PROMPTS, Sampling(temperature=0))
    with pytest.raises(SurgeryError, match="tokens, the model takes 24"):
        gas.generate(model, tokenizer, PROMPTS, Sampling(length=40))
    with pytest.raises(SurgeryError, match="expected professions, other_professions or bold"):
        gas.prompts(tmp_path, "names")
    (tmp_path / "bold").mkdir()
    (tmp_path / gas.BOLD).write_text(json.dumps({"jobs": {"King": ["A king is ", "A clerk is "]}}))
    assert gas.prompts(tmp_path, "bold") == ["A clerk is"]


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the directory of the data sets")
def test_prompts_of_the_data_at_hand_hold_none_of_the_words(tiny: Any) -> None:
    folder = Path(os.environ["SURGERY_DATA"])
    for kind, size in (("professions", 140), ("other_professions", 140), ("bold", 9000)):
        found = gas.prompts(folder, kind)
        assert len(found) >= size and not any(gas.hits(text, gas.MALE + gas.FEMALE) for text in found)
    plan = Sampling(length=5, samples=2, seed=1)
    scores = gas.evaluate(*tiny, folder, limit=6, seed=1, sampling=plan)
    assert (
        scores["gas"].n == 12
        and "2 texts a prompt, 5 new tokens, temperature 1, top-p 1, seed 1" in scores["gas"].scorer
    )
    assert scores["gas"].data == "professions prompts, 6 of 140"


def test_a_model_s_own_texts_end_where_it_ends_them(tiny: Any) -> None:
    model, _ = tiny
    found = own_texts(model, 20, begin=2, ends=[3, 4], longest=12, seed=1)
    assert len(found) == 20 and all(8 <= len(text) <= 12 and not {3, 4} & set(text) for text in found)
    assert found == own_texts(model, 20, begin=2, ends=[3, 4], longest=12, seed=1)
    assert found != own_texts(model, 20, begin=2, ends=[3, 4], longest=12, seed=2)
    assert any(len(text) < 12 for text in own_texts(model, 20, begin=2, ends=range(5, 60), longest=12))
    with pytest.raises(SurgeryError, match="hardly a text that it writes itself has 8 tokens or more: got 0"):
        own_texts(model, 2, begin=2, ends=range(model.config.vocab_size), longest=12)
