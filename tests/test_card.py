"""The model card that goes beside a delta."""

import deltakit as kit
import numpy as np

from surgery import delta as deltas
from surgery.delta.card import card


def test_card_says_what_it_is(tmp_path):
    folder = kit.save(tmp_path / "base", kit.weights())
    metric = {"value": 0.25, "low": 0.2, "high": 0.3, "n": 90, "scorer": "next-token"}
    measured = {"before": {"afgb": {"word": metric}}, "after": {"afgb": {"word": metric | {"value": 0.1}}}}
    one = deltas.make(
        {kit.DOWN: np.full((16, 24), 0.01, np.float32)}, folder, base="tiny/base", recipe="lr = 1\n", seed=3,
        measured=measured,
    )  # fmt: skip
    text = card(one, file="debias.safetensors")
    assert text.startswith("---\nlicense: other  # FILL IN") and 'base_model: "tiny/base"' in text
    assert "| afgb.word | 0.25 [0.2, 0.3] | 0.1 [0.2, 0.3] | 90 | next-token |" in text
    assert "surgery apply debias.safetensors CHECKPOINT" in text and "lr = 1" in text and one.sha256 in text
    both = card(deltas.compose([one, one], [1.0, 2.0]))
    assert "Part: weight 2.0" in both and "Recipe of part 2" in both and "Not measured" in both
