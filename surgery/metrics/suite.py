"""The measurements that stand before and after every edit: of the shipped texts, and on a user's data folder."""

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from surgery.catalogue import check_suites
from surgery.forward.next_token import next_words, token_losses
from surgery.forward.residual_cache import ResidualCache
from surgery.forward.token_logprobs import continuation_probabilities
from surgery.metrics import facts_of_gender as facts_metric
from surgery.metrics import genbias as genbias_metric
from surgery.metrics import genhint as genhint_metric
from surgery.metrics import locality as locality_metric
from surgery.metrics import perplexity as perplexity_metric
from surgery.metrics.locality import Distributions, Reference
from surgery.metrics.material import WORD_SUITES, Material
from surgery.metrics.metric import Metric
from surgery.progress import Progress

Scores = dict[str, Any]
Prefixes = Mapping[str, ResidualCache]
WORDS = "words"  # the pass of all suites but perplexity's


@dataclass(frozen=True)
class Measured:
    """Scores as in ``run.json``, P(word) per prompt, and per kept block the streams of each pass."""

    scores: Scores
    probabilities: Float[np.ndarray, "prompts words"] | None
    prefixes: dict[int, dict[str, ResidualCache]]
    reference: Reference | None = None
    """The next-token distributions after the prompts of locality, to which a later measurement has its KL."""


def measure(
    model: PreTrainedModel,
    given: Material,
    *,
    keep: Sequence[int] = (),
    prefixes: Prefixes | None = None,
    reference: Reference | None = None,
    progress: Progress | None = None,
    label: str = "measure",
) -> Measured:
    """Score every suite of ``given``; from ``prefixes`` (one per pass) where the blocks before are unchanged.

    ``reference`` (``Measured.reference`` of the untouched model) gives locality its KL.
    """
    start = prefixes or {}
    scores: Scores = {suite: {"skipped": [reason]} for suite, reason in given.skipped.items()}
    probabilities: np.ndarray | None = None
    made: Reference | None = None
    kept: dict[int, dict[str, ResidualCache]] = {block: {} for block in keep}
    with (progress or Progress(quiet=True)).work(label, sum(len(ids) for ids in given.ids.values())) as step:
        asked: Any = {"keep": keep, "step": step}
        words = [suite for suite in given.ids if not suite.startswith("perplexity")]
        if words:
            chances, far, found = _next_words(model, given, words, reference, prefix=start.get(WORDS), **asked)
            made, probabilities = far.made() if far else None, chances.get("genbias")
            for block in keep:
                kept[block][WORDS] = found[block]
        for suite, ids in given.ids.items():
            if suite in words:
                scores[suite] = _scored(suite, given, chances[suite], far)
                continue
            sums, counts, found = token_losses(model, ids, prefix=start.get(suite), **asked)
            scores[suite] = perplexity_metric.score(sums, counts, data=given.names[suite])
            for block in keep:
                kept[block][suite] = found[block]
    return Measured(scores, probabilities, kept, made)


def _next_words(
    model: PreTrainedModel, given: Material, suites: Sequence[str], reference: Reference | None, **how: Any
) -> tuple[dict[str, Float[np.ndarray, "prompts words"]], Distributions | None, dict[int, ResidualCache]]:
    """P of what each suite asks for after its prompts, locality's distributions, and the kept streams.

    All prompts go through in one pass, so that the trees they stand in are full.
    """
    ids = [row for suite in suites for row in given.ids[suite]]
    ends = accumulate(len(given.ids[suite]) for suite in suites)
    rows = {suite: range(end - len(given.ids[suite]), end) for suite, end in zip(suites, ends, strict=True)}
    tokens = {suite: given.asked(suite) for suite in suites}
    every = sorted({token for asked in tokens.values() for token in asked})
    mine = rows.get("locality", range(0))
    far = Distributions(len(mine), reference) if mine else None

    def look(batch: Sequence[int], logs: Float[Tensor, "batch vocab"]) -> None:
        places = [place for place, row in enumerate(batch) if row in mine]
        if far and places:
            far([batch[place] - mine.start for place in places], logs[places])

    found = next_words(model, ids, every, seen=look, **how)
    if far:
        far.join()
    chances = {
        suite: found.probabilities[rows[suite]][:, [every.index(token) for token in tokens[suite]]] for suite in suites
    }
    for suite in set(suites) & set(WORD_SUITES) if given.continuations else ():
        whole = continuation_probabilities(model, given.ids[suite], given.continuations)
        chances[suite] = np.hstack([whole, chances[suite]])
    return chances, far, found.prefixes


def _scored(
    suite: str, given: Material, found: Float[np.ndarray, "prompts words"], far: Distributions | None
) -> dict[str, Any]:
    data, words = given.names[suite], given.compared
    if suite == "genbias":
        return genbias_metric.score(found, given.prompts, data=data, words=words)
    if suite == "genhint":
        return genhint_metric.score(found, given.hints, data=data, words=words)
    if suite == "facts_of_gender":
        return facts_metric.score(found, given.settled[suite], words=given.candidates, data=data)
    chances, pronouns = found[:, : len(words)], found[:, len(words) :]
    kl = far.kl if far and far.reference else None
    return locality_metric.score(chances, pronouns, given.settled[suite], words=words, data=data, kl=kl)


@contextmanager
def _only_new_garbage() -> Iterator[None]:
    """Inside, the garbage collector leaves alone what there is already, such as all that the libraries made.

    To go through that stops a process for some tenths of a second, and each of several at another time.
    """
    own = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        yield
    finally:
        if own:
            gc.unfreeze()


@_only_new_garbage()
def evaluate_suites(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    folder: str | Path,
    *,
    limit: int = 0,
    seed: int = 0,
    progress: Progress | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Scores:
    """``{suite: scores}`` of the named suites on the data ``folder``; ``limit`` rows each, or all where it is 0.

    ``options`` are further keyword arguments by suite, such as ``{"stereoset": {"scorer": "bos"}}``. Rows that a
    suite skipped stand as reasons under its ``"skipped"``, and are said.

    Raises ``SurgeryError`` for an unknown suite, before any is measured, and for a folder without its files.
    """
    check_suites(names)
    progress, scores = progress or Progress(quiet=True), {}
    for name in names:
        module = import_module(f"surgery.metrics.{name}")
        with progress.work(f"measure {name}", None) as step:
            scores[name] = module.evaluate(
                model,
                tokenizer,
                Path(folder),
                **{"limit": limit, "seed": seed, "step": step, **(options or {}).get(name, {})},
            )
        skipped = scores[name].get("skipped", [])
        if skipped:
            progress.say(f"{name}: {len(skipped)} rows skipped; {'; '.join(skipped[:3])}{' ...' * (len(skipped) > 3)}")
    return scores


def plain(scores: Any, *, samples: bool = False) -> Any:
    """The same scores with each ``Metric`` as a dictionary, for JSON; with ``samples`` so that they can be paired."""
    if isinstance(scores, Mapping):
        return {key: plain(value, samples=samples) for key, value in scores.items()}
    return scores.to_dict(samples=samples) if isinstance(scores, Metric) else scores
