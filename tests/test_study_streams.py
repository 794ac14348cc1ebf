"""A cell is judged from the untouched model's streams where its edit begins further up, with the same numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from surgery.delta import make
from surgery.metrics.judges import Judges
from surgery.metrics.metric import flat
from surgery.progress import Progress
from surgery.study import Method
from surgery.study.judging import judge
from surgery.study.streams import Streams, blocks_to_keep, first_edited


def delta(checkpoint: Path, *names: str) -> Any:
    shapes = {"norm": (32,), "proj": (32, 48), "tokens": None}
    differences = {name: np.full(next(s for k, s in shapes.items() if k in name), 0.05, np.float32) for name in names}
    return make(differences, checkpoint, base="tiny", recipe="", seed=0)


def test_the_first_block_that_a_delta_changes(tiny: Any, checkpoint: Path) -> None:
    model = tiny[0]
    down = "model.layers.{}.mlp.down_proj.weight"
    assert blocks_to_keep(model) == (2, 3)
    assert first_edited(model, delta(checkpoint, down.format(3), down.format(2))) == 2
    assert first_edited(model, delta(checkpoint, "model.norm.weight")) == 3  # behind every block
    rows = model.get_input_embeddings().weight.shape
    embedding = {"model.embed_tokens.weight": np.full(rows, 0.01, np.float32)}
    assert first_edited(model, make(embedding, checkpoint, base="tiny", recipe="", seed=0)) == 0


def test_both_ways_give_the_same_numbers(tiny: Any, checkpoint: Path) -> None:
    model, _ = tiny
    judges = Judges(suites=("genhint", "perplexity"))
    streams, progress = Streams(), Progress(quiet=True)
    judge(*tiny, judges, None, details={}, streams=streams, progress=progress)
    assert set(streams.kept) == {2, 3}
    one = delta(checkpoint, "model.layers.2.mlp.down_proj.weight")
    assert streams.until(model, 1) is None and streams.until(model, 2) is streams.kept[2]
    with one.applied(model):
        method = Method(name="a", delta="x")
        quick = judge(*tiny, judges, method, details={}, streams=streams, first=2, progress=progress)
        plain = flat(judges.judge(*tiny, progress=progress))
    assert {place: metric.value for place, metric in quick.items()} == pytest.approx(
        {place: metric.value for place, metric in plain.items()}, rel=1e-5
    )
