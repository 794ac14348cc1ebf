"""The multiple-choice scorer against one option at a time, and the files of the capability checks."""

import os
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from letters import letters

from surgery.data import capability, rows
from surgery.data.capability import Question
from surgery.errors import SurgeryError
from surgery.metrics import capability as metric
from surgery.metrics import multiple_choice

QUESTIONS = [
    Question("the cat sat on the", (" mat", " roof of it", " dog"), 0),
    Question("is it so", (" a", " b"), 1),
    Question("a", (" longer one here", " b"), 1),
    Question("what is said here: yes or no ", ("yes", "no"), 0),  # the space at the end belongs to the options
    Question("is the sea blue, then", (" C", " A", " B", " D"), 1),
]


def plainly(model: Any, tokenizer: Any, question: Question) -> np.ndarray:
    """lm-eval's definition, written out: one sequence an option, all positions, no batch."""
    start = len(tokenizer(question.prompt.rstrip())["input_ids"])
    found = []
    for option in question.options:
        ids = tokenizer(question.prompt + option)["input_ids"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        found.append(sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))))
    return np.array(found)


FAMILIES = ["gpt2", "llama", "gemma3", "opt", "bloom", "gpt_neox", "mpt", "qwen3_moe"]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_one_option_at_a_time(family: str, share: bool) -> None:
    model, tokenizer = build(family), letters()
    before = state(model)
    found = multiple_choice.score(model, tokenizer, QUESTIONS, share=share)
    for question, sums in zip(QUESTIONS, found.sums, strict=True):
        np.testing.assert_allclose(sums, plainly(model, tokenizer, question), atol=1e-4)
    assert state(model) == before


def test_a_chat_template_stands_around_the_prompt_with_its_white_space() -> None:
    model, tokenizer = build("llama"), letters()
    with pytest.raises(SurgeryError, match="has no chat template"):
        multiple_choice.score(model, tokenizer, QUESTIONS, chat=True)
    tokenizer.chat_template = "[BOS]{% for m in messages %}{{ m.role }}: {{ m.content }}.{% endfor %} bot: "
    found = multiple_choice.score(model, tokenizer, QUESTIONS[:2], chat=True)
    for question, sums in zip(QUESTIONS, found.sums, strict=False):
        before = f"[BOS]user: {question.prompt}. bot: "
        for option, value in zip(question.options, sums, strict=True):
            ids = tokenizer(before + option, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            start = len(ids) - len(option)
            assert value == pytest.approx(sum(logs[at - 1, ids[at]].item() for at in range(start, len(ids))), abs=1e-4)


def test_a_sliding_window_shorter_than_the_prompt_is_kept() -> None:
    model, tokenizer = build("gemma3", sliding_window=6), letters()
    found = multiple_choice.score(model, tokenizer, QUESTIONS)
    for question, sums in zip(QUESTIONS, found.sums, strict=True):
        np.testing.assert_allclose(sums, plainly(model, tokenizer, question), atol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_a_token_over_the_boundary_is_counted_as_in_lm_eval(share: bool) -> None:
    """ "t " is one token: the prompt alone ends in "t", with " sat" in "t "; that token is not scored.

    With "-s at" it ends in "t": the options then share one token less than the prompt has.
    """
    model, tokenizer = build("llama"), letters(merges=(("t", " "),))
    asked = [Question("the cat", (" sat", " ran of"), 0), Question("the cat", (" sat", "-s at"), 0)]
    assert len(tokenizer("the cat sat")["input_ids"]) == len(tokenizer("the cat")["input_ids"]) + 3
    found = multiple_choice.score(model, tokenizer, asked, share=share)
    for question, sums in zip(asked, found.sums, strict=True):
        np.testing.assert_allclose(sums, plainly(model, tokenizer, question), atol=1e-4)


def test_both_norms_choose_as_defined_and_the_mode_is_kept() -> None:
    asked = (Question("x", (" a", " abcd"), 1),)  # the space before an option does not count
    scores = multiple_choice.Scores(asked, (np.array([-2.0, -6.0]),), cut=(False,))
    assert scores.chosen("sum").tolist() == [0] and scores.chosen("characters").tolist() == [1]
    right = multiple_choice.accuracy(scores, "characters", data="d")
    assert right.value == 1.0 and "per character" in right.scorer
    model = build("llama").train()
    multiple_choice.score(model, letters(), QUESTIONS)
    assert model.training and model.lm_head.training


def test_a_prompt_longer_than_the_context_is_cut_on_the_left_and_counted() -> None:
    model, tokenizer = build("gpt2"), letters()
    tail = "b" * 40
    both = [Question("a" * 60 + tail + " so", (" x", " yz"), 0), Question("c" * 70 + " so", (" x", " y"), 0)]
    found = multiple_choice.score(model, tokenizer, both)
    assert sum(found.cut) == 2 and "2 prompts cut" in multiple_choice.accuracy(found, "sum", data="d").data
    ids = tokenizer(both[0].prompt + " yz")["input_ids"][-64:]
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(logs[at - 1, ids[at]].item() for at in range(61, 64))
    assert found.sums[0][1] == pytest.approx(expected, abs=1e-4)


def test_bad_questions_are_refused_by_number() -> None:
    model, tokenizer = build("llama"), letters()
    with pytest.raises(SurgeryError, match="no question"):
        multiple_choice.score(model, tokenizer, [])
    with pytest.raises(SurgeryError, match=r"question 1 .*blank"):
        multiple_choice.score(model, tokenizer, [QUESTIONS[0], Question(" ", (" a", " b"), 0)])
    with pytest.raises(SurgeryError, match="answer 2 of 2"):
        multiple_choice.score(model, tokenizer, [Question("x", (" a", " b"), 2)])
    with pytest.raises(SurgeryError, match="an option alone has 80 tokens"):
        multiple_choice.score(model, tokenizer, [Question("x", (" a", " " + 79 * "b"), 0)])
    model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(SurgeryError, match="finite"):
        multiple_choice.score(model, tokenizer, QUESTIONS)


def test_options_are_read_as_they_stand_in_the_files() -> None:
    assert capability.split_options("Who?", "\nA. one\nB. two\nlines") == ("Who?", ["one", "two\nlines"])
    assert capability.split_options("Who?\nA. one", "\nB. two") == ("Who?", ["one", "two"])  # row 103 of CommonsenseQA
    assert capability.split_options("Who", "?\nA. U.S.A. Inc.\nB. C. Dent") == ("Who?", ["U.S.A. Inc.", "C. Dent"])


def test_samples_keep_the_strata_and_splits_are_disjoint() -> None:
    items = [(i, "ab"[i % 4 == 0], i // 2) for i in range(100)]
    drawn = rows.sample(items, 20, 3, lambda item: item[1])
    assert len(drawn) == 20 and sum(item[1] == "b" for item in drawn) == 5
    assert drawn == rows.sample(items, 20, 3, lambda item: item[1]) != rows.sample(items, 20, 4, lambda item: item[1])
    assert rows.sample(items, 0, 3) == items
    parts = [rows.part(items, name, 0, stratum=lambda i: i[1], unit=lambda i: i[2]) for name in rows.PARTS]
    assert sorted(chain(*parts)) == items
    assert [len(p) for p in parts] == pytest.approx([60, 20, 20], abs=4)
    units = [{item[2] for item in p} for p in parts]
    assert not units[0] & units[1] and not units[0] & units[2] and not units[1] & units[2]


def test_bad_files_are_named_with_their_line(tmp_path: Path) -> None:
    (tmp_path / "capability").mkdir()
    file = tmp_path / capability.FILES["piqa"]
    with pytest.raises(SurgeryError, match="no such file"):
        capability.load("piqa", tmp_path)
    with pytest.raises(SurgeryError, match="expected one of boolq"):
        capability.load("pica", tmp_path)
    for text, fault in (("{}\n", "line 1.*'question'"), ("[1]\n", "line 1.*JSON object"), ("\n", "no row")):
        file.write_text(text)
        with pytest.raises(SurgeryError, match=fault):
            capability.load("piqa", tmp_path)
    file.write_text('{"question": "q", "options": "A. x\\nB. y", "answer": "C. z"}\n')
    with pytest.raises(SurgeryError, match=r"row 1: answer 'C. z' among 2 options"):
        capability.load("piqa", tmp_path)


def test_a_task_that_is_named_twice_takes_no_questions_of_another(tmp_path: Path) -> None:
    row = '{"question": "q", "options": "A. x\\nB. y", "answer": "%s"}\n'
    for task, answers in {"piqa": "AA", "openbookqa": "AB"}.items():
        file = tmp_path / capability.FILES[task]
        file.parent.mkdir(exist_ok=True)
        file.write_text("".join(row % answer for answer in answers))
    found = metric.evaluate(build("llama"), letters(), tmp_path, tasks=("piqa", "piqa", "openbookqa"))
    assert found["openbookqa"].value == 0.5 != found["piqa"].value  # one question, once with either answer


@pytest.mark.skipif("SURGERY_DATA" not in os.environ, reason="needs SURGERY_DATA, the directory of the data sets")
def test_the_files_at_hand_give_all_their_questions_and_a_tiny_model_is_near_chance() -> None:
    folder = Path(os.environ["SURGERY_DATA"])
    sizes = {task: len(capability.load(task, folder)) for task in capability.FILES}
    assert sizes == {
        "boolq": 600,
        "piqa": 1500,
        "openbookqa": 500,
        "commonsenseqa": 1221,
        "mmlu": 1000,
        "hellaswag": 800,
    }
    boolq = capability.load("boolq", folder)
    assert sum(question.answer for question in boolq) == 382
    found = metric.evaluate(
        build("llama", max_position_embeddings=1024), letters(), folder, limit=40, tasks=("openbookqa", "hellaswag")
    )
    assert all(0.05 < found[task].value < 0.8 and found[task].n == 40 for task in found)
    assert "40 of 800 with seed 0" in found["hellaswag"].data
