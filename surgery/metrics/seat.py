"""SEAT (May et al. 2019): WEAT's effect sizes on the hidden states of sentences, by gender, race and religion."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.data.seat import SEAT, load
from surgery.metrics.association import Pool, lookup, score, states, texts_of
from surgery.progress import Advance


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    limit: int = 0,
    seed: int = 0,
    step: Advance | None = None,
    pool: Pool = "mean",
    site: str | None = None,
) -> dict[str, Any]:
    """``{"gender" | "race" | "religion": {test: {"effect_size", "p"}, "mean_abs": Metric}}`` for bias-bench's tests.

    A sentence is the mean of its tokens' last hidden states, as in bias-bench; ``pool="last"`` takes the last token's,
    ``site`` another layer's (``association.states``). ``limit`` sentences of each set, drawn with ``seed``.
    """
    tests = {kind: [load(folder, name).sampled(limit, seed) for name in names] for kind, names in SEAT.items()}
    texts = texts_of([test for group in tests.values() for test in group])
    vector = lookup(texts, states(model, tokenizer, texts, pool=pool, site=site, step=step))
    scorer = f"{'mean of all tokens' if pool == 'mean' else 'last token'} at {site or 'the last hidden states'}"
    return {kind: score(group, vector, scorer=scorer, seed=seed) for kind, group in tests.items()}
