"""What an edit changed, as one number of a model: the gap between words, or the margin between pairs of sentences."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.batching import context_limit
from surgery.catalogue import check_measure, check_scorer
from surgery.data import genbias, pairs
from surgery.data.prompts import PromptSet, load_prompt_set
from surgery.data.rows import sample
from surgery.data.texts import Example
from surgery.delta.metadata import recipes_of
from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words
from surgery.forward.tokens import encode, word_ids
from surgery.metrics import genbias as genbias_metric
from surgery.metrics.judges import split_seed_of
from surgery.metrics.metric import Metric, mean_metric
from surgery.metrics.sentences import per_token, sentence_tokens

Model = PreTrainedModel
Tokenizer = PreTrainedTokenizerBase
RELEARNT = 50
SHOTS = 4


@dataclass(frozen=True)
class Question:
    """What is asked of a model, the same rows each time.

    ``measure(preamble)`` gives the number with ``preamble`` before every text. ``relative``: an effect is a part of
    what the number was (a gap), not a difference (a margin, which may be near 0 untouched). ``biased()`` are examples
    that teach the bias again, and ``shots()`` sentences that show it, both of the model as it is at the call.
    """

    kind: str
    relative: bool
    measure: Callable[[str], Metric]
    biased: Callable[[], Sequence[Example]]
    shots: Callable[[], Sequence[str]]


def words_question(
    model: Model,
    tokenizer: Tokenizer,
    prompts: PromptSet,
    *,
    part: str = "test",
    limit: int = 0,
    seed: int = genbias.SEED,
) -> Question:
    """The relative gap between the words of ``prompts`` on its ``part``, ``limit`` prompts of it or all.

    Subjects are those that an edit whose ``split_seed`` was ``seed`` has not seen.
    """
    every = genbias.records("profession", part, seed, prompts)
    rows = every[: limit or None]  # they are shuffled
    name = f"{prompts.name} {part} (split by profession{f', split seed {seed}' if seed != genbias.SEED else ''})"
    name += f", {len(rows)} of {len(every)}" if len(rows) < len(every) else ""
    train = genbias.records("profession", "train", seed, prompts)
    words, most = word_ids(tokenizer, prompts.words.words), context_limit(model)

    def measure(preamble: str) -> Metric:
        ids = encode(tokenizer, [preamble + row.text for row in rows], limit=most)
        found = next_words(model, ids, words).probabilities
        return genbias_metric.score(found, rows, data=name, words=prompts.words.words)["relative_gap"]["all"]

    def preferred(count: int) -> list[tuple[str, str]]:
        texts = [row.text for row in train[:count]]
        found = next_words(model, encode(tokenizer, texts, limit=most), words).probabilities
        return [(text, " " + prompts.words.words[n]) for text, n in zip(texts, found.argmax(axis=1), strict=True)]

    def shots() -> list[str]:
        return [f"{text}{word} did." for text, word in preferred(SHOTS)]

    return Question("words", True, measure, lambda: [Example(*row) for row in preferred(RELEARNT)], shots)


def pairs_question(
    model: Model, tokenizer: Tokenizer, data: pairs.Pairs, *, scorer: str = "bias-bench", limit: int = 0
) -> Question:
    """The mean margin of the pairs: log-probability a token of the stereotype minus that of the other.

    Groups are dealt in two by a seed: sentences of a fifth of them are learnt again, the others are measured.

    Raises ``SurgeryError`` for pairs of fewer than two groups.
    """
    check_scorer(scorer)
    _check_groups(data)
    groups = genbias.shuffled(sorted({row.group for row in data.rows}), genbias.SEED)
    kept_back = set(groups[: max(1, len(groups) // 5)])
    every = [row for row in data.rows if row.group not in kept_back]
    rows = sample(every, limit, genbias.SEED, lambda row: row.bias_type)
    learnt = [row.more for row in data.rows if row.group in kept_back][:RELEARNT]
    sides = [text for row in rows for text in (row.more, row.less)]
    name = f"{data.name}, {len(rows)} {f'of {len(every)} ' if len(rows) < len(every) else ''}pairs"

    def measure(preamble: str) -> Metric:
        contexts = [preamble.strip()] * len(sides) if preamble else None
        means = per_token(sentence_tokens(model, tokenizer, sides, scorer=scorer, contexts=contexts))
        return mean_metric(
            means[::2] - means[1::2],
            groups=np.array([row.group for row in rows]),
            scorer=f"mean margin per token (nats), {scorer}",
            data=name,
            ideal=0.0,
            direction="nearer",
        )

    return Question("pairs", False, measure, lambda: [Example("", text) for text in learnt], lambda: learnt[:SHOTS])


def question_of(
    metadata: Mapping[str, Any],
    model: Model,
    tokenizer: Tokenizer,
    *,
    kind: str = "auto",
    sentences: pairs.Pairs | None = None,
    prompts: str = "",
    limit: Mapping[str, int] | None = None,
    scorer: str = "bias-bench",
) -> Question:
    """What the recipe in a delta's ``metadata`` edited; ``kind`` words or pairs says it instead.

    ``limit``: how many rows by kind; all where nothing is said.

    Raises ``SurgeryError`` as ``kind_of`` does.
    """
    limit = limit or {}
    if kind_of(metadata, kind, sentences) == "pairs":
        assert sentences is not None
        return pairs_question(model, tokenizer, sentences, scorer=scorer, limit=limit.get("pairs", 0))
    asked: Any = {"limit": limit.get("words", 0), "seed": split_seed_of(metadata)}
    return words_question(model, tokenizer, load_prompt_set(prompts or prompts_of(metadata)), **asked)


def kind_of(metadata: Mapping[str, Any], kind: str = "auto", sentences: pairs.Pairs | None = None) -> str:
    """Words or pairs: what the recipe in a delta's ``metadata`` edited, or the ``kind`` that is said instead.

    Raises ``SurgeryError`` for another kind, for a delta composed of edits of both where none is said, for pairs
    without any ``sentences`` and for those of fewer than two groups.
    """
    check_measure(kind)
    edited = {"pairs" if is_of_pairs(recipe) else "words" for recipe in recipes_of(metadata)} or {"words"}
    if kind == "auto" and len(edited) > 1:
        raise SurgeryError(
            "this delta is composed of edits of words and of pairs of sentences; name what is to be measured with "
            "--measure words or --measure pairs"
        )
    found = edited.pop() if kind == "auto" else kind
    if found == "pairs" and sentences is None:
        raise SurgeryError(
            "this edit is one of pairs of sentences; name a file of pairs that it did not learn with --pairs FILE "
            "(StereoSet's .json, CrowS-Pairs' .csv, or .jsonl with more and less), or --measure words"
        )
    if found == "pairs" and sentences is not None:
        _check_groups(sentences)
    return found


def prompts_of(metadata: Mapping[str, Any]) -> str:
    """The prompt set whose words a delta edits, by its ``metadata``; the usual one where that says none.

    Raises ``SurgeryError`` for a delta composed of edits on several.
    """
    words = [recipe for recipe in recipes_of(metadata) if not is_of_pairs(recipe)]
    names = list(dict.fromkeys(str(recipe.get("prompt_set", "genbias")) for recipe in words))
    if len(names) > 1:
        raise SurgeryError(f"this delta is composed of edits of {' and '.join(names)}; name one of them with --data")
    return names[0] if names else "genbias"


def _check_groups(data: pairs.Pairs) -> None:
    groups = {row.group for row in data.rows}
    if len(groups) < 2:
        raise SurgeryError(
            f"{data.name}: {len(groups)} groups of pairs; expected at least 2, to measure and to learn again; "
            "give the pairs other groups, or add some"
        )


def is_of_pairs(recipe: Mapping[str, Any]) -> bool:
    """Whether a recipe with these settings edits what is preferred of two sentences, and not words."""
    return recipe.get("recipe") == "bias_unlearn" or bool(recipe.get("pairs"))
