"""What a model says, for a reader: the likeliest next words of a few texts, and how it goes on with them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.tokens import word_pieces
from surgery.forward.batching import batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.generation import plain_generation
from surgery.forward.residual_cache import shortcut
from surgery.forward.tokens import encode

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
    if not model.can_generate() or not texts:
        return []
    single = {word: word_pieces(tokenizer, word) for word in words}
    rows, found = encode(tokenizer, texts), []
    chances: dict[int, Tensor] = {}
    with evaluating(model), plain_generation(model):
        with shortcut(model) as run:
            for some in batches_for(model, rows):
                chances |= dict(zip(some, run(pad(rows, some, model.device)).float().softmax(-1), strict=True))
        written = _written(model, rows, [int(chances[row].argmax()) for row in range(len(rows))], length)
    for row, (text, tokens) in enumerate(zip(texts, written, strict=True)):
        each = chances[row]
        top = each.topk(min(TOP, len(each)))
        found.append({
            "text": text,
            "next": [[tokenizer.decode([t]), float(p)] for p, t in zip(top.values, top.indices, strict=True)],
            "words": {word: float(each[ids[0]]) for word, ids in single.items() if len(ids) == 1},
            "goes_on": tokenizer.decode(tokens, skip_special_tokens=True),
        })  # fmt: skip
    return found


def _written(model: Any, rows: Sequence[Sequence[int]], first: Sequence[int], length: int) -> list[list[int]]:
    """Up to ``length`` tokens after each row: written together, padded on the left, which takes one pass a token.

    Rows that do not begin with ``first``, the likeliest token of each row, show a model that must not be padded so;
    then each is written alone.
    """
    width = max(map(len, rows), default=0)
    ids = torch.tensor([[0] * (width - len(row)) + [*row] for row in rows], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=model.device)
    written = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=length, do_sample=False)[:, width:]
    if len(rows) > 1 and written[:, 0].tolist() != list(first):
        return [_written(model, [row], [token], length)[0] for row, token in zip(rows, first, strict=True)]
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    return [row[: next((at for at, one in enumerate(row) if one in ends), len(row))] for row in written.tolist()]
