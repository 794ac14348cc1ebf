"""hooks.plots: each function returns a figure that shows the numbers it was given and reads in grey."""

from __future__ import annotations

import io
import warnings
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import hooks
from hooks import HookError, Ranking, plots
from hooks.patching import Patching
from tests.families import build
from tests.tiny_tokenizer import tiny_tokenizer

CONTRAST = (20, 21)
PROMPTS = [[5, 6, 7, 8, 9], [3, 4, 5]]


def shown(figure: Figure) -> None:
    """Draws it: labels with `$`, arrows and spaces must not break that, and nothing may warn."""
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(data, dpi=40)
    assert data.tell() > 1000


def image(figure: Figure, panel: int = 0) -> np.ndarray[Any, Any]:
    return np.asarray(figure.axes[panel].images[0].get_array())


def patching(effects: Any, tokens: tuple[str, ...] | None = None, unit: Any = "stream") -> Patching:
    effects = np.asarray(effects, dtype=float)
    positions: Any = "each" if tokens else "all"
    contrast = ("he", "she")
    return Patching("patching", unit, positions, effects, effects * 0 + 0.1, contrast, 1.0, 0.0, tokens, "pairs", 2)


def test_block_bars() -> None:
    raw = Ranking("bmi", "block", [0.1, 0.3, 0.2], "d", 3, errors=[0.01] * 3)
    figure = plots.block_bars(raw, raw, edited=[1])
    shown(figure)
    heights = [bar.get_height() for bar in figure.axes[0].patches if isinstance(bar.get_height(), float)]
    assert np.isin([0.1, 0.3, 0.2], heights).all()


def test_head_map_shows_the_scores_and_frames_the_best() -> None:
    scores = np.array([[0.1, 0.2], [0.9, 0.3], [0.0, 0.8]])
    figure = plots.head_map(Ranking("attention", "head", scores, "d", 3), mark=2)
    shown(figure)
    np.testing.assert_array_equal(image(figure), scores)
    frames = {patch.get_xy() for patch in figure.axes[0].patches}  # type: ignore[attr-defined]
    assert frames == {(-0.5, 0.5), (0.5, 1.5)}
    with pytest.raises(HookError, match="unit 'block'"):
        plots.head_map(Ranking("bmi", "block", [0.1], "d", 3))


def test_attention_pattern() -> None:
    model, tokens = build("llama"), ["the", "Ġnurse", "$x$", "▁said", "Ċ"]
    site = "blocks.1.attn.hook_pattern"
    pattern = hooks.record(model, torch.arange(5, 10)[None], site)[site][0]
    figure = plots.attention_pattern(pattern.bfloat16(), tokens, heads=[4, 5, 6, 7], title="block 1")
    shown(figure)
    for head in range(4):
        np.testing.assert_allclose(image(figure, head), pattern[head], atol=1e-2)
        assert figure.axes[head].get_title() == f"head {head + 4}"
    assert [t.get_text() for t in figure.axes[0].get_yticklabels()][1] == "·nurse"
    shown(plots.attention_pattern(pattern[0], tokens))
    with pytest.raises(HookError, match="for 4 tokens"):
        plots.attention_pattern(pattern, tokens[:4])
    with pytest.raises(HookError, match="2 head numbers for 4 heads"):
        plots.attention_pattern(pattern, tokens, heads=[1, 2])


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_lens_curve(name: str) -> None:
    found = hooks.lens(build(name), None, PROMPTS, CONTRAST)
    figure = plots.lens_curve(found)
    shown(figure)
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), found.cumulative)
    assert len(figure.axes) == (1 if name == "bert" else 2)
    if name != "bert":
        heights = [bar.get_height() for bar in figure.axes[1].patches]  # type: ignore[attr-defined]
        assert np.isin(found.mlp, heights).all() and np.isin(found.attention, heights).all()
    shown(plots.lens_curve(hooks.lens(build(name), None, PROMPTS[:1], CONTRAST)))  # no intervals for one prompt


def test_patching_grids_and_bars() -> None:
    tokens = ("The", "Ġnurse", "Ġsaid")
    effects = [[1.0, 0.2, -0.8], [0.0, -0.02, 0.5]]
    grid = plots.patching_grid(patching(effects, tokens))
    shown(grid)
    np.testing.assert_array_equal(image(grid), effects)
    marks = [(text.get_position(), text.get_text()) for text in grid.axes[0].texts]
    assert marks == [((2, 0), "\N{MINUS SIGN}")]  # only what is clearly negative
    assert [t.get_text() for t in grid.axes[0].get_xticklabels()] == ["The", "·nurse", "·said"]
    bars = plots.patching_grid(patching([0.5, -0.2], unit="block"))
    shown(bars)
    assert [bar.get_height() for bar in bars.axes[0].patches] == [0.5, -0.2]  # type: ignore[attr-defined]
    heads = plots.patching_grid(patching(effects, unit="head"))
    assert heads.axes[0].get_xlabel() == "head"
    shown(plots.patching_grid(patching(np.zeros((2, 3)), tokens)))
    with pytest.raises(HookError, match="three axes"):
        plots.patching_grid(patching(np.zeros((2, 3, 4))))


def test_cross_attention_map() -> None:
    found = hooks.cross_attention_weights(build("llama"), tiny_tokenizer(), "the nurse said that", ["he", "she"])
    mean = plots.cross_attention_map(found)
    shown(mean)
    np.testing.assert_allclose(image(mean), found.weights.mean((0, 1)), atol=1e-6)
    one = plots.cross_attention_map(found, block=1, head=2)
    np.testing.assert_allclose(image(one), found.weights[1, 2], atol=1e-6)
    with pytest.raises(HookError, match="block is 9; the model has 0 to 2"):
        plots.cross_attention_map(found, block=9)


def test_more_is_lighter_in_grey() -> None:
    """The map's lightness (CIE luma of the colours) rises with the value, so that grey keeps the order."""
    colours = matplotlib.colormaps[plots.LIGHTNESS](np.linspace(0, 1, 50))[:, :3]
    assert (np.diff(colours @ [0.299, 0.587, 0.114]) > 0).all()


def test_no_window_state_is_touched() -> None:
    import matplotlib.pyplot as plt

    before = plt.get_fignums()
    plots.head_map(Ranking("attention", "head", np.ones((2, 2)), "d", 3))
    assert plt.get_fignums() == before


def test_a_notebook_shows_a_figure_without_pyplot() -> None:
    assert plots.new_figure(2, 1)._repr_png_().startswith(b"\x89PNG")
