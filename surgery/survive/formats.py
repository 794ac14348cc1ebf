"""Weights as a number format gives them back: rounded to its codes and read again, in the model's own dtype.

The matrices inside the blocks are what quantisers change; embedding, head and norms stay. A matrix is taken as the
linear layer multiplies it: rows are outputs, and blocks of codes run along the inputs.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hooks import anatomy
from surgery.errors import SurgeryError
from surgery.files.gguf_codes import quantise

# The 16 codes of NormalFloat4 (Dettmers et al. 2023, appendix E), quantiles of a normal distribution in [-1, 1].
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
NF4_BLOCK = 64
# The rows that llama.cpp's quantiser cannot cut into blocks of 256 get this type there.
_FALLBACK = {"Q4_K": "Q5_0"}
_BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q5_0": 32, "Q4_K": 256}


def bf16(weights: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Each weight to the nearest bfloat16, ties to even."""
    return weights.bfloat16().to(weights.dtype)


def int8(weights: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Each row on 255 even steps between plus and minus its largest weight (LLM.int8, Dettmers et al. 2022)."""
    values = weights.float()
    step = values.abs().amax(dim=-1, keepdim=True) / 127
    codes = torch.where(step == 0, 0, (values / step).round())
    return (codes * step).to(weights.dtype)


def nf4(weights: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """The nearest of 16 codes times the largest size in each block of 64 (QLoRA, Dettmers et al. 2023)."""
    flat = weights.float().reshape(-1)
    short = -flat.numel() % NF4_BLOCK
    blocks = nn.functional.pad(flat, (0, short)).view(-1, NF4_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    codes = torch.tensor(NF4, device=flat.device)
    between = (codes[1:] + codes[:-1]) / 2
    found = codes[torch.bucketize(blocks / largest.clamp(min=1e-30), between)] * largest
    return found.view(-1)[: flat.numel()].view_as(weights).to(weights.dtype)


def _ggml(kind: str) -> Callable[[Tensor], Tensor]:
    def back(weights: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        own = kind if weights.shape[-1] % _BLOCK[kind] == 0 else _FALLBACK.get(kind, "")
        if not own or weights.shape[-1] % _BLOCK[own]:
            return weights  # as llama.cpp: left in 16 bits
        rows = weights.detach().float().cpu().reshape(-1, weights.shape[-1]).numpy()
        found = dequantize(quantise(rows, own), GGMLQuantizationType[own])
        return torch.from_numpy(np.ascontiguousarray(found, np.float32)).view_as(weights).to(weights)

    return back


FORMATS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "bf16": bf16,
    "int8": int8,
    "NF4": nf4,
    "Q8_0": _ggml("Q8_0"),
    "Q4_0": _ggml("Q4_0"),
    "Q4_K": _ggml("Q4_K"),
}


@dataclass(frozen=True)
class Matrix:
    """A parameter that quantisers change; ``transposed``: its rows are inputs (transformers' Conv1D)."""

    name: str
    parameter: nn.Parameter
    transposed: bool

    def write(self, kind: str, weights: Tensor) -> None:
        """Put ``weights`` into the model as the format ``kind`` gives them back."""
        found = FORMATS[kind](weights.T.contiguous()).T if self.transposed else FORMATS[kind](weights)
        with torch.no_grad():
            self.parameter.copy_(found)


def matrices(model: PreTrainedModel) -> dict[str, Matrix]:
    """The matrices inside the model's blocks by parameter name; fused experts count as one matrix each.

    Raises ``SurgeryError`` where there is none.
    """
    blocks = tuple(block.name + "." for block in anatomy.find(model).blocks)
    turned = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)}
    found = {
        name: Matrix(name, parameter, name in turned)
        for name, parameter in model.named_parameters()
        if name.startswith(blocks) and parameter.ndim >= 2 and parameter.is_floating_point()
    }
    if not found:
        raise SurgeryError(f"{type(model).__name__}: has no matrix of floating-point numbers in its blocks")
    return found
