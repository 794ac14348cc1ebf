"""A tokenizer of a few words, built in memory: whole words, and "nonbinary" and "engineer" as two pieces."""

from __future__ import annotations

from typing import Any

_TEXT = (
    "[PAD] [UNK] [BOS] [MASK] the a nurse plumber doctor teacher said that he she it him table because was "
    "tired left early non ##binary engin ##eer . The He yesterday old car"
)
WORDS = _TEXT.split()


def tiny_tokenizer(padding_side: str = "right") -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    model = models.WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    inner = Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[BOS]", "mask_token": "[MASK]"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, padding_side=padding_side, **special)
