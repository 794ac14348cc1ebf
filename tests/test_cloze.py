"""Facts as cloze questions: patterns, rivals, and a model that knows or does not know them."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import build
from letters import letters

from surgery.data import facts
from surgery.data.facts import Fact, Facts
from surgery.errors import SurgeryError
from surgery.metrics import cloze
from surgery.metrics.multiple_choice import Scores

FACTS = Facts(tuple(Fact("P1", f"s{n}", "abcd"[n % 4], f"s{n} is") for n in range(20)), 0, ())


def test_patterns_must_end_in_the_object() -> None:
    assert facts.usable(["[Y] is of [X].", "[X] plays [Y] .", "[X] plays the [Y]."]) == "[X] plays"
    assert facts.usable(["[Y], home of [X].", "[X] [Y] [Y]."]) is None


def test_rivals_are_other_objects_of_the_relation_that_are_not_true_of_the_subject() -> None:
    two = Facts((*FACTS.rows, Fact("P1", "s0", "b", "s0 is"), Fact("P2", "s0", "z", "s0 has")), 0, ())
    asked = cloze.questions(two, choices=3, seed=1)
    assert len(asked) == 21  # P2 has one object only
    for question, fact in zip(asked, two.rows, strict=False):
        texts = [option.strip() for option in question.options]
        assert texts[question.answer] == fact.object and len(set(texts)) == len(texts) <= 3
        assert set(texts) <= set("abcd") and (fact.subject != "s0" or len(set(texts) & set("ab")) == 1)
    assert len({question.answer for question in asked}) == 3
    assert asked == cloze.questions(two, choices=3, seed=1) != cloze.questions(two, choices=3, seed=2)
    assert len(cloze.questions(FACTS, limit=7)) == 7
    with pytest.raises(SurgeryError, match="choices: got 1"):
        cloze.questions(FACTS, choices=1)


def write(folder: Path) -> None:
    for name in ("facts", "patterns"):
        (folder / facts.FOLDER / name).mkdir(parents=True)
    for relation, last in (("P1", "[X] is [Y] ."), ("P2", "[Y] is of [X].")):
        rows = [json.dumps({"sub_label": f"s{n}", "obj_label": "abcd"[n % 4], "uuid": ""}) for n in range(40)]
        (folder / facts.FOLDER / "facts" / f"{relation}.jsonl").write_text("\n".join(rows))
        (folder / facts.FOLDER / "patterns" / f"{relation}.jsonl").write_text(json.dumps({"pattern": last}))


def test_a_random_model_is_at_chance_and_skipped_relations_are_named(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"got no \.jsonl file"):
        facts.load(tmp_path)
    write(tmp_path)
    found = cloze.evaluate(build("llama"), letters(), tmp_path, seed=2)["accuracy"]
    assert found.n == 40 and "40 facts of P2 skipped" in found.data and "chance 0.250" in found.scorer
    assert found.value == pytest.approx(0.25, abs=0.2)


def test_a_model_that_knows_one_object_is_right_where_it_is_true(tmp_path: Path) -> None:
    """Scores are given, not computed: " c" wins everywhere, and is true of ten of the forty facts."""
    write(tmp_path)

    def knows_c(model: Any, tokenizer: Any, questions: Any, *, step: Any) -> Scores:
        sums = tuple(np.array([float(option == " c") for option in question.options]) for question in questions)
        return Scores(tuple(questions), sums, (False,) * len(questions))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cloze, "score", knows_c)
        assert cloze.evaluate(Any, Any, tmp_path)["accuracy"].value == 0.25
        assert cloze.evaluate(Any, Any, tmp_path, choices=2)["accuracy"].value > 0.5  # c is seldom among two


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the directory of the data sets")
def test_the_facts_at_hand() -> None:
    found = facts.load(os.environ["SURGERY_DATA"])
    assert len(found.rows) + found.skipped == 29411 and found.relations_skipped == ("P31", "P527")
    assert found.skipped == 879 + 922
    assert next(f for f in found.rows if f.relation == "P103").prompt.startswith("The native language of ")
    assert all("[" not in f.prompt or "[" in f.subject for f in found.rows)
    asked = cloze.questions(found, limit=300)
    assert len(asked) == 300 and min(len(question.options) for question in asked) >= 4
