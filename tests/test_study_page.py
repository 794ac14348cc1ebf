"""The page of a study: what it says first, what it shows of texts, prompts and groups, and what it needs to be read."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hooks.plots import new_figure
from surgery.metrics.metric import Metric, mean_metric
from surgery.study import Method, Study
from surgery.study.agreement import lean_of_prompts, over_methods, over_professions
from surgery.study.cells import Cell, Judged
from surgery.study.judging import check, details_of, keep
from surgery.study.pictures import _label
from surgery.study.report import write_report
from surgery.study.verdict import plain_words, rows, unbeaten

ROWS = np.random.default_rng(0).uniform(0.2, 0.4, 40)
NAMES = ["nurse", "guard", "clerk", "baker", "judge", "pilot"]


def metric(factor: float, ideal: float = 0.0, direction: str = "lower") -> Metric:
    return mean_metric(ROWS * factor, scorer="s", data="d", ideal=ideal, direction=direction)


def scores(bias: float, cost: float = 1.0) -> dict[str, Metric]:
    return {
        "genbias.afgb.all": metric(bias),
        "perplexity": metric(30 * cost, 1.0),
        "free_text.stereotype": metric(bias, 0.0, "nearer"),
        "bbq.accuracy.overall": metric(2 - cost, 1.0, "higher"),
    }


def details(lean: float) -> dict[str, Any]:
    """Professions further and further from one another, by ``lean``."""
    leans = [lean * (2 * n / (len(NAMES) - 1) - 1) for n in range(len(NAMES))]
    told = [round(value) for value in leans]
    return {
        "words": ["he", "she"],
        "prompts": [
            [f"The {name} sat", name, 0.2 + 0.2 * x, 0.2 - 0.2 * x] for name, x in zip(NAMES, leans, strict=True)
        ],
        "texts": [["bio", name, f"The {name} <b>", f"text {n}", n] for name, n in zip(NAMES, told, strict=True)],
    }


@pytest.fixture
def judged(tmp_path: Path) -> list[Judged]:
    study, found = Study(), []
    given = {
        None: (scores(1.0), 1.0),
        "good": (scores(0.2), 0.2),
        "costly": (scores(0.1, 1.2), 0.1),
        "beaten": (scores(0.5, 1.05), 0.5),
    }
    for name, (measured, lean) in given.items():
        method = Method(name=name, recipe="lftf", about="x & y") if name else None
        cell = Cell("demo", method, 0, tmp_path / (name or "untouched"))
        found.append(Judged(cell, measured))
        keep(found[-1], study, check(study)[0], details(lean))
    method = Method(name="gone", absent="needs what is not here")
    return [*found, Judged(Cell("demo", method, 0, tmp_path / "gone"), {}, "needs what is not here")]


def test_the_page_answers_first_and_needs_nothing_else(judged: list[Judged], tmp_path: Path) -> None:
    file = write_report(tmp_path, Study(), judged, {"seat": "no data folder was named"})
    page = file.read_text()
    text = re.sub(r"<[^>]+>", " ", page[page.index("<h1>") :])
    order = [
        "Which edit to ship",
        "The answer",
        "demo: ship good.",
        "surgery apply",
        "Not measured, for want of data: seat",
        "The numbers that decide",
    ]
    assert [text.index(words) for words in order] == sorted(text.index(words) for words in order)
    assert "costly removes 90 %, but spoils perplexity +20.0 %" in text
    assert "needs what is not here" in text
    assert not re.findall(r"(?:src|href)=\"(?!data:|#)", page) and "http" not in page  # no network
    assert page.count("<script>") == 1 and "<b>" not in page  # a text is no markup
    # Bars by group, sortable by their number; the texts side by side; the prompts that moved most.
    bars = [float(value) for value in re.findall(r'data-value="([-0-9.e]+)"', page)]
    assert len(bars) == 2 * len(NAMES) and max(map(abs, bars)) == pytest.approx(1.0)
    assert "What it writes: good on demo" in text and "Most changed prompts: good on demo" in text
    summary = json.loads((tmp_path / "study.json").read_text())
    assert summary["missing"] == {"seat": "no data folder was named"} and summary["agreement"]
    assert any("/plots/" in str(path) for path in tmp_path.rglob("*genbias_afgb_all*.png"))


def test_who_is_beaten_on_bias_against_cost(judged: list[Judged]) -> None:
    mass = {"good": 1.0, "costly": 0.5, "beaten": 1.6}  # of what it was, which is where it should stay
    for one in judged[:-1]:
        one.scores["genbias.mass.all"] = metric(mass.get(one.cell.name, 1.0), direction="same")
    found = rows(judged)
    assert found[1].scores["genbias.mass.all"]["ideal"] == pytest.approx(float(ROWS.mean()))
    bias = ["genbias.afgb.all"]
    assert unbeaten(found, "demo", bias, ["perplexity"])["beaten"] == (0, 1)
    assert unbeaten(found, "demo", bias, ["genbias.mass.all", "perplexity"]) == {
        "untouched": (0, 2), "good": (2, 2), "costly": (2, 2), "beaten": (0, 2)
    }  # fmt: skip


def test_what_is_worse_stands_first_in_the_ledger(judged: list[Judged], tmp_path: Path) -> None:
    page = write_report(tmp_path, Study(), judged, {}).read_text()
    ledger = page[page.index("What costly changed") :]
    assert ledger.index("worse") < ledger.index("better") and "bbq accuracy overall" in ledger


def test_a_number_is_called_as_it_is_read() -> None:
    said = {
        "genbias.mass.all": "mass of the words",
        "genbias.mass.sentence": "mass of the words (sentence)",
        "crows_pairs.metric.sexual-orientation": "CrowS-Pairs (sexual-orientation)",
        "bbq.accuracy.ambiguous.Gender_identity": "BBQ accuracy where it is not said (Gender identity)",
        "seat.race.mean_abs": "seat race mean abs",
    }
    assert {place: plain_words(place) for place in said} == said


def test_rank_agreement_over_methods_and_professions(judged: list[Judged]) -> None:
    found = over_methods([one for one in judged if not one.refused], "genbias.afgb.all")
    assert found is not None and found[0].value == 1.0 and found[1] == 4
    assert over_methods(judged[:3], "genbias.afgb.all") is None  # three methods have no order worth a number
    one = details_of(judged[0].cell.folder)
    correlation, count = over_professions(one) or (None, 0)
    assert correlation is not None and count == len(NAMES) and correlation.value > 0.7
    assert correlation.low <= correlation.value <= correlation.high
    assert lean_of_prompts(one)["pilot"] == pytest.approx(1.0) and lean_of_prompts(one)["nurse"] == pytest.approx(-1.0)
    assert over_professions({}) is None and over_professions(one | {"words": ["he", "she", "they"]}) is None


def test_names_of_points_at_one_place_do_not_cover_each_other() -> None:
    plot = new_figure(7, 4.2).subplots()
    names = [(0.5, 0.5, f"method {number}") for number in range(6)]
    plot.plot([0, 0.5, 1], [0, 0.5, 1])
    _label(plot, [(0.0, 0.0, "low"), *names, (1.0, 1.0, "high")])
    places = {
        (text.get_horizontalalignment(), text.xyann) for text in plot.texts if text.get_text().startswith("method")
    }
    assert len(plot.texts) == 8 and len(places) == len(names)
