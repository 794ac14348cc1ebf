"""Mean-ablation: what a model's contrast loses when one block adds the same to every prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.anatomy import find
from hooks.display import Readable
from hooks.errors import HookError
from hooks.logit_difference import Changes, check_head, logit_difference, prompts_in_batches, word_tokens
from hooks.ranking import Ranking
from hooks.remote import anywhere
from hooks.streaming import Mean, Progress, Text, stream


@dataclass(frozen=True, eq=False, repr=False)
class Ablation(Readable):
    """What replacing one block's contribution by its mean does to logit(first word) - logit(second).

    effects, errors: mean over prompts of the absolute change in logits, and its standard error (NaN for one
    prompt), in the order of `blocks`. gaps: relative gap |P1 - P2| / (P1 + P2), mean over prompts, of the ablated
    models; gap: of the model itself.
    """

    contrast: tuple[str, str]
    blocks: tuple[int, ...]
    effects: NDArray[np.float64]
    errors: NDArray[np.float64]
    gaps: NDArray[np.float64]
    gap: float
    data: str
    count: int

    def effect(self, block: int) -> float:
        """The effect of one block. Raises HookError for a block that was not ablated."""
        if block not in self.blocks:
            raise HookError(f"mean-ablation: block {block} was not ablated; expected one of {list(self.blocks)}")
        return float(self.effects[self.blocks.index(block)])

    def ranking(self) -> Ranking:
        """Blocks by effect. Raises HookError unless every block from 0 on was ablated."""
        if self.blocks != tuple(range(len(self.blocks))):
            raise HookError(f"mean-ablation: only blocks {list(self.blocks)}; for a ranking ablate all of them")
        errors = self.errors if self.count > 1 else None
        settings = {"contrast": list(self.contrast)}
        return Ranking("mean_ablation", "block", self.effects, self.data, self.count, errors, settings=settings)

    def against(self, named: Mapping[str, int], others: Sequence[int]) -> str:
        """Plain text: each named block's effect against those of `others`, such as random blocks."""
        lines = [
            f"mean-ablation, effect on {self.contrast[0]} - {self.contrast[1]}, {self.data}, n = {self.count}; "
            f"relative gap of the model {self.gap:.4f}"
        ]
        wide = max([len("random"), *map(len, named)])
        rows = [(label, block) for label, block in named.items()] + [("random", block) for block in others]
        for label, block in rows:
            effect, place = self.effect(block), self.blocks.index(block)
            line = f"  {label:{wide}}  block {block:>3}  {effect:7.3f} ± {self.errors[place]:.3f} logits"
            line += f"  gap {self.gaps[place]:.4f}"
            if label != "random" and others:
                above = sum(effect > self.effect(other) for other in others)
                line += f"  more than {above} of {len(others)} random blocks"
            lines.append(line)
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and numbers for JSON; the errors of a single prompt are null."""
        arrays = {"effects": self.effects, "errors": self.errors, "gaps": self.gaps}
        lists = {n: [None if np.isnan(v) else float(v) for v in array] for n, array in arrays.items()}
        plain = {"contrast": list(self.contrast), "blocks": list(self.blocks), "gap": self.gap}
        return plain | lists | {"data": self.data, "count": self.count}


@anywhere
def mean_ablation(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Text],
    blocks: Sequence[int] | None = None,
    contrast: tuple[str | int, str | int] = ("he", "she"),
    *,
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Ablation:
    """Replace what a block adds to the stream by its mean over the prompts, one block at a time (Wang et al. 2023).

        mean_ablation(model, tokenizer, prompts, [25, 3, 11]).against({"lens": 25}, [3, 11])

    The mean is over all real tokens but the first of each prompt, and put in at all of those: at the first place
    stands an attention sink (Xiao et al. 2024), whose outliers would be the mean. blocks: numbers, None for all.
    Of T5 and BART the encoder's blocks are taken. Evaluation mode; the model is left as it was.

    Raises HookError for a block that does not exist, a prompt of one token, and as `hooks.lens` does.
    """
    if len(contrast) != 2:
        raise HookError(f"contrast is {contrast!r}; expected two words such as ('he', 'she')")
    tokens = word_tokens(tokenizer, contrast)
    sites = [block.site for block in find(model).stacks[0].blocks]
    chosen = list(range(len(sites))) if blocks is None else list(dict.fromkeys(blocks))
    wrong = [block for block in chosen if not 0 <= block < len(sites)]
    if wrong or not chosen:
        raise HookError(f"mean-ablation: block {wrong[0] if wrong else 'none'}; the model has 0 to {len(sites) - 1}")
    mean = _means(model, tokenizer, prompts, [sites[block] for block in chosen], batch_tokens)
    before: list[Tensor] = []
    after: list[Tensor] = []
    with probe.unchanged(model):
        for batch in prompts_in_batches(model, tokenizer, prompts, batch_tokens=batch_tokens):
            if not before:
                check_head(model, batch, tokens)
            mask = batch.inputs["attention_mask"].bool()
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
            before.append(logit_difference(model, batch, tokens, {}).double().cpu())
            rows = [logit_difference(model, batch, tokens, _flat(sites[b], mean[sites[b]], mask)) for b in chosen]
            after.append(torch.stack([row.double().cpu() for row in rows]))
            if progress is not None:
                progress(sum(map(len, before)), len(prompts))
    base, ablated = torch.cat(before).numpy(), torch.cat(after, 1).numpy()  # (prompt), (block prompt)
    for block, row in zip([None, *chosen], [base, *ablated], strict=True):
        if not np.isfinite(row).all():
            where = "of the model" if block is None else f"without block {block}"
            raise HookError(f"mean-ablation: the contrast {where} is NaN or infinite; check the weights and the dtype")
    change = np.abs(ablated - base)
    count = len(base)
    errors = change.std(1, ddof=1) / count**0.5 if count > 1 else np.full(len(chosen), np.nan)
    # (P1 - P2) / (P1 + P2) = tanh(d / 2) for the logit difference d
    gaps = np.abs(np.tanh(ablated / 2)).mean(1)
    words = (str(contrast[0]), str(contrast[1]))
    gap = float(np.abs(np.tanh(base / 2)).mean())
    return Ablation(words, tuple(chosen), change.mean(1), errors, gaps, gap, data, count)


def _means(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Text], sites: Sequence[str], batch_tokens: int
) -> dict[str, Float[Tensor, " d_model"]]:
    """Block site -> mean of what it adds, over all tokens but the first of each prompt (padded on the right)."""
    mean = Mean()
    entering: list[Tensor] = []

    def add(site: str, tensor: Tensor, mask: Tensor) -> None:
        block, _, kind = site.rpartition(".")
        if kind == "hook_resid_pre":
            entering[:] = [tensor.float().clone()]
            return
        if int(mask.sum(1).min()) < 2:
            raise HookError("mean-ablation: a prompt has one token, which is left as it is; expected at least two")
        later = mask.clone()
        later[:, 0] = False
        mean(block, tensor.float() - entering.pop().to(tensor.device), later)

    wanted = [f"{site}.{kind}" for site in sites for kind in ("hook_resid_pre", "hook_resid_post")]
    stream(model, tokenizer, prompts, [(wanted, add)], batch_tokens=batch_tokens)
    return {site: mean.mean(site) for site in sites}


def _flat(site: str, mean: Tensor, mask: Tensor) -> Changes:
    entering: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        entering[:] = [tensor.clone()]
        return tensor

    def change(tensor: Tensor) -> Tensor:
        flat = entering[0].to(tensor.device) + mean.to(tensor.device)
        return torch.where(mask.to(tensor.device)[..., None], flat.to(tensor.dtype), tensor)

    return {f"{site}.hook_resid_pre": note, f"{site}.hook_resid_post": change}
