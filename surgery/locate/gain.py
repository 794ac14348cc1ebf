"""Rank the blocks by the natural gain of an objective of the project, and what ``block = "auto"`` takes."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.gain_rankings import By, Gain
from hooks.natural_gain import GainConfig, Objective, gain
from hooks.rank_correlation import ranks
from hooks.ranking import Ranking
from surgery.data import neutral
from surgery.data.genbias import Prompt
from surgery.data.pairs import Pair
from surgery.data.prompts import PromptSet
from surgery.data.rows import sample
from surgery.errors import SurgeryError
from surgery.forward.precision import matrix_products
from surgery.forward.tokens import encode, word_ids
from surgery.locate.objectives import pairs_objective, words_objective
from surgery.progress import Advance

GAIN_LIMIT = 128
"""How many prompts by default when nothing else is ranked."""
RETAIN = 32
"""How many texts stand for what must not change. By twice as many the demo model's attentions rank alike to +.996, no
less than when the labels of the same texts are drawn anew."""
PER_DRAW = 8
"""Retain texts in one backward pass; labels are drawn for each token, so that the Fisher information is as it was."""

KNOWN = {
    "gain_depth": "Spearman +.67 [.51, .78] (unseen +.60), a best-10 % block named in 10 of 16 cases (6 of 12 unseen)",
    "gain_attention": "Spearman +.40 [.16, .59] (unseen +.30), "
    "a best-10 % block named in 4 of 16 cases (1 of 12 unseen)",
    "gain_natural": "Spearman +.41 [.12, .64] (unseen +.28), a best-10 % block named in 5 of 16 cases (5 of 12 unseen)",
    "bmi raw": "Spearman -.17 [-.38, .05] (unseen -.16), a best-10 % block named in 0 of 12 cases (0 of 8 unseen)",
    "bmi final_norm": "Spearman -.16 [-.39, .06] (unseen -.13), "
    "a best-10 % block named in 2 of 12 cases (2 of 8 unseen)",
}
"""What rankings predicted of equalise and hold at lr 1e-4, by docs/which_block.md: means of 16 cases (he / she,
he / she / they, race and pairs of sentences, on SmolLM2, Gemma 3 270M and a child of each), "unseen" of those that the
rule for ``auto`` was not chosen on. Depth alone, which measures nothing, has +.68 [.50, .82], one in 4 of 16."""


def rank_by_gain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    *,
    retain: Sequence[str] | None = None,
    data: str = "prompts",
    seed: int = 0,
    factored: bool = False,
    step: Callable[[int], None] | None = None,
) -> Gain:
    """``hooks.gain`` against ``retain`` (default: the first ``RETAIN`` shipped neutral sentences).

    Products of float32 matrices may be rounded to bfloat16, where the processor gains by it: ranks do not need more.
    """
    texts = list(neutral.sentences()[:RETAIN] if retain is None else retain)
    groups = max(2, min(GainConfig.groups, count))
    done = 0

    def advance(now: int, _: int | None) -> None:
        nonlocal done
        if step:
            step(now - done)
        done = now

    ids = encode(tokenizer, texts)
    config = GainConfig(seed=seed, groups=groups, per_draw=PER_DRAW, factored=factored)
    with matrix_products("medium"):
        return gain(model, objective, count, ids, config=config, data=data, progress=advance)


def gain_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rows: Sequence[Prompt] | Sequence[Pair],
    *,
    objective: str = "equalize",
    **options: Any,
) -> Gain:
    """The gain of ``objective`` over ``rows``: of the set's words after prompts, or of pairs of sentences.

    ``options`` are those of ``rank_by_gain``. Raises ``SurgeryError`` for an objective of the other kind.
    """
    pairs = [row for row in rows if isinstance(row, Pair)]
    texts = [row.text for row in rows if isinstance(row, Prompt)]
    if pairs:
        losses = pairs_objective(model, tokenizer, pairs, objective)
    else:
        losses = words_objective(model, encode(tokenizer, texts), word_ids(tokenizer, prompts.words.words), objective)
    data = "pairs of sentences" if pairs else f"{prompts.name} train"
    return rank_by_gain(model, tokenizer, losses, len(rows), data=data, **options)


def rankings_of(found: Gain, only: Sequence[int] | None = None) -> list[Ranking]:
    """By block: what ``auto`` takes, and the natural gain of blocks and, where all have them, of attention and MLP.

    ``only``: of these groups of the examples.
    """
    parts = [
        replace(found.ranking("natural", part, only=only), unit="block", method=f"gain_{part}")
        for part in _everywhere(found)
    ]
    return [auto_ranking(found, only), found.ranking("natural", only=only), *parts]


def details(found: Gain, count: int = 5) -> str:
    """Plain text: the first matrices, and how far two halves of the examples agree, by what is ranked."""
    matrices = found.ranking("natural", "matrix").table(count)
    kinds: list[By] = ["block", *_everywhere(found), "matrix"]
    agreement = ", ".join(f"{by} {found.stability('natural', by).value:+.2f}" for by in kinds)
    return f"{matrices}\n\nSpearman's correlation between two halves of the examples: {agreement}"


def auto_ranking(found: Gain, only: Sequence[int] | None = None) -> Ranking:
    """The block ranking whose first block ``block = "auto"`` takes: gain and depth.

    That is a block's place by the natural gain of attention (of the whole block where some block has no attention),
    counted from the least, plus its number. Chosen on four cases and tested on others: docs/which_block.md.
    ``only``: of these groups of the examples.
    """
    gains = found.ranking("natural", "attention" if "attention" in _everywhere(found) else "block", only=only)
    scores = ranks(gains.scores) - 1 + np.arange(len(gains.scores))
    return replace(gains, method="gain_depth", unit="block", scores=scores, low=None, high=None)


def _everywhere(found: Gain) -> list[By]:
    """Those of attention and MLP that every block has."""
    blocks = {place.block for place in found.places}
    kinds: tuple[By, By] = ("attention", "mlp")
    return [part for part in kinds if {place.block for place in found.places if place.part == part} == blocks]


def auto_block(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    *,
    seed: int = 0,
    step: Advance | None = None,
) -> dict[str, Any]:
    """What ``block = "auto"`` stands for: the ``block``, its ``ranking``, and in a sentence (``said``) why.

    At most ``GAIN_LIMIT`` of the ``count`` examples are measured, drawn by ``seed``. Raises ``HookError`` where the
    model has no gradient to rank by, such as with quantised weights.
    """
    found = _of_some(model, tokenizer, objective, count, seed, step)
    ranking = auto_ranking(found)
    first = ranking.top(3)
    said = (
        f"Block {first[0]} was chosen of 0 to {len(ranking.scores) - 1}: its number and its place by the natural gain, "
        f"over {found.count} training examples against {found.settings['retain']} neutral sentences, add up to the "
        f"most; next are {first[1:]}. docs/which_block.md says how far such a choice can be trusted."
    )
    return {"block": first[0], "said": said, "ranking": ranking.to_dict()}


def auto_part(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    *,
    size: int,
    blocks: Sequence[int] | None = None,
    seed: int = 0,
    step: Advance | None = None,
) -> dict[str, Any]:
    """What ``block_part = "auto"`` stands for: the ``names`` of matrices, their ``blocks``, and why (``said``).

    They are taken from the most natural gain for each number down, as long as they fit into ``size`` numbers together.
    ``blocks``: of these alone. Raises ``SurgeryError`` where not one fits, and as ``auto_block``.
    """
    found = _of_some(model, tokenizer, objective, count, seed, step)
    inside = set(blocks if blocks is not None else [place.block for place in found.places])
    ranking = found.ranking("natural", "matrix")
    sizes = {place.name: int(size) for place, size in zip(found.places, found.sizes, strict=True)}
    owners = {place.name: place.block for place in found.places}
    gains = {
        name: float(score) / sizes[name]
        for name, score in zip(ranking.names or (), ranking.scores, strict=True)
        if owners[name] in inside and model.get_parameter(name).ndim > 1
    }
    chosen = fitting(sorted(gains, key=lambda name: -gains[name]), sizes, size)
    if not chosen:
        raise SurgeryError(
            f"part_size: got {size:,}, less than the smallest matrix of the chosen blocks has "
            f"({min(sizes[name] for name in gains):,} numbers); give at least that"
        )
    total = sum(int(sizes[name]) for name in chosen)
    said = (
        f"{len(chosen)} of {len(gains)} matrices were chosen ({total:,} numbers), those with the most natural gain for "
        f"each number, over {found.count} training examples against {found.settings['retain']} neutral sentences: "
        f"{', '.join(chosen[:6])}{', ...' if len(chosen) > 6 else ''}."
    )
    return {"names": chosen, "blocks": sorted({owners[name] for name in chosen}), "said": said}


def fitting(names: Iterable[str], sizes: Mapping[str, int], size: int) -> list[str]:
    """Of ``names``, in their order, those that fit into what the ones before leave of ``size`` numbers."""
    chosen: list[str] = []
    for name in names:
        if sizes[name] <= size:
            chosen.append(name)
            size -= int(sizes[name])
    return chosen


def _of_some(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    objective: Objective,
    count: int,
    seed: int,
    step: Advance | None,
) -> Gain:
    """The gain over ``GAIN_LIMIT`` of the examples."""
    drawn = sample(range(count), GAIN_LIMIT, seed)

    def losses(module: nn.Module, rows: Sequence[int]) -> Tensor:
        return objective(module, [drawn[row] for row in rows])

    return rank_by_gain(model, tokenizer, losses, len(drawn), seed=seed, step=step)
