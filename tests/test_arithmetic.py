"""Arithmetic by exact match: right answers, and the match that greedy decoding would give."""

import re
from typing import Any

import pytest
import torch

from surgery.data.arithmetic import KINDS, Question, questions
from surgery.metrics.arithmetic import evaluate

OPERATIONS: dict[str, Any] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def test_every_answer_is_right_and_no_example_gives_it_away() -> None:
    rows = questions()
    assert len(rows) == 200 and [row.kind for row in rows[::50]] == list(KINDS) and rows == questions()
    for row in rows:
        *shown, (asked, _) = re.findall(r"Question: (.*)\nAnswer:( \d+|$)", row.prompt)
        assert len(shown) == 4 and asked not in [text for text, _ in shown]
        for text, answer in [*shown, (asked, row.answer)]:
            sign = re.search(r"(\d+) ([-+*]) (\d+)", text)
            if sign:
                first, operation, second = sign.groups()
                assert OPERATIONS[operation](int(first), int(second)) == int(answer), text
            else:
                a, b = map(int, re.findall(r"\d+", text))
                taken = "taken" in text
                assert int(answer) == (a * b if "Each" in text else a - b if taken else a + b) > 0, text
        assert re.fullmatch(r" \d+", row.answer)


def test_a_match_is_what_greedy_decoding_says(tiny: Any) -> None:
    model, tokenizer = tiny
    ids = tokenizer("The nurse said", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        logs = model(torch.cat([ids[0], out])[None]).logits[0].log_softmax(-1)
    said = " ".join(tokenizer.convert_ids_to_tokens(out.tolist()))
    wrong = " ".join([said.split()[0], "nurse"])
    rows = [Question("The nurse said", f" {answer}", "addition") for answer in (said, wrong)]
    found = evaluate(model, tokenizer, rows=rows)
    assert found["exact"]["all"].value == 0.5 and found["exact"]["addition"].n == 2 and len(found["exact"]) == 2
    with pytest.MonkeyPatch.context() as patch:  # what is said next would go on with the number
        patch.setattr(type(tokenizer), "decode", lambda self, tokens: " 7")
        assert evaluate(model, tokenizer, rows=rows)["exact"]["all"].value == 0
    by_hand = sum(float(logs[ids.shape[1] - 1 + place, token]) for place, token in enumerate(out.tolist()))
    assert evaluate(model, tokenizer, rows=rows[:1])["logp"]["all"].value == pytest.approx(by_hand, abs=1e-4)
