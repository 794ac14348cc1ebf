"""A delta made on a parent lowers the bias of its fine-tuned child, and is refused by models that are no relatives."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

import surgery
from recipes import finetune, lftf
from surgery.apply import apply
from surgery.data import neutral
from surgery.data.prompts import load_prompt_set
from surgery.errors import SurgeryError
from surgery.metrics.material import material
from surgery.metrics.suite import measure


@pytest.fixture(scope="module")
def delta(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LFTF on the parent."""
    out = tmp_path_factory.mktemp("runs") / "lftf"
    settings = lftf.Settings(model=str(checkpoint), lr=3e-2, epochs=5, batch_size=128, controls=[])
    lftf.run(*surgery.load(checkpoint, device="cpu"), settings, out=out)
    return out / "delta.safetensors"


@pytest.fixture(scope="module")
def child(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parent, all its parameters fine-tuned on the neutral sentences: none names he, she or a profession."""
    folder = tmp_path_factory.mktemp("child")
    (folder / "texts.txt").write_text("\n".join(neutral.sentences()))
    settings = finetune.Settings(
        model=str(checkpoint), file=str(folder / "texts.txt"), lr=3e-3, epochs=2, batch_size=16, keep_checkpoint=True
    )
    summary = finetune.run(*surgery.load(checkpoint, device="cpu"), settings, out=folder / "run").summary
    losses = [summary[when]["held_out_loss"]["value"] for when in ("before", "after")]
    assert losses[1] < 0.9 * losses[0]  # it did learn something else
    return folder / "run" / "checkpoint"


def gap(directory: Path) -> Any:
    """The relative gap of all test prompts, with its interval, of a checkpoint opened from nothing."""
    model, tokenizer = surgery.load(directory, device="cpu")
    given = material(model, tokenizer, load_prompt_set(), suites=("genbias",))
    return measure(model, given).scores["genbias"]["relative_gap"]["all"]


def test_the_bias_of_the_child_falls_too(delta: Path, child: Path, checkpoint: Path, tmp_path: Path) -> None:
    report = apply(delta, child, tmp_path / "edited", rounding="auto")
    assert report.verdict == "related" and 0.005 < report.distance < 0.5
    before, after = gap(child), gap(tmp_path / "edited")
    assert before.value != gap(checkpoint).value
    assert after.value < 0.7 * before.value and after.high < before.low


def test_random_weights_of_the_same_shape_are_refused_for_distance(
    delta: Path, child: Path, checkpoint: Path, tmp_path: Path
) -> None:
    stranger = tmp_path / "stranger"
    torch.manual_seed(1)
    LlamaForCausalLM(AutoConfig.from_pretrained(checkpoint)).to(torch.bfloat16).save_pretrained(stranger)
    with pytest.raises(SurgeryError, match=r"1\.\d\d of its norm away .* these are other weights"):
        apply(delta, stranger, tmp_path / "out", force=True)
    assert list(tmp_path.iterdir()) == [stranger]


def test_another_architecture_is_refused_by_name(delta: Path, checkpoint: Path, tmp_path: Path) -> None:
    """The same tensors under the same names, read by another architecture's code."""
    from transformers import MistralConfig, MistralForCausalLM

    other = tmp_path / "other"
    same = {k: v for k, v in AutoConfig.from_pretrained(checkpoint).to_dict().items() if k != "model_type"}
    model = MistralForCausalLM(MistralConfig(**same)).to(torch.bfloat16)
    model.load_state_dict(surgery.load(checkpoint, device="cpu")[0].state_dict())
    model.save_pretrained(other)
    with pytest.raises(SurgeryError, match=r"another architecture .*model_type: the delta's base has llama.*mistral"):
        apply(delta, other, tmp_path / "out", force=True)
    assert list(tmp_path.iterdir()) == [other]
