"""What a model says, for a reader: the likeliest next words of a few texts, and how it goes on with them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.forward.evaluation import evaluating
from surgery.forward.generation import plain_generation

TOP = 10


@torch.no_grad()
def shown(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    words: Sequence[str] = (),
    *,
    length: int = 16,
) -> list[dict[str, Any]]:
    """For each text ``{"text", "next": [[token, P], ...], "words": {word: P}, "goes_on"}``, as plain JSON values.

    ``next`` are the ``TOP`` likeliest tokens, ``words`` those of the named words that are one token, ``goes_on`` at
    most ``length`` tokens, each the likeliest after what stands before it. Nothing of a model that cannot generate.
    """
    if not model.can_generate():
        return []
    single = {word: tokenizer(f" {word}", add_special_tokens=False)["input_ids"] for word in words}
    found = []
    ask: Any = model
    with evaluating(model), plain_generation(model):
        for text in texts:
            given = {name: tensor.to(model.device) for name, tensor in tokenizer(text, return_tensors="pt").items()}
            given = {name: tensor for name, tensor in given.items() if name in ("input_ids", "attention_mask")}
            chances = ask(**given).logits[0, -1].float().softmax(-1)
            top = chances.topk(min(TOP, len(chances)))
            written = ask.generate(**given, max_new_tokens=length, do_sample=False)[0, given["input_ids"].shape[1] :]
            found.append({
                "text": text,
                "next": [[tokenizer.decode([t]), float(p)] for p, t in zip(top.values, top.indices, strict=True)],
                "words": {word: float(chances[ids[0]]) for word, ids in single.items() if len(ids) == 1},
                "goes_on": tokenizer.decode(written, skip_special_tokens=True),
            })  # fmt: skip
    return found
