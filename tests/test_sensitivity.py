"""hooks.attention_to and hooks.cross_attention: known answers by hand, padding, words, and an untouched model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import hooks
from hooks import HookError, anatomy
from hooks.qk_channels import find_qk_channels
from tests.families import FAMILIES, REFUSED, build, state
from tests.tiny_tokenizer import tiny_tokenizer

TEXTS = ["the nurse said that she was tired", "the doctor left early because he was tired .", "the car was old"]
WORDS = ["he", "she"]
ALL = [name for name in FAMILIES if name not in REFUSED]


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3", "falcon_old", "bert", "t5"])
def test_attention_to_words_by_hand(name: str) -> None:
    model, tokenizer = build(name), tiny_tokenizer()
    before = state(model)
    found = hooks.attention_to(model, tokenizer, TEXTS, WORDS)
    assert state(model) == before
    prefix = anatomy.find(model).stacks[0].prefix
    causal = name not in ("bert", "t5")
    rows = []
    for text, place in zip(TEXTS[:2], (4, 5), strict=True):
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        patterns = hooks.record(model, ids, f"{prefix}.*.attn.hook_pattern")
        on = torch.stack(list(patterns.values()))[:, 0, :, :, place]  # (block head query)
        asked = [q for q in range(ids.shape[1]) if (q > place if causal else q != place)]
        rows.append(on[:, :, asked].mean(-1).numpy())
    np.testing.assert_allclose(found.scores, np.mean(rows, 0), atol=1e-6)
    np.testing.assert_allclose(found.errors, np.std(rows, 0, ddof=1) / 2**0.5, atol=1e-6)
    assert (found.count, found.skipped) == (2, 1)
    blocks = found.ranking("block")
    np.testing.assert_allclose(blocks.scores, np.mean(rows, 0).mean(1), atol=1e-6)
    assert found.ranking().unit == "head" and found.ranking().method == "attention"


def test_tokens_queries_and_words() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    text = "the teacher said nonbinary was early"
    found = hooks.attention_to(model, tokenizer, [text], ["nonbinary"])
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    patterns = torch.stack(list(hooks.record(model, ids, "blocks.*.attn.hook_pattern").values()))[:, 0]
    on = patterns[..., 3:5].sum(-1)  # both pieces
    np.testing.assert_allclose(found.scores, on[:, :, 5:].mean(-1), atol=1e-6)
    assert found.notes == ("'nonbinary' is 2 tokens (non ##binary); what they get is summed",)
    assert set(found.tokens) == {"was", "early"}
    assert found.tokens["was"] == (pytest.approx(float(on[:, :, 5].mean()), abs=1e-6), 1)
    assert found.top_tokens(1)[0][1] == max(mean for mean, _ in found.tokens.values())
    last = hooks.attention_to(model, tokenizer, [text], ["nonbinary"], queries="last")
    np.testing.assert_allclose(last.scores, on[:, :, -1], atol=1e-6)


def test_only_whole_words_count_in_any_case_and_never_the_sink() -> None:
    model, tokenizer = build("gpt2"), tiny_tokenizer()
    for text in ("the nurse said that", "the he"):  # "he" inside "the", and with no later token
        with pytest.raises(HookError, match="none of 1 prompts holds one of he"):
            hooks.attention_to(model, tokenizer, [text], ["he"])
    upper = hooks.attention_to(model, tokenizer, ["the nurse said He was tired"], ["he"])
    assert upper.count == 1
    with pytest.raises(HookError, match="none of 1 prompts"):
        hooks.attention_to(model, tokenizer, ["he was tired"], ["he"])
    both = hooks.attention_to(model, tokenizer, ["he was tired", "the nurse said he was tired"], ["he"])
    assert (both.count, both.skipped) == (1, 1) and "very first place" in both.notes[0]
    assert hooks.attention_to(build("bert"), tokenizer, ["he was tired"], ["he"]).count == 1


@pytest.mark.parametrize("name", ALL)
def test_projections_are_found_in_every_family(name: str) -> None:
    model = build(name)
    before = state(model)
    stack = anatomy.find(model).stacks[0]
    found = find_qk_channels(model, stack)
    assert state(model) == before and len(found) == len(stack.blocks)
    for block, (query, key) in zip(stack.blocks, found, strict=True):
        assert query.channels.shape == key.channels.shape == (4, 8)
        assert query.module.startswith(f"{block.attention}.")
        assert len(set(query.channels.flatten().tolist())) == 32  # no two heads share a query


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "mpt", "gpt_neo", "bart"])
def test_query_and_key_are_those_of_the_models_attention(name: str) -> None:
    """Without rotation the model's own weights follow from them, up to the scale and ALiBi's distance."""
    model = build(name)
    stack = anatomy.find(model).stacks[0]
    query, key = find_qk_channels(model, stack)[0]
    kept: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(p.module).register_forward_hook(
            lambda m, a, out, n=n, p=p: kept.update({n: p.split(out, (1, 6))})
        )
        for n, p in (("q", query), ("k", key))
    ]
    site = f"{stack.prefix}.0.attn.hook_pattern"
    pattern = hooks.record(model, torch.arange(5, 11)[None], site)[site][0]
    for handle in handles:
        handle.remove()
    scores = torch.einsum("qhd,khd->hqk", kept["q"][0], kept["k"][0])
    scores = scores / (1.0 if name == "gpt_neo" else 8**0.5)  # GPT-Neo does not divide
    if name == "mpt":  # ALiBi: a bias by distance, the same in every row where they overlap
        ratio = (pattern.clamp(min=1e-30).log() - scores)[:, 4, :4].diff(dim=-1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), atol=1e-3, rtol=1e-3)
        return
    if name in ("gpt2", "opt", "gpt_neo"):
        scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    torch.testing.assert_close(scores.softmax(-1), pattern, atol=1e-5, rtol=1e-4)


def test_cross_attention_by_hand() -> None:
    """CrAWD 4.3 written out for Llama: Q of the text and K of the reference words, behind the start token."""
    model: Any = build("llama")
    tokenizer = tiny_tokenizer()
    text, words = TEXTS[0], ["he", "she", "nonbinary"]
    before = state(model)
    got = hooks.cross_attention_weights(model, tokenizer, text, words)
    assert state(model) == before
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    reference = torch.tensor([[tokenizer.bos_token_id, *tokenizer("he she nonbinary")["input_ids"]]])
    beta = []
    for i, layer in enumerate(model.model.layers):
        site = f"blocks.{i}.hook_resid_pre"
        states = [layer.input_layernorm(hooks.record(model, x, site)[site]) for x in (ids, reference)]
        query = layer.self_attn.q_proj(states[0])[0].view(-1, 4, 8)
        key = layer.self_attn.k_proj(states[1])[0].view(-1, 2, 8).repeat_interleave(2, 1)[1:]
        weights = (torch.einsum("qhd,khd->hqk", query, key) / 8**0.5).softmax(-1)
        beta.append(torch.cat([weights[..., :2], weights[..., 2:].sum(-1, keepdim=True)], -1))
    expected = torch.stack(beta).detach()
    torch.testing.assert_close(got.weights, expected, atol=1e-5, rtol=1e-4)
    assert got.tokens == tuple(text.split()) and got.words == tuple(words)
    peak = hooks.cross_attention(model, tokenizer, [text], words)
    np.testing.assert_allclose(peak.scores, expected.amax(-1).mean(-1), atol=1e-5)
    share = hooks.cross_attention(model, tokenizer, [text], words[:2], words[2:])
    np.testing.assert_allclose(share.scores, expected[..., :2].sum(-1).mean(-1), atol=1e-5)
    assert share.notes == ("'nonbinary' is 2 tokens (non ##binary); what they get is summed",)
    assert share.tokens["she"][0] == pytest.approx(float(expected[..., 4, :2].sum(-1).mean()), abs=1e-5)
    assert peak.ranking("block").method == "cross_attention"


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "opt", "deberta_v2", "t5"])
def test_padding_batches_and_singles_agree(name: str) -> None:
    model = build(name)
    for function in (hooks.attention_to, hooks.cross_attention):
        right = function(model, tiny_tokenizer("right"), TEXTS, WORDS)
        left = function(model, tiny_tokenizer("left"), iter(TEXTS), WORDS)
        single = function(model, tiny_tokenizer(), TEXTS, WORDS, batch_tokens=1)
        np.testing.assert_array_equal(right.scores, left.scores)
        np.testing.assert_allclose(right.scores, single.scores, atol=1e-5)
        np.testing.assert_allclose(right.errors, single.errors, atol=1e-5)
        assert set(right.tokens) == set(single.tokens)


def test_sixteen_bits_find_the_same_projections() -> None:
    model = build("llama")
    full = find_qk_channels(model, anatomy.find(model).stacks[0])
    half_model = build("llama").to(torch.bfloat16)
    half = find_qk_channels(half_model, anatomy.find(half_model).stacks[0])
    for pairs in zip(full, half, strict=True):
        for one, other in zip(*pairs, strict=True):
            assert one.module == other.module and torch.equal(one.channels, other.channels)


def test_bad_input_and_exceptions_leave_the_model_as_it_was() -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    model.train()
    before = state(model)
    for words in ([], "he", [" "]):
        with pytest.raises(HookError, match="expected a list of at least one word"):
            hooks.attention_to(model, tokenizer, TEXTS, words)
    with pytest.raises(HookError, match="at least two words in all"):
        hooks.cross_attention(model, tokenizer, TEXTS, ["he"])
    with pytest.raises(HookError, match="data set is empty"):
        hooks.cross_attention(model, tokenizer, [], WORDS)
    with pytest.raises(HookError, match="data set is empty"):
        hooks.attention_to(model, tokenizer, [], WORDS)
    with pytest.raises(HookError, match="expected a string"):
        hooks.attention_to(model, tokenizer, [[1, 2]], WORDS)  # type: ignore[list-item]
    with pytest.raises(HookError, match="prompt 0 has special tokens only"):
        hooks.cross_attention(model, tokenizer, ["[BOS]"], WORDS)

    def stop(done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    for function in (hooks.attention_to, hooks.cross_attention):
        with pytest.raises(KeyboardInterrupt):
            function(model, tokenizer, TEXTS, WORDS, progress=stop)
        handle = model.get_submodule("model.layers.1.mlp").register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises((ZeroDivisionError, HookError)):
            function(model, tokenizer, TEXTS, WORDS)
        handle.remove()
    assert state(model) == before
