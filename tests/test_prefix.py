"""The shortcuts give what the plain forward pass gives, in every family, and leave nothing behind."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from families import FAMILIES, build, state

from hooks import anatomy
from hooks.errors import Note
from surgery.edits.block import fine_tune
from surgery.edits.kept_streams import KeptStreams
from surgery.edits.supervised import Lora, adapters
from surgery.errors import SurgeryError
from surgery.forward import last_position, precision
from surgery.forward.batching import by_length, pad
from surgery.forward.last_query import queries
from surgery.forward.next_token import next_words, token_losses
from surgery.forward.precision import matrix_products
from surgery.forward.residual_cache import cut_depth, shortcut, why_not
from surgery.forward.tokens import encode, word_ids
from surgery.forward.trees import Trees, as_batch, trees_for, why_no_trees
from surgery.progress import Progress
from surgery.training import Plan

CAUSAL = [name for name, (kind, _) in FAMILIES.items() if kind.endswith(("CausalLM", "GPT2LMHeadModel"))]
STEM = (40, 41, 42, 43)  # of which the prompts share nothing, half, or all
IDS = tuple((*STEM[: 2 * (row % 3)], *range(3 + row, 9 + 2 * row)) for row in range(6))
WORDS = (5, 11)


def plain(model: torch.nn.Module, ids: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """Next-token probabilities of each prompt alone, without padding: nothing of the code under test."""
    with torch.no_grad():
        rows = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in ids]
    return torch.stack(rows).softmax(-1)


@pytest.mark.parametrize("family", CAUSAL)
def test_shortcuts_equal_the_plain_pass(family: str) -> None:
    model = build(family)
    before = state(model)
    expected = plain(model, IDS)[:, WORDS].numpy()
    seen = next_words(model, IDS, WORDS, keep=[0, 1])
    assert abs(seen.probabilities - expected).max() < 1e-5
    prefix = seen.prefixes[1]
    assert abs(next_words(model, IDS, WORDS, prefix=prefix).probabilities - expected).max() < 1e-5
    assert state(model) == before


def test_a_stream_of_other_texts_is_refused() -> None:
    """Its numbers would be those of the texts that it was kept of, without a word."""
    model = build(CAUSAL[0])
    others, plan = IDS[::-1], Plan(1e-3, 1, 4)
    kept = next_words(model, IDS, WORDS, keep=[2]).prefixes[2]
    losses = token_losses(model, IDS, keep=[2])[2][2]
    for ask in (
        lambda: next_words(model, others, WORDS, prefix=kept),
        lambda: token_losses(model, others, prefix=losses),
        lambda: fine_tune(model, others, WORDS, plan, blocks=[2], seed=0, prefix=kept),
    ):
        with pytest.raises(SurgeryError, match=r"entering block 2 is of \d+ texts, not of the"):
            ask()


def test_a_model_that_must_not_run_from_a_kept_stream_is_measured_whole() -> None:
    """RWKV's blocks hand on more than the stream; an edit of it is measured as saved all the same."""
    from transformers import RwkvConfig, RwkvForCausalLM

    torch.manual_seed(0)
    model = RwkvForCausalLM(RwkvConfig(vocab_size=96, hidden_size=16, num_hidden_layers=3, context_length=32)).eval()
    kept = next_words(model, IDS, WORDS, keep=[1]).prefixes[1]
    losses = token_losses(model, IDS, keep=[1])
    with torch.no_grad():
        model.rwkv.blocks[2].feed_forward.value.weight.mul_(3)
    with pytest.warns(Note, match="is measured from its first block on: .*does not run from block 1"):
        found = next_words(model, IDS, WORDS, prefix=kept).probabilities
    assert abs(found - plain(model, IDS)[:, WORDS].numpy()).max() < 1e-5
    again = token_losses(model, IDS, prefix=losses[2][1])[0]
    assert abs(again - token_losses(model, IDS)[0]).max() < 1e-4 < abs(again - losses[0]).max()


def test_a_stream_kept_with_rounded_products_is_not_compared_with_exact_ones() -> None:
    """Whoever asks within exact products says how the stream was kept: its own rounding is no fault of the model."""
    model = build("llama")
    prefix = next_words(model, IDS, WORDS, keep=[2]).prefixes[2]
    rounded = replace(prefix, flat=prefix.flat.bfloat16().float())
    assert why_not(model, rounded, exact=False) is None
    assert "differ from the plain forward pass" in str(why_not(model, rounded, exact=True))


def test_most_families_take_the_shortcut_and_trees() -> None:
    """The fallback is for the odd one: a change that silently sends every family there has to fail."""
    refused = {}
    alone = {}
    shallow = []
    for family in CAUSAL:
        model = build(family)
        shallow += [family] if cut_depth(model) < 2 else []
        if reason := why_no_trees(model, max(map(len, IDS))):
            alone[family] = reason
        reason = why_not(model, next_words(model, IDS, WORDS, keep=[1]).prefixes[1])
        if reason:
            refused[family] = reason
    assert len(refused) <= 1, refused
    assert not shallow, shallow
    assert sorted(alone) == ["bloom", "mpt"], alone  # whose distances are counted along the row


def test_with_lora_layers_the_last_query_is_asked_alone_and_no_index_is_out_of_bounds() -> None:
    """Inside a LoRA layer of the attention's writer the stream is cut already: cut again, a GPU would stop for good."""
    model = build("llama")
    with adapters(model, Lora(2, 4.0), 0):
        assert cut_depth(model) == 3
        assert all(".q_proj." in name for name in queries(model))


def test_queries_are_told_from_keys_and_values() -> None:
    """As many heads of keys as of queries: the shapes do not tell, the gradient does."""
    model = build("phi")
    (name,) = queries(model)
    assert name.endswith("self_attn.q_proj") and model.get_submodule(name.replace("q_", "k_")).weight.shape[0] == 32
    assert queries(build("phi3")) == [] == queries(build("gpt_neox"))  # one matrix gives queries, keys and values
    before = state(model)
    with shortcut(model) as run, torch.no_grad():
        found = run(pad(IDS, range(6), "cpu")).softmax(-1)
    assert torch.allclose(found, plain(model, IDS), atol=1e-6)
    assert state(model) == before


def test_what_prompts_begin_alike_runs_once() -> None:
    model = build("llama")
    ids = [(3, 4, 5), (3, 4, 6, 7), (3, 4), (8, 9), (3, 4, 5)]
    ((packed,),) = trees_for(model, ids) or [()]
    batch = as_batch(model, [packed])
    assert len(packed.ids) == 7 and sorted(batch.rows) == [0, 1, 2, 3, 4]  # 3 4 5 6 7 and 8 9, not 14 tokens
    for row, path in zip(batch.rows, batch.paths, strict=True):
        assert tuple(batch.ids.flatten()[list(path)].tolist()) == ids[row]
        assert batch.depths.flatten()[list(path)].tolist() == list(range(len(path)))


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_step_of_training_is_one_tree(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 14 tokens 5 places, in 3 of which prompts end; one prompt stands there twice, another within a longer one."""
    model, ids = build(family), ((8, 9), (3, 4, 5), (3, 4, 6, 7), (3, 4), (3, 4, 5))
    cache, seen = next_words(model, ids, WORDS, keep=[2]).prefixes[2], []
    expected, step = plain(model, ids), cache.steps(model)
    writer = model.get_submodule(str(anatomy.find(model).blocks[-1].attention_writer))
    with shortcut(model, start=2) as run, torch.no_grad():
        hook = writer.register_forward_hook(lambda _, given, __: seen.append(given[0].shape[:2]))
        for rows in ([4, 1, 3, 2], [0, 3]):
            tree, batch = step(rows), cache.batch(rows)
            assert torch.allclose(run(tree).softmax(-1), expected[[rows[row] for row in tree.rows]], atol=1e-6)
            assert torch.allclose(run(batch).softmax(-1), expected[rows], atol=1e-6)
        hook.remove()
    assert seen == [(1, 3), (4, 1), (1, 2), (2, 1)]
    for limit in ("TREE", "context_limit"):
        with monkeypatch.context() as patch:
            patch.setattr(f"surgery.forward.trees.{limit}", 4 if limit == "TREE" else lambda _: 4)
            few = cache.steps(model)
            assert isinstance(few([0, 3]), Trees) and not isinstance(few([4, 1, 3, 2]), Trees)


def test_a_few_trees_are_filled_alike() -> None:
    """130 tokens in trees of at most 64, the context: not 60, 60 and 10, which is padded to as many."""
    ids = [(number, *range(30, 39)) for number in range(13)]
    every = [pack for group in trees_for(build("llama"), ids) or [] for pack in group]
    assert sorted(row for pack in every for *_, row, _ in pack.wanted) == list(range(13))
    assert sorted(len(pack.ids) for pack in every) == [30, 50, 50]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("block", [1, 2])
def test_cached_and_plain_training_have_the_same_losses(family: str, block: int) -> None:
    model = build(family)
    plan = Plan(lr=1e-2, epochs=4, batch_size=4)
    prefix = next_words(model, IDS, WORDS, keep=[block]).prefixes[block]
    fast = fine_tune(model, IDS, WORDS, plan, blocks=[block], seed=3, prefix=prefix)
    slow = fine_tune(model, IDS, WORDS, plan, blocks=[block], seed=3)
    assert len(fast.losses) == 8
    assert fast.losses == pytest.approx(slow.losses, abs=1e-5)
    assert fast.losses[-1] < fast.losses[0]


def test_streams_behind_an_edit_are_not_kept() -> None:
    model, plan = build("llama"), Plan(lr=1e-2, epochs=1, batch_size=4)
    streams = KeptStreams(model, IDS, SimpleNamespace(words=WORDS), Progress(quiet=True), keep=(1, 2))  # type: ignore[arg-type]
    streams.training(1, edited=True)
    assert set(streams.trained) == {1}
    later = streams.training(2)
    assert set(streams.trained) == {1, 2} and later.block == 2
    with pytest.raises(SurgeryError, match="enters block 2, behind the first trained one"):
        fine_tune(model, IDS, WORDS, plan, blocks=[1, 2], seed=3, prefix=later)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gptj"])
def test_the_words_alone_are_those_of_the_logits(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that does not train is read once; one with a soft cap or a scale behind it, or a bias, gives logits."""
    model, fused = build(family), []
    real = last_position.words_of_head
    monkeypatch.setattr(last_position, "words_of_head", lambda *given: fused.append(family) or real(*given))
    with shortcut(model) as run, torch.no_grad():
        expected = run(pad(IDS, range(3), "cpu")).log_softmax(-1)[:, WORDS]
    for trains in (True, False):
        model.requires_grad_(trains)
        with shortcut(model, words=WORDS) as run, torch.no_grad():
            assert torch.allclose(run(pad(IDS, range(3), "cpu")), expected, atol=1e-6)
    assert fused == (["llama"] if family == "llama" else [])


def test_perplexity_losses_equal_one_text_at_a_time() -> None:
    model = build("llama")
    token_losses(model, IDS)  # whether it takes trees is found out
    ran: list[int] = []
    with model.get_input_embeddings().register_forward_pre_hook(lambda _, args: ran.append(args[0].numel())):
        sums, counts, kept = token_losses(model, IDS, keep=[2])
    assert sum(ran) < counts.sum()  # what texts begin alike runs once, and their last tokens not at all
    for row, ids in enumerate(IDS):
        tokens = torch.tensor([ids])
        with torch.no_grad():
            mean = model(input_ids=tokens, labels=tokens).loss.item()
        assert sums[row] / counts[row] == pytest.approx(mean, abs=1e-5)
    again, _, _ = token_losses(model, IDS, prefix=kept[2])
    assert again == pytest.approx(sums, abs=1e-4)


def test_dropout_and_broken_architectures_fall_back_with_the_reason() -> None:
    model = build("gpt2")
    prefix = next_words(model, IDS, WORDS, keep=[1]).prefixes[1]
    model.train()
    assert "dropout" in str(why_not(model, prefix))
    model.eval()
    wrong = type(prefix)(1, prefix.ids, prefix.flat * 2)
    assert "differ" in str(why_not(model, wrong))
    with matrix_products("medium"):  # its products' rounding is no other computation
        noise = torch.randn(prefix.flat.shape, generator=torch.Generator().manual_seed(0))
        near = replace(prefix, flat=prefix.flat * (1 + 1e-2 * noise))
        assert why_not(model, near) is None
    assert "differ" in str(why_not(model, near))


@pytest.mark.parametrize("rounded", [True, False])
def test_attention_stays_fused_where_products_are_not_rounded(rounded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = torch.backends.cuda.flash_sdp_enabled
    with matrix_products("medium"):  # as this processor has it
        product = torch.full((64, 64), 1.003) @ torch.full((64, 64), 1.003)
        assert fused() == torch.allclose(product, torch.tensor(64 * 1.003**2), rtol=1e-4)
    monkeypatch.setattr(precision, "rounds", lambda: rounded)
    with matrix_products("medium"):
        assert fused() is not rounded
    assert fused()


def test_an_exception_inside_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    prefix = next_words(model, IDS, WORDS, keep=[2]).prefixes[2]
    before = state(model)
    with pytest.raises(ZeroDivisionError), shortcut(model, start=2) as run:
        run(prefix.batch([0]))
        raise ZeroDivisionError
    assert state(model) == before


def test_batches_hold_every_row_once_within_the_budget() -> None:
    batches = by_length(IDS, tokens=20)
    assert sorted(row for rows in batches for row in rows) == list(range(len(IDS)))
    assert all(len(rows) == 1 or len(rows) * max(len(IDS[row]) for row in rows) <= 20 for rows in batches)
    padded = pad(IDS, [0, 3], "cpu")
    assert padded.at_last(padded.ids).tolist() == [IDS[0][-1], IDS[3][-1]] and padded.mask[0].sum() == len(IDS[0])
    assert padded.last.tolist() == [len(IDS[0]) - 1, len(IDS[3]) - 1] and "position_ids" not in padded.inputs()


def test_words_must_be_one_token(word_tokenizer) -> None:  # type: ignore[no-untyped-def]
    assert len(word_ids(word_tokenizer, ["he", "she"])) == 2
    with pytest.raises(SurgeryError, match="'xylograph'"):
        word_ids(word_tokenizer, ["he", "xylograph"])
    with pytest.raises(SurgeryError, match="2 tokens"):
        word_ids(word_tokenizer, ["he she"])
    with pytest.raises(SurgeryError, match="got none"):
        encode(word_tokenizer, [])
    with pytest.raises(SurgeryError, match="no token"):
        encode(word_tokenizer, ["The nurse", ""])
