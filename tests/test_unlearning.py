"""Unlearning: every loss against its formula, exact masks, the kept reference, chunks, swaps, stop and resume."""

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, state
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from surgery.data.stereoset import Triple
from surgery.edits.supervised import Lora, Row
from surgery.edits.unlearning import (
    BatchSampler,
    EarlyStopping,
    Item,
    Objective,
    ascent,
    batch_losses,
    batch_weights,
    boundary,
    decide,
    dpo,
    encode_triples,
    gradients_of_terms,
    kl,
    npo,
    npo_batch,
    preference,
    push,
    reference,
    retention,
    split_terms,
    unlearn,
)
from surgery.edits.unlearning.early_stopping import merit
from surgery.edits.unlearning.encoding import ANTI, SIDES, STEREOTYPE, UNRELATED, encode_sentences
from surgery.errors import SurgeryError
from surgery.training import Plan

F64 = torch.float64


# The losses


def logs(seed: int, count: int = 5) -> torch.Tensor:
    return -5 * torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=F64)


def test_npo_is_equation_1_of_each_example() -> None:
    logp, ref = logs(0), logs(1)
    for beta in (0.1, 1.0):
        direct = [-(2 / beta) * math.log(1 / (1 + math.exp(beta * (p - r)))) for p, r in zip(logp, ref, strict=True)]
        assert npo(logp, ref, beta).tolist() == pytest.approx(direct, abs=1e-12)
    assert npo(ref, ref, 0.1).tolist() == pytest.approx([20 * math.log(2)] * 5)


def test_small_beta_is_gradient_ascent() -> None:
    """Zhang et al. 2024, section 3: the gradient's limit."""
    logp, ref = logs(0).requires_grad_(), logs(1)
    (of_npo,) = torch.autograd.grad(npo(logp, ref, 1e-7).sum(), logp)
    (of_ascent,) = torch.autograd.grad(ascent(logp).sum(), logp)
    torch.testing.assert_close(of_npo, of_ascent, rtol=0, atol=1e-6)


def test_the_released_npo_lets_opposite_examples_cancel() -> None:
    ref = torch.tensor([2.0, 2.0], dtype=F64)
    apart = torch.tensor([1.0, 3.0], dtype=F64)  # one stereotype likelier, one mixed-in anti-stereotype less likely
    assert npo_batch(apart, ref, 0.1).tolist() == pytest.approx([20 * math.log(2)] * 2)
    assert npo(-apart, -ref, 0.1).mean() > 20 * math.log(2) + 0.02
    risen = npo_batch(torch.tensor([4.0, 3.0], dtype=F64), ref, 0.5)
    assert risen.tolist() == pytest.approx([4 * math.log(1 + math.exp(-0.5 * 1.5))] * 2)


def test_kl_is_torch_s_in_both_directions() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = (torch.randn(4, 7, generator=generator, dtype=F64) for _ in range(2))
    p, q = torch.distributions.Categorical(logits=one), torch.distributions.Categorical(logits=two)
    torch.testing.assert_close(kl(one, two), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(kl(one, two, "reverse"), torch.distributions.kl_divergence(q, p))
    with pytest.raises(SurgeryError, match="got 'backward', expected one of forward, reverse"):
        kl(one, two, "backward")


def test_dpo_and_retention() -> None:
    chosen, rejected, first, second = (logs(n) for n in range(4))
    direct = [
        -math.log(1 / (1 + math.exp(-0.3 * ((c - a) - (r - b)))))
        for c, r, a, b in zip(chosen, rejected, first, second, strict=True)
    ]
    assert dpo(chosen, rejected, first, second, 0.3).tolist() == pytest.approx(direct, abs=1e-12)
    assert retention(torch.tensor([-6.0]), torch.tensor([3.0])).tolist() == [2.0]
    assert retention(torch.tensor([-6.0])).tolist() == [6.0]


def test_a_preference_weighs_what_still_prefers_the_stereotype() -> None:
    margin = torch.tensor([0.4, -0.1, -2.0], dtype=F64)
    direct = [-math.log(1 / (1 + math.exp(5 * (m + 0.1)))) for m in margin.tolist()]
    assert preference(margin, 5.0, 0.1).tolist() == pytest.approx(direct, abs=1e-12)
    assert direct[0] > 10 * direct[2]


def test_the_mean_over_a_chunk_is_equation_4() -> None:
    parts = {"forget": logs(0, 4), "retain": logs(1, 28), "unrelated": logs(2, 3)}
    weights = {"forget": 0.4, "retain": 0.4, "unrelated": 0.2}
    factors = batch_weights({role: len(part) for role, part in parts.items()}, weights)
    whole = torch.cat([factors[role] * part for role, part in parts.items()]).mean()
    assert whole.item() == pytest.approx(sum(weights[role] * part.mean().item() for role, part in parts.items()))


# The context's mask


def triple(context: str, *sentences: str, kind: str = "gender", term: str = "nurse") -> Triple:
    return Triple(term, kind, context, *sentences, id="", kind="intrasentence", where="")


NURSE = triple(
    "the nurse  is so BLANK today.",
    "The nurse is so kindhearted today.",
    "The nurse is so unkind today.",
    "The nurse is so orange today.",
)
TEXTS = [getattr(NURSE, side) for side in SIDES] * 3 + ["An engineer should be paid, naïve as she is."]


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    return tokenizer


def word_pieces() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=80, special_tokens=["[UNK]"]))
    return tokenizer


def metaspace() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"])
    )
    return tokenizer


@pytest.mark.parametrize("make", [byte_level, word_pieces, metaspace])
def test_exactly_the_continuation_is_learnt(make: Any) -> None:
    """No character of it is lost, and no token of the context alone is learnt, with and without a start token."""
    inner = make()
    for more in ({}, {"bos_token": "<s>"}):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, **more)
        for side in SIDES:
            sentence = getattr(NURSE, side)
            begin = boundary(NURSE.context, sentence)
            assert begin is not None and sentence[:begin] == "The nurse is so "
            (row,) = encode_sentences(tokenizer, [sentence], [begin], start="always" if more else "tokenizer")
            assert (row.ids[0] == tokenizer.bos_token_id) is bool(more)
            learnt = tokenizer.decode(row.ids[row.start :]).replace(" ##", "").replace("##", "").replace(" .", ".")
            assert learnt.strip() == sentence[begin:]


def test_a_token_over_the_boundary_is_learnt_whole() -> None:
    vocabulary = {"so": 0, "sokind": 1, "kind": 2, " ": 3}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="so"))
    inner.pre_tokenizer = pre_tokenizers.Split(" ", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=" ")
    coded = encode_sentences(tokenizer, ["so sokind"] * 3, [5, 3, 0])
    # The first token needs one before it.
    assert coded == [Row((0, 3, 1), 2), Row((0, 3, 1), 2), Row((3, 0, 3, 1), 1)]


def test_the_context_may_differ_in_case_and_spaces_only() -> None:
    assert boundary("Puerto Rican woman  are BLANK.", "Puerto rican woman are loud.") == 23
    assert boundary("BLANK is here.", " Nobody is here.") == 1
    assert boundary("The man was BLANK.", "A man was kind.") is None
    assert boundary("The man BLANK", "The man ") is None


def test_triples_that_cannot_be_learnt_are_said(capsys: Any) -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level())
    odd = triple("A man is BLANK.", "A man is kind.", "The man is cruel.", "A man is blue.")
    coded = encode_triples(tokenizer, [odd, NURSE], max_length=40)
    assert coded.kept == (1,) and "triple 0 (anti_stereotype 'The man is cruel.'" in coded.skipped[0]
    assert coded.rows[0][UNRELATED].start == 1 < coded.rows[0][ANTI].start
    with pytest.raises(SurgeryError, match=r"none of 1 triples can be learnt: triple 0 .* more than 3"):
        encode_triples(tokenizer, [NURSE], max_length=3)
    bare = PreTrainedTokenizerFast(tokenizer_object=word_pieces())
    with pytest.raises(SurgeryError, match="no begin and no end token"):
        encode_sentences(bare, ["Kind is she."], [0])


# One pass against the plain way

ROWS = [
    {
        STEREOTYPE: Row((5, 6, 7 + n, 8, 9 + n)[: 4 + n % 2], 2),
        ANTI: Row((5, 6, 20 + n, 21), 2),
        UNRELATED: Row((5, 6, 30 + n, 31, 32, 33), 1),
    }
    for n in range(8)
]
ITEMS = [
    Item("forget", 0, STEREOTYPE),
    Item("retain", 1, ANTI),
    Item("unrelated", 2, UNRELATED),
    Item("forget", 3, ANTI),
    Item("both", 4, STEREOTYPE),
    Item("prefer", 5, STEREOTYPE),
    Item("unrelated", 6, UNRELATED),
]
KEPT = ({(n, side) for n in range(8) for side in (STEREOTYPE, ANTI)}, set(range(8)))


def nudged(model: Any) -> Any:
    """A copy of ``model`` with other weights in its blocks."""
    other = build(model.config.model_type.replace("_text", ""))
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if parameter.ndim > 1 and "embed" not in name and "wte" not in name and "head" not in name:
                parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    return other


def summed(model: Any, row: Row) -> torch.Tensor:
    logits = model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    return torch.stack([logits[at - 1, row.ids[at]] for at in range(row.start, len(row.ids))]).sum()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_one_padded_pass_and_the_kept_reference_are_two_models(family: str) -> None:
    """Against a second frozen model, a sentence at a time, in double precision; Gemma 2 caps its logits.

    (In single precision, since its attention in transformers takes no other with padding.)
    """
    frozen: Any = build(family)
    dtype = torch.float32 if family == "gemma2" else F64
    model = nudged(frozen).to(dtype)
    before = state(model)
    kept = reference(frozen, ROWS, *KEPT)
    values, ratio = batch_losses(model, model, ITEMS, ROWS, kept, Objective({}, "npo", 0.3, retain_by="token"))
    frozen.to(dtype)
    expected = []
    for item in ITEMS:
        row = ROWS[item.triple][item.side]
        logp, ref = summed(model, row), summed(frozen, row).detach()
        if item.role == "unrelated":
            both = [net(torch.tensor([row.ids])).logits[0].log_softmax(-1) for net in (frozen, model)]
            expected.append(
                torch.nn.functional.kl_div(both[1], both[0], log_target=True, reduction="none").sum(-1).mean()
            )
        elif item.role == "prefer":
            chosen = ROWS[item.triple][ANTI]
            expected.append(dpo(summed(model, chosen), logp, summed(frozen, chosen), ref, 0.3))
        else:
            expected.append(npo(logp, ref, 0.3) if item.role == "forget" else -logp / (len(row.ids) - row.start))
    assert values.dtype == dtype
    assert values.tolist() == pytest.approx([value.item() for value in expected], rel=2e-5, abs=2e-6)
    assert min(values[2], values[6]) > 1e-5
    forgotten = [ROWS[0][STEREOTYPE], ROWS[3][ANTI]]
    change = sum(summed(model, row).item() for row in forgotten) / sum(summed(frozen, row).item() for row in forgotten)
    assert ratio == pytest.approx(change, rel=1e-5)
    (got,) = torch.autograd.grad(values.sum(), model.get_input_embeddings().weight, retain_graph=True)
    (direct,) = torch.autograd.grad(torch.stack(expected).sum(), model.get_input_embeddings().weight)
    # A tied head sees the kept head inputs as constants, as it is never trained here.
    if model.get_output_embeddings().weight is not model.get_input_embeddings().weight:
        torch.testing.assert_close(got, direct, rtol=1e-4, atol=1e-6)
    assert state(model) == before


def test_before_training_nothing_diverges() -> None:
    model: Any = build("llama")
    values, ratio = batch_losses(model, model, ITEMS, ROWS, reference(model, ROWS, *KEPT), Objective({}))
    assert values[[2, 6]].abs().max() < 1e-6 and ratio == pytest.approx(1, abs=1e-5)
    assert values[[0, 3]].tolist() == pytest.approx([20 * math.log(2)] * 2, rel=1e-5)
    assert values[5].item() == pytest.approx(math.log(2), rel=1e-5)


def test_in_the_scorers_unit_every_loss_is_of_means_over_tokens() -> None:
    frozen: Any = build("llama")
    model = nudged(frozen).to(F64)
    kept = reference(frozen.to(F64), ROWS, *KEPT)
    items = [item for item in ITEMS if item.role in ("forget", "retain", "prefer")]
    objective = Objective(
        {}, beta=0.3, unit="mean", prefer="margin", offsets=[number / 10 for number in range(len(ROWS))]
    )
    values, _ = batch_losses(model, model, items, ROWS, kept, objective)
    expected = []
    for item in items:
        row = ROWS[item.triple][item.side]
        logp, ref = (summed(net, row) / (len(row.ids) - row.start) for net in (model, frozen))
        if item.role == "prefer":
            other = ROWS[item.triple][ANTI]
            margin = logp - summed(model, other) / (len(other.ids) - other.start)
            expected.append(preference(margin, 0.3, objective.offsets[item.triple]))
        else:
            expected.append(npo(logp, ref, 0.3) if item.role == "forget" else -logp)
    assert values.tolist() == pytest.approx([value.item() for value in expected], rel=1e-6)


def test_the_released_codes_loss_takes_means_over_tokens() -> None:
    frozen: Any = build("llama")
    model = nudged(frozen).to(F64)
    kept = reference(frozen.to(F64), ROWS, *KEPT)
    items = [item for item in ITEMS if item.role == "forget"]
    values, _ = batch_losses(model, model, items, ROWS, kept, Objective({}, "npo_batch", 0.3))
    rows = [ROWS[item.triple][item.side] for item in items]
    nll, ref = (
        torch.stack([-summed(net, row) / (len(row.ids) - row.start) for row in rows]) for net in (model, frozen)
    )
    assert values.tolist() == pytest.approx(npo_batch(nll, ref, 0.3).tolist(), rel=1e-6)


def test_a_push_sets_the_ratio_of_the_gradients() -> None:
    one, two = (torch.tensor(values, requires_grad=True) for values in ([3.0, 4.0], [1.0]))
    items = [Item("forget", 0, STEREOTYPE), Item("retain", 0, ANTI), Item("retain", 1, ANTI)]
    with torch.no_grad():  # as an evaluation inside a training is
        found = gradients_of_terms(items, lambda _: torch.stack([one.square().sum(), 5 * two[0], one[0]]), [one, two])
    assert found == pytest.approx({"forget": 10.0, "retain": math.sqrt(2.5**2 + 0.5**2)})
    objective = Objective({"forget": 0.4, "retain": 0.4, "unrelated": 0.2}, ratio=2.0)
    assert push(objective, {"forget": 10.0, "retain": 4.0}) == pytest.approx(0.8)  # 4 to 1.6 before
    both = Objective({"forget": 0.4, "prefer": 0.1, "retain": 0.4}, ratio=2.0)
    assert push(both, {"forget": 10.0, "prefer": 20.0, "retain": 4.0}) == pytest.approx(3.2 / 6)


# BatchSampler

TYPES = ("race",) * 40 + ("gender",) * 20 + ("religion",) * 4
SIZES = {"forget": 4, "retain": 28, "unrelated": 4}


def test_a_chunk_depends_on_seed_and_step_alone_and_cycles_through_the_sets() -> None:
    chunks = BatchSampler(TYPES, SIZES, seed=3)
    assert chunks.items(7) == BatchSampler(TYPES, SIZES, seed=3).items(7) != BatchSampler(TYPES, SIZES, seed=4).items(7)
    seen = [item for step in range(20) for item in chunks.items(step)]
    retained = Counter(item.triple for item in seen if item.role == "retain")
    assert sum(retained.values()) == 560 and set(retained.values()) == {8, 9} and len(retained) == 64
    forgotten = Counter((item.triple, item.side) for item in seen if item.role == "forget")
    assert len(forgotten) == 80 and set(forgotten.values()) == {1}  # 64 stereotypes and a quarter of the others
    mixed = Counter(TYPES[n] for n, side in forgotten if side == ANTI)
    assert mixed == {"race": 10, "gender": 5, "religion": 1}


def test_plain_fine_tuning_takes_both_sides_of_every_triple() -> None:
    seen = [item for step in range(16) for item in BatchSampler(TYPES, {"both": 8}, seed=0).items(step)]
    drawn = Counter((item.triple, item.side) for item in seen)
    assert (
        len(drawn) == 2 * len(TYPES)
        and set(drawn.values()) == {1}
        and {side for _, side in drawn} == {STEREOTYPE, ANTI}
    )


def test_the_released_code_mixes_in_the_front_types_only() -> None:
    mixed = BatchSampler(TYPES, SIZES, seed=0, in_order=True).mixed_in
    assert {TYPES[n] for n in mixed} == {"gender"} and len(mixed) == 16
    assert BatchSampler(TYPES, SIZES, seed=0, adversarial=0).mixed_in == ()


def test_a_swap_exchanges_sides_and_nothing_else() -> None:
    chunks = BatchSampler(TYPES, SIZES, seed=0)
    for step in range(5):
        for item, swapped in zip(chunks.items(step), chunks.items(step, swapped=frozenset({"race"})), strict=True):
            assert (item.role, item.triple) == (swapped.role, swapped.triple)
            changed = TYPES[item.triple] == "race" and item.role != "unrelated"
            assert (item.side != swapped.side) is changed
    assert {TYPES[item.triple] for item in chunks.items(0, active=("religion",))} == {"religion"}


def test_balanced_chunks_take_every_type_equally_often() -> None:
    chunks = BatchSampler(TYPES, {"retain": 6}, seed=0, balance="types")
    assert Counter(TYPES[item.triple] for item in chunks.items(5)) == {"race": 2, "gender": 2, "religion": 2}


@given(steps=st.integers(1, 12), seed=st.integers(0, 99), sizes=st.sampled_from([SIZES, {"prefer": 16}, {"both": 9}]))
def test_the_reference_knows_every_sentence_that_any_swap_may_need(
    steps: int, seed: int, sizes: dict[str, int]
) -> None:
    chunks = BatchSampler(TYPES, sizes, seed)
    sentences, unrelated = chunks.referenced(steps)
    for step in range(steps):
        for item in chunks.items(step, swapped=frozenset({"gender"})):
            if item.role in ("forget", "prefer"):
                assert {(item.triple, STEREOTYPE), (item.triple, ANTI)} <= sentences
            elif item.role == "unrelated":
                assert item.triple in unrelated


def test_passes_are_counted_by_set_and_type() -> None:
    """Against counting the draws: 48 chunks of 4 are three passes through 64 stereotypes, or 64 of each type."""
    for balance in ("rows", "types"):
        chunks = BatchSampler(TYPES, SIZES, seed=0, adversarial=0.0, balance=balance)  # type: ignore[arg-type]
        found = chunks.passes(48)
        drawn = Counter(
            TYPES[item.triple] for step in range(48) for item in chunks.items(step) if item.role == "forget"
        )
        for name, rows in Counter(TYPES).items():
            assert found["forget"][name] == pytest.approx(drawn[name] / rows)
    assert chunks.passes(48)["retain"]["religion"] == 10 * chunks.passes(48)["retain"]["race"]


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(
        SurgeryError, match=r"got \{'forgotten': 4\}, expected at least 1 place for some of forget, retain"
    ):
        BatchSampler(TYPES, {"forgotten": 4}, seed=0)


# The development set


def triples(counts: dict[str, tuple[int, int]]) -> list[Triple]:
    """``counts``: of each type how many terms of how many rows."""
    return [
        triple("A BLANK", "A b", "A c", "A d", kind=kind, term=f"{kind} {term}")
        for kind, (terms, rows) in counts.items()
        for term in range(terms)
        for _ in range(rows)
    ]


def test_held_out_terms_are_not_trained_on() -> None:
    given = triples({"race": (10, 5), "gender": (3, 8)})
    found = split_terms(given, share=0.2, watched=6, seed=1)
    names = {part: {given[n].target for n in getattr(found, part)} for part in ("train", "held_out", "watched")}
    assert not names["train"] & names["held_out"] and names["watched"] == names["held_out"]
    assert Counter(given[n].bias_type for n in found.held_out) == {"race": 10, "gender": 8}
    assert Counter(given[n].bias_type for n in found.watched) == {"race": 6, "gender": 6}
    assert Counter(given[n].target for n in found.watched if given[n].bias_type == "race").most_common(1)[0][1] == 3
    assert len(found.train) == 40 + 16
    assert found == split_terms(given, share=0.2, watched=6, seed=1) != split_terms(given, share=0.2, watched=6, seed=2)


def test_a_type_of_one_term_is_refused() -> None:
    with pytest.raises(
        SurgeryError, match="bias type race: all rows have the target term 'race 0'; expected at least 2"
    ):
        split_terms(triples({"race": (1, 30)}), share=0.2, watched=5, seed=0)


def test_types_below_50_are_swapped_until_they_are_above() -> None:
    control = EarlyStopping(5, {"gender": 50, "race": 50, "religion": 10})
    assert decide(control, {"ss": {"gender": 47.0, "race": 61.0, "religion": 45.0}}).swapped == {"gender", "religion"}
    assert decide(control, {"ss": {"gender": 52.1, "race": 61.0, "religion": 45.0}}).swapped == {"religion"}
    assert not decide(control, {"ss": {"gender": 52.1, "race": 50.0, "religion": 50.0}}).stop
    assert decide(control, {"ss": {"gender": 52.0, "race": 48.0, "religion": 59.9}}).stop  # 10 rows: one is 10 points
    assert not decide(control, {"ss": {"gender": 52.0, "race": 48.0, "religion": 60.1}}).stop


def test_a_swap_may_wait_for_the_interval_and_the_choice_for_the_language_model() -> None:
    given: Any = {"swap_when": "interval", "select": "ss", "lms_floor": 89.0, "counted": ("gender", "race")}
    control = EarlyStopping(25, {"gender": 50, "race": 50, "religion": 5}, **given)
    scores = {"ss": {"gender": 47.0, "race": 44.0, "religion": 20.0}, "high": {"gender": 51.0, "race": 49.0}}
    scores["high"]["religion"] = 60.0
    assert decide(control, scores).swapped == {"race"}
    scores["lms"] = {"overall": 89.0}
    assert merit(control, scores) == -4.5  # religion takes no part
    short, far = scores | {"lms": {"overall": 88.0}}, scores | {"ss": {"gender": 90.0, "race": 90.0}}
    assert merit(control, short) < merit(control, far) < merit(control, scores)
    mean = replace(control, select="overall")
    apart = scores | {"ss": {"gender": 57.0, "race": 44.0}}  # types on both sides of 50 make up for each other
    assert merit(mean, scores) == -4.5 and merit(mean, apart) == -0.5 and merit(control, apart) == -6.5
    assert merit(mean, apart | {"lms": {"overall": 88.0}}) < merit(mean, scores)


def test_the_released_schedule_goes_on_with_the_farthest_type() -> None:
    control = EarlyStopping(5, {"gender": 100, "religion": 100}, focus=True, targets={"gender": 49.0, "religion": 48.0})
    far = decide(control, {"ss": {"gender": 60.0, "religion": 45.0}})
    assert (far.active, far.swapped, far.factor, far.stop) == (("gender",), frozenset(), 1.0, False)
    near = decide(control, {"ss": {"gender": 50.0, "religion": 45.0}})
    assert (near.active, near.swapped, near.factor, near.stop) == (("religion",), {"religion"}, 0.8, False)


# Training

SMALL = BatchSampler(("gender",) * 4 + ("race",) * 4, {"forget": 2, "retain": 4, "unrelated": 2}, seed=0)
WEIGHTS = {"forget": 0.4, "retain": 0.4, "unrelated": 0.2}


def learn(model: Any, *, steps: int = 9, lr: float = 1e-2, scores: Any = None, **more: Any) -> Any:
    """Unlearn on the small rows; ``scores`` are the development set's gender SS at each evaluation."""
    given = iter(scores) if scores else None
    objective = more.pop("objective", Objective(WEIGHTS))

    def evaluate(step: int) -> dict[str, dict[str, float]]:
        ss = next(given) if given else 60.0
        return {"ss": {"gender": ss, "race": 60.0}, "icat": {"gender": 2 * min(ss, 100 - ss), "race": 80.0}, "lms": {}}

    return unlearn(
        model,
        ROWS,
        SMALL,
        reference(model, ROWS, *KEPT),
        objective,
        more.pop("control", EarlyStopping(3, {"gender": 50, "race": 50})),
        Plan(lr, 1, SMALL.size, "adamw", dropout=True, schedule="linear", shuffle=False),
        steps=steps,
        lora=Lora(4, 8, dropout=0.1),
        evaluate=evaluate,
        **more,
    )


def test_training_forgets_retains_and_leaves_the_model_as_it_was() -> None:
    model: Any = build("llama")
    before, seen = state(model), []
    control = EarlyStopping(40, {"gender": 50, "race": 50})
    found = learn(model, steps=40, lr=3e-2, scores=[60.0], control=control, log=seen.append)
    assert state(model) == before
    assert found.kept_step == 40 and found.stopped == "all 40 steps were done" and len(found.trained.losses) == 40
    steps = [row for row in seen if "step" in row]
    assert {"forget", "retain", "unrelated", "forget_ratio"} < set(steps[0])
    assert steps[0]["forget"] == pytest.approx(20 * math.log(2), rel=1e-3)
    first, last = (
        [sum(row[key] for row in part) / 5 for key in ("forget", "retain")] for part in (steps[:5], steps[-5:])
    )
    assert last[1] < 0.95 * first[1]


def test_the_best_evaluation_is_kept_or_the_last_one() -> None:
    model: Any = build("llama")
    best = learn(model, scores=[60.0, 53.0, 58.0])
    assert best.kept_step == 6 and sorted(best.evaluations) == [3, 6, 9]
    stopped = learn(
        model, steps=6, scores=[60.0, 53.0], control=EarlyStopping(3, {"gender": 50, "race": 50}, keep="last")
    )
    assert stopped.kept_step == 6
    last = learn(model, scores=[60.0, 53.0, 58.0], control=EarlyStopping(3, {"gender": 50, "race": 50}, keep="last"))
    assert last.kept_step == 9
    name = next(iter(best.trained.differences))
    assert not torch.equal(best.trained.differences[name], last.trained.differences[name])


def test_training_ends_when_every_type_is_near() -> None:
    model: Any = build("llama")
    found = learn(model, scores=[60.0, 51.0, 70.0], control=EarlyStopping(3, {"gender": 50}))
    assert found.stopped == "every bias type was within its tolerance at step 6"
    assert len(found.trained.losses) == 6 and found.kept_step == 6


def test_an_explosion_stops_and_keeps_the_last_good_checkpoint() -> None:
    model: Any = build("llama")
    before = state(model)
    objective = Objective({"forget": 1.0, "retain": 0.0, "unrelated": 0.0}, "ascent")
    control = EarlyStopping(2, {"gender": 50, "race": 50}, explosion=1.2, early_stop=False)
    found = learn(model, steps=60, lr=2e-2, scores=[60.0] * 30, objective=objective, control=control)
    assert "the forget loss was more than 1.2 x its start at step" in found.stopped
    assert 2 <= found.kept_step < len(found.trained.losses) < 60
    assert all(bool(torch.isfinite(value).all()) for value in found.trained.differences.values())
    with pytest.raises(SurgeryError, match=r"before the first evaluation .every 50 steps. left a good checkpoint"):
        learn(
            model,
            steps=60,
            lr=3e-2,
            objective=objective,
            control=EarlyStopping(50, {"gender": 50, "race": 50}, explosion=1.2),
        )
    assert state(model) == before


@pytest.mark.parametrize("killed", [4, 8])
def test_an_interrupted_training_goes_on_to_the_same_result(
    killed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The swap after the first evaluation, and the best checkpoint of before the interruption, are taken up."""
    model: Any = build("llama")
    scores = [45.0, 53.0, 58.0]
    whole = learn(model, scores=scores)
    monkeypatch.setattr("surgery.training_state.SAVE_EVERY", 0.0)

    def interrupt(row: dict[str, Any]) -> None:
        if row.get("step") == killed:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(model, scores=scores, state=tmp_path, log=interrupt)
    done = (killed - 1) // 3
    rest = learn(model, scores=scores[done:], state=tmp_path)
    assert rest.kept_step == whole.kept_step == 6 and rest.evaluations == whole.evaluations
    assert rest.trained.losses == whole.trained.losses
    for name, value in whole.trained.differences.items():
        assert torch.equal(value, rest.trained.differences[name]), name
