"""Time `surgery apply` and `undo` of a GGUF file against copying it, and compare what undo gives back.

    python -m benchmarks gguf_file [--blocks 32] [--repeat 3] [--work FOLDER]

The file has the shape of a 7B llama in Q4_0 (3.8 GB with 32 blocks) and random codes; the delta changes every matrix of
one block. Each round copies and syncs the file (`cp`, `sync FILE`), applies with and without an undo record, and
undoes; every way ends durable on disk. Printed are medians, and of each round the ratio to its own copy.
"""

import argparse
import filecmp
import json
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks._shapes import Shape
from benchmarks.apply import COMMAND, run
from surgery.apply.gguf import RECORD
from surgery.delta import make

LLAMA = Shape(4096, 11008, 32, 32, 32, 32000)
PLACES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
}  # fmt: skip
STEP = 0.002  # of every block of codes


def place(name: str) -> str:
    """What llama.cpp's converter calls a tensor."""
    if not name.startswith("model.layers."):
        return f"{PLACES[name.removesuffix('.weight')]}.weight"
    _, _, number, part = name.removesuffix(".weight").split(".", 3)
    return f"blk.{number}.{PLACES[part]}.weight"


def write(shape: Shape, folder: Path) -> tuple[Path, Path]:
    """(the file, the delta of its last block but one)."""
    import gguf
    from safetensors.numpy import save_file

    generator, kept = np.random.default_rng(0), {}
    path, kind = folder / "model.gguf", gguf.GGMLQuantizationType.Q4_0
    writer = gguf.GGUFWriter(path, "llama")
    keys = {"block_count": shape.blocks, "embedding_length": shape.width, "feed_forward_length": shape.inner,
            "attention.head_count": shape.heads, "attention.head_count_kv": shape.groups,
            "attention.key_length": shape.width // shape.heads}  # fmt: skip
    for key, value in keys.items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_array("tokenizer.ggml.tokens", [f"t{number}" for number in range(shape.vocabulary)])

    def codes(rows: int, columns: int) -> np.ndarray:
        raw = generator.integers(0, 256, (rows, columns // 32, 18), dtype=np.uint8)
        raw[..., :2] = np.array([STEP], np.float16).view(np.uint8)
        return raw.reshape(rows, -1)

    for name, size in shape.tensors().items():
        if len(size) == 1:
            writer.add_tensor(place(name), np.ones(size, np.float32))
            continue
        stored = codes(*size)
        writer.add_tensor(place(name), stored, raw_dtype=kind)
        if name.startswith(f"model.layers.{shape.blocks - 2}."):
            kept[name] = gguf.dequantize(stored, kind).astype(np.float16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = folder / "base"
    base.mkdir()
    save_file(kept, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps(shape.config()))
    moved = {
        name: 0.1 * STEP * generator.standard_normal(array.shape, dtype=np.float32) for name, array in kept.items()
    }
    make(moved, base, base="random", recipe="", seed=0).save(folder / "delta.safetensors")
    return path, folder / "delta.safetensors"


def rounds(path: Path, delta: Path, repeat: int) -> Iterator[dict[str, float]]:
    """Seconds of each way; the first round warms the page cache."""
    folder, surgery = path.parent, [sys.executable, "-c", COMMAND]
    copy, out, back = (folder / name for name in ("copy.gguf", "edited.gguf", "back.gguf"))
    for _ in range(repeat + 1):
        found = {"cp; sync": run(["sh", "-c", f"cp '{path}' '{copy}' && sync '{copy}'"])[0]}
        copy.unlink()
        command = [*surgery, "apply", str(delta), str(path), "--out", str(out), "--quiet"]
        found["surgery apply --undo none"] = run([*command, "--undo", "none"])[0]
        out.unlink()
        found["surgery apply"] = run(command)[0]
        found["surgery undo"] = run([*surgery, "undo", str(out), "--out", str(back), "--quiet"])[0]
        if not filecmp.cmp(path, back, shallow=False):
            sys.exit("undo did not give the file back byte for byte")
        for file in (out, back, folder / (out.name + RECORD)):
            file.unlink()
        yield found


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the file, time the rounds, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="*", help="not used: the file is made")
    parser.add_argument("--blocks", type=int, default=LLAMA.blocks)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--work", type=Path, default=None, help="a folder on the disk to measure")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.work) as work:
        path, delta = write(replace(LLAMA, blocks=options.blocks), Path(work))
        _, *found = rounds(path, delta, options.repeat)
        sizes = f"{path.stat().st_size / 1e9:.2f} GB, delta {delta.stat().st_size / 1e6:.0f} MB"
        print(f"\n{sizes}, medians of {options.repeat}\n{'way':28} {'seconds':>8} {'x cp':>6}  (range)")
        for way in found[0]:
            ratios = [one[way] / one["cp; sync"] for one in found]
            middle = statistics.median(one[way] for one in found)
            print(f"{way:28} {middle:8.2f} {statistics.median(ratios):6.2f}  {min(ratios):.2f}-{max(ratios):.2f}")


if __name__ == "__main__":
    main()
