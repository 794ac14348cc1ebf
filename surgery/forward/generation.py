"""Generating by the caller's settings alone, whatever the checkpoint's own generation_config.json says."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from surgery.errors import SurgeryError
from surgery.forward.evaluation import evaluating
from surgery.progress import Advance

SHORTEST = 8  # tokens: a shorter text of the model's own is left out
AT_ONCE = 128

_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


@contextmanager
def plain_generation(model: Any) -> Iterator[None]:
    """Inside, ``model.generate`` knows of its own settings only which tokens begin, end and pad a text.

    transformers fills every setting that a caller leaves open with the checkpoint's: temperature and penalties, tokens
    that are suppressed or forced, stop strings, time limits, the form of the result. All are as before afterwards.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig(**{name: getattr(before, name, None) for name in _ENDS})
    try:
        yield
    finally:
        model.generation_config = before


class Draw(LogitsProcessor):
    """Makes greedy search draw by given random numbers: all scores but that of the drawn token become -inf."""

    def __init__(self, uniforms: Float[Tensor, "batch length"], temperature: float = 1.0, top_p: float = 1.0) -> None:
        self.uniforms, self.temperature, self.top_p, self.at = uniforms, temperature, top_p, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        chosen = draw(scores, self.uniforms[:, self.at], self.temperature, self.top_p)
        self.at += 1
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


def draw(
    logits: Float[Tensor, "batch vocab"], uniforms: Float[Tensor, " batch"], temperature: float, top_p: float
) -> Int[Tensor, " batch"]:
    """The token at the place ``uniforms`` (0..1) of the cumulated distribution: a draw, when these are uniform.

    ``top_p`` keeps the fewest tokens whose probabilities reach it, as in nucleus sampling.
    """
    probabilities = (logits.double() / temperature).softmax(-1)
    if top_p < 1:
        ordered, places = probabilities.sort(dim=-1, descending=True)
        outside = ordered.cumsum(-1) - ordered >= top_p
        probabilities = probabilities.scatter(1, places, ordered.masked_fill(outside, 0.0))
    cumulated = probabilities.cumsum(-1)
    chosen = torch.searchsorted(cumulated, uniforms[:, None] * cumulated[:, -1:], right=True)[:, 0]
    return chosen.clamp(max=logits.shape[1] - 1)


def own_texts(
    model: PreTrainedModel,
    count: int,
    *,
    begin: int,
    ends: Sequence[int],
    longest: int = 40,
    seed: int = 0,
    step: Advance | None = None,
) -> list[tuple[int, ...]]:
    """Token ids of ``count`` texts that ``model`` writes itself after the token ``begin``, which is not among them.

    Drawn from the whole distribution at temperature 1, each up to the first of ``ends`` or ``longest`` tokens. Over
    such texts the KL(model || edited) of all positions together is, on average, that of the two models as
    distributions of texts. The random numbers come from ``seed`` and depend on no device. ``step`` is told of texts.

    Raises ``SurgeryError`` where hardly any text comes to ``SHORTEST`` tokens.
    """
    found: list[tuple[int, ...]] = []
    config = GenerationConfig(
        max_new_tokens=longest, do_sample=False, num_beams=1, eos_token_id=list(ends) or None, pad_token_id=begin
    )
    generate: Any = model.generate
    generator, left = np.random.default_rng(seed), 4 + 4 * count // AT_ONCE
    while len(found) < count:
        if not left:
            raise SurgeryError(
                f"{type(model).__name__}: hardly a text that it writes itself has {SHORTEST} tokens or more: got "
                f"{len(found)}, expected {count}; hold texts of your own instead"
            )
        left -= 1
        uniforms = torch.from_numpy(generator.random((AT_ONCE, longest))).to(model.device)
        ids = torch.full((AT_ONCE, 1), begin, device=model.device)
        with evaluating(model), plain_generation(model):
            out = generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                generation_config=config,
                logits_processor=LogitsProcessorList([Draw(uniforms)]),
            )
        texts = [
            row[: next((at for at, token in enumerate(row) if token in ends), len(row))] for row in out[:, 1:].tolist()
        ]
        kept = [tuple(text) for text in texts if len(text) >= SHORTEST][: count - len(found)]
        found += kept
        step(len(kept)) if step else None
    return found
