"""Perplexity of sentences of Wikipedia, beside the sentences of our own: the third kind of text."""

from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from surgery.data import neutral
from surgery.data.rows import find_file, sample
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import perplexity
from surgery.metrics.metric import Metric
from surgery.progress import Advance

FILE = "factual/wikitext_sentences_1000.jsonl"


def texts(folder: str | Path) -> list[str]:
    """The sentences. Raises ``SurgeryError`` where the file is not there."""
    return neutral.sentences(find_file(folder, FILE))


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    step: Advance | None = None,
) -> dict[str, Metric]:
    """``{"perplexity": Metric}`` of ``limit`` sentences drawn with ``seed`` (0: all), cut to what the model takes."""
    every = texts(folder)
    chosen = sample(every, limit, seed)
    room = context_limit(model)
    ids = tuple(row[:room] for row in encode(tokenizer, chosen))
    sums, counts, _ = token_losses(model, tuple(row for row in ids if len(row) > 1), step=step)
    return {"perplexity": perplexity.score(sums, counts, data=f"WikiText sentences, {len(chosen)} of {len(every)}")}
