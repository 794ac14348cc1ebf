"""What ``surgery.runs.fitting`` fits: words that come even after prompts, while what is settled stays as it was.

What is held is what the model itself answers before the delta.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from surgery.data import facts_of_gender, genbias, genhint, locality
from surgery.data.prompts import POSSESSIVES, PromptSet
from surgery.forward.batching import Ids
from surgery.forward.next_token import next_words
from surgery.forward.scale_slopes import Part, word_slopes
from surgery.forward.tokens import encode, word_ids
from surgery.progress import Advance, Progress
from surgery.runs.fitting import QUIET, Equation, Slopes, Task, Values

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELD = 1.0  # weight of the words' shares where they are held, beside 1 of the gap; half of it for their mass
EACH = 100  # held prompts of a kind, drawn by the seed
MATTERS = 0.05  # shares are held where the words have so much mass


def equal_words(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: PromptSet,
    *,
    start: int = 0,
    seed: int = 0,
    split_seed: int = genbias.SEED,
    hold: float = HELD,
    progress: Progress = QUIET,
) -> Task:
    """The set's development prompts to come even; ``EACH`` of its hints, of facts of gender, of locality held.

    (Of these the training parts.) ``seed`` draws what is held, ``split_seed`` cuts the set into its parts. ``model``
    is looked at untouched; no tensor lies before block ``start``.
    """
    rows = genbias.records("profession", "dev", split_seed, prompts)
    kinds: list[Sequence[Any]] = (
        [genhint.records("train", split_seed, both=True, prompts=prompts)] if prompts.words.hints else []
    )
    if set(prompts.words.words) <= set(POSSESSIVES):
        kinds += [facts_of_gender.records("train"), locality.records("train")]
    draw = np.random.default_rng(seed)
    held = [of[place].text for of in kinds for place in draw.permutation(len(of))[:EACH]]
    groups = np.unique([row.profession for row in rows], return_inverse=True)[1]
    ids, words = encode(tokenizer, [row.text for row in rows] + held), word_ids(tokenizer, prompts.words.words)
    return words_task(model, ids, words, groups, start=start, hold=hold, progress=progress)


def words_task(
    model: "PreTrainedModel",
    ids: Ids,
    words: Sequence[int],
    groups: Int[np.ndarray, "equalised"],
    *,
    start: int = 0,
    hold: float = HELD,
    progress: Progress = QUIET,
) -> Task:
    """Even shares of ``words`` after the first prompts, as many as ``groups``; what the model says after the others."""
    with progress.work("untouched prompts", len(ids)) as step:
        seen = next_words(model, ids, words, keep=[start] if start else [], step=step)
    prefix = seen.prefixes.get(start)
    untouched = np.log(np.maximum(seen.probabilities, 1e-12))
    shape = (len(ids), len(words))

    def look(parts: Sequence[Part], step: Advance) -> tuple[Values, Slopes]:
        values, slopes = word_slopes(model, ids, words, parts, prefix=prefix, step=step)
        return values.reshape(-1), slopes.reshape(len(slopes), values.size)

    def equations(values: Values, slopes: Slopes) -> list[Equation]:
        slopes = slopes.reshape(len(slopes), *shape)
        return words_equations(untouched, values.reshape(shape), slopes, groups, hold)

    return Task(look, equations, len(ids))


def words_equations(
    untouched: Float[np.ndarray, "prompts words"],
    logs: Float[np.ndarray, "prompts words"],
    slopes: Float[np.ndarray, "parts prompts words"],
    groups: Int[np.ndarray, "equalised"],
    hold: float = HELD,
) -> list[Equation]:
    """Shares of the words that are equal on the first prompts, as many as ``groups``; shares and mass held elsewhere.

    From log-probabilities untouched and now, and the slopes of the latter.
    """
    count, words = len(groups), logs.shape[1]
    before, now = _shares(untouched), _shares(logs)
    mean = np.einsum("npw,pw->np", slopes, now)
    answers = now * (slopes - mean[..., None])  # of the shares
    mass = np.exp(logs).sum(axis=1)

    def flat(weight: float, rows: Any, lack: np.ndarray, groups: np.ndarray | None = None) -> Equation:
        # The mean over prompts is of the sum over words.
        return Equation(weight * words, lack.reshape(-1), answers[:, rows].reshape(len(slopes), lack.size), groups)

    found = [flat(1.0, slice(count), 1 / words - now[:count], np.repeat(groups, words))] if count else []
    if len(mass) > count:
        heavy = np.flatnonzero(mass[count:] >= min(MATTERS, float(np.median(mass[count:])))) + count
        found.append(flat(hold, heavy, (before - now)[heavy]))
    return [*found, Equation(hold / 2, np.exp(untouched).sum(axis=1) - mass, mean * mass)]


def _shares(logs: Float[np.ndarray, "prompts words"]) -> Float[np.ndarray, "prompts words"]:
    raised = np.exp(logs - logs.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
