"""CAFIE: what is likelier than in the counterfactual is damped, and texts without a group word stay as they are."""

from typing import Any

import pytest
import torch
from families import state

from surgery.edits.cafie import counterfactual, fair, swaps
from surgery.errors import SurgeryError


def test_the_formula_by_hand() -> None:
    p, q = torch.tensor([0.6, 0.4]), torch.tensor([0.5, 0.5])
    weighted = [
        0.9 * a * (1 - torch.tanh(torch.tensor(2 * (a - b))).item()) + 0.1 * a for a, b in ((0.6, 0.5), (0.4, 0.5))
    ]
    found = fair(p.log()[None], q.log()[None], 2.0, 0.9)[0].exp()
    torch.testing.assert_close(found, torch.tensor(weighted) / sum(weighted))
    assert found[0] < p[0]  # likelier here than in the counterfactual, so less likely now
    torch.testing.assert_close(fair(p.log()[None], p.log()[None], 1000.0, 0.99)[0].exp(), p)


def test_a_text_and_its_counterfactual_come_closer(tiny: Any) -> None:
    model, tokenizer = tiny
    before = state(model)
    table = swaps(tokenizer)
    him, his, her = (tokenizer(word)["input_ids"][0] for word in ("him", "his", "her"))
    assert (table[him], table[his], table[her]) == (her, her, him)
    he, she = (tokenizer(word)["input_ids"][0] for word in ("he", "she"))
    assert table[he] == she and table[she] == he
    plain = tokenizer("The nurse smiled because", return_tensors="pt")["input_ids"]
    told = torch.cat([plain, torch.tensor([[he]])], 1)
    other = torch.cat([plain, torch.tensor([[she]])], 1)
    with torch.no_grad():
        was = [model(input_ids=ids).logits.log_softmax(-1) for ids in (plain, told, other)]
        with counterfactual(model, tokenizer, strength=1.0, share=1.0):
            now = [model(input_ids=ids, use_cache=False).logits for ids in (plain, told, other)]
            with pytest.raises(SurgeryError, match="cached keys"):
                model.generate(told, max_new_tokens=2)
    torch.testing.assert_close(now[0], was[0])
    torch.testing.assert_close(now[1], fair(was[1], was[2], 1.0, 1.0))  # "he" is compared with what "she" makes likely
    gap = [(logs[1][0, -1].exp() - logs[2][0, -1].exp()).abs().sum() for logs in (was, now)]
    assert gap[1] < gap[0]
    assert state(model) == before and "forward" not in model.__dict__
