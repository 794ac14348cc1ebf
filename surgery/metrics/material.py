"""The texts of the shipped suites, encoded for one tokenizer, and what each of them asks of a model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from surgery.catalogue import SUITES
from surgery.data import facts_of_gender, genbias, genhint, locality, neutral
from surgery.data.locality import Row
from surgery.data.prompts import PromptSet
from surgery.data.rows import sample
from surgery.errors import SurgeryError
from surgery.forward.tokens import Ids, continuation_ids, encode, word_ids

WORD_SUITES = ("genbias", "genhint", "locality")  # what they ask for is the compared words
PRONOUN_SUITES = ("locality", "facts_of_gender")  # what they ask for is he, she and others, whatever words are compared


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
    whole = words_as == "continuations"
    return Material(
        ids={name: encode(tokenizer, lines, limit=limit) for name, lines in chosen.items() if lines},
        words=() if whole else tuple(word_ids(tokenizer, prompts.words.words)),
        continuations=continuation_ids(tokenizer, prompts.words.words) if whole else (),
        prompts=rows,
        hints=hints,
        names=_names(prompts.name, split, part, seed, judged, texts, whole),
        compared=tuple(prompts.words.words),
        settled=settled,
        pronouns=pronouns,
        skipped={suite: reason for suite in PRONOUN_SUITES if reason and suite in suites},
    )


def _names(
    prompts: str, split: str, part: str, seed: int, judged: str, texts: str | Path | None, whole: bool
) -> dict[str, str]:
    """What each suite's texts are called in a metric's ``data``; another split than the published one is other data."""
    drawn = "" if seed == genbias.SEED else f", split seed {seed}"
    names = {
        "genbias": f"{prompts} {part} (split by {split}{drawn})",
        "genhint": f"{prompts} hints {part} (professions of the {part} part{drawn})",
        "locality": f"prompts on which nothing should change, {judged} part",
        "facts_of_gender": f"gender by definition, title or introduction, {judged} part",
        "perplexity": str(texts) if texts else "neutral sentences shipped with the package",
        "perplexity_pronouns": "sentences full of pronouns shipped with the package",
    }
    return names | ({name: f"{names[name]}, words as continuations" for name in WORD_SUITES} if whole else {})


def fewer(given: Material, rows: Mapping[str, int], seed: int = 0) -> Material:
    """At most so many prompts of each suite named in ``rows``, drawn by the seed, templates or sets in their shares.

    0 takes all. Of perplexity the sentences with pronouns are drawn alike. The names say how many of how many.
    """
    of: dict[str, Sequence[Any]] = {"genbias": given.prompts, "genhint": given.hints, **given.settled}
    strata = {name: [getattr(row, "template", "") or row.kind for row in known] for name, known in of.items()}

    def drawn(name: str) -> list[int]:
        known, limit = strata.get(name), rows.get(name.removesuffix("_pronouns"), 0)
        return sample(range(len(given.ids[name])), limit, seed, lambda at: known[at] if known else "")

    places = {name: drawn(name) for name in given.ids}
    chosen = {name: [of[name][at] for at in kept] for name, kept in places.items() if name in of}
    some = {
        name: f"{given.names[name]}, {len(kept)} of {len(given.ids[name])} with seed {seed}"
        for name, kept in places.items()
        if len(kept) < len(given.ids[name])
    }
    return replace(
        given,
        names=given.names | some,
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
