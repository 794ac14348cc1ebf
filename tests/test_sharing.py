"""What a continued run and the runs of a sweep do not compute again: the ranking, and the measurement before."""

from pathlib import Path
from typing import Any

import pytest
from test_lftf import QUICK, operate

from recipes import lftf
from recipes.lftf import recipe
from surgery.edits import kept_streams
from surgery.errors import SurgeryError
from surgery.metrics.metric import from_dict
from surgery.runs.sharing import Shared


def test_a_sweep_ranks_and_measures_the_untouched_model_once_and_gives_what_runs_alone_give(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def counted(module: Any, name: str) -> None:
        plain = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *args, **how: (seen.append(how.get("label", name)), plain(*args, **how))[1]
        )

    counted(recipe, "rank_blocks")
    counted(kept_streams, "measure")
    alone = operate(tiny, checkpoint, tmp_path / "alone", lr=3e-2, block=2, test_rows=40)
    assert seen == ["rank_blocks", "measure before", "measure lftf"]
    seen.clear()
    shared = Shared()

    def run(name: str, **one: Any) -> dict[str, Any]:
        ready = lftf.Settings(**({"model": str(checkpoint)} | QUICK | one))
        return lftf.run(*tiny, ready, out=tmp_path / name, shared=shared).summary

    run("first", test_rows=40)
    found = run("second", lr=3e-2, block=2, test_rows=40)
    assert seen == ["rank_blocks", "measure before", *["measure lftf"] * 2]
    assert found["delta"]["sha256"] == alone["delta"]["sha256"]
    assert all(found[part] == alone[part] for part in ("before", "ranking", "shown"))
    now, then = (from_dict(each["after"]["genbias"]["afgb"]["all"]).value for each in (found, alone))
    assert now == pytest.approx(then, abs=1e-6)
    run("other", test_rows=30)
    assert seen[4:] == ["measure before", "measure lftf"]  # of other rows; the ranking is of the same prompts


def test_a_continued_run_repeats_neither_the_ranking_nor_the_measurement_before(
    tiny: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = operate(tiny, checkpoint, tmp_path / "whole", test_rows=40)
    with monkeypatch.context() as patch:
        patch.setattr(
            recipe.edit, "fine_tune", lambda *_, **__: (_ for _ in ()).throw(SurgeryError("the power failed"))
        )
        with pytest.raises(SurgeryError, match="the power failed"):
            operate(tiny, checkpoint, tmp_path / "cut", test_rows=40)
    seen: list[str] = []
    measured = kept_streams.measure
    monkeypatch.setattr(
        kept_streams, "measure", lambda *args, **how: (seen.append(how["label"]), measured(*args, **how))[1]
    )
    monkeypatch.setattr(recipe, "rank_blocks", None)
    ready = lftf.Settings(**({"model": str(checkpoint)} | QUICK | {"test_rows": 40}))
    rest = lftf.run(*tiny, ready, out=tmp_path / "cut", resume=True).summary
    assert seen == ["measure lftf"] and rest["delta"]["sha256"] == whole["delta"]["sha256"]
    for number in ("afgb", "relative_gap"):
        pair = [from_dict(one["after"]["genbias"][number]["all"]).value for one in (rest, whole)]
        assert pair[0] == pytest.approx(pair[1], abs=1e-6)
