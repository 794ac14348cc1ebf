"""Mean-ablation of every head: what a model's contrast loses when one head writes the same after every prompt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.anatomy import find
from hooks.errors import HookError
from hooks.logit_difference import check_head, logit_difference, prompts_in_batches, word_tokens
from hooks.ranking import Ranking
from hooks.streaming import Mean, Progress, Text, stream


def ablate_heads(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Text],
    contrast: tuple[str | int, str | int] = ("he", "she"),
    *,
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Ranking:
    """Heads by the mean absolute change of logit(first word) - logit(second) when each alone is replaced by its mean.

        hooks.plots.head_map(hooks.ablate_heads(model, tokenizer, prompts[:16]))

    What a head writes (`attn.hook_z`) becomes its mean over all tokens of the prompts but each prompt's first, put in
    at all of those, as in `mean_ablation`. One pass a head and batch. Evaluation mode; the model is left as it was.

    Raises HookError where a block has no heads, their numbers differ, a prompt has one token, and as `hooks.lens` does.
    """
    tokens = word_tokens(tokenizer, contrast)
    blocks = find(model).blocks
    heads = {block.n_heads for block in blocks}
    if None in heads or len(heads) != 1:
        raise HookError(
            f"ablate_heads: the blocks have {sorted(map(str, heads))} heads; expected the same number in all"
        )
    count = int(next(iter(heads)) or 0)
    sites = [f"{block.site}.attn.hook_z" for block in blocks]
    mean = _means(model, tokenizer, prompts, sites, batch_tokens)
    changes: list[np.ndarray] = []
    done = 0
    with probe.unchanged(model):
        for batch in prompts_in_batches(model, tokenizer, prompts, batch_tokens=batch_tokens):
            if not changes:
                check_head(model, batch, tokens)
            mask = batch.inputs["attention_mask"].bool()
            mask = mask & (torch.arange(mask.shape[1], device=mask.device) > 0)
            base = logit_difference(model, batch, tokens, {}).double().cpu()
            found = np.empty((len(sites), count, len(base)))
            for block, site in enumerate(sites):
                for head in range(count):
                    change = {site: _flat(mean[site], head, mask)}
                    found[block, head] = (logit_difference(model, batch, tokens, change).double().cpu() - base).abs()
            changes.append(found)
            done += len(base)
            if progress is not None:
                progress(done, len(prompts))
    every = np.concatenate(changes, axis=-1)
    if not np.isfinite(every).all():
        raise HookError("ablate_heads: the contrast is NaN or infinite; check the weights and the dtype")
    rows = every.shape[-1]
    errors = every.std(-1, ddof=1) / rows**0.5 if rows > 1 else None
    settings = {"contrast": [str(word) for word in contrast]}
    return Ranking("mean_ablation", "head", every.mean(-1), data, rows, errors, settings=settings)


def _means(
    model: nn.Module, tokenizer: Any, prompts: Sequence[Text], sites: Sequence[str], batch_tokens: int
) -> dict[str, Float[Tensor, "head d_head"]]:
    """Site -> mean of what each head writes, over all tokens but the first of each prompt."""
    mean = Mean()
    heads: dict[str, int] = {}

    def add(site: str, z: Tensor, mask: Tensor) -> None:
        if int(mask.sum(1).min()) < 2:
            raise HookError("ablate_heads: a prompt has one token, which is left as it is; expected at least two")
        later = mask.clone()
        later[:, 0] = False
        heads[site] = z.shape[2]
        mean(site, rearrange(z.float(), "batch pos head d_head -> batch pos (head d_head)"), later)

    stream(model, tokenizer, prompts, [(list(sites), add)], batch_tokens=batch_tokens)
    return {site: rearrange(mean.mean(site), "(head d_head) -> head d_head", head=heads[site]) for site in sites}


def _flat(mean: Tensor, head: int, mask: Tensor) -> Callable[[Tensor], Tensor]:
    def change(z: Tensor) -> Tensor:
        new = z.clone()
        flat = mean[head].to(z.device, z.dtype)
        new[:, :, head] = torch.where(mask.to(z.device)[..., None], flat, z[:, :, head])
        return new

    return change
