"""Checkpoints of a Llama shape with random weights in bf16, written shard by shard without a model in memory."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from surgery.files.safetensors_io import header_bytes

Draw = Callable[[str, tuple[int, ...]], Iterable[bytes | memoryview]]


@dataclass(frozen=True)
class Shape:
    """Of a Llama model, embedding and head untied."""

    width: int
    inner: int
    blocks: int
    heads: int
    groups: int
    vocabulary: int

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's name and shape, in the order of the model."""
        narrow = self.width * self.groups // self.heads
        block = {
            "input_layernorm": (self.width,),
            "self_attn.q_proj": (self.width, self.width),
            "self_attn.k_proj": (narrow, self.width),
            "self_attn.v_proj": (narrow, self.width),
            "self_attn.o_proj": (self.width, self.width),
            "post_attention_layernorm": (self.width,),
            "mlp.gate_proj": (self.inner, self.width),
            "mlp.up_proj": (self.inner, self.width),
            "mlp.down_proj": (self.width, self.inner),
        }
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocabulary, self.width)}
        for number in range(self.blocks):
            found |= {f"model.layers.{number}.{name}.weight": shape for name, shape in block.items()}
        return found | {"model.norm.weight": (self.width,), "lm_head.weight": (self.vocabulary, self.width)}

    @property
    def bytes(self) -> int:
        """Of all weights in bf16."""
        return 2 * sum(math.prod(shape) for shape in self.tensors().values())

    def config(self) -> dict[str, object]:
        """``config.json``."""
        return {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.blocks,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }


def write(folder: Path, shape: Shape, draw: Draw, shards: int) -> Path:
    """The checkpoint without a tokenizer; ``draw`` gives each tensor's bytes, in several threads."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(shape.config()))
    tensors, files = shape.tensors(), {}
    order = list(tensors)
    parts: dict[str, list[str]] = {}
    filled = 0
    for name in order:
        number = min(shards - 1, filled * shards // shape.bytes)
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        parts.setdefault(file, []).append(name)
        files[name] = file
        filled += 2 * math.prod(tensors[name])

    def one(file: str) -> None:
        with open(folder / file, "wb") as out:
            head, placed = header_bytes({name: ("BF16", tensors[name]) for name in parts[file]}, {"format": "pt"})
            out.write(head)
            for name in placed:
                for piece in draw(name, tensors[name]):
                    out.write(piece)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(one, parts))
    index = {"metadata": {"total_size": shape.bytes}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def normal(name: str, shape: tuple[int, ...]) -> Iterator[memoryview]:
    """Numbers of standard deviation .02, ones for norms, drawn on the accelerator where there is one."""
    import zlib

    import torch

    own = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = own or torch.device("cpu")
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    rows = max(1, 2**26 // math.prod(shape[1:]))
    for start in range(0, shape[0], rows):
        part = (min(rows, shape[0] - start), *shape[1:])
        if len(shape) == 1:
            numbers = torch.ones(part, dtype=torch.bfloat16)
        else:
            numbers = (torch.randn(part, generator=generator, device=device) * 0.02).to(torch.bfloat16).cpu()
        yield numbers.view(torch.int16).numpy().view("u1").reshape(-1).data
