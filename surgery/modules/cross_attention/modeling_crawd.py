"""CrAWD's cross-attention to reference words, and what puts it into a transformers model.

This file needs torch alone, so that a copy of it beside exported weights opens them without any other package:
`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)`.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

SCOPES = ("row", "sequence")


class CrossAttention(nn.Module):
    """Attention of a text's last hidden states to those of reference words, its strongest weights decayed.

    beta = softmax(Q K^T / sqrt(d_head)) with Q = H_x W_Q, K = H_b W_K, V = H_b W_V (CrAWD Eq. 1, no biases), and the
    top K % of beta times lambda (Eq. 2). Then 4.4 as its text says: residual, norm, FFN, norm (its formula leaves
    out the residual and the norms). The paper widens the head to read [H_x, H_cross] (4.5) and does not say how a
    pretrained head becomes 2d wide; here a d x 2d map M brings it back to d in front of the model's own head.
    M starts as [I, 0], so that the model starts as it was. `fusion` holds M - [I, 0]: x + 0 is x bit for bit on any
    hardware, and weight decay pulls towards the original model instead of towards no model.

    Args:
        width: d, of the hidden states. words: for each of the m reference tokens the word it is of; the tokens' states
            H_b stand in the buffer `reference` (m d).
        heads: 8, as the paper's appendix A.1 has it. ffn: inner width, 4 d if None; ReLU (Vaswani et al. 2017).
        top_percent: K of Eq. 2, 0 to 100; ceil(K / 100 * count) weights, and those that equal the least of them.
        decay: lambda of Eq. 2, 0 to 1.
        scope: of the threshold tau. "row": the weights of one position, of all its heads and reference tokens, so
            that no later token changes what an earlier one predicts. "sequence": the whole matrix of one text
            without its padding, as the paper's words can be read; for classifiers, and no good for generation, where
            later tokens would change earlier predictions and a KV cache would change the result.
        renormalise: make the weights sum to 1 again after the decay. Eq. 2 does not, and where the whole row was
            decayed it would undo the decay.
        dropout: of the weights and inside the FFN; in training only.

    Raises ValueError for a setting outside of its range.
    """

    reference: Tensor

    def __init__(
        self,
        width: int,
        words: Sequence[str],
        *,
        heads: int = 8,
        ffn: int | None = None,
        top_percent: float = 40.0,
        decay: float = 0.2,
        scope: str = "row",
        renormalise: bool = False,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"heads is {heads}; expected a number that divides the model's width {width}")
        if ffn is not None and ffn < 1:
            raise ValueError(f"ffn is {ffn}; expected an inner width of at least 1, or None for {4 * width}")
        if not 0 <= top_percent <= 100:
            raise ValueError(f"top_percent (K) is {top_percent}; expected 0 to 100")
        if not 0 <= decay <= 1:
            raise ValueError(f"decay (lambda) is {decay}; expected 0 to 1")
        if scope not in SCOPES:
            raise ValueError(f"scope is {scope!r}; expected one of {', '.join(SCOPES)}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}; expected at least 0 and less than 1")
        self.width, self.words, self.heads = width, tuple(words), heads
        self.ffn_width = 4 * width if ffn is None else ffn
        self.top_percent, self.decay, self.scope, self.renormalise = top_percent, decay, scope, renormalise
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.norm = nn.LayerNorm(width)
        inner, outer = nn.Linear(width, self.ffn_width), nn.Linear(self.ffn_width, width)
        self.ffn = nn.Sequential(inner, nn.ReLU(), nn.Dropout(dropout), outer)
        self.last_norm = nn.LayerNorm(width)
        self.fusion = nn.Linear(2 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("reference", torch.zeros(len(self.words), width))
        self.renew: Callable[[Tensor], Tensor] | None = None  # known states -> those of the model's present weights
        self.enabled = True  # False while the reference words themselves are run
        self._real: Tensor | None = None  # (batch pos), of the running pass; scope "sequence" alone needs it

    @property
    def settings(self) -> dict:
        """The arguments that make this module again, as JSON can hold them."""
        return {
            "width": self.width,
            "words": list(self.words),
            "heads": self.heads,
            "ffn": self.ffn_width,
            "top_percent": self.top_percent,
            "decay": self.decay,
            "scope": self.scope,
            "renormalise": self.renormalise,
            "dropout": self.dropout.p,
        }

    @property
    def fusion_map(self) -> Tensor:
        """M, the d x 2d map from [H_x, H_cross] to what the head reads."""
        weight = self.fusion.weight
        start = torch.cat([torch.eye(len(weight)), torch.zeros(len(weight), len(weight))], 1)
        return start.to(weight) + weight

    def forward(self, stream: Tensor, real: Tensor | None = None) -> Tensor:
        """H_final (batch pos width) from H_x (batch pos width); `real` (batch pos) marks what is no padding."""
        x = stream.to(self.query.weight.dtype)
        states = self.states().to(x)
        weights = self.decayed(self.weights(x, states), real)
        value = self._split(self.value(states[None]))  # (1 head token d_head)
        mixed = (self.dropout(weights).to(value.dtype) @ value).transpose(1, 2).flatten(2)  # (batch pos width)
        cross = self.norm(x + self.output(mixed))
        cross = self.last_norm(self.ffn(cross))
        return stream + self.fusion(torch.cat([x, cross], -1)).to(stream.dtype)

    def states(self) -> Tensor:
        """H_b (token width): constant, or that of the model's present weights while those are trained."""
        if self.renew is None:
            return self.reference
        found = self.renew(self.reference)
        self.reference = found.detach()
        return found

    def weights(self, stream: Tensor, states: Tensor) -> Tensor:
        """beta before its decay (batch head pos token), float32, of H_x (batch pos width) and H_b (token width)."""
        x = stream.to(self.query.weight.dtype)
        query, key = self._split(self.query(x)), self._split(self.key(states.to(x)[None]))
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        return scores.float().softmax(-1)

    def decayed(self, weights: Tensor, real: Tensor | None = None) -> Tensor:
        """beta' of Eq. 2 (batch head pos token): lambda * beta where beta >= tau."""
        batch, heads, length, tokens = weights.shape
        rows = weights.detach().transpose(1, 2).reshape(batch, length, heads * tokens)
        tau = self._row_tau(rows) if self.scope == "row" else self._sequence_tau(rows, real)
        kept = torch.where(weights >= tau[:, None, :, None], self.decay * weights, weights)
        if self.renormalise:
            kept = kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(kept.dtype).tiny)
        return kept

    def _row_tau(self, rows: Tensor) -> Tensor:
        """tau of each position (batch pos) from its weights (batch pos weight)."""
        count = self._count(rows.shape[-1])
        if count == 0:
            return rows.new_full(rows.shape[:2], math.inf)
        return rows.topk(count, -1).values[..., -1]

    def _sequence_tau(self, rows: Tensor, real: Tensor | None) -> Tensor:
        """One tau a text (batch 1), from the weights of its real positions."""
        batch, length, size = rows.shape
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=rows.device)
        ordered = rows.masked_fill(~real[..., None], -math.inf).flatten(1).sort(-1, descending=True).values
        counts = torch.tensor([self._count(size * n) for n in real.sum(1).tolist()], device=rows.device)
        tau = ordered.gather(1, (counts - 1).clamp(min=0)[:, None])
        return tau.masked_fill(counts[:, None] == 0, math.inf)

    def _count(self, size: int) -> int:
        # Rounded first: 0.07 * 100 is 7.000000000000001, of which the ceiling would be 8.
        return math.ceil(round(self.top_percent / 100 * size, 6))

    def _split(self, states: Tensor) -> Tensor:
        """(batch pos width) -> (batch head pos d_head)."""
        return states.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def fuse(self, place: nn.Module, args: object, output: object) -> object:
        """Forward hook of the module that returns H_x (a tensor, or a tuple that begins with it)."""
        if not self.enabled:
            return output
        if isinstance(output, Tensor):
            return self(output, self._mask_of(output))
        return (self(output[0], self._mask_of(output[0])), *output[1:])  # type: ignore[index]

    def note_mask(self, base: nn.Module, args: tuple, kwargs: dict) -> None:
        """Forward pre-hook of the model without its head: what of the last stack's input is padding."""
        if not self.enabled:
            return
        names = inspect.signature(type(base).forward).parameters
        given = dict(zip([name for name in names if name != "self"], args, strict=False)) | kwargs
        mask = given.get("attention_mask")
        if "decoder_input_ids" in names:
            # A classifier's decoder reads the text itself, shifted by one place (T5, BART). As many of its positions
            # count as the text has tokens; behind padding one more would be real, the last.
            text, own = given.get("input_ids"), given.get("decoder_input_ids")
            shifted = own is None or (text is not None and torch.equal(own[:, 1:], text[:, :-1]))
            of_decoder = given.get("decoder_attention_mask")
            mask = mask if of_decoder is None and shifted else of_decoder
        self._real = mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _mask_of(self, stream: Tensor) -> Tensor | None:
        if self._real is None:
            return None
        return self._real[:, -stream.shape[1] :].to(stream.device)


def insert(model: nn.Module, module: CrossAttention, place: str) -> list:
    """Let `module` change what `place`, the module of `model` that returns H_x, hands on; returns the hooks' handles.

    In front of other hooks, so that they see what the head sees.
    """
    handles = [model.get_submodule(place).register_forward_hook(module.fuse, prepend=True)]
    if module.scope == "sequence":
        base = getattr(model, "base_model", model)
        handles.append(base.register_forward_pre_hook(module.note_mask, with_kwargs=True))
    return handles


class CrossAttended(nn.Module):
    """Mixed in before a transformers model's class: that model with the module that its config describes."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        settings = dict(config.crawd)
        place = settings.pop("place")
        self.cross_attention = CrossAttention(**settings)
        insert(self, self.cross_attention, place)
