"""Results show themselves in a line, and as a table in a notebook."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hooks
import surgery
from surgery.delta import make, open_delta


@pytest.fixture(scope="module")
def results(word_tokenizer: Any, checkpoint: Path) -> list[Any]:
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    texts = ["The nurse smiled because", "The doctor left because", "The pilot laughed because"]
    importance = hooks.bmi(model, tokenizer, texts)
    return [
        hooks.anatomy.find(model),
        importance,
        importance.raw,
        hooks.lens(model, tokenizer, texts, ("he", "she")),
        hooks.compare([importance.raw, importance.final_norm]),
        hooks.attention_to(model, tokenizer, texts, ["nurse", "doctor", "pilot"]),
        hooks.mean_ablation(model, tokenizer, texts, [0, 1], ("he", "she")),
        hooks.patch(model, tokenizer, texts[:1], texts[1:2], ("he", "she"), positions="each"),
    ]


def test_a_result_is_one_short_line(results: list[Any]) -> None:
    for result in results:
        line = repr(result)
        assert line.startswith(type(result).__name__ + "(") and len(line) < 600 and "\n" not in line, line
    assert "scores=float64[4]" in repr(results[2]) and "(4 of Block)" in repr(results[0].stacks[-1])


def test_a_notebook_shows_the_table(results: list[Any]) -> None:
    for result in results:
        assert result._repr_html_().startswith("<pre>")
    assert "final_norm" in results[1]._repr_html_() and "blocks.3" in results[0]._repr_html_()
    assert "by position" not in results[-1]._repr_html_()  # what no ranking can hold is shown by its line


def test_a_delta_names_its_size_and_its_tensors(checkpoint: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    model, _ = surgery.load(checkpoint, device="cpu")
    shape = model.get_parameter(name).shape
    delta = make({name: np.full(shape, 0.01, np.float32)}, checkpoint, base="<tiny>", recipe="", seed=0)
    assert repr(delta) == f"Delta(dense, 1 tensors, {shape.numel():,} parameters, of '<tiny>')"
    assert name in delta._repr_html_() and "&lt;tiny&gt;" in delta._repr_html_()
    delta.save(tmp_path / "d.safetensors")
    assert repr(open_delta(tmp_path / "d.safetensors")) == repr(delta).replace("Delta(", "DeltaFile(")


def test_names_complete() -> None:
    assert {"bmi", "capture", "lens", "Ranking"} <= set(dir(hooks))
    assert {"load", "Delta", "SurgeryError"} <= set(dir(surgery))
