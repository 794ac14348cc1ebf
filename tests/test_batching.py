"""Rows in a batch give what each gives alone, however a family counts positions and whatever it makes of padding."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import hooks
from hooks.batching import context_limit, mixes_beyond, remembered, takes_positions, why_alone
from hooks.errors import HookError, Note
from hooks.wider import Wider, errs_more, gap
from surgery.forward.batching import batches_for, pad
from surgery.forward.next_token import next_words, token_losses
from surgery.forward.residual_cache import ResidualCache, shortcut, why_no_cut, why_not
from surgery.forward.token_logprobs import token_log_probabilities
from tests.families import build, state
from tests.tiny_configs import tiny

IDS = ((5, 6, 7, 8, 9, 10, 11), (12, 13, 14), (20, 21), (30, 31, 32, 33, 34))
WORDS = (41, 50)
# Positions behind the padding index, offsets, ALiBi, positions without regard to the mask, none at all, recurrence,
# a forward that names no mask, a decoder of more layers than its config says, attention to the best few tokens.
FAMILIES = {
    "RobertaForCausalLM": {"is_decoder": True},
    "XLMRobertaForCausalLM": {"is_decoder": True},
    "OPTForCausalLM": {},
    "XGLMForCausalLM": {},
    "BartForCausalLM": {},
    "PegasusForCausalLM": {},
    "BloomForCausalLM": {},
    "MptForCausalLM": {},
    "GPT2LMHeadModel": {},
    "RwkvForCausalLM": {},
    "MambaForCausalLM": {},
    "Lfm2ForCausalLM": {},
    "Qwen3NextForCausalLM": {},
    "xLSTMForCausalLM": {},
    "BlenderbotForCausalLM": {},
    "DeepseekV32ForCausalLM": {},
}


def family(name: str) -> Any:
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(tiny(kind.config_class, **FAMILIES.get(name, {}))).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4.0)
    return model


@torch.no_grad()
def alone(model: Any, ids: tuple[int, ...]) -> Tensor:
    """Log-probabilities of the model's own plain pass over one row: no padding, no mask, no positions."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_pass_gives_what_the_model_gives_for_a_row_alone(name: str) -> None:
    model = family(name)
    logs = [alone(model, ids) for ids in IDS]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "rows run alone|a row changes", Note)
        seen = next_words(model, IDS, WORDS, keep=[1])
        np.testing.assert_allclose(seen.probabilities, [log[-1, list(WORDS)].exp() for log in logs], atol=1e-5)
        if why_not(model, seen.prefixes[1]) is None:
            again = next_words(model, IDS, WORDS, prefix=seen.prefixes[1]).probabilities
            np.testing.assert_allclose(again, seen.probabilities, atol=1e-5)
        each = [log[range(len(ids) - 1), list(ids[1:])] for log, ids in zip(logs, IDS, strict=True)]
        np.testing.assert_allclose(
            token_losses(model, IDS)[0], [-values.sum() for values in each], rtol=1e-4, atol=1e-4
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)  # most of these take no trees
        found = token_log_probabilities(model, IDS)
    for got, right in zip(found, each, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-4)
    singles = np.array([hooks.bmi(model, None, [ids]).raw.scores for ids in IDS])
    np.testing.assert_allclose(hooks.bmi(model, None, IDS).raw.scores, singles.mean(0), atol=1e-5)


@pytest.mark.parametrize(("name", "positions"), [("GPT2LMHeadModel", True), ("RobertaForCausalLM", False)])
def test_rows_that_a_user_pads_on_the_left_get_positions_where_the_model_needs_them(name: str, positions: bool) -> None:
    model = family(name)
    fill = model.config.pad_token_id or 0
    ids = torch.tensor([[fill] * (7 - len(row)) + list(row) for row in IDS])
    mask = torch.tensor([[0] * (7 - len(row)) + [1] * len(row) for row in IDS])
    assert takes_positions(model) == positions
    before = state(model)
    with hooks.capture(model, "blocks.0.hook_resid_post") as store, torch.no_grad():
        inputs = hooks.model_inputs(model, {"input_ids": ids, "attention_mask": mask})
        logits = model(**inputs).logits
    assert ("position_ids" in inputs) == positions and len(store) == 1
    for row, got in zip(IDS, logits.log_softmax(-1), strict=True):
        torch.testing.assert_close(got[-len(row) :], alone(model, row), atol=1e-4, rtol=1e-4)
    assert state(model) == before


@pytest.mark.parametrize("name", ["BartForCausalLM", "RwkvForCausalLM"])
def test_padding_on_the_left_is_refused_where_it_changes_the_values(name: str) -> None:
    ids = torch.tensor([[1, 5, 6], [5, 6, 7]])
    with pytest.raises(HookError, match=r"padded on the left give other values .* expected rows padded on the right"):
        hooks.model_inputs(family(name), {"input_ids": ids, "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])})


class Crowded(nn.Module):
    """An MLP in which each token also gets the mean of its batch: what a mixture of experts with a capacity does."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.inner(hidden_states + hidden_states.mean(0, keepdim=True))


def crowded() -> Any:
    model: Any = build("llama")
    model.model.layers[1].mlp = Crowded(model.model.layers[1].mlp)
    return model


def test_rows_that_change_one_another_run_alone_and_a_note_says_so() -> None:
    model = crowded()
    logs = [alone(model, ids) for ids in IDS]
    with pytest.warns(Note, match="a row changes with what stands beside it, so rows run alone"):
        seen = next_words(model, IDS, WORDS).probabilities
    np.testing.assert_allclose(seen, [log[-1, list(WORDS)].exp() for log in logs], atol=1e-5)
    assert why_alone(model) and not why_alone(build("llama"))
    each = [log[range(len(ids) - 1), list(ids[1:])].sum() for log, ids in zip(logs, IDS, strict=True)]
    np.testing.assert_allclose(-token_losses(model, IDS)[0], each, atol=1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Note)
        np.testing.assert_allclose([v.sum() for v in token_log_probabilities(model, IDS)], each, atol=1e-4)
    # The instruments too.
    words = (5, 9)
    lens = np.mean([hooks.lens(model, None, [ids], words).difference for ids in IDS])
    assert float(hooks.lens(model, None, IDS, words).difference) == pytest.approx(lens, abs=1e-5)
    clean, corrupted = [(5, 6, 7), (8, 9)], [(5, 11, 7), (10, 9)]
    pairs = [hooks.patch(model, None, [a], [b], words).clean for a, b in zip(clean, corrupted, strict=True)]
    assert hooks.patch(model, None, clean, corrupted, words).clean == pytest.approx(np.mean(pairs), abs=1e-5)
    sizes = [len(batch.places) for batch in hooks.example_gradients(model, None, IDS, project=norms)]
    assert sizes == [1] * len(IDS)
    with pytest.raises(HookError, match="cannot run two rows at once"):
        hooks.influence_probe(model, None, [IDS[0]], contrast=[(5, 6, 7, 8, 9, 10, 12)])


def test_rows_that_change_one_another_only_where_they_are_longer_run_alone_too() -> None:
    class Late(Crowded):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states) if hidden_states.shape[1] > 20 else self.inner(hidden_states)

    model: Any = build("llama")
    model.model.layers[1].mlp = Late(model.model.layers[1].mlp)
    ids = [tuple(range(5, 5 + length)) for length in (24, 30)]
    right = [alone(model, row)[-1, list(WORDS)].exp() for row in ids]
    with pytest.warns(Note, match="rows run alone"):
        np.testing.assert_allclose(next_words(model, ids, WORDS).probabilities, right, atol=1e-5)
    shorter: Any = build("llama", max_position_embeddings=8)  # takes no such rows
    assert why_alone(shorter) is None


def test_whole_numbers_that_are_made_float_are_as_wide_as_the_rest() -> None:
    with Wider(torch.float64):
        assert (torch.ones(2, 2) @ torch.tensor([[1, 2], [3, 4]]).float()).dtype == torch.float64


def test_what_is_found_out_of_a_model_does_not_depend_on_how_exactly_a_caller_multiplies() -> None:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert remembered(build("llama"), "seen", torch.get_float32_matmul_precision) == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


def norms(gradient: Any) -> Tensor:
    return gradient.matrix().flatten(1).norm(dim=1)[:, None]


def test_a_cut_that_changes_the_values_is_found_out_and_not_taken() -> None:
    class Summed(Crowded):  # each place also gets the sum over its row, so that one place is not computed alone
        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.inner(hidden_states + hidden_states.cumsum(1))

    model: Any = build("llama")
    assert why_no_cut(model) is None
    model.model.layers[-1].mlp = Summed(model.model.layers[-1].mlp)
    right = [alone(model, ids)[-1, list(WORDS)].exp() for ids in IDS]
    np.testing.assert_allclose(next_words(model, IDS, WORDS).probabilities, right, atol=1e-5)
    assert why_no_cut(model)
    with shortcut(model) as run, torch.no_grad():
        assert run(pad(IDS, [0, 1], "cpu")).shape == (2, 96)


def test_the_bound_is_the_rounding_of_the_dtype_in_this_model() -> None:
    model: Any = build("llama", num_hidden_layers=8).to(torch.bfloat16)
    prefix = next_words(model, IDS, WORDS, keep=[6]).prefixes[6]
    assert why_not(model, prefix) is None
    moved = ResidualCache(6, prefix.ids, prefix.flat + 0.5 * prefix.flat.float().std())
    assert "differ" in str(why_not(model, moved))
    plain, exact = model(input_ids=torch.tensor([IDS[0]])).logits, None
    with Wider(torch.float32), torch.no_grad():
        exact = model(input_ids=torch.tensor([IDS[0]])).logits
    wide = build("llama", num_hidden_layers=8).to(torch.bfloat16).float()
    with torch.no_grad():
        right = wide(input_ids=torch.tensor([IDS[0]])).logits
    assert exact.dtype == torch.float32 and gap([exact], [right]) < 1e-5 < 1e-3 < gap([plain], [right])
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    # As far from the exact values as the plain ones, on another side, is no fault; four times as far is one.
    own = plain.float() - exact
    assert errs_more([(exact - own)], [plain.float()], lambda: [exact], torch.bfloat16) is None
    assert "off by" in str(errs_more([(exact - 6 * own)], [plain.float()], lambda: [exact], torch.bfloat16))


def test_lengths_that_scale_positions_are_not_mixed() -> None:
    plain, model = (
        build("llama"),
        build("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    )
    assert mixes_beyond(plain) is None and mixes_beyond(model) == 64
    ids = [tuple(range(3, 3 + length)) for length in (60, 62, 66, 66, 70)]
    assert sorted(map(sorted, batches_for(model, ids))) == [[0, 1], [2, 3], [4]]
    assert batches_for(plain, ids) == [[0, 1, 2, 3, 4]]
    sparse = family("DeepseekV32ForCausalLM")
    assert mixes_beyond(sparse) == sparse.config.index_topk == 2
    assert sorted(map(sorted, batches_for(sparse, [(5, 6), (7,), (5, 6, 7), (6, 7, 8), (5, 6, 7, 8)]))) == [
        [0, 1], [2, 3], [4]
    ]  # fmt: skip


def test_the_context_limit_is_that_of_the_text_model_and_its_table() -> None:
    assert context_limit(build("llama")) == 64
    assert context_limit(family("OPTForCausalLM")) == family("OPTForCausalLM").config.max_position_embeddings
    roberta = family("RobertaForCausalLM")
    table = roberta.roberta.embeddings.position_embeddings
    assert context_limit(roberta) == table.num_embeddings - table.padding_idx - 1
    longest = tuple(range(5, 5 + context_limit(roberta)))
    assert np.isfinite(next_words(roberta, [longest], WORDS).probabilities).all()
    assert context_limit(family("BloomForCausalLM")) is None
    nested: Any = build("llama")
    nested.config.get_text_config = lambda *_, **__: transformers.LlamaConfig(max_position_embeddings=7)
    assert context_limit(nested) == 7


def test_evaluation_mode_is_the_same_everywhere() -> None:
    model: Any = build("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5)
    words, losses = next_words(model, IDS, WORDS).probabilities, token_losses(model, IDS)[0]
    model.train()
    np.testing.assert_array_equal(next_words(model, IDS, WORDS).probabilities, words)
    np.testing.assert_array_equal(token_losses(model, IDS)[0], losses)
    assert model.training and model.transformer.drop.training
