"""Scales of a delta's tensors fitted to a relative of its base, where what the relative prefers itself is left.

A delta takes away what its base preferred. A fine-tuned child prefers something else besides, and one scale of the
whole cannot give it: it needs a shift. The tensors of the delta shift by different amounts, which is measured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from surgery.data import facts_of_gender, genbias, genhint, locality
from surgery.data.prompts import POSSESSIVES, PromptSet
from surgery.delta import Delta, compose
from surgery.forward.next_token import next_words
from surgery.forward.tokens import Ids, encode, word_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from surgery.progress import Advance

STEP = 0.25  # by how much a tensor's scale is moved to see what it does
HELD = 2.0  # weight of the words' shares and of their mass where they are held, beside 1 of the gap
RIDGES = (5e-5, 1.5e-4, 5e-4, 1.5e-3, 5e-3, 1.5e-2, 0.05)
FOLDS = 5
EACH = 100  # held prompts of a kind, drawn by the seed
MATTERS = 0.05  # shares are held where the words have so much mass


@dataclass(frozen=True)
class Fit:
    """The scales by tensor, and the mean squared distance from equal shares: with the delta, and as foretold."""

    scales: Mapping[str, float]
    ridge: float
    given: float
    foretold: float


@dataclass(frozen=True)
class Texts:
    """Development prompts to equalise, each of a group, followed by those that are held."""

    ids: Ids
    groups: Int[np.ndarray, "equalised"]


def texts_of(tokenizer: "PreTrainedTokenizerBase", prompts: PromptSet, seed: int) -> Texts:
    """The set's development prompts, and ``EACH`` of its hints, of facts of gender and of locality (training parts)."""
    rows = genbias.records("profession", "dev", genbias.SEED, prompts)
    kinds: list[Sequence[Any]] = (
        [genhint.records("train", genbias.SEED, both=True, prompts=prompts)] if prompts.words.hints else []
    )
    if set(prompts.words.words) <= set(POSSESSIVES):
        kinds += [facts_of_gender.records("train"), locality.records("train")]
    draw = np.random.default_rng(seed)
    held = [of[place].text for of in kinds for place in draw.permutation(len(of))[:EACH]]
    groups = np.unique([row.profession for row in rows], return_inverse=True)[1]
    return Texts(encode(tokenizer, [row.text for row in rows] + held), groups)


def fitted(
    delta: Delta,
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: PromptSet,
    *,
    seed: int = 0,
    step: "Advance | None" = None,
) -> tuple[Delta, Fit]:
    """``delta`` with each tensor at a scale of its own, chosen on ``model``, and what was chosen.

    The scale of each matrix, and of all vectors as one, is moved once, and the answer taken as linear. Least squares:
    the shares of the words on development prompts to be equal; where they are held, shares and mass as ``model`` has
    them untouched; and a ridge towards 1, by cross-validation over professions. ``model`` is as it was afterwards; hold
    it in float32, or rounding hides what a scale does. ``step`` is told of finished passes. Raises ``SurgeryError`` for
    a delta of kind "module" and one that does not fit ``model``.
    """
    whole, texts = compose([delta]), texts_of(tokenizer, prompts, seed)
    words = word_ids(tokenizer, prompts.words.words)

    def look() -> Float[np.ndarray, "prompts words"]:
        found = np.maximum(next_words(model, texts.ids, words).probabilities, 1e-12)
        if step:
            step(1)
        return found

    untouched = look()
    with whole.applied(model, force=True):
        given, moved = look(), []
        for names in (parts := together(whole)):
            with _only(whole, names).applied(model, scale=STEP, force=True):
                moved.append(look())
    scales, ridge = solve(untouched, given, np.stack(moved), texts.groups)
    answer = _shares(
        np.log(given) + np.einsum("npw,n->pw", np.log(np.stack(moved)) - np.log(given), (scales - 1) / STEP)
    )
    count = len(texts.groups)
    chosen = {name: float(scale) for names, scale in zip(parts, scales, strict=True) for name in names}
    fit = Fit(chosen, ridge, _uneven(_shares(np.log(given))[:count]), _uneven(answer[:count]))
    tensors = {name: array * np.float32(chosen[name]) for name, array in whole.tensors.items()}
    return replace(whole, tensors=tensors), fit


def together(delta: Delta) -> list[list[str]]:
    """What has one scale: each matrix, and all vectors (gains of norms, biases) together."""
    vectors = [name for name, shape in delta.shapes.items() if len(shape) < 2]
    return [[name] for name in delta.shapes if name not in vectors] + ([vectors] if vectors else [])


def _only(whole: Delta, names: Sequence[str]) -> Delta:
    entries = {name: whole.metadata["tensors"][name] for name in names}
    return Delta({name: whole.tensors[name] for name in names}, whole.metadata | {"tensors": entries})


def _shares(logs: Float[np.ndarray, "prompts words"]) -> Float[np.ndarray, "prompts words"]:
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def _uneven(shares: Float[np.ndarray, "prompts words"]) -> float:
    return float(((shares - 1 / shares.shape[1]) ** 2).sum(axis=1).mean())


def solve(
    untouched: Float[np.ndarray, "prompts words"],
    given: Float[np.ndarray, "prompts words"],
    moved: Float[np.ndarray, "tensors prompts words"],
    groups: Int[np.ndarray, "equalised"],
) -> tuple[Float[np.ndarray, "tensors"], float]:
    """The scale of each tensor and the ridge, from the words' probabilities untouched, with all, and moved by STEP.

    The first prompts, as many as ``groups``, are equalised; the others are held.
    """
    count = len(groups)
    logs, before, now = np.log(given), _shares(np.log(untouched)), _shares(np.log(given))
    slopes = (np.log(moved) - logs) / STEP  # of the log-probabilities
    mean = np.einsum("npw,pw->np", slopes, now)
    answers = now * (slopes - mean[..., None])  # of the shares
    mass = given.sum(axis=1)
    heavy = (
        np.flatnonzero(mass[count:] > min(MATTERS, float(np.median(mass[count:])) if len(mass) > count else 0.0))
        + count
    )
    held = (answers[:, heavy].reshape(len(moved), -1), (before - now)[heavy].reshape(-1), len(heavy))
    masses = (mean * mass, untouched.sum(axis=1) - mass, len(mass))

    def found(rows: Int[np.ndarray, "some"], ridge: float) -> Float[np.ndarray, "tensors"]:
        equal = (answers[:, rows].reshape(len(moved), -1), (1 / now.shape[1] - now)[rows].reshape(-1), len(rows))
        left, right = np.sqrt(ridge) * np.eye(len(moved)), np.zeros(len(moved))
        for weight, (slope, lack, size) in ((1.0, equal), (HELD, held), (HELD / 2, masses)):
            if size:
                root = np.sqrt(weight / size)
                left, right = np.vstack([left, root * slope.T]), np.concatenate([right, root * lack])
        return np.linalg.lstsq(left, right, rcond=None)[0]

    rows, parts = np.arange(count), groups % FOLDS

    def error(ridge: float) -> float:
        """Of each fold's prompts at the scales that the others choose."""
        total = 0.0
        for part in np.unique(parts):
            by = found(rows[parts != part], ridge)
            there = logs[:count][parts == part] + np.einsum("npw,n->pw", slopes[:, :count][:, parts == part], by)
            total += _uneven(_shares(there)) * float((parts == part).sum())
        return total

    ridge = min(RIDGES, key=error)
    return 1 + found(rows, ridge), ridge
