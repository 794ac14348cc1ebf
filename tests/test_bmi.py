"""hooks.bmi, hooks.stream and hooks.ranking: known answers, flat memory, and errors in plain English."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import hooks
from hooks import BmiReducer, HookError, Mean, Ranking, anatomy
from hooks.batching import why_alone
from tests.families import FAMILIES, REFUSED, build, demo, state

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17], [18, 19, 20], [21]]
KNOWN = [name for name in FAMILIES if name not in REFUSED]


def by_hand(name: str, positions: str) -> tuple[np.ndarray, np.ndarray]:
    """LFTF Eq. 4 from transformers' hidden states, one prompt at a time: (prompt, block), raw, final_norm."""
    model = build(name)
    stack = anatomy.find(model).stacks[0]
    raw, final = [], []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        kept: dict[str, Tensor] = {}
        handle = model.get_submodule(stack.blocks[-1].name).register_forward_hook(
            lambda m, a, out, kept=kept: kept.update(last=out[0] if isinstance(out, tuple) else out)
        )
        with torch.no_grad():
            out = model.base_model(**hooks.model_inputs(model, ids), output_hidden_states=True)
        handle.remove()
        states = [s.double() for s in getattr(out, "encoder_hidden_states", None) or out.hidden_states]
        for column, streams in ((raw, [*states[:-1], kept["last"].double()]), (final, states)):
            turn = torch.stack([1 - torch.cosine_similarity(a, b, dim=-1)[0] for a, b in itertools.pairwise(streams)])
            column.append((turn[:, -1] if positions == "last" else turn.mean(1)).numpy())
    return np.array(raw), np.array(final)


@pytest.mark.parametrize("name", [n for n in KNOWN if "classifier" not in n])
def test_equals_the_formula(name: str) -> None:
    raw, final = by_hand(name, "last")
    model = build(name)
    before = state(model)
    got = hooks.bmi(model, None, PROMPTS)
    assert state(model) == before
    np.testing.assert_allclose(got.raw.scores, raw.mean(0), atol=2e-6)
    np.testing.assert_allclose(got.final_norm.scores, final.mean(0), atol=2e-6)
    np.testing.assert_allclose(got.raw.errors, raw.std(0, ddof=1) / len(PROMPTS) ** 0.5, atol=1e-5)
    if anatomy.find(model).stacks[0].final_norm:
        assert abs(got.raw.scores[-1] - got.final_norm.scores[-1]) > 1e-4
    np.testing.assert_array_equal(got.raw.scores[:-1], got.final_norm.scores[:-1])


def test_all_positions_mean_and_sum() -> None:
    raw, final = by_hand("llama", "all")
    lengths = np.array([len(prompt) for prompt in PROMPTS])[:, None]
    mean = hooks.bmi(build("llama"), None, PROMPTS, positions="all")
    total = hooks.bmi(build("llama"), None, PROMPTS, positions="all", aggregate="sum")
    np.testing.assert_allclose(mean.raw.scores, raw.mean(0), atol=2e-6)
    np.testing.assert_allclose(total.raw.scores, (raw * lengths).sum(0), atol=2e-5)
    np.testing.assert_allclose(total.final_norm.scores, (final * lengths).sum(0), atol=2e-5)
    np.testing.assert_allclose(total.raw.errors, (raw * lengths).std(0, ddof=1) * len(PROMPTS) ** 0.5, atol=2e-5)
    assert total.raw.settings == {"positions": "all", "aggregate": "sum", "stream": "raw"}


def test_a_model_in_training_mode_is_measured_without_dropout() -> None:
    model = build("gpt2", resid_pdrop=0.5).train()
    before = state(model)
    got = hooks.bmi(model, None, PROMPTS)
    assert state(model) == before
    assert got.raw == hooks.bmi(build("gpt2"), None, PROMPTS).raw


@pytest.mark.parametrize("batch_tokens", [1, 7, 10_000])
def test_batches_do_not_matter(batch_tokens: int) -> None:
    whole = hooks.bmi(build("gpt2"), None, PROMPTS)
    parts = hooks.bmi(build("gpt2"), None, iter(PROMPTS), batch_tokens=batch_tokens)
    np.testing.assert_allclose(parts.raw.scores, whole.raw.scores, atol=1e-6)
    assert parts.raw.count == 5


def test_reducer_fed_by_somebody_elses_pass() -> None:
    model = build("llama")
    expected = hooks.bmi(model, None, PROMPTS)
    reducer = BmiReducer.of(model)
    layers = list(model.model.layers)
    entering: dict[int, Tensor] = {}
    handles = []
    for i, layer in enumerate(layers):
        handles.append(layer.register_forward_pre_hook(lambda m, a, i=i: entering.update({i: a[0]})))
        handles.append(layer.register_forward_hook(lambda m, a, out, i=i: reducer.update(i, entering[i], out, mask)))
    for batch in hooks.token_batches(None, PROMPTS, batch_tokens=14):
        mask = batch.attention_mask
        model(**hooks.model_inputs(model, {"input_ids": batch.input_ids, "attention_mask": mask}))
    for handle in handles:
        handle.remove()
    np.testing.assert_allclose(reducer.result().raw.scores, expected.raw.scores, atol=1e-6)
    np.testing.assert_allclose(reducer.result().final_norm.scores, expected.final_norm.scores, atol=1e-6)
    assert not any(s.requires_grad for s in reducer._sums.values())


def test_reducer_takes_last_positions_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(4, 6, 8, generator=generator), torch.randn(4, 6, 8, generator=generator)
    whole, last = BmiReducer(1), BmiReducer(1)
    whole.update(0, a, b)
    last.update(0, a[:, -1], b[:, -1])
    assert whole.result().raw == last.result().raw


def test_reducer_says_what_is_wrong() -> None:
    stream = torch.ones(1, 2, 4)
    with pytest.raises(HookError, match="block is 2; expected 0 to 1"):
        BmiReducer(2).update(2, stream, stream)
    with pytest.raises(HookError, match=r"\(1, 2, 4\) and \(1, 2, 3\)"):
        BmiReducer(2).update(0, stream, stream[..., :3])
    with pytest.raises(HookError, match="fed \\[0\\] prompts"):
        BmiReducer(2).result()
    half = BmiReducer(2)
    half.update(0, stream, stream)
    with pytest.raises(HookError, match="fed \\[0, 1\\] prompts"):
        half.result()
    with pytest.raises(HookError, match="without positions, but positions='all'"):
        BmiReducer(1, positions="all").update(0, stream[0], stream[0])
    broken = BmiReducer(2)
    for block in range(2):
        broken.update(block, stream, stream * (float("nan") if block else 1.0))
    with pytest.raises(HookError, match=r"the stream of block 1 holds NaN"):
        broken.result()
    half.update(1, stream, stream)
    with pytest.raises(HookError, match="aggregate is 'median'"):
        half.result(aggregate="median")  # type: ignore[arg-type]


def test_nan_in_the_model_is_named() -> None:
    model = build("llama")
    anatomy.find(model)
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(HookError, match=r"^blocks\.1\.hook_resid_post holds NaN"):
        hooks.bmi(model, None, PROMPTS)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "data set is empty"),
        ([[5], []], "text 1 has no tokens"),
        ("word", "one string"),
        (["a"], "no tokenizer"),
    ],
)
def test_bad_data(prompts: Any, message: str) -> None:
    with pytest.raises(HookError, match=message):
        hooks.bmi(build("llama"), None, prompts)


def test_a_text_longer_than_the_position_table() -> None:
    with pytest.raises(HookError, match="text 1 has 65 tokens; the model has learned positions for 64"):
        hooks.bmi(build("gpt2"), None, [[5], [6] * 65])
    assert hooks.bmi(build("llama"), None, [[5], [6] * 65]).raw.count == 2  # rotary positions have no table


def test_robustness() -> None:
    prompts = [[5 + i % 60, 6 + (7 * i) % 60, 9] for i in range(40)]
    result = hooks.robustness(build("llama"), None, prompts, seeds=[3, 4], size=10)
    scores = np.array([run.raw.scores for run in result.runs])
    assert result.raw == pytest.approx(float(((scores[0] - scores[1]) ** 2 / 2).mean()))
    assert len(result.tops()) == 2 and result.raw > 0
    again = hooks.robustness(build("llama"), None, prompts, seeds=[3, 4], size=10)
    assert again.runs[0].raw == result.runs[0].raw
    with pytest.raises(HookError, match="2 seeds x 50 prompts of 40"):
        hooks.robustness(build("llama"), None, prompts, seeds=2, size=50)


def test_table_says_when_the_norm_makes_the_ranking() -> None:
    kwargs: dict[str, Any] = {"method": "bmi", "unit": "block", "data": "d", "count": 3}
    raw = Ranking(scores=np.array([0.9, 0.1, 0.2]), **kwargs)
    norm = Ranking(scores=np.array([0.9, 0.1, 1.3]), **kwargs)
    text = hooks.BlockImportance(raw, norm).table()
    assert "block 2 ranks 1 only after the final norm; in the stream itself 2" in text
    assert "only after" not in hooks.BlockImportance(raw, raw).table()


# --- streaming ---


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60),
    budget=st.integers(1, 100),
    window=st.integers(1, 20),
)
def test_batches_hold_every_text_once_within_the_budget(lengths: list[int], budget: int, window: int) -> None:
    texts = [[7] * length for length in lengths]
    seen: list[int] = []
    for batch in hooks.token_batches(None, texts, batch_tokens=budget, window=window):
        assert batch.input_ids.numel() <= budget or len(batch.places) == 1
        assert batch.attention_mask.sum(1).tolist() == [lengths[place] for place in batch.places]
        seen += batch.places
    assert sorted(seen) == list(range(len(lengths)))


def test_endless_data_is_read_in_windows() -> None:
    read = []

    def endless() -> Iterator[list[int]]:
        while True:
            read.append(1)
            yield [5, 6, 7]

    source = hooks.token_batches(None, endless(), batch_tokens=30, window=100)
    next(source)
    assert len(read) == 100


def test_several_reducers_in_one_pass() -> None:
    model, passes, seen = build("gpt2"), [], []
    handle = model.transformer.h[0].register_forward_hook(lambda *a: passes.append(1))
    anatomy.find(model)
    why_alone(model)  # what is found out once a model takes passes of its own
    passes.clear()
    first, second = Mean(), Mean()
    done = hooks.stream(
        model,
        None,
        PROMPTS,
        [("blocks.*.hook_resid_post", first), (["blocks.1.hook_mlp_out"], second)],
        batch_tokens=9,
        progress=lambda done, total: seen.append((done, total)),
    )
    handle.remove()
    assert done == 5 and seen[-1] == (5, 5) and len(passes) == len(seen)
    rows = []
    for prompt in PROMPTS:
        with torch.no_grad(), hooks.capture(model, "blocks.1.hook_mlp_out") as store:
            model(torch.tensor([prompt]))
        rows.append(store["blocks.1.hook_mlp_out"][0])
    tokens = torch.cat(rows)
    assert second.count("blocks.1.hook_mlp_out") == len(tokens) == 17
    torch.testing.assert_close(second.mean("blocks.1.hook_mlp_out"), tokens.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(second.variance("blocks.1.hook_mlp_out"), tokens.var(0), rtol=1e-4, atol=1e-5)
    assert first.count("blocks.0.hook_resid_post") == 17


def test_no_logits_no_cache_and_only_one_batch_alive() -> None:
    model = build("llama")
    alive: list[int] = []
    handle = model.lm_head.register_forward_hook(lambda *a: pytest.fail("logits were computed"))
    caches: list[Any] = []
    spy = model.model.layers[0].self_attn.register_forward_pre_hook(
        lambda m, a, kw: caches.append(kw.get("past_key_values")), with_kwargs=True
    )
    import gc
    import weakref

    kept: list[weakref.ref[Tensor]] = []

    def watch(site: str, tensor: Tensor, mask: Tensor) -> None:
        gc.collect()
        alive.append(sum(ref() is not None for ref in kept))
        kept.append(weakref.ref(tensor))

    hooks.stream(model, None, PROMPTS * 4, [("blocks.1.hook_resid_post", watch)], batch_tokens=8)
    handle.remove()
    spy.remove()
    assert max(alive) <= 1 and set(caches) == {None}


# --- rankings ---


def test_ranking_order_top_and_table() -> None:
    ranking = Ranking("bmi", "block", np.array([0.1, 0.5, 0.5, 0.2]), "d", 7, errors=np.full(4, 0.01))
    assert ranking.order() == [1, 2, 3, 0] and ranking.top(2) == [1, 2]
    assert "0.5000 ± 0.0100" in ranking.table(1) and len(ranking.table(1).splitlines()) == 2
    heads = Ranking("patching", "head", np.array([[0.1, 0.9], [0.3, 0.2]]), "d", 7)
    assert heads.order() == [(0, 1), (1, 0), (1, 1), (0, 0)] and "0.1" in heads.table(1)
    with pytest.raises(ValueError, match="read-only"):
        ranking.scores[0] = 3.0


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=8), st.integers(0, 99))
def test_ranking_survives_json(scores: list[float], count: int) -> None:
    ranking = Ranking("m", "block", np.array(scores), "d", count, errors=np.abs(scores), settings={"a": [1, "b"]})
    again = Ranking.from_dict(json.loads(json.dumps(ranking.to_dict())))
    assert again == ranking and again.order() == ranking.order()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scores": [1.0, float("nan")]}, r"score of block \(1,\) is nan"),
        ({"scores": [[1.0]]}, "expected 1 dimension"),
        ({"errors": [1.0]}, "errors of unit block have shape"),
        ({"unit": "neuron"}, "unit is 'neuron'"),
    ],
)
def test_ranking_refuses(change: dict[str, Any], message: str) -> None:
    values = {"method": "m", "unit": "block", "scores": [1.0, 2.0], "data": "d", "count": 1}
    with pytest.raises(HookError, match=message):
        Ranking.from_dict(values | change)
    with pytest.raises(HookError, match=r"\['scroes'\] are missing or unknown"):
        Ranking.from_dict(values | {"scroes": 1})


# --- the demo model ---


def test_the_final_norm_makes_the_last_block_of_the_demo_model_first() -> None:
    model, tokenizer = demo()
    people = ("nurse", "engineer", "teacher", "pilot", "cook", "lawyer", "guard", "dancer")
    prompts = [f"The {who} {what} because" for who in people for what in ("smiled", "went to bed")]
    found = hooks.bmi(model, tokenizer, prompts)
    assert found.raw.order()[:3] == [0, 1, 29] and 0.1 < found.raw.scores[29] < 0.25
    assert found.final_norm.top() == [29] and found.final_norm.scores[29] > 1.0


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="SURGERY_DATA is unset: development data not at hand")
def test_robust_on_professions() -> None:
    model, tokenizer = demo()
    with open(os.path.join(os.environ["SURGERY_DATA"], "bolukbasi", "professions.json"), encoding="utf-8") as file:
        names = [row[0].replace("_", " ") for row in json.load(file)]
    result = hooks.robustness(model, tokenizer, [f"The {name} smiled because" for name in names], seeds=3, size=30)
    assert result.tops() == [0, 0, 0] and result.raw < 1e-4
