"""The one report: what its page says of a run beside the recipe's own sentences and tables."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import painted

from hooks.plots import new_figure
from surgery.data import genbias
from surgery.forward.shown import shown
from surgery.runs import examples
from surgery.runs.headline import in_short, lead
from surgery.runs.paired import told
from surgery.runs.report import Table, edited, page, why, write_page
from surgery.runs.settings import PromptSet

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
        ({"blocks": [8, 9, 12, 14, 15, 16]}, "blocks 8, 9, 12, 14 to 16"),
        ({"preamble": "Be fair."}, "prompt only"),
    ],
)
def test_what_was_edited_in_words(edit: dict[str, Any], words: str) -> None:
    assert edited(edit) == words


def test_the_page_says_what_ran_and_places_each_picture_once(tmp_path: Path) -> None:
    figures = {"placed": new_figure(2, 1), "free": new_figure(2, 1)}
    figures["free"].set_label("a bar for each block")
    tables = [Table("Numbers", ["name", "value"], [["<gap>", "1"]], picture="placed", hints=["a scorer"])]
    with painted():
        write_page(tmp_path, RUN, "seed = 7", lines=["Warning: much was lost."], tables=tables, figures=figures)
    text = (tmp_path / "report.html").read_text()
    assert "<title>crawd (vanilla) on tiny</title>" in text
    assert f"transformers {version('transformers')}, Python " in text
    assert '<p class="note">Edited: blocks 2, 3 (without mlp), 1,234,567 numbers' in text and "CPU cores.</p>" in text
    assert "900 of 1,000 entries changed, 100 left" in text and "4,096 bytes" in text and "seed = 7" in text
    assert '<p class="warning">Warning: much' in text and '<tr title="a scorer"><td>&lt;gap&gt;</td>' in text
    assert text.count("<svg") == 2 and "<img" not in text and "<metadata" not in text
    assert (
        text.index('aria-label="a bar for each block"') < text.index("<h2>Numbers") < text.index('aria-label="placed"')
    )
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"placed.png", "free.png"}


def test_a_delta_in_memory_has_no_counts_and_a_comparison_has_no_file(tmp_path: Path) -> None:
    write_page(tmp_path, RUN | {"applied": {"rounding": "auto"}}, "seed = 7", lines=[], tables=[], figures={})
    text = (tmp_path / "report.html").read_text()
    assert "The file" in text and "entries changed" not in text
    text, pictures = page(title="Side by side", lines=[], tables=[], figures={})
    assert pictures == {} and not any(said in text for said in ("The file", "Do it again", "Edited", "Undefined"))


def metric(value: float, n: int = 90, scorer: str = "s") -> dict[str, Any]:
    known = {"low": value - 0.1, "high": value + 0.1, "ideal": 0.0, "direction": "lower"}
    return {"value": value, "n": n, "scorer": scorer, "data": "rows", **known}


def test_noise_is_said_in_words_and_few_rows_are_a_warning(tmp_path: Path) -> None:
    scores = {"genbias": {"afgb": {"all": metric(0.2, n=12), "word": metric(0.3, n=4)}}, "perplexity": metric(9.0)}
    pairs = {
        "genbias.afgb.all": {"value": -0.1, "low": -0.2, "high": 0.1, "verdict": "within noise"},
        "perplexity": {"value": 0.5, "low": 0.1, "high": 0.9, "verdict": "worse"},
    }
    run = RUN | {"after": scores, "before": scores, "differences": {"before": pairs}}
    lines = told(run)
    assert lines[0].endswith("0 better, 1 worse (perplexity), 1 within noise.")
    assert lines[1].startswith("Warning: few rows: genbias afgb all on 12.") and "word" not in lines[1]
    short = in_short(run, picture="")
    assert [row[3] for row in short.rows] == ["+0.0%, within noise", "+0.0%, worse"]
    write_page(tmp_path, run, "seed = 7", lines=["The gap fell."], tables=[short], figures={}, lead="It is fairer.")
    text = (tmp_path / "report.html").read_text()
    assert text.index('class="lead">It is fairer.') < text.index("In short")
    assert text.index("In short") < text.index("The gap fell.") < text.index("1 within noise") < text.index("<dt>AFGB")
    assert "<dt>perplexity" in text and "<dt>StereoSet" not in text


def test_the_first_sentence_says_how_far_the_bias_went_and_what_else_moved() -> None:
    def scores(gap: float) -> dict[str, Any]:
        return {"genbias": {"relative_gap": {"all": metric(gap, n=90)}, "mass": {"all": metric(0.5, n=90)}}}

    verdicts = {"genbias.relative_gap.all": "better", "genbias.mass.all": "within noise", "perplexity": "worse"}
    pairs = {"before": {path: {"verdict": verdict} for path, verdict in verdicts.items()}}
    run = RUN | {"words": ["he", "she"], "before": scores(0.4), "after": scores(0.1), "differences": pairs}
    assert lead(run) == (
        "The gap between he and she fell by 75%, from 0.400 to 0.100, on 90 prompts of rows. "
        "Unchanged within noise: the words' mass. Worse: perplexity."
    )
    assert lead(run | {"before": {}}) == ""


def test_what_a_reader_can_look_at_himself(tiny: Any, tmp_path: Path) -> None:
    prompts = [row for row in genbias.records() if row.profession in ("nurse", "doctor")]
    before = [[0.1, 0.5] if row.profession == "nurse" else [0.3, 0.2] for row in prompts]
    after = [[0.3, 0.3] for _ in prompts]
    found = examples.cases(prompts, before, after)
    assert [(row["profession"], row["prompts"]) for row in found] == [("nurse", 9), ("doctor", 9)]
    assert found[0]["before"] == pytest.approx([0.1, 0.5]) and found[0]["after"] == pytest.approx([0.3, 0.3])
    assert examples.cases(prompts, None, after) == []
    texts = examples.texts_to_show(prompts, before, ["The nurse lost his keys because"], ["The car stopped because"])
    assert "nurse" in texts[0] and len(texts) == 4
    said, *others = shown(*tiny, texts, ["he", "she", "nowhere at all"], length=3)
    model, tokenizer = tiny
    assert len({len(tokenizer(text)["input_ids"]) for text in texts}) > 1  # they are written together, padded
    for one, text in zip([said, *others], texts, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        alone = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
        assert one["text"] == text and one["goes_on"] == tokenizer.decode(alone, skip_special_tokens=True)
    with torch.no_grad():
        chances = model(**tokenizer(texts[0], return_tensors="pt")).logits[0, -1].softmax(-1)
    he = tokenizer(" he", add_special_tokens=False)["input_ids"][0]
    assert said["words"]["he"] == pytest.approx(float(chances[he]), rel=1e-5) and set(said["words"]) == {"he", "she"}
    assert [p for _, p in said["next"]] == pytest.approx(chances.topk(10).values.tolist(), rel=1e-5)
    run = RUN | {"words": ["he", "she"], "cases": found, "shown": {"before": [said], "after": [said]}}
    tables = examples.tables(run)
    assert [len(table.rows) for table in tables] == [2, 10, 1]
    write_page(tmp_path, run, "seed = 7", lines=[], tables=tables, figures={})
    assert "Every subject of the test part (2)" in (tmp_path / "report.html").read_text()


def test_why_a_place_was_edited_stands_beside_it() -> None:
    assert why({"blocks": [3]}, "block = [3]") == "named in the recipe"
    assert why({"blocks": [3]}, 'block = "last"') == "the last one, which the paper edits"
    assert why({"blocks": "all"}, 'block = "all"') == why({"blocks": [3]}, "") == ""


def test_few_subjects_are_said_before_the_run(tmp_path: Path) -> None:
    few = tmp_path / "few.toml"
    names = ", ".join(f'"person {n}"' for n in range(20))
    few.write_text(
        f'name = "few"\nwords = ["young", "old"]\nsubjects = [{names}]\n[[templates]]\nname = "a"\n'
        'text = "The {person} is"\n'
    )
    assert [line.partition(";")[0] for line in PromptSet(prompt_set=str(few)).cautions()] == [
        "Warning: 8 test subjects"
    ]
    assert PromptSet().cautions() == []
