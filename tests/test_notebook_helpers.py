"""What a notebook asks for: every head's ablation, steering, chats, a generation's activations, others' views."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from letters import letters

import hooks
from hooks.errors import HookError

PROMPTS = ["abca", "bcab", "cc"]


@pytest.fixture(scope="module")
def opened() -> tuple[Any, Any]:
    return build("gpt2").eval(), letters(bos=False)


def logits(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        return model(input_ids=ids).logits[0]


def test_every_head_is_ablated_as_by_hand(opened: Any) -> None:
    """One head by a forward hook on the matrix behind it, with the mean taken from the same matrix's inputs."""
    model, tokenizer = opened
    before = state(model)
    a, b = (tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in "ab")
    found = hooks.ablate_heads(model, tokenizer, PROMPTS, (a, b))
    assert state(model) == before and found.unit == "head" and found.count == 3
    blocks, heads = len(hooks.anatomy.find(model).blocks), hooks.anatomy.find(model).blocks[0].n_heads
    assert found.scores.shape == (blocks, heads)
    writer, head, width = model.transformer.h[1].attn.c_proj, 1, model.config.n_embd // heads
    seen: list[torch.Tensor] = []
    handle = writer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    base = [logits(model, tokenizer, text)[-1] for text in PROMPTS]
    handle.remove()
    cut = slice(head * width, (head + 1) * width)
    mean = torch.cat([stream[1:, cut] for stream in seen]).mean(0)

    def flat(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[:, 1:, cut] = mean
        return (z, *args[1:])

    handle = writer.register_forward_pre_hook(flat)
    after = [logits(model, tokenizer, text)[-1] for text in PROMPTS]
    handle.remove()
    change = [abs(float((n[a] - n[b]) - (o[a] - o[b]))) for n, o in zip(after, base, strict=True)]
    assert found.scores[1, head] == pytest.approx(np.mean(change), rel=1e-4)
    assert hooks.plots.head_map(found).axes


def test_steering_is_a_hook_and_the_same_as_a_bias(opened: Any) -> None:
    model, tokenizer = opened
    before = state(model)
    found = hooks.steering_vector(model, tokenizer, ["ab", "cab"], ["ba"], 1)
    streams = []
    for text in ("ab", "cab", "ba"):
        with hooks.capture(model, "blocks.1.hook_resid_post", positions="last") as store:
            logits(model, tokenizer, text)
        streams.append(store["blocks.1.hook_resid_post"][0])
    assert torch.allclose(found.vector, (streams[0] + streams[1]) / 2 - streams[2], atol=1e-5)
    plain = logits(model, tokenizer, "abca")
    with found.added(model, 2.0):
        steered = logits(model, tokenizer, "abca")
    assert state(model) == before and not torch.allclose(steered, plain, atol=1e-3)
    ((name, difference),) = found.differences(model, 2.0).items()
    parameter = dict(model.named_parameters())[name]
    with torch.no_grad():
        parameter += difference
        as_bias = logits(model, tokenizer, "abca")
        parameter -= difference
    assert torch.allclose(as_bias, steered, atol=1e-4)
    with pytest.raises(HookError, match=r"has no bias .*Llama.*use Steering\.added"):
        found.differences(build("llama"))
    with pytest.raises(HookError, match="block 99; the model has 0 to"):
        hooks.steering_vector(model, tokenizer, ["ab"], ["ba"], 99)


def test_a_chat_becomes_a_prompt(opened: Any) -> None:
    tokenizer = opened[1]
    with pytest.raises(HookError, match="has no chat template"):
        hooks.chat(tokenizer, "ab")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    try:
        assert hooks.chat(tokenizer, "ab", answer="c") == "ab|>c"
        assert hooks.chat(tokenizer, [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}]) == "a|b|>"
    finally:
        tokenizer.chat_template = None


def test_a_generation_s_activations_are_those_of_its_steps(opened: Any) -> None:
    model, tokenizer = opened
    before = state(model)
    found = hooks.capture_generation(model, tokenizer, "abc", "blocks.1.hook_resid_post", max_new_tokens=4)
    assert state(model) == before and len(found.tokens) == found.prompt + 4 == 7
    stream = found.activations["blocks.1.hook_resid_post"]
    assert stream.shape == (7, model.config.n_embd)
    for length in (3, 5):  # what a step saw: the text up to it alone, and the token that it chose
        with hooks.capture(model, "blocks.1.hook_resid_post", positions="last") as store, torch.no_grad():
            out = model(input_ids=torch.tensor([found.tokens[:length]])).logits[0, -1]
        assert torch.allclose(store["blocks.1.hook_resid_post"][0], stream[length - 1], atol=1e-5)
        assert int(out.argmax()) == found.tokens[length]
    with pytest.raises(HookError, match="does not go on with its prompt"):
        hooks.capture_generation(build("t5"), tokenizer, "abc", "decoder_blocks.1.hook_resid_post")


def test_the_attention_view_gets_tokens_and_patterns(opened: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = opened
    monkeypatch.setitem(sys.modules, "circuitsvis", None)
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", None)
    with pytest.raises(HookError, match="pip install circuitsvis"):
        hooks.attention_view(model, tokenizer, "abc", 1)
    viewer = ModuleType("circuitsvis.attention")
    viewer.attention_heads = lambda **given: given  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "circuitsvis.attention", viewer)
    given = hooks.attention_view(model, tokenizer, "abc", 1)
    assert given["tokens"] == ["a", "b", "c"]
    assert given["attention"].shape[1:] == (3, 3) and torch.allclose(given["attention"].sum(-1), torch.ones(1))


def test_features_of_an_autoencoder_are_those_of_the_last_token(opened: Any) -> None:
    model, tokenizer = opened
    torch.manual_seed(0)
    weight = torch.randn(model.config.n_embd, 12)
    sae = SimpleNamespace(encode=lambda x: (x @ weight).relu())
    (found,) = hooks.sae_features(model, tokenizer, ["abc"], sae, "blocks.1.hook_resid_post", top=3)
    with hooks.capture(model, "blocks.1.hook_resid_post", positions="last") as store:
        logits(model, tokenizer, "abc")
    features = (store["blocks.1.hook_resid_post"][0] @ weight).relu()
    assert [n for n, _ in found] == features.topk(3).indices.tolist()
    assert [v for _, v in found] == pytest.approx(features.topk(3).values.tolist(), rel=1e-4)
    wrong = SimpleNamespace(encode=lambda x: x @ torch.randn(7, 2))
    with pytest.raises(HookError, match=r"does not take blocks\.1\.hook_resid_post of width"):
        hooks.sae_features(model, tokenizer, ["abc"], wrong, "blocks.1.hook_resid_post")
