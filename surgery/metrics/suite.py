"""The measurements that stand before and after every edit: those shipped, and those on a user's data folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from surgery.catalogue import SUITES, check_suites
from surgery.data import facts_of_gender, genbias, genhint, locality, neutral
from surgery.data.locality import Row
from surgery.data.prompts import PromptSet
from surgery.data.rows import sample
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words, token_losses
from surgery.forward.residual_cache import ResidualCache
from surgery.forward.token_logprobs import continuation_probabilities
from surgery.forward.tokens import Ids, continuation_ids, encode, word_ids
from surgery.metrics import facts_of_gender as facts_metric
from surgery.metrics import genbias as genbias_metric
from surgery.metrics import genhint as genhint_metric
from surgery.metrics import locality as locality_metric
from surgery.metrics import perplexity as perplexity_metric
from surgery.metrics.locality import Distributions, Reference
from surgery.metrics.metric import Metric
from surgery.progress import Progress

WORD_SUITES = ("genbias", "genhint", "locality")  # what they ask for is the compared words
PRONOUN_SUITES = ("locality", "facts_of_gender")  # what they ask for is he, she and others, whatever words are compared
Scores = dict[str, Any]
Prefixes = Mapping[str, ResidualCache]


@dataclass(frozen=True)
class Material:
    """The texts of each suite, encoded for one tokenizer. A suite that the prompt set cannot serve is absent."""

    ids: dict[str, tuple[tuple[int, ...], ...]]
    words: tuple[int, ...]
    prompts: list[genbias.Prompt]
    hints: list[genhint.HintPrompt]
    names: dict[str, str]
    compared: tuple[str, ...]
    """The words of ``words``."""
    continuations: Ids
    """The tokens of each of them where they are scored as continuations; ``words`` is then empty."""
    settled: dict[str, list[Row]]
    """The prompts of locality and of facts_of_gender."""
    pronouns: dict[str, int]
    """The tokens of the pronouns that locality and facts_of_gender ask for."""
    skipped: dict[str, str]
    """Why a suite that was asked for is absent."""

    @property
    def candidates(self) -> tuple[str, ...]:
        """The words among which facts_of_gender has a right one: the compared ones, or he and she."""
        return self.compared if {"he", "she"} <= set(self.compared) and self.words else ("he", "she")

    def asked(self, suite: str) -> list[int]:
        """The tokens whose probability ``suite`` needs."""
        extra = {"locality": locality.PRONOUNS, "facts_of_gender": self.candidates}.get(suite)
        if extra is None:
            return list(self.words)
        known = self.pronouns | (dict(zip(self.compared, self.words, strict=True)) if self.words else {})
        return [*(self.words if suite == "locality" else ()), *(known[word] for word in extra)]


@dataclass(frozen=True)
class Measured:
    """Scores as in ``run.json``, P(word) per prompt, and per kept block the stream of each suite's texts."""

    scores: Scores
    probabilities: Float[np.ndarray, "prompts words"] | None
    prefixes: dict[int, dict[str, ResidualCache]]
    reference: Reference | None = None
    """The next-token distributions after the prompts of locality, to which a later measurement has its KL."""


def material(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    *,
    split: str = "profession",
    part: str = "test",
    seed: int = genbias.SEED,
    texts: str | Path | None = None,
    suites: Sequence[str] = SUITES,
    preamble: str = "",
    words_as: str = "tokens",
) -> Material:
    """Encode the ``part`` of GenBiasEval and GenHintEval, and the neutral ``texts`` (default: the shipped 200 and 40).

    ``preamble`` is put before every prompt (the prompt baseline). Where a tokenizer splits the pronouns that locality
    and facts_of_gender ask for, these are left out, with the reason in ``skipped``. ``words_as="continuations"``
    takes compared words of any number of tokens, and scores them by their summed log-probability.

    Raises ``SurgeryError`` for unknown suites, splits, files, and for words that are not one token.
    """
    unknown = [suite for suite in suites if suite not in SUITES]
    if unknown or not suites:
        raise SurgeryError(f"suite: got {unknown[0] if unknown else 'none'}, expected some of {', '.join(SUITES)}")
    limit = context_limit(model)
    rows = genbias.records(split, part, seed, prompts) if "genbias" in suites else []
    hinted = "genhint" in suites and bool(prompts.hint_templates) and bool(prompts.words.hints)
    hints = genhint.records(part, seed, prompts=prompts) if hinted else []
    pronouns, reason = _pronouns(tokenizer, suites)
    judged = "dev" if part == "dev" else "test"
    settled = {"locality": locality.records(judged), "facts_of_gender": facts_of_gender.records(judged)}
    chosen: dict[str, list[str]] = {
        "genbias": [preamble + row.text for row in rows],
        "genhint": [preamble + row.text for row in hints],
        **{name: [row.text for row in rows if pronouns and name in suites] for name, rows in settled.items()},
        "perplexity": list(neutral.sentences(texts)) if "perplexity" in suites else [],
        "perplexity_pronouns": neutral.with_pronouns() if "perplexity" in suites and not texts else [],
    }
    names = {
        "genbias": f"{prompts.name} {part} (split by {split})",
        "genhint": f"{prompts.name} hints {part} (professions of the {part} part)",
        "locality": f"prompts on which nothing should change, {judged} part",
        "facts_of_gender": f"gender by definition, title or introduction, {judged} part",
        "perplexity": str(texts) if texts else "neutral sentences shipped with the package",
        "perplexity_pronouns": "sentences full of pronouns shipped with the package",
    }
    whole = words_as == "continuations"
    if whole:
        names |= {name: f"{names[name]}, words as continuations" for name in WORD_SUITES}
    return Material(
        ids={name: encode(tokenizer, lines, limit=limit) for name, lines in chosen.items() if lines},
        words=() if whole else tuple(word_ids(tokenizer, prompts.words.words)),
        continuations=continuation_ids(tokenizer, prompts.words.words) if whole else (),
        prompts=rows,
        hints=hints,
        names=names,
        compared=tuple(prompts.words.words),
        settled=settled,
        pronouns=pronouns,
        skipped={suite: reason for suite in PRONOUN_SUITES if reason and suite in suites},
    )


def fewer(given: Material, rows: Mapping[str, int], seed: int = 0) -> Material:
    """At most so many prompts of each suite named in ``rows``, drawn by the seed, templates or sets in their shares.

    0 takes all. Of perplexity the sentences with pronouns are drawn alike.
    """
    of: dict[str, Sequence[Any]] = {"genbias": given.prompts, "genhint": given.hints, **given.settled}
    strata = {name: [getattr(row, "template", "") or row.kind for row in known] for name, known in of.items()}

    def drawn(name: str) -> list[int]:
        known, limit = strata.get(name), rows.get(name.removesuffix("_pronouns"), 0)
        return sample(range(len(given.ids[name])), limit, seed, lambda at: known[at] if known else "")

    places = {name: drawn(name) for name in given.ids}
    chosen = {name: [of[name][at] for at in kept] for name, kept in places.items() if name in of}
    return replace(
        given,
        ids={name: tuple(given.ids[name][at] for at in kept) for name, kept in places.items()},
        prompts=chosen.pop("genbias", given.prompts),
        hints=chosen.pop("genhint", given.hints),
        settled=given.settled | chosen,
    )


def _pronouns(tokenizer: PreTrainedTokenizerBase, suites: Sequence[str]) -> tuple[dict[str, int], str]:
    """The pronouns' tokens, or none and why; none and no reason where no suite asks for them."""
    if not set(PRONOUN_SUITES) & set(suites):
        return {}, ""
    try:
        return dict(zip(locality.PRONOUNS, word_ids(tokenizer, locality.PRONOUNS), strict=True)), ""
    except SurgeryError as error:
        return {}, str(error)


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
    """Score every suite of ``given``; from ``prefixes`` (one per suite) where the blocks before are unchanged.

    ``reference`` (``Measured.reference`` of the untouched model) gives locality its KL.
    """
    start = prefixes or {}
    scores: Scores = {suite: {"skipped": [reason]} for suite, reason in given.skipped.items()}
    probabilities: np.ndarray | None = None
    made: Reference | None = None
    kept: dict[int, dict[str, ResidualCache]] = {block: {} for block in keep}
    with (progress or Progress(quiet=True)).work(label, sum(len(ids) for ids in given.ids.values())) as step:
        for suite, ids in given.ids.items():
            if suite.startswith("perplexity"):
                sums, counts, found = token_losses(model, ids, keep=keep, prefix=start.get(suite), step=step)
                scores[suite] = perplexity_metric.score(sums, counts, data=given.names[suite])
            else:
                far = Distributions(len(ids), reference) if suite == "locality" else None
                asked: Any = {"keep": keep, "prefix": start.get(suite), "step": step, "seen": far}
                seen = next_words(model, ids, given.asked(suite), **asked)
                if far:
                    far.join()
                found, chances = seen.prefixes, seen.probabilities
                if given.continuations and suite in WORD_SUITES:
                    chances = np.hstack([continuation_probabilities(model, ids, given.continuations), chances])
                scores[suite] = _scored(suite, given, chances, far)
                if suite == "genbias":
                    probabilities = chances
                made = far.made() if far else made
            for block in keep:
                kept[block][suite] = found[block]
    return Measured(scores, probabilities, kept, made)


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
