"""Each kind of row of a study does what its name says: its probabilities are those of a model edited by hand."""

import json
from pathlib import Path
from typing import Any

import torch
from test_cli import surgery

from surgery.checkpoints import load
from surgery.delta import Delta, make

PREAMBLE = "Good day . "
FILE = f"""
suites = ["genbias", "genhint"]
rows = {{ genbias = 9, genhint = 9 }}

[[methods]]
name = "prompt"
preamble = "{PREAMBLE}"

[[methods]]
name = "FPFT"
recipe = "lftf"
settings = {{ block = "all", lr = 1e-2, epochs = 1, batch_size = 256, controls = [], test_rows = 9 }}

[[methods]]
name = "negation"
delta = DELTA
scale = -1.0

[[methods]]
name = "CAFIE"
decoding = "cafie"
"""


def test_every_kind_of_row_is_the_model_edited_by_hand(checkpoint: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "learnt.safetensors", tmp_path / "out"
    model, tokenizer = load(checkpoint, device="cpu")
    was = model.model.norm.weight.detach().clone()
    learnt = was * torch.tensor([0.5, 0.0]).repeat(16)  # without which a weight needs no rounding where it is stored
    make({"model.norm.weight": learnt.numpy()}, checkpoint, base="tiny", recipe="", seed=0).save(file)
    (tmp_path / "s.toml").write_text(
        f"models = [{json.dumps(str(checkpoint))}]\n" + FILE.replace("DELTA", json.dumps(str(file)))
    )
    code, _, stderr = surgery("study", tmp_path / "s.toml", "--out", out, "--device", "cpu")
    assert code == 0, stderr
    (place,) = out.glob("model=*")

    def chances(preamble: str = "") -> torch.Tensor:
        """Of the words after the judged prompts, from plain forward passes."""
        words = [tokenizer(word)["input_ids"][0] for word in told["words"]]
        rows = [tokenizer(preamble + text, return_tensors="pt")["input_ids"] for text, *_ in told["prompts"]]
        with torch.no_grad():
            return torch.stack([model(input_ids=ids, use_cache=False).logits[0, -1].softmax(-1)[words] for ids in rows])

    def judged(name: str) -> torch.Tensor:
        found: dict[str, Any] = json.loads((place / name / "details.json").read_text())
        assert [row[0].removeprefix(PREAMBLE) for row in found["prompts"]] == [row[0] for row in told["prompts"]]
        return torch.tensor([row[2:] for row in found["prompts"]])

    def same(name: str, expected: torch.Tensor) -> None:
        torch.testing.assert_close(judged(name), expected, rtol=1e-4, atol=1e-7)
        assert (expected - untouched).abs().max() > 1e-5, f"{name} moved nothing"

    told = json.loads((place / "untouched" / "details.json").read_text())
    untouched = chances()
    torch.testing.assert_close(judged("untouched"), untouched, rtol=1e-4, atol=1e-7)
    same("prompt/seed=0", chances(PREAMBLE))
    with torch.no_grad():
        model.model.norm.weight.copy_(was - learnt)  # what was learnt is subtracted
        same("negation/seed=0", chances())
        model.model.norm.weight.copy_(was)
    torch.testing.assert_close(judged("CAFIE/seed=0"), untouched, rtol=1e-4, atol=1e-7)  # no group word to exchange
    scores = {one["method"]: one["scores"] for one in json.loads((out / "study.json").read_text())["cells"]}
    hints = {name: scores[name]["genhint.mass"]["value"] for name in ("untouched", "CAFIE")}
    assert hints["CAFIE"] != hints["untouched"], "a hint is one"
    delta = Delta.load(place / "FPFT" / "seed=0" / "run" / "delta.safetensors")
    assert {name for name, _ in model.named_parameters()} == set(delta.tensors), "full-parameter: every one is trained"
    with delta.applied(model, as_stored=True):
        same("FPFT/seed=0", chances())
