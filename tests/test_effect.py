"""What an adapter keeps of an edit, through peft: all of it where it is exact, none where it is empty."""

from pathlib import Path

import numpy as np
import pytest
from deltakit import edit, load
from safetensors.torch import load_file, save_file
from test_cli import surgery

from surgery import delta as deltas
from surgery.adapters.effect import Effect, effect
from surgery.adapters.exporting import export_peft

DOWN = "model.layers.2.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def delta(checkpoint: Path) -> deltas.Delta:
    """What a block's MLP writes is tripled, which brings the compared words closer together here."""
    difference = 2 * load(checkpoint)[DOWN].float().numpy()
    return deltas.make({DOWN: difference}, checkpoint, base="tiny", recipe="", seed=0)


def measured(delta: deltas.Delta, checkpoint: Path, out: Path, rank: int | None) -> Effect:
    export_peft(delta, out, rank=rank)
    return effect(delta, out, checkpoint, prompts=12)


def test_an_exact_adapter_keeps_all_and_a_short_one_part(delta: deltas.Delta, checkpoint: Path, tmp_path: Path) -> None:
    whole = measured(delta, checkpoint, tmp_path / "whole", None)
    assert whole.kept == pytest.approx(1, abs=1e-4) and whole.lost < 1e-5 < whole.edit and whole.prompts == 12
    assert whole.gaps is not None and whole.gaps[1] == pytest.approx(whole.gaps[2], abs=1e-5)
    assert whole.gap_kept is not None and whole.gap_kept == pytest.approx((1, 1, 1), abs=1e-3)
    assert whole.gaps[0] > whole.gaps[1]
    part = measured(delta, checkpoint, tmp_path / "part", 4)
    more = measured(delta, checkpoint, tmp_path / "more", 16)
    assert part.low < part.kept < more.kept < 1 and part.gaps is not None and part.gaps[0] == whole.gaps[0]
    assert part.gap_kept is not None
    share = (part.gaps[0] - part.gaps[2]) / (part.gaps[0] - part.gaps[1])
    assert part.gap_kept[0] == pytest.approx(share) and part.gap_kept[1] <= share <= part.gap_kept[2]


def test_an_empty_adapter_keeps_nothing(delta: deltas.Delta, checkpoint: Path, tmp_path: Path) -> None:
    export_peft(delta, tmp_path / "empty", rank=4)
    file = tmp_path / "empty" / "adapter_model.safetensors"
    save_file({name: tensor * 0 for name, tensor in load_file(file).items()}, file)
    found = effect(delta, tmp_path / "empty", checkpoint, prompts=12)
    assert found.kept == pytest.approx(0, abs=1e-6) and found.gap_kept is not None
    assert np.allclose(found.gap_kept, 0, atol=1e-6)


def test_an_edit_that_reduces_no_gap_has_no_share_of_it(checkpoint: Path, tmp_path: Path) -> None:
    small = edit(checkpoint, (DOWN,), size=1e-4)
    small.save(tmp_path / "small.safetensors")
    words = ["--peft", tmp_path / "a", "--rank", "8", "--checkpoint", checkpoint]
    code, stdout, _ = surgery("export", tmp_path / "small.safetensors", *words)
    assert code == 0 and "effect kept, through peft:" in stdout and "gap reduction kept" not in stdout
