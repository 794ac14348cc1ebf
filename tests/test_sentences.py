"""Sentence scores: every scorer by its definition, one sentence at a time; trees of tokens give the same numbers."""

import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from hypothesis import given, settings
from hypothesis import strategies as st
from letters import letters

from surgery import SurgeryError
from surgery.catalogue import SCORERS
from surgery.forward.token_logprobs import _batches, continuation_probabilities, token_log_probabilities
from surgery.forward.trees import packs, plans, sees
from surgery.metrics.sentences import DEFINITIONS, fitting, per_token, sentence_scores

SENTENCES = [
    "The nurse said that he",
    "The nurse said",
    "The doctor went home today",
    "Her doctor",
    "The nurse said that she",
]
SHARING = ("gpt2", "gpt_neo", "llama", "gemma3", "opt", "gpt_neox", "falcon_old", "qwen3_moe")


@pytest.fixture
def opened(tiny: Any) -> Any:
    model, tokenizer = tiny
    tokenizer.bos_token = "<pad>"
    return model, tokenizer


def sequences(seed: int = 0, count: int = 30) -> list[list[int]]:
    rng = random.Random(seed)
    stems = [[rng.randrange(3, 96) for _ in range(rng.randrange(1, 9))] for _ in range(4)]
    return [rng.choice(stems) + [rng.randrange(3, 96) for _ in range(rng.randrange(1, 20))] for _ in range(count)]


@torch.no_grad()
def one_by_one(model: Any, ids: list[int]) -> np.ndarray:
    """log P(token | before) of every token but the first, from a pass of this sequence alone."""
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logits[range(len(ids) - 1), ids[1:]].numpy()


def by_definition(model: Any, tokenizer: Any, text: str, scorer: str) -> float:
    ids, start = tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.bos_token_id
    p = np.exp(
        {
            "bias-bench": lambda: np.append(one_by_one(model, [start, ids[0]]), one_by_one(model, ids)),
            "bos": lambda: one_by_one(model, [start, *ids]),
            "sum": lambda: one_by_one(model, [start, *ids]),
            "legacy-biasedit": lambda: one_by_one(model, ids),
            "no-start": lambda: one_by_one(model, ids),
            "no-start-sum": lambda: one_by_one(model, ids),
        }[scorer]()
    )
    if scorer in ("sum", "no-start-sum"):
        return float(np.log(p).sum())
    return float(p.mean()) if scorer == "legacy-biasedit" else float(2 ** np.log2(p).mean())


@pytest.mark.parametrize("scorer", SCORERS)
def test_every_scorer_is_its_definition_one_sentence_at_a_time(opened: Any, scorer: str) -> None:
    fast = sentence_scores(*opened, SENTENCES, scorer=scorer)
    slow = [by_definition(*opened, text, scorer) for text in SENTENCES]
    assert fast == pytest.approx(slow, rel=1e-5)
    assert len(set(np.round(fast, 12))) == len(SENTENCES)
    assert set(SCORERS) == set(DEFINITIONS)
    told: list[int] = []
    sentence_scores(*opened, SENTENCES, scorer=scorer, step=told.append)
    assert sum(told) == len(SENTENCES)


@pytest.mark.parametrize("scorer", ["bias-bench", "bos", "no-start"])
def test_only_the_sentence_is_scored_given_its_context(opened: Any, scorer: str) -> None:
    model, tokenizer = opened
    contexts = ["The doctor went home.", "Her nurse said", "The nurse.", "The nurse.", "He"]
    fast = sentence_scores(model, tokenizer, SENTENCES, scorer=scorer, contexts=contexts)
    for value, context, text in zip(fast, contexts, SENTENCES, strict=True):
        before = [tokenizer.bos_token_id] if scorer == "bos" else []
        given_ids = before + tokenizer(context, add_special_tokens=False)["input_ids"]
        ids = before + tokenizer(f"{context} {text}", add_special_tokens=False)["input_ids"]
        assert value == pytest.approx(np.exp(one_by_one(model, ids)[len(given_ids) - 1 :].mean()), rel=1e-5)


@pytest.mark.parametrize("family", SHARING)
def test_trees_give_what_each_sequence_gives_alone(family: str) -> None:
    model, rows = build(family), sequences()
    before = state(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = token_log_probabilities(model, rows)
    for values, ids in zip(found, rows, strict=True):
        assert values == pytest.approx(one_by_one(model, ids), abs=1e-5)
    after = state(model)
    assert before.keys() == after.keys()


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("bloom", {}),
        ("mpt", {}),
        ("gemma3", {"sliding_window": 8}),
        ("gpt_neo", {"window_size": 8}),
    ],
)
def test_models_that_take_no_trees_are_found_out_and_give_the_same(family: str, config: dict[str, Any]) -> None:
    model, rows = build(family, **config), sequences(1)
    with pytest.warns(UserWarning, match="shared beginnings are encoded each time"):
        found = token_log_probabilities(model, rows)
    for values, ids in zip(found, rows, strict=True):
        assert values == pytest.approx(one_by_one(model, ids), abs=1e-5)


def test_only_what_is_asked_for_comes_back(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = opened
    rows = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8]]
    told: list[int] = []
    found = token_log_probabilities(model, rows, starts=[3, 1, 2], step=told.append)
    assert [len(values) for values in found] == [1, 2, 2]
    assert found[0] == pytest.approx(one_by_one(model, rows[0])[2:], abs=1e-5)
    assert sum(told) == 3
    monkeypatch.setattr("surgery.forward.token_logprobs.PLANNED", 2)  # laid into trees in two pieces
    again = token_log_probabilities(model, rows, starts=[3, 1, 2])
    assert np.concatenate(again) == pytest.approx(np.concatenate(found), abs=1e-6)
    assert token_log_probabilities(model, []) == [] and per_token([]).shape == (0,)
    assert continuation_probabilities(model, [], [[1]]).shape == (0, 1)


def test_dropout_is_off_inside_and_every_mode_comes_back() -> None:
    model = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    expected = token_log_probabilities(model, sequences(2))
    model.train()
    model.transformer.h[1].eval()
    modes = [module.training for module in model.modules()]
    found = token_log_probabilities(model, sequences(2))
    assert np.concatenate(found) == pytest.approx(np.concatenate(expected), abs=1e-6)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.lists(st.integers(0, 3), min_size=2, max_size=9), min_size=1, max_size=12),
    size=st.integers(4, 20),
    shared=st.booleans(),
)
def test_every_sequence_stands_in_its_pack_as_a_path_from_a_root(
    rows: list[list[int]], size: int, shared: bool
) -> None:
    starts = [1 + sum(row) % (len(row) - 1) for row in rows]
    found = packs(rows, starts, size=size, shared=shared)
    for pack, plan in zip(found, plans(rows, starts, size=size, shared=shared), strict=True):
        assert (plan.rows, plan.nodes) == (pack.rows, len(pack.ids))
        assert plan.read >= len({node for node, *_ in pack.wanted})
    assert sorted(row for pack in found for row in pack.rows) == list(range(len(rows)))
    seen = set()
    for pack in found:
        assert len(pack.ids) <= max(size, *(len(rows[row]) - 1 for row in pack.rows))
        seen_by = sees([pack], len(pack.ids) + 2, torch.device("cpu"))[0].numpy()
        assert np.array_equal(seen_by[-2:], np.eye(len(pack.ids) + 2, dtype=bool)[-2:])  # padding sees itself
        for node, token, row, place in pack.wanted:
            seen.add((row, place))
            path = [other for other in range(len(pack.ids)) if seen_by[node, other]]
            assert [pack.ids[other] for other in path] == rows[row][: place + starts[row]]
            assert [pack.depths[other] for other in path] == list(range(place + starts[row]))
            assert token == rows[row][place + starts[row]]
        if shared:
            paths = [tuple(np.flatnonzero(line)) for line in seen_by[: len(pack.ids)]]
            assert len({tuple(pack.ids[node] for node in path) for path in paths}) == len(paths)
    assert seen == {(row, place) for row, ids in enumerate(rows) for place in range(len(ids) - starts[row])}


def test_mistakes_say_what_and_where(opened: Any) -> None:
    model, tokenizer = opened
    with pytest.raises(SurgeryError, match="got 'mean', expected one of bias-bench, bos, sum, legacy-biasedit"):
        sentence_scores(model, tokenizer, SENTENCES, scorer="mean")
    with pytest.raises(SurgeryError, match=r"sentence 1 .*301 tokens, the model takes 128"):
        sentence_scores(model, tokenizer, ["The nurse", "nurse " * 300], scorer="bos")
    with pytest.raises(SurgeryError, match=r"sentence 1 .*gives no token"):
        sentence_scores(model, tokenizer, ["The nurse", ""])
    with pytest.raises(SurgeryError, match=r"'nurse'.* is one token, which scorer 'no-start' does not score"):
        sentence_scores(model, tokenizer, ["The nurse", "nurse"], scorer="no-start")
    assert sentence_scores(model, tokenizer, ["nurse"]).shape == (1,)
    tokenizer.bos_token = tokenizer.eos_token = None
    for scorer in ("bias-bench", "bos", "sum"):
        with pytest.raises(SurgeryError, match=f"neither BOS nor EOS, and scorer '{scorer}'"):
            sentence_scores(model, tokenizer, SENTENCES, scorer=scorer)
    assert len(sentence_scores(model, tokenizer, SENTENCES, scorer="no-start")) == len(SENTENCES)


def test_a_text_fits_with_the_start_token_that_a_scorer_puts_before_it() -> None:
    model, tokenizer = build("gpt2", n_positions=8), letters()
    kept, out = fitting(model, tokenizer, [("a" * 7, "b"), ("c", "d" * 8)], ["file, line 1", "file, line 2"])
    assert kept == [0] and out == ["file, line 2: 9 tokens with a start token, the model takes 8"]
    sentence_scores(model, tokenizer, ["a" * 7], scorer="bos")


def test_broken_weights_and_a_missing_head_are_named() -> None:
    for family in ("llama_headless", "bert", "t5"):
        with pytest.raises(SurgeryError, match="expected a causal language model"):
            token_log_probabilities(build(family), [[3, 4]])
    model = build("gpt_neox", tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight[50] = float("nan")
    with pytest.raises(SurgeryError, match="sequence 0 are not finite"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        token_log_probabilities(model, [[3, 4], [3, 5]])


def test_sequences_that_differ_in_their_last_token_only_are_run_once() -> None:
    found = packs([[1, 2, 3], [1, 2, 4], [1, 2]], [2, 2, 1], shared=False)
    assert [(pack.ids, sorted(pack.wanted)) for pack in found] == [
        ([1], [(0, 2, 2, 0)]),
        ([1, 2], [(1, 3, 0, 0), (1, 4, 1, 0)]),
    ]
    assert plans([[1, 2, 3], [1, 2, 4], [1, 2]], [2, 2, 1]) == [([2, 0, 1], 2, 2)]


def test_small_batches_come_last_so_that_shares_end_together() -> None:
    every = plans([[row, *range(40)] for row in range(300)], [41 - 10] * 300, size=40)
    found = _batches(build("gpt2"), every)
    assert sorted(each.rows for batch in found for each in batch) == [[row] for row in range(300)]
    sizes = [len(batch) * 40 for batch in found]
    assert sizes == [1800, 2040, 160, *[1000] * 8]
