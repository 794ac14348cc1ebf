"""Exported directories open in a fresh process that has transformers and torch, and not this package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tiny_tokenizer import tiny_tokenizer
from torch import Tensor
from typer.testing import CliRunner

import surgery
from surgery import SurgeryError
from surgery.apply import export
from surgery.apply.export import export_transformers
from surgery.checkpoints import tensors_of
from surgery.cli import app
from surgery.delta import Delta
from surgery.delta.module import module_delta
from surgery.modules import cross_attention

# family -> the auto class that opens it
FAMILIES = {
    "llama": "AutoModelForCausalLM",
    "gpt2": "AutoModelForCausalLM",
    "mixtral": "AutoModelForCausalLM",
    "bert_classifier": "AutoModelForSequenceClassification",
    "t5": "AutoModelForSeq2SeqLM",
}

# Runs with `python -I`, with this package forbidden; prints what the parent compares.
FRESH = """
import json, sys
class Forbid:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("surgery", "hooks", "recipes"):
            raise ImportError(name)
sys.meta_path.insert(0, Forbid())
import torch, transformers
torch.set_num_threads(1)
for family, auto, place in json.loads(sys.argv[1]):
    kind = getattr(transformers, auto)
    model, info = kind.from_pretrained(place, trust_remote_code=True, dtype=torch.float32, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=True)
    batch = torch.load(place + ".batch")
    result = {"logits": None, "keys": sorted(k for v in info.values() for k in v), "class": type(model).__name__}
    with torch.no_grad():
        result["logits"] = model(**batch).logits
    result["ids"] = tokenizer("the nurse said that")["input_ids"]
    if model.can_generate():
        given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        for cache in (True, False):
            result[f"text {cache}"] = model.generate(**given, max_new_tokens=6, do_sample=False, use_cache=cache)
    if family == "llama":
        model.save_pretrained(place + "-again")
        again = kind.from_pretrained(place + "-again", trust_remote_code=True)
        with torch.no_grad():
            result["again"] = again(**batch).logits
        try:
            kind.from_pretrained(place)
            result["untrusted"] = "opened"
        except ValueError as error:
            result["untrusted"] = str(error)
    torch.save(result, place + ".found")
"""


@dataclass(frozen=True)
class Exported:
    place: Path
    wanted: dict[str, Any]
    found: dict[str, Any]


def edited_delta(model: Any, folder: Path, *, lora: bool, heads: int = 4) -> Delta:
    """A module far from the identity, and where wanted factors on one matrix of the last block."""
    generator = torch.Generator().manual_seed(1)
    with cross_attention.attached(model, tiny_tokenizer(), heads=heads) as module, torch.no_grad():
        module.fusion.weight.normal_(std=0.3, generator=generator)
        weights = cross_attention.weights_of(module)
    factors: dict[str, Tensor] = {}
    if lora:
        name = "model.layers.2.self_attn.q_proj.weight"
        factors = {f"{name}.lora_{side}": torch.randn(*shape, generator=generator) / 4 for side, shape in
                   (("B", (32, 2)), ("A", (2, 32)))}  # fmt: skip
    return module_delta(weights, folder, base="tiny", recipe="", seed=0, differences=factors)


def save(family: str, folder: Path) -> Any:
    """A checkpoint of the family as users have them; returns the model as it is stored."""
    model: Any = families.build(family)
    if family == "llama":
        model.to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="20KB" if family == "t5" else "5GB")
    tiny_tokenizer().save_pretrained(folder)
    if family == "gpt2":  # the hub's GPT-2 has no "transformer." in front of its names
        with safe_open(folder / "model.safetensors", "pt") as file:
            tensors = {name.removeprefix("transformer."): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return surgery.load(folder, device="cpu")[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exported]:
    root = tmp_path_factory.mktemp("exports")
    wanted, todo = {}, []
    for family, auto in FAMILIES.items():
        folder, place = root / family, root / f"{family}-edited"
        model = save(family, folder)
        delta = edited_delta(model, folder, lora=family == "llama")
        delta.save(root / f"{family}.safetensors")
        report = export_transformers(Delta.load(root / f"{family}.safetensors"), folder, place)
        assert report.auto_class == auto and report.out == place
        batch = families.batch(model)
        torch.save(batch, f"{place}.batch")
        todo.append((family, auto, str(place)))
        with torch.no_grad(), delta.applied(model, as_stored=True):
            wanted[family] = {"logits": model(**batch).logits}
            if model.can_generate():
                given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                wanted[family]["text"] = model.generate(**given, max_new_tokens=6, do_sample=False)
    environment = os.environ | {"HF_MODULES_CACHE": str(root / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", FRESH, json.dumps(todo)]
    done = subprocess.run(
        command, cwd=root, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {family: Exported(Path(place), wanted[family], torch.load(f"{place}.found")) for family, _, place in todo}


@pytest.mark.parametrize("family", FAMILIES)
def test_it_opens_without_this_package_and_does_the_same(exported: dict[str, Exported], family: str) -> None:
    run = exported[family]
    assert run.found["keys"] == []  # nothing missing, unexpected or of another shape
    assert run.found["class"].startswith("Crawd")
    assert run.found["ids"] == tiny_tokenizer()("the nurse said that")["input_ids"]
    # Memory-mapped tensors lie at other addresses, where a CPU's matrix product may round otherwise.
    scale = run.wanted["logits"].abs().max().item()
    torch.testing.assert_close(run.found["logits"], run.wanted["logits"], atol=1e-6 * scale, rtol=0)
    if "text" in run.wanted:
        assert torch.equal(run.found["text True"], run.wanted["text"])
        assert torch.equal(run.found["text False"], run.wanted["text"])


def test_nobody_opens_it_as_the_unedited_model(exported: dict[str, Exported]) -> None:
    run = exported["llama"]
    assert "trust_remote_code" in run.found["untrusted"]
    with pytest.raises(SurgeryError, match="brings its own code"):
        surgery.load(run.place)
    delta = Delta.load(run.place.parent / "llama.safetensors")
    with pytest.raises(SurgeryError, match="brings its own code"):
        export_transformers(delta, run.place, run.place.parent / "twice")


def test_transformers_can_save_it_again(exported: dict[str, Exported]) -> None:
    run = exported["llama"]
    scale = run.wanted["logits"].abs().max().item()
    torch.testing.assert_close(run.found["again"], run.wanted["logits"], atol=1e-5 * scale, rtol=0)


def test_its_code_needs_torch_and_transformers_alone(exported: dict[str, Exported]) -> None:
    code = (exported["llama"].place / "modeling_crawd.py").read_text()
    lines = [line.split()[1].split(".")[0] for line in code.splitlines() if line.startswith(("import ", "from "))]
    assert set(lines) <= {"inspect", "math", "collections", "typing", "torch", "transformers"}


def test_the_base_is_untouched_and_its_files_come_along(exported: dict[str, Exported]) -> None:
    place = exported["t5"].place
    base = place.parent / "t5"
    index = json.loads((place / "model.safetensors.index.json").read_text())["weight_map"]
    shards = json.loads((base / "model.safetensors.index.json").read_text())["weight_map"].values()
    assert set(index.values()) == {*shards, "model-crawd.safetensors"}
    assert (place / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
    assert "crawd" not in (base / "config.json").read_text()
    with safe_open(place / "model-crawd.safetensors", "pt") as file:
        assert all(name.startswith("cross_attention.") for name in file.keys())  # noqa: SIM118


def test_the_saved_directory_in_memory(exported: dict[str, Exported]) -> None:
    place = exported["llama"].place
    delta = Delta.load(place.parent / "llama.safetensors")
    model, _ = surgery.load(place.parent / "llama")
    batch = torch.load(f"{place}.batch")
    with torch.no_grad(), tensors_of(model, delta, place):
        found = model(**batch).logits
    torch.testing.assert_close(found, exported["llama"].wanted["logits"], atol=1e-5, rtol=1e-5)
    edited, _ = surgery.load(place.parent / "llama", deltas=[place.parent / "llama.safetensors"])
    with torch.no_grad():
        assert (edited(**batch).logits - found).abs().max() < 0.1  # but for bf16's rounding of the one matrix
        assert (model(**batch).logits - found).abs().max() > 0.5


def test_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save("llama", tmp_path / "llama")
    delta = edited_delta(model, tmp_path / "llama", lora=False)
    out = tmp_path / "out"
    families.build("llama", hidden_size=64, head_dim=16).save_pretrained(tmp_path / "wide")
    families.build("llama", rope_theta=5e5).save_pretrained(tmp_path / "rope")
    (tmp_path / "odd").mkdir()
    for file in (tmp_path / "llama").iterdir():
        (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config | {"architectures": ["MyModel"]}))
    before = sorted(tmp_path.iterdir())
    for name, message in (("wide", "hidden_size"), ("rope", "rope"), ("odd", "class 'MyModel'"), ("none", "no such")):
        with pytest.raises(SurgeryError, match=message):
            export_transformers(delta, tmp_path / name, out)
    with pytest.raises(SurgeryError, match="the destination exists"):
        export_transformers(delta, tmp_path / "llama", tmp_path / "rope")
    plain = surgery.delta.make({"model.norm.weight": torch.ones(32)}, tmp_path / "llama", base="t", recipe="", seed=0)
    with pytest.raises(SurgeryError, match="surgery apply DELTA CHECKPOINT --out DIR"):
        export_transformers(plain, tmp_path / "llama", out)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "sync_tree", full)
    with pytest.raises(SurgeryError, match=r"No space left on device.*nothing was left behind"):
        export_transformers(delta, tmp_path / "llama", out)
    assert sorted(tmp_path.iterdir()) == before


def test_commands(tmp_path: Path) -> None:
    model = save("llama", tmp_path / "llama")
    file, out = tmp_path / "d.safetensors", tmp_path / "out"
    edited_delta(model, tmp_path / "llama", lora=True).save(file)

    def run(*arguments: object) -> tuple[int, str, str]:
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        return result.exit_code, result.stdout, result.stderr

    code, text, _ = run("inspect", file, "--against", tmp_path / "llama")
    assert code == 0 and "module cross_attention: decay 0.2" in text and "words he/she" in text and ": same" in text
    code, _, error = run("apply", file, tmp_path / "llama", "--out", out)
    assert code == 1 and "surgery export DELTA --transformers DIR --checkpoint CHECKPOINT" in error
    for wrong in ((), ("--transformers", out), ("--transformers", out, "--peft", out)):
        code, _, error = run("export", file, *wrong)
        assert code == 1 and error.startswith("error: export") and not out.exists()
    code, text, error = run("export", file, "--transformers", out, "--checkpoint", tmp_path / "llama")
    assert code == 0 and "AutoModelForCausalLM.from_pretrained" in text and (out / "config.json").is_file(), error
    code, text, _ = run("card", file)
    assert code == 0 and "surgery export d.safetensors --transformers EDITED" in text


def test_eval_measures_the_edited_model(checkpoint: Path, tiny: tuple[Any, Any], tmp_path: Path) -> None:
    model, tokenizer = tiny
    with cross_attention.attached(model, tokenizer, heads=4) as module, torch.no_grad():
        made = {"plain": cross_attention.weights_of(module)}
        module.fusion.weight.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
        made["edited"] = cross_attention.weights_of(module)
    numbers = {}
    for name, weights in made.items():
        file, out = tmp_path / f"{name}.safetensors", tmp_path / f"{name}.json"
        module_delta(weights, checkpoint, base="tiny", recipe="", seed=0).save(file)
        command = [
            "eval",
            checkpoint,
            "--delta",
            file,
            "--suite",
            "genbias",
            "--json",
            out,
            "--device",
            "cpu",
            "--quiet",
        ]
        result = CliRunner().invoke(app, [str(word) for word in command])
        assert result.exit_code == 0, result.stderr
        numbers[name] = json.loads(out.read_text())["genbias"]["afgb"]["all"]["value"]
    result = CliRunner().invoke(
        app, ["eval", str(checkpoint), "--suite", "genbias", "--json", str(tmp_path / "b.json")]
    )
    base = json.loads((tmp_path / "b.json").read_text())["genbias"]["afgb"]["all"]["value"]
    assert numbers["plain"] == base != numbers["edited"]
