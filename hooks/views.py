"""What other libraries show of a text, where they are installed: CircuitsVis's attention view, SAELens's features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hooks import trace_modules as probe
from hooks.activations import capture, model_inputs
from hooks.errors import HookError
from hooks.tokens import text_tokens


def attention_view(model: nn.Module, tokenizer: Any, text: str, block: int) -> Any:
    """CircuitsVis's interactive view of all heads' attention in one block; it shows itself in a notebook.

        hooks.attention_view(model, tokenizer, "The nurse said that she", 12)

    Raises HookError where circuitsvis is not installed (pip install circuitsvis), and as `capture` does.
    """
    try:
        from circuitsvis.attention import attention_heads
    except ImportError as error:
        raise HookError(
            f"attention_view: {error}; pip install circuitsvis, or use hooks.plots.attention_pattern"
        ) from None
    ids, found = _captured(model, tokenizer, text, f"blocks.{block}.attn.hook_pattern")
    return attention_heads(tokens=[tokenizer.decode([token]) for token in ids], attention=found[0].float().cpu())


def sae_features(
    model: nn.Module, tokenizer: Any, texts: Sequence[str], sae: Any, site: str, *, top: int = 10
) -> list[list[tuple[int, float]]]:
    """For each text the `top` strongest features of a sparse autoencoder at its last token: (feature, activation).

        from sae_lens import SAE
        sae = SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")
        hooks.sae_features(model, tokenizer, ["The nurse said that"], sae, "blocks.8.hook_resid_pre")

    sae: anything whose `encode` maps (tokens d_model) to (tokens features), as SAELens's do; `site` is the place that
    it was trained at. Raises HookError where it does not fit the site's width.
    """
    found = []
    for text in texts:
        _, value = _captured(model, tokenizer, text, site)
        last = value[0, -1:].float()
        try:
            with torch.no_grad():
                features = sae.encode(last)[0]
        except RuntimeError as error:
            raise HookError(
                f"sae_features: the autoencoder does not take {site} of width {last.shape[-1]} "
                f"({str(error).splitlines()[0]}); give the site that it was trained at"
            ) from None
        kept = features.topk(min(top, features.shape[-1]))
        found.append([(int(n), float(v)) for v, n in zip(kept.values, kept.indices, strict=True) if v > 0])
    return found


def _captured(model: nn.Module, tokenizer: Any, text: str, site: str) -> tuple[tuple[int, ...], torch.Tensor]:
    ids = text_tokens(tokenizer, [text])[0]
    core: Any = probe.pretrained(model)
    given = torch.tensor([list(ids)], device=core.device)
    with probe.unchanged(model), torch.no_grad(), capture(model, site) as store:
        model(**model_inputs(model, {"input_ids": given, "attention_mask": torch.ones_like(given)}))
    return ids, store[site]
