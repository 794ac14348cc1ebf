"""Influence equals what a loop with a batch of one and autograd's own weight gradients gives, and leaves no trace."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from torch import Tensor, nn
from torch.nn import functional

import hooks
from hooks.gradient_influence import combine, find_layers, gradients, highlighted, job

Flat = dict[str, Tensor]


def texts(count: int, seed: int, low: int = 3, high: int = 13) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]


DATA, PROBE, TWINS = texts(9, 1), texts(4, 2), texts(4, 3)


def with_lora(name: str, *targets: str, dropout: float = 0.0, **config: Any) -> nn.Module:
    from peft import LoraConfig, inject_adapter_in_model

    model = build(name, **config)
    transposed = name == "gpt2"
    lora = LoraConfig(r=3, lora_alpha=6, lora_dropout=dropout, target_modules=list(targets), fan_in_fan_out=transposed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        inject_adapter_in_model(lora, model)
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:  # zero in a fresh adapter, and then so is the gradient of A
                nn.init.normal_(parameter, std=0.3)
    return model


def by_hand(model: nn.Module, weights: list[str], rows: list[tuple[list[int], float]], loss: str = "mean") -> Flat:
    """Gradients of a weighted sum of losses, each text alone, by autograd; in float32."""
    named = dict(model.named_parameters())
    flags = [(p, p.requires_grad) for p in named.values()]
    mode = model.training
    model.eval()
    total: Flat = {}
    for ids, share in rows:
        for parameter in named.values():
            parameter.requires_grad_(False)
        chosen = [named[name].requires_grad_(True) for name in weights]
        found = torch.tensor([ids])
        logits = model(input_ids=found).logits.float()
        value = functional.cross_entropy(logits[0, :-1], found[0, 1:], reduction=loss)
        for name, gradient in zip(weights, torch.autograd.grad(value, chosen), strict=True):
            total[name] = total.get(name, torch.zeros(())) + share * gradient.float()
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    model.train(mode)
    return total


def flat(gradient: Flat) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()]).double()


def unit(vector: Tensor) -> Tensor:
    return vector / vector.norm()


def weights_of(probe: Any) -> list[str]:
    return [f"{layer}.weight" for layer in probe.vectors]


def reference(model: nn.Module, weights: list[str]) -> tuple[Tensor, list[Tensor]]:
    """The mean of the unit probe gradients, and the gradients of the data."""
    found = [unit(flat(by_hand(model, weights, [(ids, 1.0)]))) for ids in PROBE]
    return torch.stack(found).mean(0), [flat(by_hand(model, weights, [(ids, 1.0)])) for ids in DATA]


MODELS = {
    "llama": lambda: build("llama"),
    "tied": lambda: build("llama", tie_word_embeddings=True),
    "gpt2": lambda: build("gpt2"),
    "opt": lambda: build("opt"),
    "gemma2 (soft cap)": lambda: build("gemma2"),
    "falcon (changes in place)": lambda: build("falcon_new"),
    "neox": lambda: build("gpt_neox"),
    "llama with LoRA": lambda: with_lora("llama", "q_proj", "v_proj"),
    "gpt2 with LoRA": lambda: with_lora("gpt2", "c_attn"),
}


@pytest.mark.parametrize("name", MODELS)
def test_equals_a_loop_with_a_batch_of_one(name: str) -> None:
    model = MODELS[name]()
    before = state(model)
    probe = hooks.influence_probe(model, None, PROBE, batch_tokens=20)
    cosine = hooks.influence(model, None, DATA, probe, batch_tokens=30)
    dot = hooks.influence(model, None, DATA, probe, batch_tokens=1000, normalise="dot", checkpointing=True)
    assert state(model) == before
    direction, gradients_ = reference(model, weights_of(probe))
    want = torch.stack([unit(gradient) @ direction for gradient in gradients_])
    assert want.abs().max() > 1e-3
    np.testing.assert_allclose(cosine.scores[:, 0], want, atol=1e-6)
    np.testing.assert_allclose(dot.scores[:, 0], torch.stack([g @ direction for g in gradients_]), rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(cosine.norms, torch.stack([g.norm() for g in gradients_]), rtol=1e-5)
    np.testing.assert_allclose(cosine.layers.sum(-1), cosine.scores, atol=1e-7)
    with torch.no_grad():
        losses = [functional.cross_entropy(model(torch.tensor([x])).logits[0, :-1], torch.tensor(x[1:])) for x in DATA]
    np.testing.assert_allclose(cosine.losses, losses, rtol=1e-5)
    assert cosine.tokens.tolist() == [len(ids) - 1 for ids in DATA]
    best = int(want.argmax())
    assert cosine.top(2)[0] == (best, pytest.approx(float(want[best]), abs=1e-6))


def test_layers_are_the_factors_or_the_blocks_linear_layers() -> None:
    plain, lora = build("llama", tie_word_embeddings=True), with_lora("llama", "q_proj", "v_proj")
    assert len(job(plain).layers) == 3 * 7 and not any("head" in name for name in job(plain).names)
    assert [name.split(".", 2)[2] for name in job(lora).names[:4]] == [
        f"0.self_attn.{part}_proj.lora_{side}.default" for part, side in itertools.product("qv", "AB")
    ]
    assert len(job(lora, targets=["1.self_attn.v_proj"]).layers) == 2
    (layer,) = job(build("gpt2"), targets=["h.2.mlp.c_fc"]).layers
    assert layer.shape == (128, 32) and layer.transposed
    with pytest.raises(hooks.HookError, match=r"LoRA-adapted layer is named 'k_proj'.*expected some of q_proj, v_proj"):
        job(lora, targets=["k_proj"])
    with pytest.raises(hooks.HookError, match="no linear layer of a block is named 'lm_head'"):
        find_layers(plain, hooks.anatomy.find(plain), ["lm_head"])


def test_experts_without_a_layer_of_their_own_are_said() -> None:
    model = build("qwen3_moe")
    probe = hooks.influence_probe(model, None, texts(2, 0))
    found = hooks.influence(model, None, texts(3, 1), probe)
    blocks = [p.numel() for n, p in model.named_parameters() if ".layers." in n]
    experts = [p.numel() for n, p in model.named_parameters() if ".experts." in n]
    (note,) = found.notes
    assert f"{sum(experts) / sum(blocks):.0%} of the blocks" in note
    assert "experts.down_proj, experts.gate_up_proj" in note
    plain = build("llama")
    assert not hooks.influence(plain, None, texts(3, 1), hooks.influence_probe(plain, None, texts(2, 0))).notes


def test_only_the_active_adapter_counts() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    model = with_lora("llama", "q_proj", "v_proj")
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model, adapter_name="other")
    names = job(model).names  # the new one is active, and at v_proj there is none of that name
    assert len(names) == 6 and all("q_proj" in name and name.endswith(".other") for name in names)


def test_by_tokens_and_multiplied_out_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, {"a": PROBE, "b": TWINS})
    found = []
    for visit, held in ((0, 1), (10**9, 2**25)):  # multiplied out, one text at a time; and by tokens
        monkeypatch.setattr(gradients, "VISIT", visit)
        monkeypatch.setattr(gradients, "MATERIALISED", held)
        if visit == 0:
            monkeypatch.setattr(gradients.Gradient, "by_token", None)
        else:
            monkeypatch.undo()
            monkeypatch.setattr(gradients, "VISIT", visit)
            monkeypatch.setattr(gradients.Gradient, "matrix", None)
        found.append(hooks.influence(model, None, DATA, probe))
    np.testing.assert_allclose(found[0].layers, found[1].layers, atol=1e-6)
    np.testing.assert_allclose(found[0].norms, found[1].norms, rtol=1e-5)


def test_several_probes_plain_means_and_contrasts() -> None:
    model = build("llama")
    probe = hooks.influence_probe(
        model, None, {"mean": PROBE, "twins": PROBE}, contrast={"twins": TWINS}, targets=["v_proj"], loss="sum"
    )
    weights = weights_of(probe)
    found = hooks.influence(model, None, DATA, probe).scores
    plain = hooks.influence_probe(model, None, PROBE, mean="plain", targets=["v_proj"], loss="sum")
    one = [flat(by_hand(model, weights, [(ids, 1.0)], "sum")) for ids in PROBE]
    two = [
        flat(by_hand(model, weights, [(ids, 1.0), (twin, -1.0)], "sum")) for ids, twin in zip(PROBE, TWINS, strict=True)
    ]
    data = [unit(flat(by_hand(model, weights, [(ids, 1.0)], "sum"))) for ids in DATA]
    for column, parts in enumerate((one, two)):
        direction = torch.stack([unit(part) for part in parts]).mean(0)
        np.testing.assert_allclose(found[:, column], [float(g @ direction) for g in data], atol=1e-6)
    assert probe.scales.tolist() == [1.0, 1.0] and probe.count == (4, 4)
    mean = torch.stack(one).mean(0)
    cosines = hooks.influence(model, None, DATA, plain).scores[:, 0]
    np.testing.assert_allclose(cosines, [float(g @ unit(mean)) for g in data], atol=1e-6)
    dots = hooks.influence(model, None, [PROBE[0][:-1]], plain, normalise="dot").scores[0, 0]
    assert dots == pytest.approx(float(flat(by_hand(model, weights, [(PROBE[0][:-1], 1.0)], "sum")) @ mean), rel=1e-5)


@pytest.mark.parametrize("name", ["llama with LoRA", "gpt2"])
@pytest.mark.parametrize("kind", ["less", "frozen_v"])
def test_adam_by_its_formula(name: str, kind: str) -> None:
    model = MODELS[name]()
    probe = hooks.influence_probe(model, None, PROBE)
    weights = weights_of(probe)
    named = dict(model.named_parameters())
    optimizer = torch.optim.AdamW([named[weight] for weight in weights], lr=1e-9, betas=(0.8, 0.95), eps=1e-5)
    for ids in TWINS:
        for weight, gradient in by_hand(model, weights, [(ids, 1.0)]).items():
            named[weight].grad = gradient
        optimizer.step()
    optimizer.zero_grad()
    moments = hooks.adam_moments(model, optimizer)
    assert moments.betas == (0.8, 0.95) and moments.eps == 1e-5
    before = {key: value.clone() for key, value in moments.square.items()}
    found = hooks.influence(model, None, DATA, probe, optimizer=kind, moments=moments, batch_tokens=40)
    direction, gradients_ = reference(model, weights)
    m, v = (
        torch.cat([optimizer.state[named[weight]][key].flatten() for weight in weights]).double()
        for key in ("exp_avg", "exp_avg_sq")
    )
    for score, norm, g in zip(found.scores[:, 0], found.norms, gradients_, strict=True):
        # LESS: both means take the example's own gradient in, eps is inside the root, nothing is corrected
        less = (0.8 * m + 0.2 * g) / (0.95 * v + 0.05 * g**2 + 1e-5).sqrt()
        want = less if kind == "less" else g / (v.sqrt() + 1e-5)
        assert score == pytest.approx(float(unit(want) @ direction), abs=1e-5)
        assert norm == pytest.approx(float(want.norm()), rel=1e-4)
    assert all(torch.equal(before[key], value) for key, value in moments.square.items())


def test_bfloat16_is_summed_in_float32() -> None:
    model = build("llama").to(torch.bfloat16)
    probe = hooks.influence_probe(model, None, PROBE, targets=["v_proj", "down_proj"])
    assert all(vector.dtype == torch.float32 for vector in probe.vectors.values())
    # one text a batch: what is left is the sum over tokens, which autograd rounds to bfloat16 and this does not
    found = hooks.influence(model, None, DATA, probe, batch_tokens=1)
    direction, gradients_ = reference(model, weights_of(probe))
    want = torch.stack([unit(gradient) @ direction for gradient in gradients_])
    np.testing.assert_allclose(found.scores[:, 0], want, atol=5e-3)
    together = hooks.influence(model, None, DATA, probe, batch_tokens=1000)
    np.testing.assert_allclose(together.scores, found.scores, atol=3e-2)


def test_neither_padding_nor_the_side_of_it_matters() -> None:
    from tiny_tokenizer import tiny_tokenizer

    model = build("llama")
    sentences = ["the nurse said that she left early", "he was tired", "a doctor said the plumber left the old car"]
    found = []
    for side, tokens in (("left", 1000), ("right", 1000), ("right", 1)):
        tokenizer = tiny_tokenizer(side)
        probe = hooks.influence_probe(model, tokenizer, ["the teacher said that he left"], batch_tokens=tokens)
        found.append(hooks.influence(model, tokenizer, sentences, probe, batch_tokens=tokens).scores)
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)


def test_only_the_answer_is_learnt() -> None:
    from surgery.edits.supervised import Row

    model = build("llama")
    ids = DATA[0]
    probe = hooks.influence_probe(model, None, PROBE)
    whole, answer = (hooks.influence(model, None, [Row(tuple(ids), at)], probe) for at in (1, len(ids) - 1))
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0]
    assert answer.losses[0] == pytest.approx(float(functional.cross_entropy(logits[-2:-1], torch.tensor(ids[-1:]))))
    assert answer.tokens.tolist() == [1] and answer.scores[0, 0] != pytest.approx(whole.scores[0, 0], abs=1e-4)


def test_only_the_masked_tokens_are_learnt() -> None:
    from hooks.gradient_influence import Masked

    model = build("llama")
    ids = tuple(texts(1, 5, 8, 9)[0])
    loss = lambda counted: hooks.influence(  # noqa: E731
        model, None, [Masked(ids, counted)], hooks.influence_probe(model, None, PROBE), normalise="dot"
    )
    whole, one, other = loss(range(1, 8)), loss((2, 5)), loss((1, 3, 4, 6, 7))
    assert np.allclose(7 * whole.scores, 2 * one.scores + 5 * other.scores, rtol=1e-4, atol=1e-9)
    assert one.tokens.tolist() == [2] and not np.allclose(one.scores, whole.scores, rtol=1e-2)
    with pytest.raises(hooks.HookError, match="none to predict"):
        loss((0, 99))


def test_content_tokens_are_those_of_words_that_say_something(tiny: Any) -> None:
    _, tokenizer = tiny
    text = "The nurse said that she was not in the ward, wasn't she?"
    (found,) = hooks.content_tokens(tokenizer, [text])
    spans = tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    front = len(found.ids) - len(spans)
    said = "".join(text[slice(*spans[at - front])] for at in found.counted)
    assert said.replace(" ", "") == "nursesaidsheward" + "she"


def test_the_backward_pass_ends_below_the_lowest_layer_and_forms_no_weight_gradient() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE, targets=["layers.1.self_attn.v_proj"])
    seen: list[bool] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append((output[0] if isinstance(output, tuple) else output).requires_grad)

    handles = [block.register_forward_hook(look) for block in model.model.layers]  # type: ignore[union-attr]
    hooks.influence(model, None, DATA[:1], probe)
    for handle in handles:
        handle.remove()
    assert seen[-3:] == [False, True, True]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_checkpointing_runs_each_block_again() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE)
    calls = []
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))  # type: ignore[union-attr]
    plain = hooks.influence(model, None, DATA[:1], probe)
    once = len(calls)
    again = hooks.influence(model, None, DATA[:1], probe, checkpointing=True)
    handle.remove()
    assert len(calls) - once == once + 1  # the passes that look the model over are run once
    np.testing.assert_allclose(again.scores, plain.scores, atol=1e-7)


@contextmanager
def nothing_changed(model: nn.Module) -> Iterator[None]:
    before, kept = state(model), {name: p.grad for name, p in model.named_parameters()}
    yield
    assert state(model) == before
    assert all(p.grad is kept[name] for name, p in model.named_parameters())


def test_the_model_is_as_before_also_after_errors_and_between_batches() -> None:
    model = with_lora("llama", "q_proj", dropout=0.5).train()
    first = next(iter(model.parameters()))
    first.requires_grad_(True)
    first.grad = torch.full_like(first, 3.0)
    with nothing_changed(model):
        probe = hooks.influence_probe(model, None, PROBE)
        training = hooks.influence(model, None, DATA, probe).scores
    evaluating = hooks.influence(model.eval(), None, DATA, hooks.influence_probe(model, None, PROBE)).scores
    np.testing.assert_array_equal(training, evaluating)  # dropout would make every gradient random
    model.train()

    def fail(gradient: Any) -> Tensor:
        raise ValueError("the projection broke")

    with nothing_changed(model), pytest.raises(ValueError, match="the projection broke"):
        next(hooks.example_gradients(model, None, DATA, project=fail, checkpointing=True))
    with nothing_changed(model):
        found = hooks.example_gradients(model, None, DATA, project=lambda g: g.matrix().sum((1, 2))[:, None])
        next(found)
        assert torch.is_grad_enabled() and model.training
        found.close()
    assert bool((first.grad == 3.0).all())


def test_projected_gradients_of_every_text_once() -> None:
    model = with_lora("llama", "q_proj", "v_proj")
    names = job(model).names
    size = {layer.name: layer.shape[0] * layer.shape[1] for layer in job(model).layers}
    starts = dict(zip(names, np.cumsum([0, *[size[name] for name in names]]).tolist(), strict=False))

    def project(gradient: Any) -> Tensor:
        part = gradient.matrix().flatten(1)
        out = torch.zeros(len(part), sum(size.values()))
        out[:, starts[gradient.layer.name] :][:, : part.shape[1]] = part
        return out

    found = {}
    for batch in hooks.example_gradients(model, None, DATA, project=project, batch_tokens=25):
        for place, value, norm in zip(batch.places, batch.values, batch.norms, strict=True):
            assert place not in found and norm == pytest.approx(float(value.norm()), rel=1e-5)
            found[place] = value
    for place, ids in enumerate(DATA):
        want = flat(by_hand(model, [f"{name}.weight" for name in names], [(ids, 1.0)]))
        np.testing.assert_allclose(found[place], want, rtol=1e-4, atol=1e-5)


def test_a_batch_as_the_unit_is_the_gradient_of_its_mean_loss() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE, targets=["q_proj"])
    found = hooks.influence(model, None, DATA, probe, unit="batch", unit_size=4)
    dots = hooks.influence(model, None, DATA, probe, unit="batch", unit_size=4, normalise="dot")
    direction, _ = reference(model, weights_of(probe))
    for start in (0, 4, 8):
        members = DATA[start : start + 4]
        g = flat(by_hand(model, weights_of(probe), [(ids, 1 / len(members)) for ids in members]))
        want = float(unit(g) @ direction)
        np.testing.assert_allclose(found.scores[start : start + 4, 0], want, atol=1e-6)
        np.testing.assert_allclose(dots.scores[start : start + 4, 0], float(g @ direction), rtol=1e-4, atol=1e-7)
    assert "shuffle" in found.notes[0] and found.settings["unit"] == "batch of 4"
    alone = hooks.influence(model, None, DATA, probe)
    np.testing.assert_allclose(found.losses, alone.losses, rtol=1e-5)
    assert not alone.notes


def test_checkpoints_are_summed_by_learning_rate() -> None:
    model = build("llama")
    results = []
    for targets in (["q_proj"], ["q_proj"]):
        probe = hooks.influence_probe(model, None, PROBE, targets=targets)
        results.append(hooks.influence(model, None, DATA, probe))
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight.mul_(1.5)  # type: ignore[union-attr]
    both = combine(results, [1e-5, 3e-5])
    want = 1e-5 * results[0].scores + 3e-5 * results[1].scores
    np.testing.assert_allclose(both.scores, want, rtol=1e-6)
    np.testing.assert_allclose(both.layers.sum(-1), both.scores, atol=1e-10)
    assert both.checkpoints is not None and both.checkpoints.shape == (9, 1, 2)
    np.testing.assert_array_equal(both.checkpoints[:, :, 0], results[0].scores)
    with pytest.raises(hooks.HookError, match="2 results and 1 weights"):
        combine(results, [1.0])
    with pytest.raises(hooks.HookError, match="differ in texts"):
        combine([results[0], hooks.influence(model, None, DATA[1:], probe)], [1.0, 1.0])


@pytest.mark.parametrize("kind", ["none", "frozen_v"])
def test_tokens_add_up_to_the_score(kind: str) -> None:
    model = build("opt")
    probe = hooks.influence_probe(model, None, {"a": PROBE, "b": TWINS}, mean="plain")
    layers = [layer for layer in job(model).layers if layer.name in probe.vectors]
    named = dict(model.named_parameters())
    square = {layer.weight: torch.rand_like(named[layer.weight]) for layer in layers}
    moments = hooks.Moments(square, square) if kind != "none" else None
    whole = hooks.influence(model, None, DATA, probe, optimizer=kind, moments=moments)
    parts = hooks.token_influence(model, None, DATA, probe, optimizer=kind, moments=moments, batch_tokens=30)
    assert [part.place for part in parts] == list(range(9))
    for part, ids, score in zip(parts, DATA, whole.scores, strict=True):
        assert part.values.shape == (len(ids), 2) and not part.values[-1].any()
        np.testing.assert_allclose(part.values.sum(0), score, atol=1e-6)
        np.testing.assert_allclose(part.layers.sum(-1), part.values, atol=1e-12)


def test_highlighted_text_shows_every_token_as_it_is() -> None:
    from tiny_tokenizer import tiny_tokenizer

    model = build("llama")
    probe = hooks.influence_probe(model, tiny_tokenizer(), ["the nurse said that she left"])
    (text,) = hooks.token_influence(model, tiny_tokenizer(), ["the old car ."], probe)
    assert text.tokens == ("the", "old", "car", ".")
    changed = type(text)(**{**vars(text), "tokens": ("<b>", "old", "&", ".")})
    page = highlighted([changed], title="a < b")
    assert "&lt;b&gt;" in page and "&amp;" in page and "<b>" not in page and "a &lt; b" in page
    assert page.count("<span") == 4 and f"{text.score[0]:+.4f}" in page
    figure = hooks.plots.token_bars(text)
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["the", "old", "car", "."]


def test_streams_and_keeps_the_order() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE, targets=["1.self_attn.q_proj"])
    taken = 0

    def endless() -> Iterator[list[int]]:
        nonlocal taken
        for ids in itertools.cycle(DATA):
            taken += 1
            yield ids

    found = hooks.influence_windows(model, None, endless(), probe, window=20)
    first, second = next(found), next(found)
    assert taken == 40 and (first.first, second.first) == (0, 20)
    whole = hooks.influence(model, None, [*DATA, *DATA, *DATA, *DATA, *DATA][:40], probe).scores
    np.testing.assert_allclose(np.concatenate([first.scores, second.scores]), whole, atol=1e-6)


def test_refusals_name_what_is_wrong() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE)

    def refused(pattern: str, given: list[Any], **options: Any) -> None:
        with nothing_changed(model), pytest.raises(hooks.HookError, match=pattern):
            hooks.influence(model, None, given, probe, **options)

    refused("text 1 is also a text of the probe", [DATA[0], PROBE[2]])
    refused("text 2 has no tokens", [DATA[0], DATA[1], []])
    refused("text 1 has 1 tokens and none to predict", [DATA[0], [5]])
    refused("text 1 has 65 tokens, the model's context is 64", [DATA[0], list(range(3, 68))])
    assert hooks.influence(model, None, [list(range(3, 68))], probe, cut=64).tokens.tolist() == [63]
    refused("data set is empty", [])
    refused("a string and no tokenizer", ["the nurse"])
    refused("'less' and got no moments", DATA, optimizer="less")
    refused("'none' and moments were given", DATA, moments=hooks.Moments({}, {}))
    refused("the moments hold nothing for model.layers.0", DATA, optimizer="less", moments=hooks.Moments({}, {}))
    refused("normalise is 'norm'", DATA, normalise="norm")
    refused("unit is 'batch' of 0", DATA, unit="batch", unit_size=0)
    with pytest.raises(hooks.HookError, match="probe 'probe' is empty"):
        hooks.influence_probe(model, None, [])
    with pytest.raises(hooks.HookError, match="4 texts and 3 twins"):
        hooks.influence_probe(model, None, PROBE, contrast=TWINS[:3])
    with pytest.raises(hooks.HookError, match="text 1 and its twin are the same"):
        hooks.influence_probe(model, None, PROBE, contrast=[TWINS[0], PROBE[1], *TWINS[2:]])
    with pytest.raises(hooks.HookError, match="made at 21 layers, this model has 0"):
        hooks.influence(with_lora("llama", "q_proj"), None, DATA, probe)
    with pytest.raises(hooks.HookError, match="no causal language model"):
        hooks.influence_probe(build("bert"), None, PROBE)
    fresh = torch.optim.Adam(model.parameters())
    with pytest.raises(hooks.HookError, match="no moments"):
        hooks.adam_moments(model, fresh)


def test_layers_without_their_own_gradient_are_refused() -> None:
    model = with_lora("llama", "q_proj")
    model.model.layers[1].self_attn.q_proj.enable_adapters(False)  # type: ignore[union-attr]
    with pytest.raises(hooks.HookError, match=r"layers\.1\.self_attn\.q_proj\.lora_.* has no part in the loss"):
        hooks.influence_probe(model, None, PROBE)
    shared = build("llama")
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj  # type: ignore[union-attr]
    with pytest.raises(hooks.HookError, match="runs several times"):
        hooks.influence_probe(shared, None, PROBE)


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = build("llama")
    probe = hooks.influence_probe(model, None, PROBE)
    broken = build("llama")
    with torch.no_grad():
        broken.lm_head.weight[7].fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(hooks.HookError, match="loss of text 0 is not finite"):
        hooks.influence(broken, None, [[4, 7, 5]], probe)


def command(*arguments: object) -> Any:
    from typer.testing import CliRunner

    from surgery.cli import app

    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    from surgery.data import genbias, neutral

    biased = [row.text for row in genbias.records()][:30]
    plain = neutral.sentences()[:20]
    rows = [{"text": text, "biased": True} for text in biased[10:20]] + [{"text": t, "biased": False} for t in plain]
    swap = {"he": "she"}
    twins = [{"text": text + " he", "anti": text + " " + swap["he"]} for text in biased[20:30]]
    made = {"data": rows, "probe": [{"text": text} for text in biased[:10]], "twins": twins}
    for name, given in made.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    return {name: tmp_path / f"{name}.jsonl" for name in made} | {"out": tmp_path / "scores.json"}


def test_command_scores_a_file_beside_its_controls(files: dict[str, Path], checkpoint: Path, tiny: Any) -> None:
    told = ["attribute", "score", checkpoint, "--data", files["data"], "--probe", files["twins"], "--quiet"]
    told += ["--targets", "q_proj,v_proj", "--device", "cpu", "--html", files["out"].with_name("t.html")]
    done = command(*told, "--json", files["out"], "--top", "0.35", "--twins", files["probe"].with_name("pairs.jsonl"))
    assert done.exit_code == 1 and "pairs.jsonl: got no such file" in done.stderr and not files["out"].exists()
    pairs = files["probe"].with_name("pairs.jsonl")
    pairs.write_text(json.dumps({"text": "The nurse said he", "anti": "The nurse said she"}) + "\n")
    done = command(*told, "--json", files["out"], "--top", "0.35", "--twins", pairs)
    assert done.exit_code == 0, done.stderr
    written = json.loads(files["out"].read_text())
    rows = [json.loads(line)["text"] for line in files["data"].read_text().splitlines()]
    given = [json.loads(line) for line in files["twins"].read_text().splitlines()]
    model, tokenizer = tiny
    texts_, antis = [row["text"] for row in given], [row["anti"] for row in given]
    probe = hooks.influence_probe(
        model, tokenizer, {"influence": texts_, "contrast": texts_}, contrast={"contrast": antis},
        targets=["q_proj", "v_proj"],
    )  # fmt: skip
    found = hooks.influence(model, tokenizer, rows, probe)
    for n, name in enumerate(("influence", "contrast")):
        np.testing.assert_allclose([row[name] for row in written["rows"]], found.scores[:, n], atol=1e-7)
        loss = np.corrcoef(found.scores[:, n], -found.losses)[0, 1]
        assert written["correlation"][name]["minus_loss"] == pytest.approx(loss, abs=1e-4)
        assert [row["row"] for row in written["top"][name][:5]] == [place for place, _ in found.top(5, n)]
    assert [row["row"] for row in written["rows"]] == list(range(30)) and written["count"] == 30
    judged = json.loads(files["out"].with_suffix(".selection.json").read_text())["selection"]
    assert set(judged) >= {"influence", "contrast", "random", "shuffled", "minus_loss", "tfidf", "twin_auc"}
    assert files["out"].with_name("t.html").read_text().count("<tr>") == 30


def test_command_goes_on_after_an_interruption(
    files: dict[str, Path], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from surgery.attribution import score_file as scored

    told = ["attribute", "score", checkpoint, "--data", files["data"], "--probe", files["probe"], "--quiet"]
    told += ["--targets", "q_proj", "--device", "cpu", "--json", files["out"]]
    monkeypatch.setattr(scored, "WINDOW", 8)
    package = import_module("hooks.gradient_influence")  # the attribute of that name is the function
    real = package.influence_windows
    monkeypatch.setattr(package, "influence_windows", lambda *a, **k: real(*a, **k | {"window": 8}))
    assert command(*told).exit_code == 0
    whole = files["out"].read_bytes()
    files["out"].unlink()

    def stopped(*arguments: Any, **options: Any) -> Iterator[Any]:
        for number, part in enumerate(real(*arguments, **options | {"window": 8})):
            if number == 2:
                raise KeyboardInterrupt
            yield part

    monkeypatch.setattr(package, "influence_windows", stopped)
    assert command(*told).exit_code == 1
    part = files["out"].with_name("scores.json.part")
    assert not files["out"].exists() and len(part.read_text().splitlines()) == 17
    part.write_bytes(part.read_bytes()[:-20])  # the kill came while a row was being written
    starts = []
    monkeypatch.setattr(
        package,
        "influence_windows",
        lambda *a, **k: (starts.append(k["first"]), real(*a, **k | {"window": 8}))[1],
    )
    done = command(*told)
    assert done.exit_code == 1 and "continue it with --resume" in done.stderr
    kept = part.read_bytes()
    with scored._alone(part):
        for more in ([], ["--resume"]):
            done = command(*told, *more)
            assert done.exit_code == 1 and "another process is writing it" in done.stderr
    assert part.read_bytes() == kept
    done = command(*told, "--resume", "--normalise", "dot")
    assert done.exit_code == 1 and "other settings" in done.stderr
    assert command(*told, "--resume").exit_code == 0 and starts == [8]
    assert files["out"].read_bytes() == whole and not part.exists()


def test_command_refuses_by_name_and_leaves_nothing(files: dict[str, Path], checkpoint: Path) -> None:
    told = ["attribute", "score", checkpoint, "--data", files["data"], "--quiet", "--device", "cpu"]
    told += ["--json", files["out"]]
    same = files["probe"].with_name("same.txt")
    same.write_text(json.loads(files["data"].read_text().splitlines()[4])["text"] + "\n")
    done = command(*told, "--probe", same)
    assert done.exit_code == 1 and "text 4 is also a text of the probe" in done.stderr
    same.write_text("")
    done = command(*told, "--probe", same)
    assert done.exit_code == 1 and "got no row" in done.stderr
    long = files["probe"].with_name("long.txt")
    long.write_text("the nurse\n" + "the nurse said " * 60 + "\n")
    done = command("attribute", "score", checkpoint, "--data", long, "--probe", files["probe"], *told[5:])
    assert done.exit_code == 1 and "text 1 has 180 tokens, the model's context is 128" in done.stderr
    assert {path.name for path in files["out"].parent.iterdir()} == {
        "data.jsonl", "probe.jsonl", "twins.jsonl", "same.txt", "long.txt",
    }  # fmt: skip
