"""surgery dose: the scale at which a number comes to a value, by hand; and what is measured at each scale."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from deltakit import edit, hashes
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cli import surgery

from surgery.errors import SurgeryError
from surgery.metrics.metric import Metric, mean_metric
from surgery.runs.dose import Dosed, changes, reached, read_scales, read_target

MATRIX = "model.layers.2.mlp.down_proj.weight"
FEW = ["--suite", "genbias", "--suite", "perplexity", "--quiet", "--device", "cpu"]


def curve(scales: list[float], values: list[float], direction: str = "lower", ideal: float = 0.0) -> list[Dosed]:
    """Numbers whose bootstrap has three draws: as measured, a tenth lower, a tenth higher."""
    draws = np.array([0.0, -0.1, 0.1])
    return [
        Dosed(
            scale, {"a": {"b": Metric(value, value - 0.1, value + 0.1, 9, "s", "d", ideal, direction, value + draws)}}
        )
        for scale, value in zip(scales, values, strict=True)
    ]


def test_the_scale_of_a_target_by_hand() -> None:
    found = reached(curve([0, 0.5, 1], [0.9, 0.5, 0.3]), "a.b", 0.4)
    # Between .5 at 0.5 and .3 at 1: half the way. A tenth lower is .4 at .5; a tenth higher .4 at 1.
    assert found.scale == pytest.approx(0.75) and not found.kept and not found.extrapolated
    assert (found.low, found.high) == (pytest.approx(0.5), pytest.approx(1.0))
    assert "a.b = 0.4: met at scale 0.75 [0.5, 1], interpolated" in str(found)
    # The first crossing counts, and a measured scale that meets it exactly is it.
    assert reached(curve([0, 1, 2, 3], [1, 0.5, 1, 0]), "a.b", 0.5).scale == 1
    # Draws that do not come there leave the interval open.
    late = reached(curve([0, 1], [1.0, 0.45]), "a.b", 0.5)
    assert late.scale == pytest.approx(10 / 11) and late.high is None and "beyond" in str(late)

    # A draw that meets it untouched has its scale at 0: .45 comes to .4 at 1/9, .55 at 1/3, .35 is there.
    early = reached(curve([0, 1], [0.45, 0.0]), "a.b", 0.4)
    assert early.low == 0 and early.scale == pytest.approx(1 / 9) and early.high == pytest.approx(1 / 3)


def test_what_a_target_means_by_direction() -> None:
    assert reached(curve([0, 1], [0.2, 0.6], "higher", 1.0), "a.b", 0.5).scale == pytest.approx(0.75)
    # Nearer to 50: from 62 down to 55, from 40 up to 45, and an ideal that is jumped over is met on the way.
    assert reached(curve([0, 1], [62, 52], "nearer", 50.0), "a.b", 55).scale == pytest.approx(0.7)
    assert reached(curve([0, 1], [40, 50], "nearer", 50.0), "a.b", 55).scale == pytest.approx(0.5)
    assert reached(curve([0, 1], [60, 40], "nearer", 50.0), "a.b", 50).scale == pytest.approx(0.5)
    # A cost is met by the untouched model: up to where it stays under the bound. Mass: as far from what it was.
    cost = reached(curve([0, 1], [10, 20]), "a.b", 12)
    assert cost.kept and cost.scale == pytest.approx(0.2) and "met by the untouched model, and up to" in str(cost)
    mass = reached(curve([0, 1], [0.5, 0.3], "same", 0.5), "a.b", 0.55)
    assert mass.kept and [mass.low, mass.scale, mass.high] == pytest.approx([0.25] * 3)  # paired: draws fall alike
    # Negative scales are searched too, and the nearest is taken.
    assert reached(curve([-1, 0, 1], [0.2, 1, 1.5]), "a.b", 0.6).scale == pytest.approx(-0.5)


def test_beyond_what_was_measured_only_when_asked() -> None:
    found = curve([0, 0.5, 1], [0.9, 0.7, 0.6])
    none = reached(found, "a.b", 0.5)
    assert none.scale is None and none.low is None and "not met" in str(none)
    more = reached(found, "a.b", 0.5, beyond=True)
    assert more.scale == pytest.approx(1.5) and more.extrapolated and "extrapolated" in str(more)
    assert reached(found, "a.b", 0.1, beyond=True).scale is None
    kept = reached(curve([0, 1], [1, 2]), "a.b", 3)
    assert kept.kept and kept.scale is None and "at all that was measured" in str(kept)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(-5, 5), min_size=2, max_size=6),
    st.floats(-5, 5),
    st.sampled_from(["lower", "higher", "nearer"]),
)
def test_a_found_scale_lies_on_the_line(values: list[float], wanted: float, direction: str) -> None:
    scales = [float(n) for n in range(len(values))]
    found = reached(curve(scales, values, direction), "a.b", wanted)
    if found.scale is not None:
        there = float(np.interp(found.scale, scales, values))
        at = abs(there) - abs(wanted) if direction == "nearer" else there - wanted
        assert at == pytest.approx(0, abs=1e-9) or (direction == "nearer" and math.isclose(there, wanted, abs_tol=1e-9))
        assert found.low is not None and found.low <= found.scale
        assert found.high is None or found.high >= found.scale


def test_differences_are_paired_with_scale_0() -> None:
    rows = np.random.default_rng(0).uniform(0.4, 0.6, 50)

    def at(scale: float, values: Any, data: str = "d") -> Dosed:
        return Dosed(scale, {"m": mean_metric(values, scorer="s", data=data, ideal=0.0, direction="lower")})

    found = changes([at(0, rows), at(1, rows - 0.01), at(2, rows, "other")], ["m"])
    assert found[1]["m"].value == pytest.approx(-0.01) and found[1]["m"].high == pytest.approx(-0.01)
    assert found[1]["m"].verdict == "better" and found[2] == {} and 0 not in found


def test_scales_and_targets_are_read() -> None:
    assert read_scales("1,.5") == [0.0, 0.5, 1.0] and read_target("a.b=0.1") == ("a.b", 0.1)
    for text in ("", "0", "1,x", "nan", "1,inf"):
        with pytest.raises(SurgeryError, match="--scales"):
            read_scales(text)
    for text in ("a.b", "=1", "a=", "a=inf"):
        with pytest.raises(SurgeryError, match="--target"):
            read_target(text)


@pytest.fixture(scope="module")
def delta(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("dose") / "delta.safetensors"
    edit(checkpoint, (MATRIX,), size=0.3).save(file)
    return file


def test_scale_0_is_the_untouched_model_and_1_what_apply_writes(delta: Path, checkpoint: Path, tmp_path: Path) -> None:
    before = hashes(checkpoint)
    files = ["--json", tmp_path / "d.json", "--plot", tmp_path / "d.svg", "--html", tmp_path / "d.html"]
    words = ["--scales", "0,0.5,1", "--target", "perplexity=1", *files, *FEW]
    code, stdout, stderr = surgery("dose", delta, checkpoint, *words)
    assert code == 0, stderr
    assert "perplexity = 1: not met within scales 0 to 1" in stdout and "surgery apply" not in stdout
    assert hashes(checkpoint) == before
    found = json.loads((tmp_path / "d.json").read_text())
    assert [one["scale"] for one in found["scales"]] == [0, 0.5, 1] and found["as_stored"]
    assert surgery("apply", delta, checkpoint, "--out", tmp_path / "edited", "--quiet")[0] == 0
    for place, model in ((0, checkpoint), (2, tmp_path / "edited")):
        assert surgery("eval", model, *FEW, "--json", tmp_path / "e.json")[0] == 0
        scores = json.loads((tmp_path / "e.json").read_text())
        for suite, own in found["scales"][place]["scores"].items():
            assert own == scores[suite]
    gap = [one["scores"]["genbias"]["relative_gap"]["all"]["value"] for one in found["scales"]]
    paired = found["scales"][2]["differences"]["genbias.relative_gap.all"]
    assert paired["value"] == pytest.approx(gap[2] - gap[0]) and found["scales"][0]["differences"] == {}
    assert (tmp_path / "d.svg").read_text().startswith("<?xml")
    assert "Difference from scale 0" in (tmp_path / "d.html").read_text()
    # A target between two measured values: its scale is measured too, and the command names it.
    wanted = (gap[0] + gap[1]) / 2
    words[3] = f"relative_gap.all={wanted}"
    code, stdout, stderr = surgery("dose", delta, checkpoint, *words)
    assert code == 0, stderr
    answer = json.loads((tmp_path / "d.json").read_text())["targets"][0]
    assert answer["place"] == "genbias.relative_gap.all" and answer["scale"] == pytest.approx(0.25)
    assert answer["measured"]["scale"] == 0.25 and "measured there" in stdout
    assert stdout.splitlines()[-1] == f"surgery apply {delta} {checkpoint} --out edited --scale 0.25"


@pytest.mark.parametrize("part", ["test", "dev"])
def test_kl_is_to_the_untouched_model(delta: Path, checkpoint: Path, tmp_path: Path, part: str) -> None:
    """On the rows that are measured, of whichever part."""
    words = ["--scales", "1", "--suite", "locality", "--apply-at", "2", "--force", "--json", tmp_path / "d.json"]
    words += ["--part", part]
    code, stdout, stderr = surgery("dose", delta, checkpoint, *words, "--quiet", "--device", "cpu")
    assert code == 0, stderr
    assert stdout.splitlines()[-1].endswith("--scale 2")
    kl = [
        one["scores"]["locality"]["things"]["kl"]["value"]
        for one in json.loads((tmp_path / "d.json").read_text())["scales"]
    ]
    assert kl[0] == pytest.approx(0, abs=1e-6) and 0.001 < kl[1] < kl[2]


@pytest.mark.parametrize(
    "words, message",
    [
        (["--scales", "0,x"], "--scales '0,x': expected numbers"),
        (["--target", "perplexity"], "expected METRIC=NUMBER"),
        (["--target", "gap=1"], "metric 'gap': none of what was measured"),
        (["--metric", "bbq"], "--metric bbq: not measured"),
        (["--apply-at", "2"], "--apply-at 2: beyond the measured scales, 0 to 1.5"),
        (["--apply-at", "nan", "--force"], "--apply-at nan: beyond"),
        (["--suite", "stereoset"], "suite stereoset: --folder '' is no folder"),
        (["--suite", "sterioset"], "got 'sterioset', expected some of"),
        (["--data", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line(delta: Path, checkpoint: Path, words: list[str], message: str) -> None:
    suite = [] if "--suite" in words else ["--suite", "perplexity"]
    code, stdout, stderr = surgery("dose", delta, checkpoint, *words, *suite, "--quiet", "--device", "cpu")
    assert code == 1 and message in stderr and stderr.count("\n") == 1 and not stdout


def test_another_model_is_refused_before_anything_is_measured(
    delta: Path, make_checkpoint: Any, tmp_path: Path
) -> None:
    other = make_checkpoint(tmp_path / "other", initializer_range=0.1, num_hidden_layers=5)
    code, stdout, stderr = surgery("dose", delta, other, "--device", "cpu")
    assert code == 1 and stderr.count("error:") == 1 and "scale 0" not in stderr and not stdout
