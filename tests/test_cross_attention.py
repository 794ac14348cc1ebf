"""CrAWD's module over families: identity, causality, cache, padding, Eq. 2 by hand, reference states, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import families
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor, nn

import hooks
from hooks import HookError
from surgery import SurgeryError
from surgery.edits.supervised import Lora, adapters
from surgery.modules import cross_attention
from surgery.modules.cross_attention import CrossAttention
from surgery.training import Plan, train, trainable

FAMILIES = ["llama", "gpt2", "bert_classifier", "t5"]
CAUSAL = ["llama", "gpt2", "gemma3"]
HEADS = 4


def stir(module: nn.Module, seed: int = 1) -> None:
    """Let the module act: a fusion far from [I, 0]."""
    with torch.no_grad():
        module.fusion.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(seed))


@contextmanager
def edited(model: Any, **options: Any) -> Iterator[CrossAttention]:
    with cross_attention.attached(model, tiny_tokenizer(), **{"heads": HEADS, **options}) as module:
        stir(module)
        yield module


@torch.no_grad()
def logits(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(**batch).logits


@pytest.mark.parametrize("family", [*FAMILIES, "gemma3", "bert", "bart", "falcon_new", "llama_classifier"])
def test_before_training_the_model_is_the_original_bit_for_bit(family: str) -> None:
    model = families.build(family)
    batch = families.batch(model)
    plain, before = logits(model, batch), families.state(model)
    with cross_attention.attached(model, tiny_tokenizer(), heads=HEADS) as module:
        assert torch.equal(logits(model, batch), plain)
        width = module.width
        assert torch.equal(module.fusion_map, torch.eye(width, 2 * width))
        with torch.no_grad():
            module.fusion.weight.fill_(0.1)
        assert not torch.equal(logits(model, batch), plain)
    assert families.state(model) == before
    assert torch.equal(logits(model, batch), plain)


def test_an_exception_leaves_the_model_as_it_was() -> None:
    model = families.build("llama")
    before = families.state(model)
    with pytest.raises(RuntimeError, match="stop"), edited(model):
        raise RuntimeError("stop")
    assert families.state(model) == before


@pytest.mark.parametrize("family", CAUSAL)
def test_a_later_token_does_not_change_earlier_logits(family: str) -> None:
    model = families.build(family)
    ids = families.batch(model)["input_ids"]
    other = ids.clone()
    other[:, 6:] = (other[:, 6:] + 7) % 60 + 3
    with edited(model):
        assert torch.equal(logits(model, {"input_ids": ids})[:, :6], logits(model, {"input_ids": other})[:, :6])
    with edited(model, scope="sequence"):  # the paper's other reading: the threshold knows the later tokens
        assert not torch.equal(logits(model, {"input_ids": ids})[:, :6], logits(model, {"input_ids": other})[:, :6])


def test_a_later_decoder_token_does_not_change_earlier_logits() -> None:
    model = families.build("t5")
    batch = families.batch(model)
    other = batch["decoder_input_ids"].clone()
    other[:, 4:] = (other[:, 4:] + 7) % 60 + 3
    with edited(model):
        one, two = logits(model, batch), logits(model, batch | {"decoder_input_ids": other})
    assert torch.equal(one[:, :4], two[:, :4])


@pytest.mark.parametrize("family", [*CAUSAL, "t5"])
def test_generation_with_a_cache_equals_generation_without(family: str) -> None:
    model = families.build(family)
    batch = {k: v for k, v in families.batch(model).items() if k in ("input_ids", "attention_mask")}
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    plain = model.generate(**batch, **options)
    with edited(model):
        kept = model.generate(**batch, **options, use_cache=True)
        anew = model.generate(**batch, **options, use_cache=False)
    assert torch.equal(kept.sequences, anew.sequences)
    torch.testing.assert_close(torch.stack(kept.logits), torch.stack(anew.logits), atol=1e-4, rtol=1e-4)
    assert not torch.equal(torch.stack(kept.logits)[0], torch.stack(plain.logits)[0])


@pytest.mark.parametrize("scope", ["row", "sequence"])
@pytest.mark.parametrize("family", [*FAMILIES, "t5_classifier", "bart_classifier"])
def test_padding_on_either_side_changes_nothing(family: str, scope: str) -> None:
    model = families.build(family)
    whole = families.batch(model)
    ids, pad = whole["input_ids"], model.config.pad_token_id or 0
    ids[ids == pad] = 9
    filler, gap = torch.full((3, 4), pad), torch.zeros(3, 4, dtype=torch.long)
    ones = torch.ones_like(ids)
    rest = {k: v for k, v in whole.items() if k == "decoder_input_ids"}
    sides = {
        "none": {"input_ids": ids, "attention_mask": ones},
        "right": {"input_ids": torch.cat([ids, filler], 1), "attention_mask": torch.cat([ones, gap], 1)},
        "left": {"input_ids": torch.cat([filler, ids], 1), "attention_mask": torch.cat([gap, ones], 1)},
    }
    if family.endswith("classifier"):  # BERT reads its first token, T5 and BART pool behind a shift
        del sides["left"]
    with edited(model, scope=scope):
        found = {}
        for side, given_ids in sides.items():
            inputs = hooks.model_inputs(model, given_ids | rest)
            inputs = inputs if rest else {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
            found[side] = logits(model, inputs)
    if not family.endswith("classifier") and not rest:
        found["right"], found["left"] = found["right"][:, :9], found["left"][:, 4:]
    for side in found:
        scale = found["none"].abs().max().item()
        torch.testing.assert_close(found[side], found["none"], atol=1e-4 * scale, rtol=0)


def test_left_padding_of_a_classifier_that_reads_its_last_token() -> None:
    model = families.build("llama_classifier")
    ids = families.batch(model)["input_ids"]
    padded = torch.cat([torch.zeros(3, 4, dtype=torch.long), ids], 1)
    mask = (torch.arange(13) >= 4).long().expand(3, -1)
    for scope in ("row", "sequence"):
        with edited(model, scope=scope):
            alone = logits(model, {"input_ids": ids})
            left = logits(model, hooks.model_inputs(model, {"input_ids": padded, "attention_mask": mask}))
        torch.testing.assert_close(left, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scope", ["row", "sequence"])
def test_a_sequence_of_length_one(family: str, scope: str) -> None:
    model = families.build(family)
    with edited(model, scope=scope):
        inputs = hooks.model_inputs(model, torch.tensor([[7]]))
        assert logits(model, inputs).isfinite().all()


def test_decay_multiplies_the_strongest_weights_of_each_position() -> None:
    module = CrossAttention(4, ["a", "b", "c", "d", "e"], heads=1, top_percent=40, decay=0.2)
    beta = torch.tensor([[[[0.1, 0.4, 0.3, 0.15, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]]])
    expected = torch.tensor([[[[0.1, 0.08, 0.06, 0.15, 0.05], [0.04] * 5]]])  # tau = 0.3; of equal weights all
    torch.testing.assert_close(module.decayed(beta), expected)
    module.renormalise = True
    torch.testing.assert_close(module.decayed(beta)[0, 0, 0], expected[0, 0, 0] / 0.44)
    module.renormalise, module.scope = False, "sequence"  # tau = 0.2: 4 of the 10, and those equal to the least
    expected = torch.tensor([[[[0.1, 0.08, 0.06, 0.15, 0.05], [0.04] * 5]]])
    torch.testing.assert_close(module.decayed(beta), expected)
    only = module.decayed(beta, torch.tensor([[True, False]]))  # the second position is padding: 2 of 5
    torch.testing.assert_close(only[0, 0, 0], expected[0, 0, 0])


def test_the_threshold_of_a_position_is_over_its_heads_and_tokens() -> None:
    module = CrossAttention(4, ["he", "she"], heads=2, top_percent=50, decay=0.5)
    beta = torch.tensor([[[[0.9, 0.1]], [[0.6, 0.4]]]])  # (1 head=2 pos=1 token=2)
    torch.testing.assert_close(module.decayed(beta), torch.tensor([[[[0.45, 0.1]], [[0.3, 0.4]]]]))


@given(
    top=st.floats(0, 100),
    decay=st.floats(0, 1),
    scope=st.sampled_from(["row", "sequence"]),
    shape=st.tuples(*(st.integers(1, n) for n in (2, 3, 4, 5))),
)
@settings(max_examples=60, deadline=None)
def test_decay_properties(top: float, decay: float, scope: str, shape: tuple[int, int, int, int]) -> None:
    _, heads, _, tokens = shape
    module = CrossAttention(heads, ["w"] * tokens, heads=heads, top_percent=top, decay=decay, scope=scope)
    beta = torch.rand(shape, generator=torch.Generator().manual_seed(3)).double()  # no two are equal
    found = module.decayed(beta)
    hit = found != beta
    rows = hit.transpose(1, 2).flatten(2) if scope == "row" else hit.flatten(1)[:, None]
    values = beta.transpose(1, 2).flatten(2) if scope == "row" else beta.flatten(1)[:, None]
    size = rows.shape[-1]
    expected = math.ceil(round(top / 100 * size, 6)) if decay < 1 else 0
    assert (rows.sum(-1) == expected).all()
    if 0 < expected < size:
        assert (values.masked_fill(~rows, 2).amin(-1) > values.masked_fill(rows, -1).amax(-1)).all()
    torch.testing.assert_close(found[hit], decay * beta[hit])


def test_without_decay_it_is_torchs_own_multi_head_attention() -> None:
    model = families.build("llama")
    with edited(model, decay=1.0, reference=["he", "she", "nurse"]) as module:
        other = nn.MultiheadAttention(32, HEADS, bias=False, batch_first=True).eval()
        with torch.no_grad():
            other.in_proj_weight.copy_(torch.cat([module.query.weight, module.key.weight, module.value.weight]))
            other.out_proj.weight.copy_(module.output.weight)
            x = torch.randn(2, 5, 32)
            states = module.reference.expand(2, -1, -1)
            mixed, weights = other(x, states, states, average_attn_weights=False)
            torch.testing.assert_close(module.weights(x, module.reference), weights)
            cross = nn.functional.layer_norm(x + mixed, (32,))  # residual, norm, FFN, norm (4.4)
            first, _, _, second = module.ffn
            cross = nn.functional.layer_norm(second(first(cross).relu()), (32,))
            final = torch.cat([x, cross], -1) @ module.fusion_map.T
            torch.testing.assert_close(module(x), final)


def test_the_reference_states_are_the_models_own() -> None:
    model, tokenizer = families.build("llama"), tiny_tokenizer()
    ids = [tokenizer.bos_token_id, *tokenizer.convert_tokens_to_ids(["he", "she", "it"])]
    with torch.no_grad():
        states = model.model(torch.tensor([ids])).last_hidden_state[0, 1:]
    with edited(model, reference=["he", "she", "it"]) as module:
        torch.testing.assert_close(module.reference, states)
        assert module.words == ("he", "she", "it")
    model = families.build("t5")  # the encoder's
    with torch.no_grad():
        states = model.encoder(torch.tensor([ids[1:3]])).last_hidden_state[0]
    with edited(model) as module:
        torch.testing.assert_close(module.reference, states)


def test_a_word_of_several_tokens_is_warned_about_and_each_token_is_a_key() -> None:
    model = families.build("llama")
    with (
        pytest.warns(UserWarning, match=r"'nonbinary' is 2 tokens \(non, ##binary\)"),
        edited(model, reference=["he", "nonbinary"]) as module,
    ):
        assert module.words == ("he", "nonbinary", "nonbinary")
        assert module.reference.shape == (3, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reference": []}, "expected a list of at least one word"),
        ({"reference": "he"}, "expected a list of at least one word"),
        ({"reference": ["he", " "]}, "expected a list of at least one word"),
        ({"reference": ["he", "xylophone"]}, "does not know 'xylophone'"),
        ({"reference": ["he", "he"]}, "'he' is named twice"),
        ({"top_percent": 101}, r"top_percent \(K\) is 101; expected 0 to 100"),
        ({"top_percent": -1}, r"top_percent \(K\) is -1"),
        ({"top_percent": math.nan}, r"top_percent \(K\) is nan"),
        ({"decay": 1.5}, r"decay \(lambda\) is 1.5; expected 0 to 1"),
        ({"heads": 5}, "heads is 5; expected a number that divides the model's width 32"),
        ({"heads": 0}, "heads is 0"),
        ({"ffn": 0}, "ffn is 0"),
        ({"scope": "batch"}, "scope is 'batch'; expected one of row, sequence"),
        ({"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_bad_input_is_an_error_by_name(options: dict[str, Any], message: str) -> None:
    model = families.build("llama")
    before = families.state(model)
    with pytest.raises(SurgeryError, match=message), edited(model, **options):
        pytest.fail("attached")
    assert families.state(model) == before


def test_models_that_it_does_not_fit() -> None:
    with pytest.raises(HookError, match="expected a Hugging Face model"), edited(nn.Linear(3, 3)):
        pytest.fail("attached")
    model = families.build("llama")
    with edited(model) as module:
        weights = cross_attention.weights_of(module)
        with pytest.raises(SurgeryError, match="has a 'cross_attention' already"), edited(model):
            pytest.fail("attached twice")
    wide = families.build("llama", hidden_size=64)
    with pytest.raises(SurgeryError, match="hidden states have width 64, the module's have 32"):
        cross_attention.attach(wide, weights)
    broken = cross_attention.Weights(weights.settings, {k: v for k, v in weights.tensors.items() if k != "norm.bias"})
    with pytest.raises(SurgeryError, match=r"'norm.bias' has shape None, expected \(32,\)"):
        cross_attention.attach(model, broken)
    assert not hasattr(wide, "cross_attention") and not hasattr(model, "cross_attention")


@pytest.mark.parametrize("family", FAMILIES)
def test_taken_out_and_put_back_it_does_the_same(family: str) -> None:
    model = families.build(family)
    batch = families.batch(model)
    plain = logits(model, batch)
    with edited(model) as module:
        wanted, weights = logits(model, batch), cross_attention.weights_of(module)
    before = families.state(model)
    with cross_attention.reattached(model, weights):
        assert torch.equal(logits(model, batch), wanted)
    with cross_attention.reattached(model, weights, scale=0.0):
        assert torch.equal(logits(model, batch), plain)
    assert families.state(model) == before
    cross_attention.attach(model, weights)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.cross_attention.fusion.weight.zero_()
    assert torch.equal(logits(twin, batch), wanted)  # a copy has a module of its own
    assert torch.equal(logits(model, batch), plain)


def test_it_takes_the_models_dtype() -> None:
    model = families.build("llama").to(torch.bfloat16)
    with edited(model) as module:
        assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
        assert logits(model, families.batch(model)).dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "bert_classifier"])
def test_live_reference_states_follow_trained_weights(family: str) -> None:
    model = families.build(family)
    batch = families.batch(model)
    before = families.state(model)

    def losses(module: nn.Module, rows: Any) -> Tensor:
        chosen = {key: value[list(rows)] for key, value in batch.items()}
        return module(**chosen).logits.square().flatten(1).mean(1)

    with adapters(model, Lora(rank=2), 0), edited(model, live=True) as module:
        start = module.reference.clone()
        names = [name for name, _ in model.named_parameters() if ".lora_" in name or name.startswith("cross_att")]
        with trainable(model, names) as parameters:
            done, far = train(model, parameters, losses, 3, Plan(1e-3, 5, 3, "adamw", dropout=True), seed=0)
            model.train()  # the stored states are those of evaluation mode all the same
            weights = cross_attention.weights_of(module)
            model.eval()
            wanted = logits(model, batch)
            merged = {name: m.get_delta_weight("default") for name, m in model.named_modules() if _is_lora(m)}
    assert done[-1] < done[0] and far.after < far.before
    assert not torch.equal(weights.tensors["reference"], start)
    assert families.state(model) == before
    with torch.no_grad():
        for name, difference in merged.items():
            model.get_submodule(name).weight += difference
    with cross_attention.reattached(model, weights):
        torch.testing.assert_close(logits(model, batch), wanted, atol=1e-4, rtol=1e-4)


def _is_lora(module: nn.Module) -> bool:
    return hasattr(module, "get_delta_weight") and hasattr(module, "base_layer")


def test_gradients_reach_the_base_through_the_reference_words_only_when_live() -> None:
    model = families.build("llama")
    word = tiny_tokenizer().convert_tokens_to_ids("she")
    ids = torch.tensor([[40, 41, 42]])
    for live in (False, True):
        with edited(model, live=live):
            model.zero_grad()
            model(ids).logits.square().sum().backward()
            reached = model.model.embed_tokens.weight.grad[word].abs().sum() > 0
        assert bool(reached) is live
    model.zero_grad()


def test_the_map_shows_the_words_that_are_asked_for() -> None:
    model, tokenizer = families.build("llama"), tiny_tokenizer()
    with edited(model) as module:
        own = cross_attention.cross_weights(model, tokenizer, "the doctor said that")
        assert own.weights.shape == (1, HEADS, 4, 2) and own.words == ("he", "she")
        torch.testing.assert_close(own.weights.sum(-1), torch.ones(1, HEADS, 4))
        after = cross_attention.cross_weights(model, tokenizer, "the doctor said that", decayed=True)
        torch.testing.assert_close(after.weights[0], module.decayed(own.weights)[0])
        with pytest.warns(UserWarning, match="2 tokens"):
            other = cross_attention.cross_weights(model, tokenizer, "the doctor", ["nurse", "nonbinary", "she"])
        assert other.words == ("nurse", "nonbinary", "she") and other.weights.shape == (1, HEADS, 2, 3)
        assert hooks.plots.cross_attention_map(own).axes
    with pytest.raises(SurgeryError, match="no cross-attention module"):
        cross_attention.cross_weights(model, tokenizer, "the doctor")


def test_sensitivity_can_be_ranked_in_the_edited_model() -> None:
    model, tokenizer = families.build("llama"), tiny_tokenizer()
    texts = ["the nurse said that", "the doctor left early"]
    plain = hooks.cross_attention(model, tokenizer, texts, ["he", "she"]).ranking()
    with edited(model):
        found = hooks.cross_attention(model, tokenizer, texts, ["he", "she"]).ranking()
    assert (found.scores == plain.scores).all()  # the module stands behind the blocks
