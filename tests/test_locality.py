"""Locality and facts of gender: their word lists, and their numbers against values computed by hand."""

import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from surgery.catalogue import SUITES
from surgery.data import facts_of_gender, locality
from surgery.data.prompts import WordSet, load_prompt_set, professions
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words
from surgery.forward.token_logprobs import continuation_probabilities
from surgery.forward.tokens import continuation_ids, word_ids
from surgery.metrics import facts_of_gender as facts_metric
from surgery.metrics import locality as metric
from surgery.metrics.locality import Distributions, Reference
from surgery.metrics.material import fewer, material
from surgery.metrics.metric import Metric, flat
from surgery.metrics.suite import measure
from surgery.runs.caveats import caveats


def test_parts_share_nothing_and_no_row_stands_twice() -> None:
    parts = {part: locality.records(part) for part in locality.PARTS}
    texts = {part: [row.text for row in rows] for part, rows in parts.items()}
    assert all(len(set(lines)) == len(lines) for lines in texts.values())
    facts = {part: facts_of_gender.records(part) for part in locality.PARTS}
    nouns = {p: {row.subject for row in [*rows, *facts[p]] if row.kind != "others"} for p, rows in parts.items()}
    for one, other in combinations(locality.PARTS, 2):
        assert not {row.text for row in [*parts[one], *facts[one]]} & {
            row.text for row in [*parts[other], *facts[other]]
        }
        assert not nouns[one] & nouns[other]
    more = facts_of_gender.more_nouns()
    assert len(set(more)) == len(more) > 200 and not set(more) & set().union(*nouns.values())
    rows = [row for part in ("dev", "test") for row in [*facts[part], *parts[part]]]
    judged = {row.subject for row in rows if row.kind in ("nouns", "gendered")}
    assert not {noun for noun in more for word in re.split("[ -]", noun) if word in judged}, "no king in crown king"
    jobs = {subject.name for subject in professions()}
    assert not jobs & set(more)
    for part, rows in parts.items():
        assert {row.kind for row in rows} == set(locality.SETS)
        assert {row.kind for row in facts[part]} == set(facts_of_gender.SETS)
        assert not jobs & {row.subject for row in facts[part]}
        assert {row.right for row in rows} <= set(locality.PRONOUNS)
        assert not jobs & {row.subject for row in rows}, "a profession is what an edit is aimed at"
        assert all(row.text == " ".join(row.text.split()) and "{" not in row.text for row in rows)


def test_the_wrong_pronoun_is_the_other_one_or_both() -> None:
    by = {row.text: row for row in locality.records("test")}
    assert by["The car stopped because"].wrong == ("he", "she")
    assert by["The mother smiled because"].wrong == ("he",)
    assert next(row for row in by.values() if row.subject == "John").wrong == ("she",)
    assert by["We smiled because"].wrong == ("he", "she")


def test_the_numbers_of_a_set_by_hand() -> None:
    rows = [
        locality.Row("The car stopped because", "things", "car", "it"),
        locality.Row("The train stopped because", "things", "train", "it"),
        *(locality.Row(kind, kind, kind, "she") for kind in locality.SETS[1:]),
    ]
    words = np.full((len(rows), 2), 0.1)
    words[:2] = [[0.3, 0.2], [0.1, 0.0]]
    pronouns = np.full((len(rows), len(locality.PRONOUNS)), 0.05)
    pronouns[:2, :3] = [[0.3, 0.2, 0.4], [0.1, 0.0, 0.6]]  # he, she, it
    found = metric.score(words, pronouns, rows, words=("he", "she"), data="made", kl=np.arange(len(rows)) / 10)
    things = {name: one.value for name, one in found["things"].items()}
    assert things == pytest.approx({"mass": 0.3, "wrong": 0.3, "right": 0.5, "kl": 0.05})
    assert found["names"]["wrong"].value == pytest.approx(0.05) and found["names"]["mass"].value == pytest.approx(0.2)
    assert found["things"]["mass"].scorer == "mean P(he) + P(she)" and found["things"]["mass"].direction == "same"
    assert "kl" not in metric.score(words, pronouns, rows, words=("he", "she"), data="made")["things"]


def test_of_fewer_rows_than_sets_the_others_are_absent() -> None:
    rows = [row for row in locality.records("test") if row.kind == "plurals"][:2]
    found = metric.score(
        np.full((2, 2), 0.2), np.full((2, len(locality.PRONOUNS)), 0.1), rows, words=("he", "she"), data="d"
    )
    assert set(found) == {"plurals"} and found["plurals"]["mass"].n == 2
    facts = [row for row in facts_of_gender.records("test") if row.kind == "nouns"][:2]
    table = facts_metric.score(np.full((2, 2), 0.2), facts, words=("he", "she"), data="d")["right"]
    assert set(table) == {facts[0].kind, "all"}


def test_kl_by_hand_and_with_the_rest_as_one() -> None:
    base, edited = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    kept = Distributions(1)
    kept([0], base)
    far = Distributions(1, kept.made())
    far([0], edited)
    assert far.kl[0] == pytest.approx(0.5 * np.log(0.5 / 0.2) + 0.2 * np.log(0.2 / 0.5))
    two = Reference(torch.tensor([[0, 1]]), torch.tensor([[0.5, 0.3, 0.2]]).log())  # the third token is the rest
    again = Distributions(1, Reference.of(two.to_dict()))
    again([0], edited)
    assert again.kl[0] == pytest.approx(far.kl[0], abs=1e-6)


def test_an_untouched_model_has_no_kl_and_an_edited_one_has(tiny: Any) -> None:
    model, tokenizer = tiny
    given = material(model, tokenizer, load_prompt_set("genbias"), suites=["locality", "facts_of_gender"])
    before = measure(model, given)
    assert "kl" not in before.scores["locality"]["things"]
    same = measure(model, given, reference=before.reference)
    assert max(same.scores["locality"][kind]["kl"].value for kind in locality.SETS) < 1e-5
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1.5)
    after = measure(model, given, reference=before.reference)
    assert min(after.scores["locality"][kind]["kl"].value for kind in locality.SETS) > 1e-3
    assert after.scores["facts_of_gender"]["right"]["all"].n == len(facts_of_gender.records()) >= 200


def test_suites_give_the_same_numbers_together_and_each_alone(tiny: Any) -> None:
    model, tokenizer = tiny
    prompts, few = load_prompt_set("genbias"), dict.fromkeys(SUITES, 20)
    whole = measure(model, fewer(material(model, tokenizer, prompts), few))
    with torch.no_grad():
        model.model.layers[-1].mlp.down_proj.weight.mul_(1.5)
    given: Any = {"reference": whole.reference}
    together = flat(measure(model, fewer(material(model, tokenizer, prompts), few), **given).scores)
    alone: dict[str, Metric] = {}
    for suite in SUITES:
        one = fewer(material(model, tokenizer, prompts, suites=[suite]), few)
        alone |= flat(measure(model, one, **given).scores)
    assert together.keys() == alone.keys() and {name.partition(".")[0] for name in alone} >= set(SUITES)
    assert {name: each.value for name, each in together.items()} == pytest.approx(
        {name: each.value for name, each in alone.items()}, rel=1e-4, abs=1e-6
    )


def test_a_tokenizer_that_splits_a_pronoun_leaves_the_suites_out_and_says_why(tiny: Any) -> None:
    model, tokenizer = tiny
    prompts = load_prompt_set("genbias")
    vocabulary = tokenizer.get_vocab()
    split = type(tokenizer)(tokenizer_object=tokenizer._tokenizer, unk_token="they")  # so that " they" is no token
    assert "they" in vocabulary
    given = material(model, split, prompts)
    assert set(given.ids) == {"genbias", "genhint", "perplexity", "perplexity_pronouns"}
    scores = measure(model, given).scores
    assert (
        "word 'they'" in scores["locality"]["skipped"][0] and "word 'they'" in scores["facts_of_gender"]["skipped"][0]
    )


def test_facts_by_hand() -> None:
    rows = facts_of_gender.records()
    chances = np.tile([0.3, 0.1], (len(rows), 1))  # he is always likelier
    found = facts_metric.score(chances, rows, words=("he", "she"), data="made")
    he = np.mean([row.right == "he" for row in rows])
    assert found["accuracy"]["all"].value == pytest.approx(he) == 0.5
    assert found["right"]["all"].value == pytest.approx(0.75 * he + 0.25 * (1 - he))
    ties = facts_metric.score(np.full((len(rows), 2), 0.2), rows, words=("he", "she"), data="made")
    assert ties["accuracy"]["all"].value == 0
    with pytest.raises(SurgeryError, match="facts of gender: got 'all', expected one of train, dev, test"):
        facts_of_gender.records("all")


def one(value: float) -> dict[str, Any]:
    return {"value": value}


def test_caveats_name_what_a_score_hides() -> None:
    def scores(ss: float, margin: float) -> dict[str, Any]:
        return {"stereoset": {"ss": {"overall": one(ss)}, "margin": {"overall": one(margin)}}}

    assert "point both ways now" in caveats(scores(62, 0.4), scores(51, 0.39))[0]
    assert caveats(scores(62, 0.4), scores(51, 0.2)) == []  # the preference went with the score
    assert caveats(scores(62, 0.4), scores(60, 0.4)) == []  # nothing came to its ideal

    def words(afgb: float, mass: float, hint: float = 0.5) -> dict[str, Any]:
        table = {"afgb": {"all": one(afgb)}, "mass": {"all": one(mass)}}
        return {"genbias": table, "genhint": {"mass": one(hint)}}

    assert "silence" in caveats(words(0.2, 0.4), words(0.1, 0.2))[0]
    assert "did not before" in caveats(words(0.2, 0.4), words(0.1, 0.8))[0]
    assert caveats(words(0.2, 0.4), words(0.1, 0.41)) == []
    assert "hint prompts" in caveats(words(0.2, 0.4), words(0.1, 0.4, 0.9))[0]

    def spilled(things: float, facts: float) -> dict[str, Any]:
        table = {"things": {"mass": one(things), "wrong": one(things)}}
        return {"locality": table, "facts_of_gender": {"right": {"all": one(facts)}}}

    found = caveats(spilled(0.05, 0.9), spilled(0.6, 0.8))
    assert len(found) == 2 and "inanimate subjects" in found[0] and "knowledge" in found[1]
    assert caveats(spilled(0.05, 0.9), spilled(0.06, 0.895)) == []


def test_words_of_several_tokens_are_scored_whole(tiny: Any) -> None:
    """P(word | prompt) is the product over its tokens; of words of one token it is what it always was."""
    model, tokenizer = tiny
    prompts = replace(load_prompt_set("genbias"), words=WordSet(("he", "she was"), ("his", "her")))
    given = material(model, tokenizer, prompts, words_as="continuations", suites=["genbias", "locality"])
    given = replace(given, ids={"genbias": given.ids["genbias"][:4], "locality": given.ids["locality"]})
    given = replace(given, prompts=given.prompts[:4])
    ids = given.ids["genbias"]
    he, she, was = word_ids(tokenizer, ["he", "she", "was"])
    chances = continuation_probabilities(model, ids, given.continuations)
    assert chances[:, 0] == pytest.approx(next_words(model, ids, [he]).probabilities[:, 0], rel=1e-4)
    with torch.no_grad():
        logs = model(torch.tensor([[*ids[0], she]])).logits[0].log_softmax(-1)
    assert chances[0, 1] == pytest.approx(float((logs[-2, she] + logs[-1, was]).exp()), rel=1e-4)
    scores = measure(model, given).scores
    assert scores["genbias"]["mass"]["all"].value == pytest.approx(chances.sum(1).mean())
    assert scores["genbias"]["mass"]["all"].data.endswith("words as continuations, all")
    assert scores["locality"]["things"]["right"].n == len([r for r in given.settled["locality"] if r.kind == "things"])
    with pytest.raises(SurgeryError, match="'he': 'he was' begins with its tokens"):
        continuation_ids(tokenizer, ["he", "he was"])
