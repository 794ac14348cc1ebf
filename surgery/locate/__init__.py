"""Rank the blocks of a model by each localisation method, all on the same prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.ablation import Ablation, mean_ablation
from hooks.block_importance import BlockImportance, bmi
from hooks.counterfactuals import counterfactual_pairs
from hooks.gain_rankings import Gain
from hooks.logit_lens import lens
from hooks.patching import attribution_patch, patch
from hooks.plots import block_bars
from hooks.rank_correlation import Comparison, compare, rank_map
from hooks.ranking import Ranking
from hooks.reference_attention import cross_attention
from hooks.sensitivity import attention_to
from hooks.tokens import ids_of
from surgery.catalogue import RANKINGS
from surgery.data.genbias import Prompt, records
from surgery.data.prompts import PromptSet
from surgery.errors import SurgeryError
from surgery.locate.gain import KNOWN, gain_of, rankings_of
from surgery.progress import Advance, Progress

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LIMIT = 32
"""How many prompts by default: patching runs the model once a block and pair."""
RANDOM = 5
"""How many random blocks the named ones are held against."""


def rank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rows: Sequence[Prompt],
    method: str,
    *,
    seed: int = 0,
    positions: Literal["last", "all"] = "last",
    aggregate: Literal["mean", "sum"] = "mean",
    objective: str = "equalize",
    retain: Sequence[str] | None = None,
    factored: bool = False,
    step: Advance | None = None,
) -> list[Ranking]:
    """Block rankings by one of ``RANKINGS`` on ``rows``; the contrast is the set's first two words.

    gain: natural gain of ``objective`` against the texts ``retain``, of attention and of the whole block (see
    ``surgery.locate.gain``). bmi: raw and final_norm. lens: direct contribution to the contrast. patching,
    attribution: interchange effects of what a block adds, on the ``pairs`` of the rows. sensitivity: attention of the
    last token to the subject, and cross-attention to the set's words. ``positions`` and ``aggregate`` are options of
    bmi; ``step`` is told of finished prompts.

    Raises ``SurgeryError`` for an unknown method and where there are no pairs, ``HookError`` as the method does.
    """
    texts = [row.text for row in rows]
    contrast = _contrast(prompts)
    data = f"{prompts.name} train"
    done = 0

    def advance(now: int, _: int | None) -> None:
        nonlocal done
        if step is not None:
            step(now - done)
        done = now

    if method == "gain":
        given: Any = {"objective": objective, "retain": retain, "factored": factored, "seed": seed, "step": step}
        return rankings_of(gain_of(model, tokenizer, prompts, rows, **given))
    if method == "bmi":
        found = bmi(model, tokenizer, texts, positions=positions, aggregate=aggregate, data=data, progress=advance)
        return [found.raw, found.final_norm]
    if method == "lens":
        rankings = [lens(model, tokenizer, texts, contrast, data=data).ranking("block")]
    elif method in ("patching", "attribution"):
        measure = patch if method == "patching" else attribution_patch
        clean, corrupted = pairs(tokenizer, prompts, rows, seed=seed)
        rankings = [measure(model, tokenizer, clean, corrupted, contrast, data=f"{data} pairs").ranking()]
    elif method == "sensitivity":
        subjects = sorted({row.profession for row in rows})
        seen = attention_to(model, tokenizer, texts, subjects, queries="last", data=data)
        crossed = cross_attention(model, tokenizer, texts, prompts.words.words, data=data)
        rankings = [seen.ranking("block"), crossed.ranking("block")]
    else:
        raise SurgeryError(f"method: got {method!r}, expected one of {', '.join(RANKINGS)}")
    advance(len(rows), None)
    return rankings


def pairs(
    tokenizer: PreTrainedTokenizerBase, prompts: PromptSet, rows: Sequence[Prompt], *, seed: int = 0
) -> tuple[list[str], list[str]]:
    """Clean and corrupted prompts: each row's subject swapped for one of opposite stereotype score, both ways.

    The other subject is drawn by ``seed`` from those of the training part that give as many tokens in the same
    template. A row without such a partner, or with a score of 0, is left out.

    Raises ``SurgeryError`` if no row is left, as with subjects that have no scores.
    """
    scores = {row.profession: row.stereotype_score for row in records("profession", "train", prompts=prompts)}
    scores |= {row.profession: row.stereotype_score for row in rows}
    templates = {template.name: template for template in prompts.templates}
    draw = np.random.default_rng(seed)

    @cache
    def length(text: str) -> int:
        return len(ids_of(tokenizer, [text])[0])

    clean: list[str] = []
    corrupted: list[str] = []
    for row in rows:
        template = templates[row.template]
        others = [
            subject
            for subject, score in scores.items()
            if (score or 0.0) * (row.stereotype_score or 0.0) < 0 and length(template.fill(subject)) == length(row.text)
        ]
        if others:
            partner = others[int(draw.integers(len(others)))]
            made = counterfactual_pairs(tokenizer, template.fill("{}"), [(row.profession, partner)])
            clean += made[0]
            corrupted += made[1]
    if not clean:
        raise SurgeryError(
            f"{prompts.name}: none of {len(rows)} prompts has a counterpart of as many tokens and the opposite "
            "stereotype_score; give the subjects such scores, or choose bmi, lens or sensitivity"
        )
    return clean, corrupted


def halves(rows: Sequence[Prompt], seed: int) -> tuple[list[Prompt], list[Prompt]]:
    """Two random halves. Raises ``SurgeryError`` for fewer than four rows."""
    if len(rows) < 4:
        raise SurgeryError(f"{len(rows)} prompts: two halves need at least 4; give a higher --limit")
    order = np.random.default_rng(seed).permutation(len(rows))
    return [rows[i] for i in order[::2]], [rows[i] for i in order[1::2]]


@dataclass(frozen=True)
class Check:
    """Whether locations hold: the rankings' comparison, and their first blocks' ablation against ``others``."""

    comparison: Comparison
    ablation: Ablation
    others: tuple[int, ...]

    def table(self) -> str:
        """Plain text: correlations, stability, mean-ablation, and what is known of each ranking."""
        names = self.comparison.tops
        known = [f"  {name:24} {KNOWN[name]}" for name in names if name in KNOWN]
        title = "what each predicted of an edit (docs/which_block.md)"
        ablated = self.ablation.against(names, self.others)
        return "\n\n".join([self.comparison.table(), ablated, *(["\n".join([title, *known])] if known else [])])

    def to_dict(self) -> dict[str, Any]:
        """``comparison`` and ``ablation`` for JSON, with the random blocks among the latter."""
        ablation = self.ablation.to_dict() | {"random": list(self.others)}
        return {"comparison": self.comparison.to_dict(), "ablation": ablation}


def check(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: PromptSet,
    rows: Sequence[Prompt],
    chosen: Sequence[str],
    rankings: Sequence[Ranking],
    *,
    seed: int = 0,
    measured: Gain | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Check:
    """Compare ``rankings``, which the methods ``chosen`` gave on ``rows``; rank again on two random halves; ablate.

    ``measured`` is what gain was ranked by: its halves are those of its own groups of prompts, against the same texts
    that must stay, so that no gradient is computed again.

    The first block of each ranking is held against ``RANDOM`` blocks (fewer in a small model), drawn by ``seed``
    among those that no ranking puts first. ``options`` are those of ``rank``.

    Raises ``SurgeryError`` for fewer than four rows, ``HookError`` as ``hooks.compare.compare`` does.
    """
    progress = progress or Progress(quiet=True)
    runs: list[list[Ranking]] = []
    for number, half in enumerate(halves(rows, seed), 1):
        runs.append([])
        for method in chosen:
            if method == "gain" and measured is not None:
                runs[-1] += rankings_of(measured, range(measured.plain.shape[1])[number - 1 :: 2])
                continue
            with progress.work(f"half {number} by {method}", len(half)) as step:
                runs[-1] += rank(model, tokenizer, prompts, half, method, seed=seed, step=step, **options)
    compared = compare(rankings, repeats=list(zip(*runs, strict=True)), seed=seed)
    tops = list(compared.tops.values())
    free = [block for block in range(compared.units) if block not in tops]
    drawn = np.random.default_rng(seed).permutation(free)[:RANDOM]
    others = tuple(sorted(int(block) for block in drawn))
    texts = [row.text for row in rows]
    data = f"{prompts.name} train"
    with progress.work("mean-ablation", None) as step:
        ablated = mean_ablation(model, tokenizer, texts, [*tops, *others], _contrast(prompts), data=data)
        step(len(rows))
    return Check(compared, ablated, others)


def _contrast(prompts: PromptSet) -> tuple[str, str]:
    return prompts.words.words[0], prompts.words.words[1]


def key(ranking: Ranking) -> str:
    """A ranking's key in the JSON file: raw and final_norm for BMI, else the method."""
    return str(ranking.settings.get("stream", ranking.method))


def tables(rankings: Sequence[Ranking]) -> str:
    """Plain text of all rankings; BMI's two stand side by side."""
    own = [ranking for ranking in rankings if ranking.method == "bmi"]
    shown = [BlockImportance(*own).table()] if own else []
    return "\n\n".join(shown + [ranking.table() for ranking in rankings if ranking.method != "bmi"])


def picture(rankings: Sequence[Ranking]) -> "Figure":
    """Bars for one ranking or for BMI's two, a map of ranks for more."""
    if len(rankings) == 1 or {ranking.method for ranking in rankings} == {"bmi"}:
        return block_bars(*rankings)
    return rank_map(rankings)
