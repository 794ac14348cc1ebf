"""Rank the blocks by the natural gain of an objective of the project, and what ``block = "auto"`` takes."""

from collections.abc import Callable, Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.gain_rankings import Gain
from hooks.natural_gain import GainConfig, Objective, gain
from hooks.ranking import Ranking
from surgery.catalogue import check_objective
from surgery.data import neutral
from surgery.data.genbias import Prompt
from surgery.data.prompts import PromptSet
from surgery.edits.block import word_loss
from surgery.edits.equalize import Prepared, losses_of, prepare, words_term
from surgery.forward.batching import pad
from surgery.forward.residual_cache import shortcut
from surgery.forward.tokens import encode, word_ids
from surgery.progress import Advance

GAIN_LIMIT = 128
"""How many prompts by default when nothing else is ranked."""
RETAIN = 64
"""How many texts stand for what must not change."""

KNOWN = {
    "gain_attention": "named places 3 of 30, 1 of 30, 7 of 18, 1 of 18; Spearman +.71, +.89, +.64, +.57",
    "gain_natural": "named places 14 of 30, 10 of 30, 4 of 18, 5 of 18; Spearman +.84, +.96, +.64, +.70",
    "bmi raw": "named places 28 of 30, 25 of 30, 18 of 18, 18 of 18; Spearman +.09, +.13, -.46, -.49",
    "bmi final_norm": "named places 14 of 30, 10 of 30, 15 of 18, 11 of 18; Spearman +.10, +.14, -.55, -.53",
}
"""What rankings predicted of equalise and hold at lr 1e-4: SmolLM2, its child, Gemma 3 270M, its child."""


def words_objective(
    model: PreTrainedModel, ids: Sequence[Sequence[int]], words: Sequence[int], name: str = "equalize"
) -> Objective:
    """The losses of the prompts ``ids``: equalise (the words' mass shared out equally), or LFTF's log form.

    Raises ``SurgeryError`` for another name.
    """
    if name == "equalize":
        return terms_objective(prepare(model, [words_term(ids, words)]))
    check_objective(name)

    def losses(module: nn.Module, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        with shortcut(model, call=module) as run:
            return word_loss(run(pad(ids, rows, model.device)), words)

    return losses


def terms_objective(given: Prepared) -> Objective:
    """The losses of the examples of the first term, such as words or pairs, as ``equalize`` would minimise them."""

    def losses(module: nn.Module, rows: Sequence[int]) -> Float[Tensor, " rows"]:
        return losses_of(module, module, given, [(0, row) for row in rows])  # type: ignore[arg-type]

    return losses


def rank_by_gain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    *,
    retain: Sequence[str] | None = None,
    data: str = "prompts",
    seed: int = 0,
    step: Callable[[int], None] | None = None,
) -> Gain:
    """``hooks.gain`` against ``retain`` (default: the first ``RETAIN`` shipped neutral sentences)."""
    texts = list(neutral.sentences()[:RETAIN] if retain is None else retain)
    groups = min(GainConfig.groups, count)
    done = 0

    def advance(now: int, _: int | None) -> None:
        nonlocal done
        if step:
            step(now - done)
        done = now

    ids = encode(tokenizer, texts)
    config = GainConfig(seed=seed, groups=groups)
    return gain(model, objective, count, ids, config=config, data=data, progress=advance)


def of_prompts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rows: Sequence[Prompt],
    *,
    objective: str = "equalize",
    retain: Sequence[str] | None = None,
    seed: int = 0,
    step: Advance | None = None,
) -> Gain:
    """The gain of equalising the set's words (or of LFTF's log form) after the prompts ``rows``."""
    ids = encode(tokenizer, [row.text for row in rows])
    losses = words_objective(model, ids, word_ids(tokenizer, prompts.words.words), objective)
    data = f"{prompts.name} train"
    return rank_by_gain(model, tokenizer, losses, len(ids), retain=retain, data=data, seed=seed, step=step)


def auto_ranking(found: Gain) -> Ranking:
    """The block ranking whose first block ``block = "auto"`` takes: the natural gain of attention.

    Where a block has no attention, the whole blocks' natural gain; the ranking's method says which.
    """
    attended = {place.block for place in found.places if place.part == "attention"}
    if attended != {place.block for place in found.places}:
        return found.ranking("natural")
    return replace(found.ranking("natural", "attention"), unit="block", method="gain_attention")


def auto_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    *,
    seed: int = 0,
    step: Advance | None = None,
) -> tuple[int, Ranking]:
    """The block that ``block = "auto"`` stands for, and its ranking, on at most ``GAIN_LIMIT`` of ``count`` examples.

    Raises ``HookError`` where the model has no gradient to rank by, such as with quantised weights.
    """
    ranking = auto_ranking(rank_by_gain(model, tokenizer, objective, min(count, GAIN_LIMIT), seed=seed, step=step))
    return ranking.top()[0], ranking
