"""hooks.gain: gradients as autograd gives them, a small case by hand, and a model left as it was."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hooks
from benchmarks import which_block
from hooks.errors import HookError
from hooks.gain_rankings import Gain, Place
from hooks.gradient_sketch import Squares
from hooks.natural_gain import GainConfig, Objective, find_places
from surgery.data.pairs import Pair
from surgery.edits.equalize import losses_of, prepare, words_term
from surgery.errors import SurgeryError
from surgery.locate.gain import auto_part, auto_ranking, fitting, rank_by_gain
from surgery.locate.objectives import pairs_objective, term_objective, words_objective
from tests import families

EXACT = GainConfig(groups=4, batch=3, sketch=None, per_draw=2)
FAMILIES = ("gpt2", "llama", "qwen3", "gemma3", "gpt_neox", "falcon_new", "mixtral")


def examples(count: int = 10, length: int = 7) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randint(3, families.VOCABULARY - 4, (count, length), generator=draw)


def objective(ids: Tensor) -> Objective:
    def losses(model: nn.Module, places: Sequence[int]) -> Tensor:
        logits = model(**hooks.model_inputs(model, ids[list(places)])).logits[:, -1]
        return -logits.log_softmax(-1)[:, [5, 9]].sum(-1)

    return losses


def retain() -> list[list[int]]:
    return [row.tolist()[: 4 + n % 3] for n, row in enumerate(examples(6))]


def by_autograd(model: nn.Module, ids: Tensor, names: Sequence[str]) -> list[Tensor]:
    """The mean gradient of all examples, the plain way."""
    chosen = [dict(model.named_parameters())[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(True)
    with torch.enable_grad():
        loss = objective(ids)(model, range(len(ids))).mean()
    found = torch.autograd.grad(loss, chosen, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(chosen, found, strict=True)]


class Quantised(nn.Module):
    """A linear layer that keeps its weight in 8 bits, as bitsandbytes' does."""

    def __init__(self, into: int, out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(out, into, dtype=torch.int8), requires_grad=False)

    def forward(self, stream: Tensor) -> Tensor:
        return stream @ (0.01 * self.weight.float()).T


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [False, True])
def test_gradients_are_autograds(family: str, lora: bool) -> None:
    tied = {"tie_word_embeddings": True} if family in ("llama", "gemma3") else {}
    model: Any = families.build(family, **tied)
    if lora:
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).eval()
    ids, before = examples(), families.state(model)
    found = hooks.gain(model, objective(ids), len(ids), retain(), config=EXACT)
    assert families.state(model) == before
    names = [place.name for place in found.places]
    assert lora == any("lora" in name for name in names)
    # unequal groups: the mean over groups of their means, weighted by their sizes, is the mean over all
    sizes = np.array([3, 3, 2, 2]) / 10
    squares = np.einsum("g,pgh,h->p", sizes, found.plain, sizes)
    expected = [float(g.double().square().sum()) for g in by_autograd(model, ids, names)]
    np.testing.assert_allclose(squares, expected, rtol=1e-3, atol=1e-9 * max(expected))


def test_natural_gain_of_one_layer_by_hand() -> None:
    """The Fisher information from its definition: the mean over all labels, weighted by their probability."""
    model: Any = families.build("llama", num_hidden_layers=1)
    ids, texts = examples(8), [row.tolist() for row in examples(4, 3)]
    config = GainConfig(groups=4, sketch=None, per_draw=1, damping=0.5)
    many = hooks.gain(model, objective(ids), 8, texts * 150, config=config)  # labels drawn 150 times
    named = dict(model.named_parameters())
    names = [place.name for place in many.places]
    fisher = {name: torch.zeros_like(named[name]) for name in names}
    for text in texts:
        logits = model(torch.tensor([text])).logits[0, :-1]
        for row in logits:
            for label, probability in enumerate(row.detach().softmax(-1)):
                got = torch.autograd.grad(row.log_softmax(-1)[label], [named[n] for n in names], retain_graph=True)
                for name, gradient in zip(names, got, strict=True):
                    fisher[name] += probability * gradient.square() / (4 * 2)
    damping = 0.5 * sum(float(f.sum()) for f in fisher.values()) / sum(f.numel() for f in fisher.values())
    np.testing.assert_allclose(many.fisher, [float(fisher[n].sum()) for n in names], rtol=0.15)
    gradients = by_autograd(model, ids, names)
    expected = sum(float((g.square() / (fisher[n] + damping)).sum()) for n, g in zip(names, gradients, strict=True))
    np.testing.assert_allclose(many.ranking("natural").scores, [expected], rtol=0.1)


def test_a_sketch_keeps_inner_products() -> None:
    model: Any = families.build("llama", hidden_size=64, intermediate_size=256)
    ids = examples()
    exact = hooks.gain(model, objective(ids), 10, retain(), config=EXACT)
    small = hooks.gain(model, objective(ids), 10, retain(), config=GainConfig(groups=4, per_draw=2, sketch=1024))
    assert (small.sizes > 1024).any()
    for method in ("natural", "ratio", "rgn"):
        np.testing.assert_allclose(small.ranking(method).scores, exact.ranking(method).scores, rtol=0.15)


def test_rows_and_columns_stand_for_the_squares() -> None:
    """Exact where the squares are an outer product; rows, columns and sum are always right; edges alone are held."""
    draw = torch.Generator().manual_seed(0)
    given = torch.randn(2, 5, 7, generator=draw)
    whole, edges = Squares(given), Squares(given, factored=True)
    for one in (whole, edges):
        for gradient in given.double().split(1):
            one.add(gradient.expand(2, 5, 7))
    assert sum(kept.numel() for kept in edges.sums) == 2 * 5 + 2 * 7
    assert edges.divide(3) == pytest.approx(whole.divide(3)) == pytest.approx(2 / 3 * float(given.square().sum()))
    for dim in (-1, -2):
        torch.testing.assert_close(edges.whole().sum(dim), whole.whole().sum(dim))
    outer = torch.randn(5, 1, generator=draw) * torch.randn(1, 7, generator=draw)
    single = Squares(outer, factored=True)
    single.add(outer)
    torch.testing.assert_close(single.whole(), outer.square())
    model: Any = families.build("llama")
    exact, small = (
        hooks.gain(model, objective(examples()), 10, retain(), config=replace(EXACT, factored=factored))
        for factored in (False, True)
    )
    np.testing.assert_allclose(small.fisher, exact.fisher, rtol=1e-4)
    np.testing.assert_array_equal(small.plain, exact.plain)
    np.testing.assert_allclose(small.ranking("natural").scores, exact.ranking("natural").scores, rtol=0.3)


def test_objectives_start_as_their_trainings_do(tiny: Any) -> None:
    """Equalise has the loss and gradient of its prepared terms; those of NPO and DPO are known where they start."""
    model, tokenizer = tiny
    ids = [[5, 6, 7], [8, 9], [5, 9, 6, 8], [7, 5]]
    term = words_term(ids, [10, 11], emphasis=2.0)
    pairs = [Pair(f"{a} smiled because he left", f"{a} smiled", "all", a, a) for a in ("The nurse", "The engineer")]
    weight = model.model.layers[1].mlp.up_proj.weight

    def gradient(losses: Tensor) -> Tensor:
        return torch.autograd.grad(losses.sum(), weight, retain_graph=True)[0]

    with torch.enable_grad():
        weight.requires_grad_(True)
        got = term_objective(model, term)(model, range(4))
        wanted = losses_of(model, model, prepare(model, [term]), [(0, row) for row in range(4)])
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(gradient(got), gradient(wanted), atol=1e-6, rtol=1e-4)
        logs = []
        for pair in pairs:
            for text in (pair.more, pair.less):
                row = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
                logits = model(row).logits[0, :-1].log_softmax(-1)
                logs.append(logits.gather(1, row[0, 1:, None]).sum())
        more, less = torch.stack(logs[::2]), torch.stack(logs[1::2])
        dpo = pairs_objective(model, tokenizer, pairs, "dpo")(model, range(2))
        npo = pairs_objective(model, tokenizer, pairs, "npo")(model, range(2))
        assert dpo.tolist() == pytest.approx([math.log(2)] * 2)
        assert npo.tolist() == pytest.approx([20 * math.log(2)] * 2)
        torch.testing.assert_close(gradient(npo), gradient(more), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(gradient(dpo), 0.05 * gradient(more - less), atol=1e-6, rtol=1e-4)
        weight.requires_grad_(False)
    with pytest.raises(SurgeryError, match="objective: got 'log', expected equalize, npo or dpo for pairs"):
        pairs_objective(model, tokenizer, pairs, "log")
    with pytest.raises(SurgeryError, match="objective: got 'dpo', expected equalize or log"):
        words_objective(model, ids, [10, 11], "dpo")


def test_named_matrices_have_the_most_gain_for_each_number(tiny: Any) -> None:
    model, tokenizer = tiny
    loss = term_objective(model, words_term(examples(12).tolist(), [10, 11]))
    found = rank_by_gain(model, tokenizer, loss, 12)
    ranking = found.ranking("natural", "matrix")
    assert ranking.names is not None
    scores = dict(zip(ranking.names, ranking.scores, strict=True))
    per = {n: s / model.get_parameter(n).numel() for n, s in scores.items() if model.get_parameter(n).ndim > 1}
    best, second = sorted(per, key=lambda name: -per[name])[:2]
    size = model.get_parameter(best).numel() + model.get_parameter(second).numel()
    named = auto_part(model, tokenizer, loss, 12, size=size)
    assert named["names"] == [best, second] and best in named["said"]
    others = {place.block for place in found.places} - {int(best.split(".")[2])}
    assert best not in auto_part(model, tokenizer, loss, 12, size=size, blocks=sorted(others))["names"]
    assert fitting(["a", "b", "c"], {"a": 5, "b": 4, "c": 2}, 8) == ["a", "c"]


def test_scores_of_known_products() -> None:
    """Two parameters in two blocks whose groups' gradients are known vectors."""
    vectors = np.array([[[3.0, 0], [1, 0], [3, 0], [1, 0]], [[1.0, 1], [1, -1], [1, 1], [1, -1]]])
    plain = np.einsum("pgi,phi->pgh", vectors, vectors)
    places = (Place("a.w", 0, "mlp"), Place("b.w", 1, "mlp"))
    found = Gain(places, np.array([2, 2]), 4 * plain, plain, np.array([16.0, 1.0]), np.array([1.0, 4.0]), "d", 4, {})
    assert found.ranking("natural").scores.tolist() == [16.0, 4.0]
    assert found.ranking("ratio").scores.tolist() == [0.5, 1.0]
    assert found.ranking("rgn").scores.tolist() == [2.0, 0.5]
    assert found.ranking("inner").scores == pytest.approx([(64 - 20) / 12, (16 - 8) / 12])
    # variance between groups: ((3-2)^2 * 4) / 3 and (4 * 1) / 3
    assert found.ranking("snr").scores == pytest.approx([4 / (4 / 3), 1 / (4 / 3)])
    # halves of the second: {0,1}|{2,3} and {0,3}|{1,2} agree fully, {0,2}|{1,3} has cosine 0
    assert found.ranking("agreement").scores == pytest.approx([1.0, 2 / 3])
    assert found.ranking("natural", "matrix").names == ("a.w", "b.w")
    assert [half.scores.tolist() for half in found.halves()] == [[36.0, 8.0], [4.0, 8.0]]


def test_auto_takes_the_ranking_that_the_study_judged() -> None:
    """On the gains of every stored case: the same scores as the row "gain and depth" of docs/which_block.md."""
    for case in which_block.read():
        gains = case.scores["natural attention"]
        places = [Place(f"{part}.{block}", block, part) for block in range(len(gains)) for part in ("attention", "mlp")]
        grams = np.repeat(np.stack([gains, gains[::-1]], 1).ravel(), 4).reshape(-1, 2, 2)
        ones = np.ones(len(places))
        found = Gain(tuple(places), ones, grams, grams, ones, ones, "d", 2, {})
        wanted = case.score("depth + natural attention")
        assert wanted is not None and auto_ranking(found).scores.tolist() == wanted.tolist()


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_left_as_it_was(training: bool) -> None:
    model: Any = families.build("gpt2").train(training)
    model.transformer.h[0].mlp.c_fc.weight.grad = torch.ones(32, 128)
    model.transformer.wte.weight.requires_grad_(False)
    before, mark = families.state(model), model.transformer.h[0].mlp.c_fc.weight.grad
    first = hooks.gain(model, objective(examples()), 10, retain(), config=EXACT)
    assert families.state(model) == before and model.transformer.h[0].mlp.c_fc.weight.grad is mark
    again = hooks.gain(model.eval(), objective(examples()), 10, retain(), config=EXACT)
    np.testing.assert_array_equal(first.plain, again.plain)  # dropout was off
    model.train(training)

    def broken(_: nn.Module, __: Sequence[int]) -> Tensor:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        hooks.gain(model, broken, 10, retain(), config=EXACT)
    assert families.state(model) == before and model.transformer.h[0].mlp.c_fc.weight.grad is mark


def test_bad_input_is_one_line() -> None:
    model: Any = families.build("llama")
    loss = objective(examples())

    def refused(match: str, *args: Any, of: Any = model, config: GainConfig = EXACT) -> None:
        given = [loss, 10, retain()]
        given[: len(args)] = args
        with pytest.raises(HookError, match=match) as caught:
            hooks.gain(of, *given, config=config)
        assert "\n" not in str(caught.value)

    refused("the retain text is 1 sentence", loss, 10, retain()[:1])
    refused("3 examples for 4 groups", loss, 3)
    refused("no gradient for the ranked parameters", lambda m, rows: torch.zeros(len(rows)))
    refused("no gradient for the ranked parameters", lambda m, rows: m.get_input_embeddings().weight[0, : len(rows)])
    refused("zero for every ranked parameter", lambda m, rows: loss(m, rows) * 0)
    refused("no causal language model", of=families.build("bert"))
    half = families.build("llama").to(torch.bfloat16)
    overflow = 3e38  # times a gradient above 1 it is more than bfloat16 holds
    refused("not finite at block . .*bfloat16", lambda m, rows: loss(m, rows) * overflow * 1e3, of=half)
    with torch.no_grad():
        half.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan  # type: ignore[index,union-attr,operator]
    refused("logits of retain text . are not finite .*bfloat16", of=half)
    whole: Any = families.build("llama")
    whole.model.layers[2].self_attn.q_proj = Quantised(32, 32)
    with pytest.raises(HookError, match=r"model\.layers\.2\.self_attn\.q_proj\.weight is quantised \(int8\)"):
        find_places(whole)
    adapted: Any = get_peft_model(whole, LoraConfig(r=2, target_modules=["v_proj"], init_lora_weights=False)).eval()
    ranked = hooks.gain(adapted, loss, 10, retain(), config=EXACT)  # gradients go through what is quantised
    assert (
        all("v_proj.lora" in place.name for place in ranked.places) and (ranked.ranking("natural").scores[:2] > 0).all()
    )
    with pytest.raises(HookError, match="method is 'gains'; expected one of natural"):
        hooks.gain(model, loss, 10, retain(), config=EXACT).ranking("gains")
