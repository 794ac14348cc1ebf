"""What a text looks like in tokens: what its tokenizer puts around it, and which of that a model is to see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hooks import trace_modules as probe
from hooks.batching import remembered, unhooked
from hooks.errors import HookError

_SAMPLES = ("a", "the", "1", "x y")  # some of these gives a token in any vocabulary that knows text


def added(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that the tokenizer puts by itself before, and behind, every text.

    Raises HookError where a text's own tokens cannot be found among them.
    """
    for sample in _SAMPLES:
        own, whole = ids_of(tokenizer, [sample])[0], tuple(tokenizer(sample)["input_ids"])
        if not own:
            continue
        for at in range(len(whole) - len(own) + 1):
            if whole[at : at + len(own)] == own:
                return whole[:at], whole[at + len(own) :]
        break
    raise HookError(
        f"{type(tokenizer).__name__}: what it puts around a text cannot be told from the text's own tokens; "
        "expected them in a row; give token ids instead of texts"
    )


def ids_of(tokenizer: Any, texts: Sequence[str]) -> list[tuple[int, ...]]:
    """The tokens of each text alone, with nothing around them."""
    return [tuple(row) for row in tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []


def text_tokens(tokenizer: Any, texts: Sequence[str], *, closed: bool = False) -> list[tuple[int, ...]]:
    """Each text as a model sees it: behind what the tokenizer puts before a text, and open at its end.

    What a text itself begins with, such as the BOS of a chat template, is not put before it a second time. A token
    that the tokenizer would put behind it (EOS) is left out, since the next word is read after the text's own last
    token; ``closed`` keeps it, for models that read a text as a whole (`reads_whole`).

        text_tokens(tokenizer, ["The nurse said that"])[0]  # (BOS, The, nurse, said, that)
    """
    before, behind = added(tokenizer)
    found = []
    for own in ids_of(tokenizer, texts):
        start = () if own[: len(before)] == before else before
        end = behind if closed and own[len(own) - len(behind) :] != behind else ()
        found.append((*start, *own, *end))
    return found


def word_pieces(tokenizer: Any, word: str) -> tuple[int, ...]:
    """The tokens of a word as it follows other text, whatever the tokenizer makes of spaces.

    Read off a text that goes on with the word, since some tokenizers begin every text with a space of their own, so
    that " he" alone is a space too many (Llama 2). Where the border is inside a token, " he" alone is taken.
    """
    alone, both, spaced = ids_of(tokenizer, ["a", f"a {word}", f" {word}"])
    return both[len(alone) :] if alone and both[: len(alone)] == alone and len(both) > len(alone) else spaced


def reads_whole(model: nn.Module) -> bool:
    """Whether the model reads a finished text (encoders, classifiers) rather than going on after its last token."""
    core = probe.pretrained(model)
    if core.config.is_encoder_decoder:
        return True
    if core.can_generate():
        return False
    if core.base_model is not core:  # a masked model or a classifier: its texts end as its tokenizer ends them
        return True
    return bool(remembered(core, "whole", lambda: _looks_ahead(core)))


def _looks_ahead(core: Any) -> bool:
    """Whether the last of three tokens changes the state of the first."""
    device = probe.input_device(core)
    if device.type == "meta":
        return False
    ids = torch.tensor([[3, 4, 5], [3, 4, 6]], device=device) % core.get_input_embeddings().weight.shape[0]
    with probe.unchanged(core), unhooked(core):
        first = core(input_ids=ids).last_hidden_state[:, 0]
    return bool((first[0] - first[1]).abs().max() > 1e-3 * first.abs().max())
