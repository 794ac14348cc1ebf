"""Generating by the caller's settings alone, whatever the checkpoint's own generation_config.json says."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

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
