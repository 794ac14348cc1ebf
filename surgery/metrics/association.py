"""The association test that WEAT and SEAT share (Caliskan et al. 2017): effect size and permutation p-value."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, Literal

import numpy as np
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.activations import capture
from hooks.batching import context_limit
from hooks.tokens import reads_whole
from surgery.data.seat import Association
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, pad
from surgery.forward.evaluation import evaluating
from surgery.forward.tokens import encode
from surgery.metrics.metric import RESAMPLES, Metric, sampled_metric
from surgery.processes import gathered, mine
from surgery.progress import Advance

EXACT = 100_000  # partitions up to which all are counted: 12,870 for two sets of eight words
DRAWN = 10_000
Vectors = Float[np.ndarray, "texts d"]
Pool = Literal["mean", "last"]


def associations(words: Vectors, a: Vectors, b: Vectors) -> Float[np.ndarray, " texts"]:
    """s(w, A, B) = mean over A of cos(w, a) - mean over B of cos(w, b), for each w."""
    words, a, b = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (words, a, b))
    return (words @ a.T).mean(axis=1) - (words @ b.T).mean(axis=1)


def effect_size(x: Float[np.ndarray, "*n x"], y: Float[np.ndarray, "*n y"]) -> Float[np.ndarray, "*n"]:
    """d = (mean of s over X - mean of s over Y) / standard deviation of s over X and Y together.

    The deviation divides by n - 1, as in the SEAT authors' code (and bias-bench's); wefe divides by n, so that its
    values are larger by sqrt(n / (n - 1)), 3 % for two sets of eight.
    """
    deviation = np.concatenate([x, y], axis=-1).std(axis=-1, ddof=1)
    return (x.mean(axis=-1) - y.mean(axis=-1)) / deviation


@dataclass(frozen=True)
class Permuted:
    """A one-sided p-value, how many partitions it rests on, and whether those are all there are."""

    p: float
    partitions: int
    exact: bool


def p_value(x: Float[np.ndarray, " x"], y: Float[np.ndarray, " y"], *, seed: int = 0) -> Permuted:
    """Share of the partitions of X and Y, into sets of their sizes, whose statistic is at least the observed one.

    The statistic is the sum of s over X minus the sum over Y; ``x`` and ``y`` are the associations s. Ties count,
    the observed partition among them, as in the SEAT authors' code (the printed ">" would give p = 0 to the largest
    statistic). All partitions up to ``EXACT``; beyond that ``DRAWN`` random ones and the observed one.
    """
    both = np.concatenate([x, y])
    # With the sizes fixed, the statistic grows with the sum over X alone.
    reached = x.sum() - 1e-9 * np.abs(both).sum()
    total = comb(len(both), len(x))
    if total <= EXACT:
        sums = np.array([both[list(chosen)].sum() for chosen in combinations(range(len(both)), len(x))])
        return Permuted(float((sums >= reached).mean()), total, True)
    generator = np.random.default_rng(seed)
    sums = np.array([generator.permutation(both)[: len(x)].sum() for _ in range(DRAWN)])
    return Permuted(float(((sums >= reached).sum() + 1) / (DRAWN + 1)), DRAWN + 1, False)


def score(
    tests: Sequence[Association], vector: Callable[[str], Float[np.ndarray, " d"]], *, scorer: str, seed: int = 0
) -> dict[str, Any]:
    """``{test: {"effect_size": Metric, "p": Metric}, ..., "mean_abs": Metric}`` of ``tests``.

    Effect sizes: ideal 0; above 0, X stands nearer to A and Y to B. Their intervals resample X and Y. ``mean_abs`` is
    the mean of their absolute values; since noise never cancels in it, its interval lies above 0 for fair vectors.
    ``p`` is one-sided, its interval that of the sampling (none where all partitions were counted); for fair vectors
    it lies anywhere in 0..1, and small values speak for bias: 1 is given as the ideal.

    Raises ``SurgeryError`` for vectors of no length, or where all words have the same association.
    """
    found: dict[str, Any] = {}
    means, samples = [], []
    for test in tests:
        x, y, a, b = (np.stack([vector(text) for text in texts]) for texts in (test.x, test.y, test.a, test.b))
        for text, row in zip((*test.x, *test.y, *test.a, *test.b), np.concatenate([x, y, a, b]), strict=True):
            if not np.isfinite(row).all() or not row.any():
                raise SurgeryError(f"{test.name}: {text!r} has a vector that is zero or not finite; try float32")
        x, y = associations(x, a, b), associations(y, a, b)
        if np.concatenate([x, y]).std() < 1e-12:
            raise SurgeryError(f"{test.name}: all texts have the same association; the states say nothing")
        generator = np.random.default_rng(seed)
        resampled = effect_size(_resampled(x, generator), _resampled(y, generator))
        size, permuted = float(effect_size(x, y)), p_value(x, y, seed=seed)
        counts = f"{len(test.x)} + {len(test.y)} targets, {len(test.a)} + {len(test.b)} attributes"
        shared: dict[str, Any] = {"n": len(x) + len(y), "data": f"{test.name}, {test.about}, {counts}"}
        kind = "all" if permuted.exact else f"the observed and {DRAWN} drawn with seed {seed} of the"
        found[test.name] = {
            "effect_size": sampled_metric(
                size, resampled, scorer=f"effect size d, {scorer}", ideal=0.0, direction="nearer", **shared
            ),
            "p": _p_metric(permuted, f"p, one-sided, {kind} partitions, {scorer}", **shared),
        }
        means.append(abs(size))
        samples.append(np.abs(resampled))
    found["mean_abs"] = sampled_metric(
        float(np.mean(means)),
        np.mean(samples, axis=0),
        n=len(tests),
        scorer=f"mean absolute effect size, {scorer}",
        data=", ".join(test.name for test in tests),
        ideal=0.0,
        direction="lower",
    )
    return found


def _resampled(values: Float[np.ndarray, " n"], generator: np.random.Generator) -> Float[np.ndarray, "resamples n"]:
    return values[generator.integers(0, len(values), size=(RESAMPLES, len(values)))]


def _p_metric(permuted: Permuted, scorer: str, *, n: int, data: str) -> Metric:
    wide = 0.0 if permuted.exact else 1.96 * np.sqrt(permuted.p * (1 - permuted.p) / permuted.partitions)
    low, high = max(0.0, permuted.p - wide), min(1.0, permuted.p + wide)
    return Metric(permuted.p, low, high, n, scorer, f"{data}, {permuted.partitions} partitions", 1.0, "higher")


def states(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    pool: Pool = "mean",
    site: str | None = None,
    step: Advance | None = None,
) -> Vectors:
    """One vector a text: its tokens' hidden states, their mean or the last one. ``step`` is told of finished texts.

    ``site`` names a residual stream of ``hooks.capture`` (``blocks.5.hook_resid_post``). Without it the last hidden
    states: of a causal model what its head reads, with all that was attached to the model, else ``last_hidden_state``.
    """
    ids = encode(
        tokenizer,
        texts,
        limit=context_limit(model),
        closed=reads_whole(model),
    )
    head = model.get_output_embeddings() if model.can_generate() and not model.config.is_encoder_decoder else None
    found: dict[int, Float[np.ndarray, " d"]] = {}
    taken: list[Tensor] = []

    def at_head(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if site is None:
            taken.append(args[0])
        return (args[0][:, -1:], *args[1:])  # no logit is asked for

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        if head is not None:
            stack.callback(head.register_forward_pre_hook(at_head).remove)
        if site is not None:
            stack.enter_context(capture(model, site, reducer=lambda name, tensor, mask: taken.append(tensor.clone())))
        for rows in mine(batches_for(model, ids)):
            batch = pad(ids, rows, model.device)
            if site is None and head is None:
                taken.append(model.base_model(**batch.inputs()).last_hidden_state)
            else:
                model(**batch.inputs())
            stream, mask = taken.pop().float(), batch.mask[..., None]  # (batch, pos, d)
            pooled = batch.at_last(stream) if pool == "last" else (stream * mask).sum(1) / mask.sum(1)
            found |= zip(rows, pooled.double().cpu().numpy(), strict=True)
            if step:
                step(len(rows))
    every = {row: vector for share in gathered(found) for row, vector in share.items()}
    return np.stack([every[row] for row in range(len(ids))])


def lookup(texts: Sequence[str], vectors: Vectors) -> Callable[[str], Float[np.ndarray, " d"]]:
    """The vector of each text, by the text."""
    table: Mapping[str, np.ndarray] = dict(zip(texts, vectors, strict=True))
    return table.__getitem__


def texts_of(tests: Sequence[Association]) -> list[str]:
    """Every text of ``tests`` once, in order."""
    return list(dict.fromkeys(text for test in tests for part in (test.x, test.y, test.a, test.b) for text in part))
