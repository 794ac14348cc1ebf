"""A tokenizer of single characters, and pieces across a space, for the tiny models of ``families``."""

from __future__ import annotations

from typing import Any

SPECIAL = ("[PAD]", "[BOS]", "[EOS]", "[UNK]")
PIECES = (*SPECIAL, *" abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:?!'_-")


def letters(*, bos: bool = True, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """Each character a token, with [BOS] before every text; ``merges`` are BPE's (``(("t", " "),)``: "t " is one)."""
    from tokenizers import Tokenizer, models, processors
    from transformers import PreTrainedTokenizerFast

    pieces = [*PIECES, *("".join(pair) for pair in merges)]
    inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate(pieces)}, list(merges), unk_token="[UNK]"))
    if bos:
        inner.post_processor = processors.TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    names = dict(zip(("pad_token", "bos_token", "eos_token", "unk_token"), SPECIAL, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
