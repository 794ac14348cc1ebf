"""What an adapter keeps of an edit, measured through peft itself: next-token distributions instead of matrix norms."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from surgery.checkpoints import load
from surgery.data import genbias
from surgery.delta.format import Delta
from surgery.forward.batching import Ids
from surgery.forward.tokens import encode

DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Effect:
    """kept: 1 - KL(edit || adapter) / KL(edit || base), ideal 1, with its 95 % bootstrap interval over professions;
    KL in nats of the next token after `prompts` prompts of genbias' development part."""

    kept: float
    low: float
    high: float
    edit: float
    lost: float
    prompts: int


def effect(delta: Delta, adapter: Path | str, checkpoint: Path | str, *, prompts: int = 96) -> Effect:
    """The edit on the checkpoint beside the adapter on it, in fp32 on the CPU; each prompt on its own."""
    from peft import PeftModel

    model, tokenizer = load(checkpoint, device="cpu")
    rows = genbias.records("profession", "dev")[:prompts]
    ids = encode(tokenizer, [row.text for row in rows])
    before = _next(model, ids)
    with delta.applied(model):
        edited = _next(model, ids)
    adapted = _next(PeftModel.from_pretrained(model, str(adapter)).eval(), ids)
    size, lost = _divergence(edited, before), _divergence(edited, adapted)
    names = sorted({row.profession for row in rows})
    sums = np.array([
        [values[[row.profession == name for row in rows]].sum() for name in names] for values in (size, lost)
    ])  # fmt: skip
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))
    kept = 1 - sums[1][drawn].sum(axis=1) / sums[0][drawn].sum(axis=1)
    low, high = np.quantile(kept, [0.025, 0.975])
    share = 1 - float(lost.sum() / size.sum())
    return Effect(share, float(low), float(high), float(size.mean()), float(lost.mean()), len(rows))


def _next(model: nn.Module, ids: Ids) -> list[Tensor]:
    with torch.no_grad():
        return [torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0, -1].float(), -1) for row in ids]


def _divergence(left: Sequence[Tensor], right: Sequence[Tensor]) -> np.ndarray:
    """KL(left || right) of each prompt, nats, fp32 [prompts]."""
    return np.array([float((a.exp() * (a - b)).sum()) for a, b in zip(left, right, strict=True)])
