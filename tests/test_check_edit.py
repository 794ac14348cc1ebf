"""What would stop a delta after training is refused before it."""

import shutil
from collections import namedtuple

import families
import pytest
import torch

from surgery import SurgeryError
from surgery.delta import check_edit


@pytest.fixture
def saved(tmp_path):
    model = families.build("llama")
    model.save_pretrained(tmp_path / "base")
    return model, tmp_path / "base"


def test_an_edit_that_can_be_made_passes(saved, tmp_path):
    model, folder = saved
    before = sorted(path.name for path in tmp_path.iterdir())
    check_edit(model, [name for name, _ in model.named_parameters()], folder, out=tmp_path / "runs" / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_each_thing_that_would_fail_later_is_named_at_once(saved, tmp_path, monkeypatch):
    model, folder = saved
    name = "model.layers.1.mlp.down_proj.weight"
    with pytest.raises(SurgeryError, match=r"the model has no parameter 'x.weight'"):
        check_edit(model, ["x.weight"], folder)
    with pytest.raises(SurgeryError, match="no such checkpoint"):
        check_edit(model, [name], tmp_path / "nowhere")
    with pytest.raises(SurgeryError, match=r"another model than the one given: layers: .*3.*2"):
        check_edit(families.build("llama", num_hidden_layers=2), [name], folder)
    with torch.no_grad():
        model.get_parameter(name)[0, 0] = float("nan")
    with pytest.raises(SurgeryError, match=r"down_proj\.weight' holds NaN"):
        check_edit(model, [name], folder)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, 1000))
    with pytest.raises(SurgeryError, match="GB are free, the delta and one saved checkpoint need"):
        check_edit(model, ["model.norm.weight"], folder, out=tmp_path / "run")
