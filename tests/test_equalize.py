"""Equalise and hold: each loss against a case worked out by hand, targets that keep the mass, an untouched optimum."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from surgery.edits.equalize import (
    divergence,
    equalize,
    even_out,
    hints_term,
    hold_term,
    keep,
    losses_of,
    prepare,
    share_out,
    words_term,
)
from surgery.edits.equalize.target import among, imbalance, raised
from surgery.edits.equalize.terms import Term
from surgery.edits.equalize.training import begun_alike
from surgery.edits.supervised import Lora
from surgery.errors import SurgeryError
from surgery.training import Plan, portions
from tests.families import build

PROMPTS = [[1, 5, 9, 13], [1, 6, 20, 21, 22], [1, 7, 30], [1, 8, 41, 42]]
HELD = [[1, 50, 51, 52], [1, 60, 61], [1, 70, 71, 72, 73, 74]]
WORDS = [3, 4]


@pytest.fixture
def model() -> Any:
    torch.manual_seed(0)
    return build("llama").eval()


def test_the_words_share_their_mass_and_every_other_token_stays() -> None:
    """p = (.1, .3, .2, .4), words 1 and 3: .7 becomes .35 and .35, or .175 and .525 by shares of a quarter."""
    logp = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    assert torch.allclose(share_out(logp, [1, 3]).exp(), torch.tensor([[0.1, 0.35, 0.2, 0.35]]))
    assert torch.allclose(share_out(logp, [1, 3], (0.25, 0.75)).exp(), torch.tensor([[0.1, 0.175, 0.2, 0.525]]))
    assert torch.allclose(share_out(logp, [0, 1, 2]).exp(), torch.tensor([[0.2, 0.2, 0.2, 0.4]]))


def test_the_odds_of_the_mass_are_raised_and_the_rest_keeps_its_ratios() -> None:
    """p = (.1, .3, .2, .4), words 1 and 3: their odds of 7 to 3 become 49 to 9, and .1 and .2 stay as 1 to 2."""
    logp = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    assert torch.allclose(share_out(logp, [1, 3], power=2.0).exp(), torch.tensor([[3.0, 24.5, 6.0, 24.5]]) / 58)
    assert torch.equal(share_out(logp, [1, 3], power=1.0), share_out(logp, [1, 3]))


def test_a_raised_ratio_keeps_the_mass_and_every_other_token() -> None:
    """p = (.1, .3, .2, .4), words 1 and 0: 3 to 1 becomes 9 to 1, of .4."""
    logp = torch.tensor([[0.1, 0.3, 0.2, 0.4]]).log()
    assert torch.allclose(raised(logp, [1, 0], 2.0).exp(), torch.tensor([[0.04, 0.36, 0.2, 0.4]]))
    assert torch.allclose(raised(logp, [1, 0], 1.0), logp)
    with pytest.raises(SurgeryError, match="power of x: got 2 and 1 words; expected at least 2"):
        hold_term("x", HELD, words=[3], power=2.0)


def test_the_divergence_is_the_sum_written_out() -> None:
    """q = (.1, .35, .2, .35) against p = (.1, .3, .2, .4): .35 ln(.35/.3) + .35 ln(.35/.4)."""
    p, q = torch.tensor([[0.1, 0.3, 0.2, 0.4]]), torch.tensor([[0.1, 0.35, 0.2, 0.35]])
    expected = 0.35 * math.log(0.35 / 0.3) + 0.35 * math.log(0.35 / 0.4)
    assert float(divergence(keep(q.log()), p.log() + 3.0)) == pytest.approx(expected, abs=1e-6)
    # Two tokens kept: .1 and .2 are one outcome of .3 on both sides, which differ in nothing.
    assert float(divergence(keep(q.log(), [1, 3], 2), p.log())) == pytest.approx(expected, abs=1e-6)
    # Tokens 0 and 1 kept: the rest is .55 against .6.
    expected = 0.35 * math.log(0.35 / 0.3) + 0.55 * math.log(0.55 / 0.6)
    assert float(divergence(keep(q.log(), [0, 1], 2), p.log())) == pytest.approx(expected, abs=1e-6)


def test_the_gap_alone_counts_the_same_at_any_mass() -> None:
    """Among words 1 and 3 of (.1, .3, .2, .4): (3/7, 4/7) against halves, and the same with their mass a tenth."""
    expected = 0.5 * math.log(0.5 / (3 / 7)) + 0.5 * math.log(0.5 / (4 / 7))
    for p in ([0.1, 0.3, 0.2, 0.4], [0.5, 0.03, 0.43, 0.04]):
        logp = torch.tensor([p]).log()
        wanted = among(share_out(logp, [1, 3]), [1, 3])
        assert float(imbalance(wanted, logp, [1, 3])) == pytest.approx(expected, abs=1e-6)
        assert float(imbalance(among(logp, [1, 3]), logp, [1, 3])) == pytest.approx(0, abs=1e-7)


def test_what_all_hints_of_a_prompt_have_in_common_goes() -> None:
    """Log odds of 2 after his and -.5 after her become 1.25 and -1.25; at shares of .8 and .2 both are ln 4 more.

    A power multiplies what the hints say, not the shares.
    """
    p = torch.tensor([[[2.0, 0.0], [0.0, 0.5]]]).softmax(-1) * torch.tensor([[[0.6], [0.3]]])
    for shares, more, power in ((None, 0.0, 1.0), ((0.8, 0.2), math.log(4), 1.0), ((0.8, 0.2), math.log(4), 1.6)):
        q = even_out(p.log(), shares, power)
        odds = torch.tensor([[1.25 * power + more, -1.25 * power + more]])
        assert torch.allclose(q.exp().sum(-1), torch.tensor([[0.6, 0.3]]))
        assert torch.allclose(q[..., 0] - q[..., 1], odds, atol=1e-6)


def test_the_hints_of_a_prompt_share_a_target(model: Any) -> None:
    """Two prompts with two hints each: full softmaxes written out, with the ratio's own weight on top."""
    hints = hints_term("hints", PROMPTS, WORDS, emphasis=3.0, power=1.5, top=10)
    ready = prepare(model, [words_term(HELD, WORDS), hints])
    logp = torch.stack([model(torch.tensor([row])).logits[0, -1].log_softmax(-1) for row in PROMPTS])
    odds = logp[:, 3] - logp[:, 4]
    mass, wanted = logp[:, WORDS].logsumexp(-1), []
    for row, other in enumerate((1, 0, 3, 2)):
        half = 1.5 * (odds[row] - odds[other]) / 2
        wanted.append(torch.stack([half, torch.zeros(())]).log_softmax(-1))
    q = torch.stack(wanted)
    p = logp[:, WORDS].log_softmax(-1)
    apart = (q.exp() * (q - p)).sum(-1)  # the other tokens stay, so that it is the words' mass that counts
    found = losses_of(model, model, ready, [(1, row) for row in range(4)])
    assert torch.allclose(found, (mass.exp() + 3.0) * apart, atol=1e-6)
    assert float(apart.detach().max()) > 1e-4
    with pytest.raises(SurgeryError, match="term 'hints': got 3 prompts for 2 hints"):
        hints_term("hints", PROMPTS[:3], WORDS)


def test_emphasis_adds_the_gap_among_the_words(model: Any) -> None:
    plain, more = (prepare(model, [words_term(PROMPTS, WORDS, emphasis=weight)]) for weight in (0.0, 2.0))
    each = [(0, row) for row in range(4)]
    apart = losses_of(model, model, more, each) - losses_of(model, model, plain, each)
    logits = torch.stack([model(torch.tensor([row])).logits[0, -1] for row in PROMPTS])
    halves = torch.full((4, 2), math.log(0.5))
    assert torch.allclose(apart, 2 * imbalance(halves, logits, WORDS), atol=1e-6)
    held = prepare(model, [hold_term("held", HELD, words=WORDS, emphasis=3.0)])
    assert float(losses_of(model, model, held, [(0, 0), (0, 1)]).abs().max()) < 1e-6


@given(
    st.lists(st.floats(-8, 8), min_size=6, max_size=6),
    st.lists(st.floats(0.1, 5), min_size=2, max_size=4),
    st.floats(0.3, 3),
)
def test_the_target_keeps_the_mass_and_the_kept_part_bounds_the_whole(
    logits: list[float], parts: list[float], power: float
) -> None:
    logp = torch.tensor([logits], dtype=torch.float64).log_softmax(-1)
    words = list(range(len(parts)))
    shares = [part / sum(parts) for part in parts]
    q = share_out(logp, words, shares).exp()
    assert float(q.sum()) == pytest.approx(1.0)
    assert float(q[0, words].sum()) == pytest.approx(float(logp.exp()[0, words].sum()))
    moved, rest = share_out(logp, words, shares, power), list(range(len(parts), 6))
    was, odds = (each[0, words].logsumexp(-1) - each[0, rest].logsumexp(-1) for each in (logp, moved))
    torch.testing.assert_close(odds, power * was)
    torch.testing.assert_close(moved[0, rest].log_softmax(-1), logp[0, rest].log_softmax(-1))
    assert float(moved.logsumexp(-1)) == pytest.approx(0.0, abs=1e-9)
    whole = float(divergence(keep(q.log(), words, 6), logp))
    some = float(divergence(keep(q.log(), words, 4), logp))
    assert -1e-9 <= some <= whole + 1e-9


@pytest.mark.parametrize(
    ("words", "shares", "message"),
    [
        ([3, 4], [0.5, 0.6], "shares: got .0.5, 0.6. .sum 1.1. for 2 words"),
        ([3, 4], [1.0], "for 2 words"),
        ([3, 4], [1.5, -0.5], "positive"),
        ([3], None, "words: got 1, expected at least 2"),
    ],
)
def test_shares_that_cannot_be_are_refused(words: list[int], shares: list[float] | None, message: str) -> None:
    with pytest.raises(SurgeryError, match=message):
        words_term(PROMPTS, words, shares=shares)


def test_a_text_in_two_terms_is_refused(model: Any) -> None:
    with pytest.raises(SurgeryError, match="text 1 of 'texts' is also a text of 'words'"):
        prepare(model, [words_term(PROMPTS, WORDS), hold_term("texts", [HELD[0], PROMPTS[2]])])


@pytest.mark.parametrize(("start", "positions"), [(0, "last"), (0, "all"), (2, "last"), (2, "all")])
def test_the_losses_are_those_of_the_plain_forward_pass(model: Any, start: int, positions: str) -> None:
    """From the kept stream or the tokens, at one position or all: the same numbers, written out with full softmaxes."""
    torch.manual_seed(1)
    terms = [words_term(PROMPTS, WORDS, top=96), hold_term("held", HELD, positions=positions, top=96)]
    ready = prepare(model, terms, start=start)
    untouched = {tuple(row): model(torch.tensor([row])).logits[0].log_softmax(-1).detach() for row in PROMPTS + HELD}
    with torch.no_grad():
        for parameter in model.model.layers[2].parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    chosen = [(1, 2), (0, 0), (0, 3), (1, 0)]
    found = losses_of(model, model, ready, chosen)
    for value, (term, row) in zip(found.detach().tolist(), chosen, strict=True):
        ids = (PROMPTS, HELD)[term][row]
        now, was = model(torch.tensor([ids])).logits[0].log_softmax(-1), untouched[tuple(ids)]
        was = was[-1:] if term == 0 or positions == "last" else was
        q = share_out(was, WORDS) if term == 0 else was
        expected = (q.exp() * (q - now[-len(q) :])).sum(-1).mean().detach()
        assert value == pytest.approx(float(expected), abs=2e-5)


def test_what_texts_of_different_terms_begin_alike_runs_once(model: Any) -> None:
    """Four tokens that stand before both, read at the last token; a text read at every token stands apart."""
    stem, seen = [1, 5, 9, 13], []
    terms = [words_term([[*stem, 20]], WORDS, top=96), hold_term("held", [[*stem, 30], [*stem, 40]], top=96)]
    whole = hold_term("whole", [[*stem, 50]], positions="all", top=96)
    prepare(model, terms)  # what is found out once a model
    with model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel())):
        found = prepare(model, [*terms, whole]).targets
    assert sorted(seen) == [len(stem) + 1, len(stem) + 3]
    for term in (*terms, whole):
        alone = prepare(model, [term]).targets
        mine, found = found[: len(alone)], found[len(alone) :]
        for one, other in zip(mine, alone, strict=True):
            for a, b in zip(one, other, strict=True):
                torch.testing.assert_close(a, b)


def test_a_term_too_long_for_trees_leaves_those_of_the_others(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its texts run in rows of their own, and what the others begin alike still runs once."""
    stem, seen = [1, 5, 9, 13], []
    terms = [words_term([[*stem, 20], [*stem, 30]], WORDS), hold_term("long", [[2] * 40], positions="last")]
    prepare(model, terms)  # what is found out once a model
    for place in ("surgery.edits.equalize.training", "surgery.forward.trees"):
        monkeypatch.setattr(f"{place}.why_no_trees", lambda _, longest: "too long" if longest > 32 else None)
    with model.model.embed_tokens.register_forward_hook(lambda _, args, __: seen.append(args[0].numel())):
        prepare(model, terms)
    assert sorted(seen) == [len(stem) + 2, 40]


def test_what_is_held_alone_has_its_optimum_at_the_untouched_model(model: Any) -> None:
    """Hold without anything to move: loss and gradient are 0, so no weight, however large, moves the model."""
    model = model.double()
    ready = prepare(model, [hold_term("held", PROMPTS + HELD, positions="all", top=96)])
    loss = losses_of(model, model, ready, ready.examples()).sum()
    loss.backward()
    assert abs(float(loss)) < 1e-12
    assert max(float(p.grad.abs().max()) for p in model.parameters()) < 1e-12


def test_the_gap_falls_the_mass_stays_and_what_is_held_moves_less(model: Any) -> None:
    """One block learns; the more the hold weighs, the less it moves, and the model itself is left bit for bit."""
    with torch.no_grad():
        model.lm_head.weight[WORDS] *= 20  # words of some mass: in a narrow random model others would hold them back
    before = {name: parameter.clone() for name, parameter in model.state_dict().items()}
    was = model(torch.tensor([PROMPTS[2]])).logits[0, -1].softmax(-1)[WORDS]
    moved = []
    for weight in (0.01, 100.0):
        terms = [words_term(PROMPTS, WORDS), hold_term("held", HELD, positions="all", weight=weight)]
        trained = equalize(model, terms, Plan(1e-3, 60, 7), blocks=(1,), seed=0)
        assert all(name.startswith("model.layers.1.") for name in trained.differences)
        assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
        ready = prepare(model, terms)
        with torch.no_grad():
            for name, difference in trained.differences.items():
                model.get_parameter(name).add_(difference)
            now = model(torch.tensor([PROMPTS[2]])).logits[0, -1].softmax(-1)[WORDS]
            moved.append(float(losses_of(model, model, ready, [(1, row) for row in range(3)]).mean()))
            model.load_state_dict(before)
        if weight < 1:
            assert abs(float(now[0] - now[1])) < 0.1 * abs(float(was[0] - was[1]))
            assert float(now.sum()) == pytest.approx(float(was.sum()), rel=0.1)
    assert moved[1] < moved[0] / 2


def test_factors_lie_in_the_chosen_blocks_only(model: Any) -> None:
    terms = [words_term(PROMPTS, WORDS)]
    trained = equalize(model, terms, Plan(1e-2, 2, 4), blocks=(1, 2), part="mlp", lora=Lora(2, 4), seed=0)
    stems = {name.rsplit(".", 1)[0] for name in trained.differences}
    assert {stem.split(".")[2] for stem in stems} == {"1", "2"}
    assert all(".mlp." in stem for stem in stems)


def test_what_begins_alike_stands_in_one_step() -> None:
    """At most so many; half of a text at least is what the one before it in the order of tokens has; pairs never."""
    ids = [[1, 5, 6, 7, 9], [2, 3, 4], [1, 5, 6, 7], [1, 5, 6, 8], [1, 9, 9, 9, 9]]
    words, pairs = words_term(ids[:3], WORDS), Term("pairs", 1.0, PROMPTS, [(0,)] * 4, lambda _: (), _none, size=2)
    held = hold_term("held", ids[3:])
    assert begun_alike([words, held, pairs], 1) == [[row] for row in range(7)]
    assert begun_alike([words, held, pairs], 3) == [[2, 0, 3], [5], [6], [4], [1]]
    assert begun_alike([words, held, pairs], 2) == [[2, 0], [3], [5], [6], [4], [1]]


def test_groups_follow_one_another_in_every_epoch_and_each_example_comes_once() -> None:
    plan = Plan(lr=1.0, epochs=3, batch_size=4)
    groups = [[4, 1], [0], [6, 3, 2], [5]]
    epochs = [row for rows in portions(groups, plan, 7) for row in rows]
    for order in (epochs[:7], epochs[7:14], epochs[14:]):
        assert sorted(order) == list(range(7))
        assert all(order[(at := order.index(group[0])) : at + len(group)] == group for group in groups)
    assert epochs[:7] != epochs[7:14]
    assert [len(rows) for rows in portions(groups, plan, 7)] == [4, 3] * 3


def _none(*_: Any) -> torch.Tensor:
    return torch.zeros(1)


def test_an_example_of_two_sequences_has_one_loss(model: Any) -> None:
    """A term may compare sequences: here the difference of the last tokens' log-probabilities of token 3."""
    places = tuple((len(row) - 1,) for row in PROMPTS)

    def loss(logits: torch.Tensor, _: Any, rows: Any) -> torch.Tensor:
        each = logits.log_softmax(-1)[:, 3]
        return each[0::2] - each[1::2]

    term = Term("pairs", 1.0, PROMPTS, places, lambda logits: (), loss, size=2, untouched=False)
    ready = prepare(model, [hold_term("held", HELD), term], start=1)
    run: list[int] = []
    bare = prepare(model, [hold_term("held", HELD), term], step=run.append)
    assert sum(run) == len(HELD), "without a stream to keep, sequences without a target are not run"
    again = losses_of(model, model, bare, [(1, 1), (0, 0), (1, 0)])
    found = losses_of(model, model, ready, [(1, 1), (0, 0), (1, 0)])
    one, other = (model(torch.tensor([PROMPTS[row]])).logits[0, -1].log_softmax(-1)[3] for row in (2, 3))
    assert float(found[0]) == pytest.approx(float(one - other), abs=1e-5)
    torch.testing.assert_close(again, found, atol=1e-5, rtol=0)
    assert ready.first == (0, 3)
    assert len(ready.examples()) == 5
