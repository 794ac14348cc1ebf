"""Fuzz the reader of delta files with atheris (a command, not a test).

    pip install atheris numpy
    python tests/fuzz_safetensors.py CORPUS_FOLDER -max_total_time=1800 -timeout=10 -rss_limit_mb=1500

The first byte chooses how the rest is used: as a whole file, as the header's JSON in front of 64 bytes of
data, as the delta's own metadata in a sound file, or as a config.json. Anything but a
SurgeryError is a crash.
"""

import json
import os
import struct
import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["surgery", "json"]):
    import surgery.delta as deltas
    import surgery.files.architecture as architecture
    import surgery.files.safetensors_io as io
    from surgery.delta import metadata as delta_metadata
    from surgery.errors import SurgeryError

FD = os.memfd_create("fuzz")
FILE = Path(f"/proc/self/fd/{FD}")


def place(data: bytes) -> Path:
    os.ftruncate(FD, 0)
    os.pwrite(FD, data, 0)
    return FILE


def whole_file(data: bytes) -> None:
    delta = deltas.Delta.load(place(data))
    assert {name: array.shape for name, array in delta.tensors.items()}
    assert deltas.Delta.load(place(b"".join(delta._parts()))).sha256 == delta.sha256


def header(data: bytes) -> None:
    found = io.parse_header(data, 8 + len(data) + 64, "fuzz")
    position = 8 + len(data)
    for name, entry in found.tensors.items():
        assert entry.begin == position <= entry.end <= found.file_bytes and name.isprintable()
        position = entry.end
    assert position == found.file_bytes


def metadata(data: bytes) -> None:
    content = io.parse_json(data, "fuzz")
    shapes = {"a": (2, 2), "b.lora_A": (1, 3), "b.lora_B": (2, 1)}
    kept = {name: shape for name, shape in shapes.items() if not isinstance(content, dict) or name in str(content)}
    delta_metadata.check_metadata(content, kept, "fuzz")
    for name, shape in delta_metadata.base_shapes(content).items():
        assert kept.get(name, shape) == shape
    json.loads(delta_metadata.encode(content))


def config(data: bytes) -> None:
    content = io.parse_json(data, "fuzz")
    if isinstance(content, dict):
        found = architecture.facts(content)
        assert architecture.differences(found, found) == []
        architecture.differences(found, {"rope": {"rope_theta": 1.0}, "heads": 3})


TARGETS = (whole_file, header, metadata, config)


def test_one_input(data: bytes) -> None:
    if not data:
        return
    try:
        TARGETS[data[0] % len(TARGETS)](data[1:])
    except SurgeryError as error:
        text = str(error)
        if "\n" in text or len(text) > 2000:
            raise AssertionError(f"not one short line: {text[:200]!r}") from error


def seeds(folder: Path) -> None:
    """Sound examples to start from."""
    import numpy as np

    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "shape": [2, 2],
        "dtype": "F32",
        "sha256": "0" * 64,
        "norm": 1.0,
        "sketch": delta_metadata.pack_sketch(np.ones(64, np.float32)),
    }
    content = {
        "format": 1, "kind": "dense", "base": "x", "architecture": {}, "tensors": {"a": entry}, "recipe": "",
        "seed": 0, "tool": "t", "parents": [], "measured": {}, "prefix": "", "tokenizer": None,
    }  # fmt: skip
    delta = deltas.Delta({"a": np.ones((2, 2), np.float32)}, content)
    lora = {**content, "kind": "lora", "tensors": {"b": {**entry, "shape": [2, 3]}}}
    rope = {
        "hidden_size": 8,
        "num_attention_heads": 2,
        "rope_parameters": {"full_attention": {"rope_theta": 1e4}},
    }
    plain = json.dumps({"a": {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}}).encode()
    examples = [
        b"\x00" + b"".join(delta._parts()),
        b"\x00" + struct.pack("<Q", len(plain)) + plain + bytes(64),
        b"\x01" + plain,
        b"\x02" + json.dumps(content).encode(),
        b"\x02" + json.dumps(lora).encode(),
        b"\x03" + json.dumps(rope).encode(),
        b"\x03" + json.dumps({"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2}}).encode(),
    ]
    for number, example in enumerate(examples):
        (folder / f"seed{number}").write_bytes(example)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if not argument.startswith("-"):
            seeds(Path(argument))
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
