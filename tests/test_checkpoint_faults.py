"""Broken, incomplete or unsupported checkpoints: one line that says what is true, and no wrong model."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import families
import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

import surgery
from surgery import SurgeryError
from surgery.checkpoints import checkpoint_dir
from surgery.data.texts import examples
from surgery.files.converted import parsed_once, public_name


@pytest.fixture
def folder(tmp_path):
    families.build("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "m")
    inner = Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "m")
    return tmp_path / "m"


def configure(folder, **new):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | new))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def pointer(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def to_bin(folder):
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


NORM, BIAS = "model.norm.weight", "model.layers.1.self_attn.q_proj.bias"
FAULTS = {
    "truncated": (cut, r"model\.safetensors: .*lies at .*outside the file"),
    "git-lfs pointer": (pointer, r"git-lfs pointer, not the file itself; fetch it with: git lfs pull"),
    "another shape": (lambda f: rewrite(f, lambda t: t.update({NORM: torch.ones(31)})), r"norm.*shape \[31\].*\[32\]"),
    "no head": (lambda f: rewrite(f, lambda t: t.pop("lm_head.weight")), r"lack 'lm_head.weight' \(1 of .*at random"),
    "no block": (lambda f: configure(f, num_hidden_layers=4), r"lack 'model.layers.3.*at random"),
    "more than the model": (
        lambda f: rewrite(f, lambda t: t.update({BIAS: torch.ones(32)})),
        r"hold .*q_proj.bias.*no use",
    ),
    "unknown type": (lambda f: configure(f, model_type="brandnew"), r"cannot open this checkpoint .*brandnew"),
    "quantised": (
        lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
        "not installed here",
    ),
    "attention": (lambda f: configure(f, _attn_implementation="flash_attention_2"), r"not installed here .*Flash"),
    "config of a list": (lambda f: (f / "config.json").write_text("[1]"), r"config\.json: not a JSON object"),
    "broken config": (lambda f: (f / "config.json").write_text('{"a": '), r"config\.json: not JSON"),
    "part of the weights pickled": (to_bin, r"lack '.*at random"),
    "a shard short": (lambda f: (f / "model.safetensors").rename(f / "x.safetensors"), r"cannot open this checkpoint"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_one_line(folder, fault, capfd):
    harm, text = FAULTS[fault]
    harm(folder)
    with pytest.raises(SurgeryError, match=text) as caught:
        surgery.load(folder, device="cpu")
    assert "\n" not in str(caught.value) and str(folder) in str(caught.value)


def test_what_is_left_over_or_beside_the_model_opens(folder, capfd):
    wanted = surgery.load(folder, device="cpu")[0].state_dict()
    rewrite(folder, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    rewrite(folder, lambda t: t.update({"v_head.summary.weight": torch.ones(1, 32)}))
    model = surgery.load(folder, device="cpu")[0]
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert "left out, not of LlamaForCausalLM: v_head.summary.weight" in capfd.readouterr().err


def test_a_device_that_is_not_here_is_named_before_anything_is_read(tmp_path):
    with pytest.raises(SurgeryError, match="cuda:99"):
        surgery.load(tmp_path / "nowhere", device="cuda:99")


def write_gguf(path, zero=None, layers=2):
    rng, d, ff = np.random.default_rng(0), 64, 96
    tokens = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefgh"]
    w = gguf.GGUFWriter(str(path), "llama")
    w.add_context_length(64)
    w.add_embedding_length(d)
    w.add_block_count(layers)
    w.add_feed_forward_length(ff)
    w.add_head_count(4)
    w.add_head_count_kv(4)
    w.add_rope_dimension_count(16)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("llama")
    w.add_token_list(tokens)
    w.add_token_scores([-float(i) for i in range(len(tokens))])
    w.add_token_types([2, 3, 3] + [1] * (len(tokens) - 3))
    w.add_bos_token_id(1)
    w.add_eos_token_id(2)
    square = {f"attn_{kind}": (d, d) for kind in ("q", "k", "v", "output")}
    shapes = {"token_embd.weight": (len(tokens), d), "output_norm.weight": (d,), "output.weight": (len(tokens), d)}
    for i in range(layers):
        block = square | {
            "ffn_gate": (ff, d),
            "ffn_up": (ff, d),
            "ffn_down": (d, ff),
            "attn_norm": (d,),
            "ffn_norm": (d,),
        }
        shapes |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    for name, shape in shapes.items():
        array = rng.standard_normal(shape).astype(np.float32)
        w.add_tensor(name, 0 * array if name == zero else array)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def test_a_gguf_file_is_known_by_every_byte(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    norms = []
    for name, zero in (("base", None), ("edited", "blk.1.attn_output.weight")):
        (tmp_path / name).mkdir()
        write_gguf(tmp_path / name / "model.gguf", zero)
        model = surgery.load(tmp_path / name / "model.gguf", device="cpu")[0]
        norms.append(float(model.model.layers[1].self_attn.o_proj.weight.detach().norm()))
    sizes = {(tmp_path / name / "model.gguf").stat().st_size for name in ("base", "edited")}
    assert len(sizes) == 1 and norms[0] > 1 and norms[1] == 0
    before = checkpoint_dir(tmp_path / "base" / "model.gguf")
    monkeypatch.setattr("surgery.files.converted.version", lambda package: "another")
    monkeypatch.setattr("surgery.checkpoints._convert_gguf", lambda path, out: None)
    assert checkpoint_dir(tmp_path / "base" / "model.gguf") != before


def test_a_gguf_file_is_parsed_once_and_converted_to_the_bytes_of_the_library_alone(tmp_path, monkeypatch):
    opened, plain = [], gguf.GGUFReader.__init__

    def counted(self, path, mode="r"):
        opened.append(path)
        plain(self, path, mode)

    monkeypatch.setattr(gguf.GGUFReader, "__init__", counted)
    write_gguf(tmp_path / "m.gguf")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    found = []
    for cache in ("once", "alone"):
        opened.clear()
        monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / cache))
        found.append({path.name: path.read_bytes() for path in checkpoint_dir(tmp_path / "m.gguf").iterdir()})
        assert (len(opened) == 1) == (cache == "once")
        assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before
        monkeypatch.setattr("surgery.checkpoints.parsed_once", nullcontext)
    assert found[0] == found[1] and "model.safetensors" in found[0]
    with pytest.raises(OSError), parsed_once():
        gguf.GGUFReader(tmp_path / "none.gguf")
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_other_gguf_files_are_named(tmp_path, monkeypatch):
    monkeypatch.setenv("SURGERY_CACHE", str(tmp_path / "cache"))
    head = b"GGUF" + (3).to_bytes(4, "little") + (2).to_bytes(8, "little") + (5).to_bytes(8, "little")
    (tmp_path / "cut.gguf").write_bytes(head + b"\x14")
    with pytest.raises(SurgeryError, match=r"cut\.gguf: .*truncated"):
        checkpoint_dir(tmp_path / "cut.gguf")
    (tmp_path / "big-00001-of-00003.gguf").write_bytes(head)
    with pytest.raises(SurgeryError, match=r"part 1 of 3 of a split GGUF file; join the parts first"):
        checkpoint_dir(tmp_path / "big-00001-of-00003.gguf")


def test_what_was_converted_is_found_without_torch(tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        from surgery.files.converted import converted
        from surgery.cli.app import local
        target = converted(Path(sys.argv[1]))
        target.mkdir(parents=True)
        assert local(sys.argv[1]) == target
        assert not {"torch", "transformers"} & set(sys.modules)
    """
    write_gguf(tmp_path / "m.gguf")
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "m.gguf")],
        env={"SURGERY_CACHE": str(tmp_path), "PYTHONPATH": str(Path(surgery.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_base_is_called_what_the_world_calls_it(tmp_path):
    assert public_name("demo") == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert public_name("owner/model") == "owner/model"
    (tmp_path / "mine").mkdir()
    assert public_name(str(tmp_path / "mine")) == str(tmp_path / "mine")
    (tmp_path / "mine" / "config.json").write_text('{"_name_or_path": "owner/model"}')
    assert public_name(tmp_path / "mine") == "owner/model"


def test_a_whole_document_in_one_cell(tmp_path):
    text = "word " * 40_000
    (tmp_path / "t.csv").write_text(f'text\n"{text}"\n')
    assert examples(tmp_path / "t.csv")[0].answer == text
