"""surgery fit: scales of a delta's tensors on a child, by hand; what is written, and that the model stays."""

from pathlib import Path

import numpy as np
import pytest
from deltakit import edit
from test_cli import surgery

from surgery.checkpoints import load
from surgery.data.prompts import load_prompt_set
from surgery.delta import Delta
from surgery.runs import fitting

TWO = ("model.layers.2.mlp.down_proj.weight", "model.layers.1.self_attn.o_proj.weight")


def odds(*logs: float) -> np.ndarray:
    """P(he), P(she) by prompt, .4 together, from the logarithm of their ratio."""
    share = 1 / (1 + np.exp(-np.array(logs)))
    return 0.4 * np.stack([share, 1 - share], axis=1)


def test_scales_by_hand() -> None:
    """One tensor shifts what is equalised, another what is held: the first goes on to 0, the second back."""
    groups = np.arange(10)
    untouched = odds(*[0.5] * 10, *[0.3] * 10)
    given = odds(*[0.1] * 10, *[0.2] * 10)  # the first tensor took .4, the second .1
    moved = np.stack([odds(*[0.0] * 10, *[0.2] * 10), odds(*[0.1] * 10, *[0.175] * 10)])
    scales, ridge = fitting.solve(untouched, given, moved, groups)
    assert ridge == fitting.RIDGES[0]
    assert scales == pytest.approx([1 + fitting.STEP, 0.0], abs=0.06)  # .4 * 1.25 = .5; .1 * 0 = 0; the ridge costs .05
    # Nothing is held: the second has nothing to do and stays.
    alone, _ = fitting.solve(untouched[:10], given[:10], moved[:, :10], groups)
    assert alone == pytest.approx([1 + fitting.STEP, 1.0], abs=0.01)


def test_the_fitted_delta_does_what_was_foretold(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        fitting, "HELD", 0.0
    )  # else a delta of noise is drawn back, which moves the words evenly or not
    whole = edit(checkpoint, TWO, size=0.05)
    whole.save(tmp_path / "delta.safetensors")
    model, tokenizer = load(str(checkpoint))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    prompts = load_prompt_set("genbias")
    found, fit = fitting.fitted(whole, model, tokenizer, prompts)
    assert all((value == before[name]).all() for name, value in model.state_dict().items())
    assert set(fit.scales) == set(TWO) and fit.foretold < fit.given
    for name in TWO:
        assert found.tensors[name] == pytest.approx(whole.tensors[name] * fit.scales[name], rel=1e-6)
    _, there = fitting.fitted(found, model, tokenizer, prompts)
    assert there.given == pytest.approx(fit.foretold, rel=0.1)

    out = tmp_path / "fitted.safetensors"
    code, stdout, stderr = surgery("fit", tmp_path / "delta.safetensors", checkpoint, "--out", out, "--quiet")
    assert code == 0 and f"foretold {fit.foretold:.4f}" in stdout, stderr
    assert Delta.load(out).tensors[TWO[0]] == pytest.approx(found.tensors[TWO[0]])
    code, _, stderr = surgery("fit", tmp_path / "delta.safetensors", checkpoint, "--out", out, "--quiet")
    assert code == 1 and str(out) in stderr
