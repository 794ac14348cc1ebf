"""What an unlearning run measures: StereoSet's development and test rows, further suites, a few rows on the way."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from surgery.data import neutral
from surgery.data.prompts import load_prompt_set
from surgery.edits import self_debias
from surgery.edits.unlearning.dataset import Dataset
from surgery.edits.unlearning.watching import Scores
from surgery.forward.next_token import token_losses
from surgery.forward.tokens import encode
from surgery.metrics import perplexity, suite
from surgery.metrics.material import material
from surgery.metrics.stereoset import evaluate_triples
from surgery.metrics.suite import evaluate_suites, plain
from surgery.progress import Progress

SCORED = ("crows_pairs",)  # suites that take the name of a sentence scorer


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    given: Dataset,
    *,
    scorer: str,
    suites: Sequence[str] = (),
    folder: str | Path = "",
    limit: int = 0,
    seed: int = 0,
    debiased: bool = False,
    progress: Progress,
    when: str,
) -> dict[str, Any]:
    """``{"dev": {"stereoset": ...}, "test": {"stereoset": ..., suite: ...}}`` of the model as it is, for JSON.

    The test's have perplexity on the shipped neutral text, too. ``suites`` are measured on the data ``folder``,
    ``limit`` rows each; all sentences are scored by ``scorer``.
    ``debiased`` asks under Self-Debias. Where rows were skipped, ``"skipped"`` has their reasons, and they are said.
    """
    judge = self_debias.evaluate_triples if debiased else evaluate_triples
    found: dict[str, Any] = {}
    for part, triples in (("dev", given.held_out), ("test", given.test)):
        if not triples.rows:  # the development set of a run that is steered by folds is scored by these
            continue
        with progress.work(f"StereoSet {part} {when}", 3 * len(triples.rows)) as step:
            found[part] = {"stereoset": plain(judge(model, tokenizer, triples, scorer=scorer, step=step), samples=True)}
    for line in skipped_rows(found):
        progress.say(line)
    if not debiased:  # which changes what is said, not what a text's perplexity is of
        asked = material(model, tokenizer, load_prompt_set(), suites=("perplexity",))
        texts = suite.measure(model, asked, progress=progress, label=f"measure {when}").scores
        found["test"] |= plain(texts, samples=True)
    if suites:
        options = {name: {"scorer": scorer} for name in SCORED}
        scores = evaluate_suites(
            model, tokenizer, suites, folder, limit=limit, seed=seed, progress=progress, options=options
        )
        found["test"] |= plain(scores, samples=True)
    return found


def watched_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, given: Dataset, scorer: str, progress: Progress
) -> Scores:
    """SS, LMS and ICAT of the rows that are scored while training, by bias type and overall; SS is said."""
    found = scores_of(evaluate_triples(model, tokenizer, given.watched, scorer=scorer))
    progress.say(", ".join(f"{kind} {value:.1f}" for kind, value in found["ss"].items()) + " (SS while training)")
    lines = neutral.with_pronouns()
    sums, counts, _ = token_losses(model, encode(tokenizer, lines, limit=context_limit(model)))
    return found | {"perplexity": {"overall": perplexity.score(sums, counts, data="shipped sentences").value}}


def scores_of(table: Mapping[str, Any]) -> Scores:
    """What steers a training, of a table of metrics by bias type: SS with the ends of its interval, LMS, ICAT."""
    found = {name: {kind: metric.value for kind, metric in table[name].items()} for name in ("ss", "lms", "icat")}
    ends = {end: {kind: getattr(metric, end) for kind, metric in table["ss"].items()} for end in ("low", "high")}
    return found | ends


def skipped_rows(found: dict[str, Any]) -> list[str]:
    """A line for each set of rows of which some could not be scored; ``found`` is what ``measure`` returns."""
    return [
        f"{name}, {part} rows: {len(reasons)} skipped, not scored: {'; '.join(reasons[:3])}"
        for part, suites in found.items()
        for name, scores in suites.items()
        if (reasons := scores.get("skipped"))
    ]
