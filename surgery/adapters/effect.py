"""What an adapter keeps of an edit, measured through peft itself: next-token distributions instead of matrix norms."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from surgery.adapters.importing import base_of
from surgery.checkpoints import load
from surgery.data import genbias
from surgery.data.prompts import load_prompt_set
from surgery.delta.format import Delta
from surgery.delta.live import touched
from surgery.delta.naming import skeleton
from surgery.errors import SurgeryError
from surgery.files.checkpoint_files import open_checkpoint
from surgery.forward.batching import Ids
from surgery.forward.tokens import encode, word_ids

DRAWS = 2000  # of the bootstrap


@dataclass(frozen=True)
class Effect:
    """kept: 1 - KL(edit || adapter) / KL(edit || base), ideal 1, with its 95 % bootstrap interval over professions;
    KL in nats of the next token after `prompts` prompts of genbias' development part.

    gap_kept: the adapter's part of the edit's reduction of the mean relative gap between he and she after the same
    prompts, with its interval; None where the tokenizer splits the words, or the edit's reduction may be 0.
    """

    kept: float
    low: float
    high: float
    edit: float
    lost: float
    prompts: int
    gap_kept: tuple[float, float, float] | None
    gaps: tuple[float, float, float] | None
    """The mean relative gap of the base, of the edit and of the adapter."""


def effect(delta: Delta, adapter: Path | str, checkpoint: Path | str, *, prompts: int = 96) -> Effect | None:
    """The edit on the checkpoint beside the adapter on it, in fp32 on the CPU; each prompt on its own.

    None for a model that predicts no next token: a classifier, an encoder, one that answers a text with another.
    """
    from peft import PeftModel

    if not predicts_next(checkpoint):
        return None
    model, tokenizer = load(checkpoint, device="cpu")
    rows = genbias.records("profession", "dev")[:prompts]
    ids = encode(tokenizer, [row.text for row in rows])
    before = _next(model, ids)
    with delta.applied(model):
        edited = _next(model, ids)
    with warnings.catch_warnings():  # of transformers, about a name that peft still asks for
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        adapted = _next(PeftModel.from_pretrained(model, str(adapter)).eval(), ids)
    size, lost = _divergence(edited, before), _divergence(edited, adapted)
    names = sorted({row.profession for row in rows})
    drawn = np.random.default_rng(0).integers(len(names), size=(DRAWS, len(names)))

    def sums(values: Float[np.ndarray, " prompts"]) -> Float[np.ndarray, " 1+draws"]:
        """The sum over all professions, and over each draw of them."""
        each = np.array([values[[row.profession == name for row in rows]].sum() for name in names])
        return np.concatenate([[each.sum()], each[drawn].sum(axis=1)])

    kept = 1 - sums(lost) / sums(size)
    low, high = np.quantile(kept[1:], [0.025, 0.975])
    gap_kept = gaps = None
    try:
        words = word_ids(tokenizer, load_prompt_set("genbias").words.words)
    except SurgeryError:  # a tokenizer that splits the words
        words = []
    if words:
        three = [_gaps(log, words) for log in (before, edited, adapted)]
        gaps = (float(three[0].mean()), float(three[1].mean()), float(three[2].mean()))
        whole, part = sums(three[0] - three[1]), sums(three[0] - three[2])
        if np.quantile(whole[1:], 0.025) > 0:
            ends = np.quantile(part[1:] / whole[1:], [0.025, 0.975])
            gap_kept = (float(part[0] / whole[0]), float(ends[0]), float(ends[1]))
    edit, missing = float(size.mean()), float(lost.mean())
    return Effect(float(kept[0]), float(low), float(high), edit, missing, len(rows), gap_kept, gaps)


def refuse_unread(delta: Delta, adapter: Path, checkpoint: Path | str, lost: float) -> None:
    """Raises ``SurgeryError`` where peft makes other weights of adapter and checkpoint than the delta does.

    lost: the part of the delta's norm that the adapter leaves out by itself.
    """
    from peft import PeftModel

    model: Any = base_of(Path(checkpoint))
    before = {name: tensor.clone() for name, tensor in touched(delta, model).read().items()}
    with delta.applied(model):
        wanted = {name: tensor - before[name] for name, tensor in touched(delta, model).read().items()}
    step = "make the edit without that part (--set block_part=attention), or ship the delta itself"
    try:
        with warnings.catch_warnings():  # of peft, about what it leaves alone
            warnings.simplefilter("ignore")
            merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    except Exception as error:  # peft raises all kinds about modules that it has no rule for
        text = " ".join(str(error).split())[:240] or type(error).__name__
        raise SurgeryError(f"{checkpoint}: peft takes no such adapter of this model ({text}); {step}") from error
    made = touched(delta, merged).read()
    far = {name: float((made[name] - before[name] - wanted[name]).norm()) for name in wanted}
    whole = math.hypot(*(float(values.norm()) for values in wanted.values()))
    if math.hypot(*far.values()) > (lost + 1e-3) * whole:
        raise SurgeryError(
            f"{checkpoint}: peft does not make the edit of the adapter: {math.hypot(*far.values()) / whole:.0%} of its "
            f"norm is off, most in {max(far, key=lambda name: far[name])!r}, where the factors leave out {lost:.0%}; "
            f"{step}"
        )


def predicts_next(checkpoint: Path | str) -> bool:
    """Whether the checkpoint's model goes on with a text, by its config."""
    model = skeleton(open_checkpoint(checkpoint))
    return bool(model.can_generate()) and not model.config.is_encoder_decoder


def _next(model: nn.Module, ids: Ids) -> list[Tensor]:
    """Log-probabilities of the next token after each prompt; without a cache, which some families cannot fill."""
    with torch.no_grad():
        found = [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1] for row in ids]
    return [torch.log_softmax(logits.float(), -1) for logits in found]


def _divergence(left: Sequence[Tensor], right: Sequence[Tensor]) -> np.ndarray:
    """KL(left || right) of each prompt, nats, fp32 [prompts]."""
    return np.array([float((a.exp() * (a - b)).sum()) for a, b in zip(left, right, strict=True)])


def _gaps(logs: Sequence[Tensor], words: Sequence[int]) -> Float[np.ndarray, " prompts"]:
    """(largest - smallest) / sum of the words' probabilities after each prompt (``surgery.metrics.genbias``)."""
    found = torch.stack([log[list(words)].double().exp() for log in logs]).numpy()
    return (found.max(axis=1) - found.min(axis=1)) / np.maximum(found.sum(axis=1), 1e-300)
