"""Block fine-tuning: what trains, what the losses do, and that the model comes back bit for bit."""

import math
from typing import Any

import pytest
import torch
import transformers
from families import build, state
from tiny_configs import tiny

from benchmarks.block import products
from hooks import anatomy
from hooks.trace_modules import unchanged
from surgery.edits.block import fine_tune, loss_of, names_of, word_loss
from surgery.errors import SurgeryError
from surgery.forward.evaluation import evaluating
from surgery.forward.next_token import next_words
from surgery.forward.residual_cache import shortcut
from surgery.forward.word_logs import word_logs, words_of_head
from surgery.training import Plan, steps_of, trainable

IDS = tuple(tuple(range(3 + row, 9 + row)) for row in range(8))
WORDS = (5, 11)
PLAN = Plan(lr=3e-2, epochs=20, batch_size=4)


def after(model: torch.nn.Module, differences: dict[str, torch.Tensor]) -> torch.Tensor:
    """P(word) of each prompt with the differences added."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_(differences.get(name, torch.tensor(0.0)))
        return model(input_ids=torch.tensor(IDS)).logits[:, -1].softmax(-1)[:, WORDS]


def test_the_losses_by_hand() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.25]]).log()
    assert word_loss(logits, [0, 1], "log").item() == pytest.approx(-math.log(0.5) - math.log(0.25))
    assert word_loss(logits, [0, 1], "as_printed").item() == pytest.approx(0.75)
    assert word_loss(logits, [1], "log").item() == pytest.approx(-math.log(0.25))
    with pytest.raises(SurgeryError, match="expected one of log, as_printed"):
        word_loss(logits, [0], "sum")


def test_log_probabilities_of_a_few_words_have_the_gradient_of_the_softmax() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = (torch.randn(3, 50, generator=draw) * 4).to(torch.bfloat16)
    words, exact = [7, 40, 7], logits.double().requires_grad_()
    assert torch.equal(word_logs(logits, words), word_logs(logits.float(), words))
    assert torch.allclose(word_logs(exact, words), exact.log_softmax(-1)[:, words])
    assert torch.autograd.gradcheck(lambda given: word_logs(given, words), exact)


def test_a_frozen_head_gives_its_words_without_logits() -> None:
    """Also where a later part of the vocabulary holds the larger logits, and two rows are left over."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 6, generator=draw).double() * torch.arange(1, 51)[:, None]
    stream, words = torch.randn(3, 6, generator=draw).double().requires_grad_(), [7, 40, 7]
    expected = word_logs(stream @ weight.T, words)
    assert torch.allclose(words_of_head(stream, weight, words), expected)
    assert torch.allclose(words_of_head(stream.detach(), weight, words), expected)
    assert torch.autograd.gradcheck(lambda given: words_of_head(given, weight, words), stream)


def test_log_balances_the_words_and_the_printed_form_silences_them() -> None:
    """The contradiction of Eq. 5: both make AFGB small, only one leaves the words in the model's mouth."""
    base = after(build("llama"), {})
    balanced = after(build("llama"), fine_tune(build("llama"), IDS, WORDS, PLAN, blocks=[2], seed=0).differences)
    printed = fine_tune(build("llama"), IDS, WORDS, PLAN, blocks=[2], seed=0, objective="as_printed")
    silenced = after(build("llama"), printed.differences)
    assert balanced.sum(1).min() > base.sum(1).max()
    assert ((balanced[:, 0] - balanced[:, 1]).abs() / balanced.sum(1)).max() < 0.15
    assert silenced.sum(1).max() < 0.5 * base.sum(1).min()


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mixtral"])
def test_parts_of_a_block(family: str) -> None:
    model = build(family)
    whole, attention, mlp = (set(names_of(model, [1], part)) for part in ("all", "attention", "mlp"))
    assert attention and mlp and attention | mlp < whole and not attention & mlp
    assert set(names_of(model, [1], "without_attention")) == whole - attention
    assert set(names_of(model, [1], "without_mlp")) == whole - mlp
    matrices = set(names_of(model, [1], "matrices"))
    assert matrices == {name for name in whole if model.get_parameter(name).ndim > 1} != whole
    assert set(names_of(model, [1], "vectors")) == whole - matrices
    assert matrices < set(names_of(model, None, "matrices")) and attention < set(names_of(model, None, "attention"))
    assert not set(names_of(model, None, "attention")) & mlp
    assert not whole & set(names_of(model, [0]))
    assert names_of(model, None) == [name for name, _ in model.named_parameters()]
    with pytest.raises(SurgeryError, match="blocks 0 to"):
        names_of(model, [9])


@pytest.mark.parametrize(("name", "sharing", "own"), [("Zamba", [1, 2], 3), ("Zamba2", [1, 3], 2)])
def test_blocks_that_share_parameters_are_edited_together_or_not_at_all(
    name: str, sharing: list[int], own: int
) -> None:
    model = getattr(transformers, f"{name}ForCausalLM")(tiny(getattr(transformers, f"{name}Config")))
    for block in sharing:
        numbers = ", ".join(map(str, sharing))
        with pytest.raises(SurgeryError, match=rf"blocks {numbers} share this parameter.* \(block = \[{numbers}\]\)"):
            names_of(model, [block])
    found = names_of(model, sharing)
    used = {
        parameter
        for block in sharing
        for parameter in model.get_submodule(f"model.layers.{block}").parameters()
    }  # fmt: skip
    assert len(found) == len(set(found)) and {model.get_parameter(name) for name in found} == used
    assert set(found) <= {name for name, _ in model.named_parameters()}
    assert names_of(model, [own]) and not set(names_of(model, [own])) & set(found)


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        ("llama", {"self_attn.o_proj.weight", "mlp.down_proj.weight"}),
        ("gpt2", {"attn.c_proj.weight", "attn.c_proj.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"}),
    ],
)
def test_writers_are_what_attention_and_mlp_add_by(family: str, writers: set[str]) -> None:
    model = build(family)
    block = anatomy.find(model).blocks[1].name
    assert set(names_of(model, [1], "writers")) == {f"{block}.{name}" for name in writers}


def test_only_the_chosen_parameters_change_and_the_model_returns() -> None:
    model = build("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.norm.weight.grad = torch.ones_like(model.model.norm.weight)
    before, data = state(model), {name: p.data_ptr() for name, p in model.named_parameters()}
    trained = fine_tune(model, IDS, WORDS, Plan(1e-2, 1, 4), blocks=[1], part="mlp", seed=0)
    assert set(trained.differences) == set(names_of(model, [1], "mlp"))
    assert all(difference.abs().max() > 0 for difference in trained.differences.values())
    assert state(model) == before
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == data


def test_the_model_returns_after_an_exception() -> None:
    model = build("llama")
    before = state(model)

    def stop(steps: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fine_tune(model, IDS, WORDS, PLAN, blocks=[1], seed=0, step_done=stop)
    assert state(model) == before


def test_a_loss_that_is_not_finite_stops_with_step_and_rate() -> None:
    model = build("llama")
    before = state(model)
    with pytest.raises(
        SurgeryError, match=r"(loss is \w+ at step \d+|not finite after step \d+) .*learning rate 1e\+30"
    ):
        fine_tune(model, IDS, WORDS, Plan(1e30, 3, 4), blocks=[1], seed=0)
    assert state(model) == before


def test_bf16_models_train_in_float32_and_return() -> None:
    model = build("llama").to(torch.bfloat16)
    before = state(model)
    trained = fine_tune(model, IDS, WORDS, Plan(1e-4, 2, 4), blocks=[1], seed=0)
    assert all(difference.dtype == torch.float32 for difference in trained.differences.values())
    assert any(difference.abs().max() > 0 for difference in trained.differences.values())
    assert state(model) == before


def test_an_interrupted_training_continues_to_the_same_result(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)
    plan, file = Plan(1e-2, 4, 4, average=0.8), tmp_path / "state.pt"  # interrupted inside what is averaged
    whole = fine_tune(build("llama"), IDS, WORDS, plan, blocks=[1], seed=0)
    taken: list[dict[str, Any]] = []

    def interrupt(row: dict[str, Any]) -> None:
        taken.append(row)
        if len(taken) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fine_tune(build("llama"), IDS, WORDS, plan, blocks=[1], seed=0, state=file, log=interrupt)
    assert file.is_file()
    again: list[dict[str, Any]] = []
    rest = fine_tune(build("llama"), IDS, WORDS, plan, blocks=[1], seed=0, state=file, log=again.append)
    assert again[0]["step"] == 5 and len(rest.losses) == steps_of(len(IDS), plan)
    assert rest.losses == whole.losses
    assert all(torch.equal(rest.differences[name], whole.differences[name]) for name in whole.differences)
    assert not file.exists()
    file.write_bytes(b"")
    with pytest.raises(SurgeryError, match="cannot be read"):
        fine_tune(build("llama"), IDS, WORDS, plan, blocks=[1], seed=0, state=file)


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(SurgeryError, match="got nowhere"), trainable(build("llama"), ["nowhere"]):
        pass
    with pytest.raises(SurgeryError, match="expected one of adam, adamw"):
        fine_tune(build("llama"), IDS, WORDS, Plan(1e-2, 1, 4, "sgd"), blocks=[1], seed=0)


def test_measuring_takes_no_attention_that_plans_and_leaves_the_switch() -> None:
    switch = torch.backends.cuda.cudnn_sdp_enabled
    for way in (evaluating, unchanged):
        before = switch()
        with pytest.raises(KeyError), way(build("llama")):
            assert not switch()
            raise KeyError
        assert switch() == before is True


def test_the_limit_of_a_step_counts_its_products() -> None:
    """Of a last block's seven matrices forward, by their weights and by their rows, and of the frozen head two."""
    model = build("llama")
    ids = ((3, 4, 5), (3, 4, 6, 7), (8, 9))
    cache = next_words(model, ids, (5, 11), keep=[2]).prefixes[2]
    taken = cache.steps(model)
    with trainable(model, names_of(model, [2])), shortcut(model, start=2, words=(5, 11)) as run:
        found = products(model, lambda: loss_of(run(taken([0, 1, 2]))).mean().backward())
    shapes = {tuple(sorted(work().shape)) for work in found}  # type: ignore[attr-defined]
    assert len(found) == 7 * 3 + 2
    assert {(3, 96), (3, 48), (7, 16), (7, 32)} <= shapes  # three prompts end; their tree has 7 places, without padding
