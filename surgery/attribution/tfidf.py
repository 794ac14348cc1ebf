"""TF-IDF similarity of texts to a probe: the cheap control of every gradient attribution, in constant memory.

Words are runs of letters and digits in lower case. The weight of a word is its count in the text times
``1 + log((1 + texts) / (1 + texts with the word))``, and the vector of a text has length 1 (the smoothed form of
scikit-learn's ``TfidfVectorizer``). The score is the mean cosine with the texts of the probe, as for the gradients.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from jaxtyping import Float

BUCKETS = 2**20  # words share a bucket only by chance: 50,000 words collide in 5 % of the cases with any other
_WORD = re.compile(r"\w+")


def similarity(texts: Callable[[], Iterable[str]] | Sequence[str], probe: Sequence[str]) -> Float[np.ndarray, " texts"]:
    """The mean cosine of each text with the ``probe`` texts, between 0 and 1.

    ``texts`` is a list, or a function that opens them anew: they are read twice, one at a time. The frequencies are
    those of the texts and the probe together, so that the probe's words are weighed too.
    """
    opened = (lambda: texts) if isinstance(texts, Sequence) else texts
    score = scorer(opened(), probe)
    return np.array([score(text) for text in opened()])


def scorer(texts: Iterable[str], probe: Sequence[str]) -> Callable[[str], float]:
    """The ``similarity`` of any one text to ``probe``, with the word frequencies of ``texts``, which are read once."""
    found = np.zeros(BUCKETS)
    total = len(probe)
    for text in probe:
        found[list(_counts(text))] += 1
    for text in texts:
        found[list(_counts(text))] += 1
        total += 1
    weights = 1 + np.log((1 + total) / (1 + found))
    mean = np.zeros(BUCKETS)
    for text in probe:
        for bucket, weight in _unit(text, weights):
            mean[bucket] += weight / len(probe)
    return lambda text: math.fsum(mean[bucket] * weight for bucket, weight in _unit(text, weights))


def _counts(text: str) -> Counter[int]:
    # Python's own hash of a string differs from process to process.
    return Counter(zlib.crc32(word.encode()) % BUCKETS for word in _WORD.findall(text.lower()))


def _unit(text: str, weights: Float[np.ndarray, " buckets"]) -> Iterator[tuple[int, float]]:
    entries = [(bucket, count * float(weights[bucket])) for bucket, count in _counts(text).items()]
    length = math.sqrt(math.fsum(weight * weight for _, weight in entries)) or 1.0
    return ((bucket, weight / length) for bucket, weight in entries)
