"""Tiny checkpoints for the tests of deltas: written by torch and safetensors, not by the code under test."""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from surgery import delta as deltas

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 40,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "max_position_embeddings": 64,
}
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
DOWN, NORM, Q = (
    "model.layers.1.mlp.down_proj.weight",
    "model.layers.1.input_layernorm.weight",
    "model.layers.1.self_attn.q_proj.weight",
)


def weights(seed: int = 0, dtype: torch.dtype = torch.bfloat16, **changes: object) -> dict[str, torch.Tensor]:
    """Random weights of the shapes that CONFIG (with changes) describes."""
    c = {**CONFIG, **changes}
    hidden, inner, heads, kv, dim = (
        int(c[key])
        for key in (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    )
    shapes = {EMBED: (int(c["vocab_size"]), hidden), "model.norm.weight": (hidden,)}
    if not c["tie_word_embeddings"]:
        shapes[HEAD] = (int(c["vocab_size"]), hidden)
    for layer in range(int(c["num_hidden_layers"])):
        p = f"model.layers.{layer}."
        shapes |= {
            p + "input_layernorm.weight": (hidden,),
            p + "post_attention_layernorm.weight": (hidden,),
            p + "self_attn.q_proj.weight": (heads * dim, hidden),
            p + "self_attn.k_proj.weight": (kv * dim, hidden),
            p + "self_attn.v_proj.weight": (kv * dim, hidden),
            p + "self_attn.o_proj.weight": (hidden, heads * dim),
            p + "mlp.gate_proj.weight": (inner, hidden),
            p + "mlp.up_proj.weight": (inner, hidden),
            p + "mlp.down_proj.weight": (hidden, inner),
        }
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator).to(dtype) + (1 if len(shape) == 1 else 0)
        for name, shape in sorted(shapes.items())
    }


def save(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    shards: int = 1,
    tokens: list[str] | None = None,
    **changes: object,
) -> Path:
    """Write a checkpoint directory; `changes` go into config.json (None removes a key)."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in {**CONFIG, **changes}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "README.md").write_text("not weights\n")
    if tokens is not None:
        vocabulary = {token: number for number, token in enumerate(tokens)}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    names = list(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
        return folder
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[number::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def edit(
    checkpoint: Path,
    names: tuple[str, ...] = (DOWN, NORM),
    size: float = 0.01,
    seed: int = 1,
    rounding: str = "nearest",
) -> deltas.Delta:
    """A delta of random differences of `size` times a normal number, measured as `rounding` says."""
    shapes = {name: tensor.shape for name, tensor in load(checkpoint).items()}
    generator = np.random.default_rng(seed)
    differences = {name: size * generator.standard_normal(shapes[name]).astype(np.float32) for name in names}
    return deltas.make(differences, checkpoint, base="tiny", recipe="x = 1\n", seed=seed, rounding=rounding)


def load(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint directory, through the safetensors library."""
    from safetensors.torch import load_file

    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


def hashes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, the empty map when there is none."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
