"""Shared fixtures: a tiny random language model that knows the words of the prompts, and its checkpoint on disk."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hooks.plots import new_figure
from surgery.data import facts_of_gender, genbias, genhint, locality, neutral
from surgery.runs import report

# Rows of the vocabulary that the tiny model is drawn with; words that come later get rows of their own behind them, so
# that a new word redraws nothing else.
DRAWN = 1689


@pytest.fixture(scope="session")
def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for every word and mark of the shipped prompts and texts."""
    texts = [row.text for row in genbias.records()] + [row.text for row in genhint.records(both=True)]
    texts += neutral.sentences()
    found = sorted({piece for text in texts for piece in re.findall(r"\w+|[^\w\s]+", text)} | {"he", "she", "they"})
    rows = [row for part in locality.PARTS for data in (locality, facts_of_gender) for row in data.records(part)]
    later = [*(row.text for row in rows), *neutral.with_pronouns(), *locality.PRONOUNS]
    found += sorted({piece for text in later for piece in re.findall(r"\w+|[^\w\s]+", text)} - set(found))
    vocabulary = {"<pad>": 0, "<unk>": 1} | {word: place for place, word in enumerate(found, 2)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")


# The suite runs in two processes; more threads than cores would wait for each other, in child processes too.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

MakeCheckpoint = Callable[..., Path]


@pytest.fixture(scope="session")
def make_checkpoint(word_tokenizer: PreTrainedTokenizerFast) -> MakeCheckpoint:
    """Write a tiny random Llama with the word tokenizer as a checkpoint directory."""

    def make(path: Path, dtype: torch.dtype = torch.bfloat16, **config: Any) -> Path:
        settings = {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "vocab_size": DRAWN,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
        }
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**(settings | config)))
        if "vocab_size" not in config:
            model.resize_token_embeddings(len(word_tokenizer), mean_resizing=False)
        model = model.to(dtype)
        model.save_pretrained(path)
        word_tokenizer.save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="session")
def checkpoint(make_checkpoint: MakeCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def tiny(checkpoint: Path) -> tuple[Any, Any]:
    """The tiny checkpoint opened in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return model, PreTrainedTokenizerFast.from_pretrained(checkpoint)


PAINT = report.bytes_of, report.svg


@contextmanager
def painted() -> Iterator[None]:
    """In here a report's pictures are painted as for a user."""
    quick = report.bytes_of, report.svg
    report.bytes_of, report.svg = PAINT
    try:
        yield
    finally:
        report.bytes_of, report.svg = quick


@pytest.fixture(scope="session", autouse=True)
def quick_pictures() -> None:
    """A run of a tiny model takes as long as painting its pictures twice, so that each is built, and an empty one
    painted in its place; tests of what a reader sees say ``with painted()``."""
    empty = new_figure(1, 1)
    as_png, as_svg = report.bytes_of(empty), report.svg("empty", empty)
    report.bytes_of = lambda figure, kind="png": as_png
    report.svg = lambda name, figure: as_svg
