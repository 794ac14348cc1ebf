"""Which tokens of a text belong to content words, so that gradients can leave out what is only style."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hooks.errors import HookError
from hooks.tokens import added

_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)*")
# Articles, pronouns but those of gender, prepositions, conjunctions, auxiliaries and adverbs of degree: what English
# texts of any content hold. He, she and their forms count as content, since they are what a bias is about.
FUNCTION_WORDS = frozenset(
    [
        "a", "an", "the", "this", "that", "these", "those", "some", "any", "each", "every", "no", "none", "both",
        "either", "neither", "all", "such", "same", "other", "another", "i", "me", "my", "mine", "we", "us", "our",
        "ours", "you", "your", "yours", "it", "its", "they", "them", "their", "theirs", "itself", "themselves",
        "who", "whom", "whose", "which", "what", "of", "in", "on", "at", "by", "for", "with", "from", "to", "into",
        "onto", "over", "under", "about", "after", "before", "between", "through", "during", "against", "among",
        "within", "without", "upon", "across", "along", "around", "behind", "beyond", "near", "off", "out", "up",
        "down", "toward", "towards", "and", "or", "but", "nor", "so", "yet", "if", "then", "than", "because",
        "since", "while", "although", "though", "unless", "until", "whether", "as", "is", "are", "was", "were",
        "be", "been", "being", "am", "has", "have", "had", "having", "do", "does", "did", "doing", "will", "would",
        "shall", "should", "can", "could", "may", "might", "must", "not", "also", "only", "just", "very", "too",
        "more", "most", "less", "least", "much", "many", "few", "here", "there", "where", "when", "why", "how",
        "again", "further", "once", "ever", "never", "always", "often", "however", "therefore", "thus", "still",
        "already", "even", "rather", "quite", "don't", "doesn't", "didn't", "isn't", "aren't", "wasn't", "weren't",
        "it's",
    ]
)  # fmt: skip


@dataclass(frozen=True)
class Masked:
    """Token ids, and the places of those whose loss counts."""

    ids: tuple[int, ...]
    counted: tuple[int, ...]


def content_tokens(tokenizer: Any, texts: Sequence[str]) -> list[Masked]:
    """The texts as tokens of which only those of content words count: every English word but the function words.

        texts = hooks.content_tokens(tokenizer, sentences)
        hooks.influence(model, tokenizer, texts, probe)

    A text without a content word keeps no token, and is refused where it is used. Raises HookError for a tokenizer
    that does not say where in a text its tokens stand.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise HookError(
            f"{type(tokenizer).__name__} does not say where in a text its tokens stand; expected a fast tokenizer; "
            "give objects with ids and counted"
        )
    before, _ = added(tokenizer)
    found = []
    for text in texts:
        coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        words = [word for word in _WORD.finditer(text) if word[0].lower() not in FUNCTION_WORDS]
        inside = {at for word in words for at in range(*word.span())}
        front = () if tuple(coded["input_ids"][: len(before)]) == before else before
        counted = [n for n, (a, b) in enumerate(coded["offset_mapping"]) if inside.intersection(range(a, b))]
        found.append(Masked((*front, *coded["input_ids"]), tuple(len(front) + n for n in counted)))
    return found
