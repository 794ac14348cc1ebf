"""The one report: what its page says of a run beside the recipe's own sentences and tables."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from hooks.plots import new_figure
from surgery.runs.report import Table, edited, page, write_page

RUN = {
    "recipe": "crawd", "method": "vanilla", "model": "tiny", "seed": 7,
    "edit": {"blocks": [2, 3], "part": "without_mlp", "parameters": 1234567, "steps": 60},
    "delta": {"file": "delta.safetensors", "kind": "dense", "bytes": 4096, "sha256": "ab12"},
    "applied": {"rounding": "auto", "entries": 1000, "changed": 900, "lost": 100},
}  # fmt: skip


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        ({"blocks": "all", "part": "all"}, "all parameters"),
        ({"blocks": "all", "part": "lora"}, "all blocks (lora)"),
        ({"blocks": [3], "part": "all"}, "block 3"),
        ({"blocks": [2, 3], "part": "without_mlp"}, "blocks 2, 3 (without mlp)"),
        ({"preamble": "Be fair."}, "prompt only"),
    ],
)
def test_what_was_edited_in_words(edit: dict[str, Any], words: str) -> None:
    assert edited(edit) == words


def test_the_page_says_what_ran_and_places_each_picture_once(tmp_path: Path) -> None:
    figures = {"placed": new_figure(2, 1), "free": new_figure(2, 1)}
    figures["free"].set_label("a bar for each block")
    tables = [Table("Numbers", ["name", "value"], [["<gap>", "1"]], picture="placed", hints=["a scorer"])]
    write_page(tmp_path, RUN, "seed = 7", lines=["Warning: much was lost."], tables=tables, figures=figures)
    text = (tmp_path / "report.html").read_text()
    assert "<title>crawd (vanilla) on tiny</title>" in text
    assert f"transformers {version('transformers')}. Edited: blocks 2, 3 (without mlp), 1,234,567 numbers" in text
    assert "900 of 1,000 entries changed, 100 left" in text and "4,096 bytes" in text and "seed = 7" in text
    assert '<p class="warning">Warning: much' in text and '<tr title="a scorer"><td>&lt;gap&gt;</td>' in text
    assert text.count("<img") == 2
    assert text.index('alt="a bar for each block"') < text.index("<h2>Numbers") < text.index('alt="placed"')
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"placed.png", "free.png"}


def test_a_delta_in_memory_has_no_counts_and_a_comparison_has_no_file(tmp_path: Path) -> None:
    write_page(tmp_path, RUN | {"applied": {"rounding": "auto"}}, "seed = 7", lines=[], tables=[], figures={})
    text = (tmp_path / "report.html").read_text()
    assert "The file" in text and "entries changed" not in text
    text, pictures = page(title="Side by side", lines=[], tables=[], figures={})
    assert pictures == {} and not any(said in text for said in ("The file", "Do it again", "Edited", "Undefined"))
