"""What each block, attention and MLP adds to the logit difference of two words: lens and direct attribution."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import capture, run_base
from hooks.anatomy import Block, Stack, find
from hooks.display import Readable
from hooks.errors import HookError
from hooks.logit_difference import Prompts, check_head, frozen, head_logits, prompts_in_batches, word_tokens
from hooks.ranking import Ranking, Unit
from hooks.remote import anywhere
from hooks.streaming import Mean, Progress, Text

_WRITES = {
    "attention": "hook_attn_out",
    "cross_attention": "hook_cross_attn_out",
    "mixer": "hook_mixer_out",
    "mlp": "hook_mlp_out",
}
_MODULES = {
    "attention": "attention_out",
    "cross_attention": "cross_writer",
    "mixer": "mixer_out",
    "mlp": "mlp_out",
}  # the fields of `anatomy.Block` behind them


@dataclass(frozen=True, eq=False, repr=False)
class Lens(Readable):
    """Means over prompts of logit(contrast[0]) - logit(contrast[1]), in logits, with standard errors.

    difference: that of the model's own output. cumulative: if the stream entered the head before block 0
    (entry 0) or after block i (entry i + 1); the last entry is `difference`. embedding, attention, mlp,
    cross_attention (of encoder-decoders) and mixer (state spaces, convolutions, linear attention): what each writes
    directly, with the final norm's scale held at that of the real pass, 0 in a block that has no such part; block is
    their sum in a block. head: (block, head), without the writer's
    bias. rest: what none of them writes: biases of the final norm and of the head, and, where the head is not
    linear (soft cap, BERT's transform), what a linear reading leaves over. embedding + sum of block + rest is
    `difference`.

    values, errors: by these names; `missing` says why a name is absent. errors hold NaN for one prompt.
    """

    contrast: tuple[str, str]
    values: dict[str, NDArray[np.float64]]
    errors: dict[str, NDArray[np.float64]]
    missing: dict[str, str]
    data: str
    count: int

    def __getattr__(self, name: str) -> NDArray[np.float64]:
        if name.startswith("_") or name not in {*self.values, *self.missing}:
            raise AttributeError(name)
        return self.get(name)

    def get(self, name: str) -> NDArray[np.float64]:
        """The mean of one quantity. Raises HookError where this model has none, and why."""
        if name not in self.values:
            why = self.missing.get(name, f"expected one of {', '.join(self.values)}")
            raise HookError(f"lens: no {name!r}: {why}")
        return self.values[name]

    def ranking(self, unit: Unit = "block") -> Ranking:
        """Units by the size of what they add directly, whatever its sign; the settings hold the signs."""
        value = self.get(unit)
        errors = self.errors[unit] if self.count > 1 else None
        settings = {"contrast": list(self.contrast), "signs": np.sign(value).astype(int).tolist()}
        return Ranking("lens", unit, np.abs(value), self.data, self.count, errors, settings=settings)

    def table(self) -> str:
        """Plain text: one line a block with the lens after it and what its parts add."""
        parts = [name for name in _WRITES if name in self.values]
        first, second = self.contrast
        lines = [
            f"lens {first} - {second}, {self.data}, n = {self.count}: {float(self.difference):+.4f} logits",
            "block   after " + " ".join(f"{name:>15}" for name in parts),
            f"embed {self.cumulative[0]:>+7.3f}" + (f" {float(self.embedding):>+15.4f}" if parts else ""),
        ]
        for block, after in enumerate(self.cumulative[1:]):
            cells = " ".join(f"{self.values[name][block]:>+15.4f}" for name in parts)
            lines.append(f"{block:>5} {after:>+7.3f} {cells}".rstrip())
        return "\n".join(lines + ([f" rest         {float(self.rest):>+15.4f}"] if parts else []))


@anywhere
def lens(
    model: nn.Module,
    tokenizer: Any,
    prompts: Iterable[Text],
    contrast: tuple[str | int, str | int] = ("he", "she"),
    *,
    batch_tokens: int = 4096,
    data: str = "prompts",
    progress: Progress | None = None,
) -> Lens:
    """The logit difference of two words along the residual stream, and who writes it.

        hooks.lens(model, tokenizer, ["The nurse said that"]).ranking("attention")

    The stream after each block goes through the model's own final norm and head (logit lens; nostalgebraist
    2020); contributions are direct logit attribution (Elhage et al. 2021): each write to the stream, centred
    and divided as the final norm does in the real pass, times the difference of the head's two rows. Read at
    each prompt's last token, at a masked model's mask token, at the first answer token of T5 and BART (whose
    decoder is read). One pass in flat memory, in evaluation mode; the model is left as it was.

    contrast: two words that are one token each with a leading space, or two token ids. prompts: texts, or
    token ids.

    Raises HookError for a word that is several tokens (naming them), a model without a language-model head,
    no prompts, an empty prompt, and NaN activations (naming the first site).
    """
    if len(contrast) != 2:
        raise HookError(f"contrast is {contrast!r}; expected two words such as ('he', 'she')")
    tokens = word_tokens(tokenizer, contrast)
    stack = find(model).stacks[-1]
    missing = _missing(stack)
    mean = Mean()
    total = len(prompts) if isinstance(prompts, (list, tuple)) else None
    done = 0
    with probe.unchanged(model):
        for batch in prompts_in_batches(model, tokenizer, prompts, batch_tokens=batch_tokens):
            if not done:
                check_head(model, batch, tokens)
            for name, value in _measure(model, stack, batch, tokens, missing).items():
                mean(name, value.reshape(len(batch.places), -1).cpu(), torch.empty(0, 0))
            done += len(batch.places)
            if progress is not None:
                progress(done, total)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(("difference", "embedding", "rest"), ())
    shapes["head"] = (len(stack.blocks), -1)
    names = [n for n in ("difference", "cumulative", "embedding", *_WRITES, "block", "head", "rest")]
    values, errors = {}, {}
    for name in names:
        if name not in missing:
            shape = shapes.get(name, (-1,))
            values[name] = mean.mean(name).double().numpy().reshape(shape)
            errors[name] = (mean.variance(name).double() / done).sqrt().numpy().reshape(shape)
    return Lens((str(contrast[0]), str(contrast[1])), values, errors, missing, data, done)


def _missing(stack: Stack) -> dict[str, str]:
    """Quantities that this architecture does not have, and why."""
    missing: dict[str, str] = {}
    for name, module in _MODULES.items():
        if not any(getattr(block, module) for block in stack.blocks):
            first = stack.blocks[0]
            why = {"cross_attention": "this stack reads no other one", "mixer": "attention alone mixes positions here"}
            missing[name] = why.get(name) or f"{first.site} has none: {first.missing.get(name, 'it has no writer')}"
    for block in stack.blocks:
        if not block.additive:
            reason = f"{block.site}: {block.missing['additive']}, so that no write reaches the head unchanged"
            return dict.fromkeys(("embedding", *_WRITES, "block", "head", "rest"), reason)
        if block.attention_writer is None or block.attention_out is None or block.n_heads is None:
            missing["head"] = f"{block.site}: {block.missing.get('attention', 'the writer or the heads are not known')}"
    if len({block.n_heads for block in stack.blocks}) > 1:
        missing.setdefault("head", "blocks have different numbers of heads")
    return missing


def _measure(
    model: nn.Module, stack: Stack, batch: Prompts, tokens: list[int], missing: dict[str, str]
) -> dict[str, Tensor]:
    """Every quantity of `Lens` for each prompt: (batch), (batch block), or (batch block head)."""
    kept = _activations(model, stack, batch, "head" not in missing)
    sites = [block.site for block in stack.blocks]
    streams = [kept[f"{sites[0]}.hook_resid_pre"], *(kept[f"{site}.hook_resid_post"] for site in sites)]
    entries = torch.stack(streams, 1)  # (batch entry d_model)
    logits = head_logits(model, entries.flatten(0, 1), tokens).reshape(*entries.shape[:2], 2)
    cumulative = logits[..., 0] - logits[..., 1]
    found = {"difference": cumulative[:, -1], "cumulative": cumulative}
    if "block" in missing:
        return found
    with torch.enable_grad():
        last = streams[-1].detach().requires_grad_()
        read = head_logits(model, last, tokens, frozen_norm=True)
        (direction,) = torch.autograd.grad((read[:, 0] - read[:, 1]).sum(), last)
    direction = direction.float()  # d difference / d stream, at the final norm's scale of this pass
    found["embedding"] = (streams[0].float() * direction).sum(-1)
    for name, site in _WRITES.items():
        writes = [kept.get(f"{block}.{site}", torch.zeros_like(last)) for block in sites]
        found[name] = torch.einsum("lbd,bd->bl", torch.stack(writes).float(), direction)
    found["block"] = sum(found[name] for name in _WRITES)  # type: ignore[assignment]
    found["rest"] = found["difference"] - found["embedding"] - found["block"].sum(1)
    if "head" not in missing:
        heads = [_heads(model, b, kept[f"{b.site}.attn.hook_z"], direction) for b in stack.blocks]
        found["head"] = torch.stack(heads, 1)
    return {name: value for name, value in found.items() if name not in missing}


def _activations(model: nn.Module, stack: Stack, batch: Prompts, heads: bool) -> dict[str, Tensor]:
    """The stream and all that is written to it, at the position that is read: (batch d_model)."""
    kept: dict[str, Tensor] = {}
    rows = torch.arange(len(batch.at), device=batch.at.device)

    def keep(site: str, tensor: Tensor, mask: Tensor) -> None:
        kept[site] = tensor[rows.to(tensor.device), batch.at.to(tensor.device)].clone()

    wanted = [f"{stack.blocks[0].site}.hook_resid_pre", f"{stack.prefix}.*.hook_resid_post"]
    for block in stack.blocks:
        parts = [(getattr(block, module), _WRITES[name]) for name, module in _MODULES.items()]
        parts += [(block.attention_writer if heads else None, "attn.hook_z")]
        wanted += [f"{block.site}.{site}" for module, site in parts if module is not None]
    with capture(model, wanted, reducer=keep):
        run_base(model, batch.inputs)
    return kept


def _heads(
    model: nn.Module,
    block: Block,
    z: Float[Tensor, "batch head d_head"],
    direction: Float[Tensor, "batch d_model"],
) -> Float[Tensor, "batch head"]:
    """What each head's z adds along `direction` through the writer, and a norm after it (Gemma 2, OLMo 2)."""
    assert block.attention_writer is not None and block.attention_out is not None
    writer = model.get_submodule(block.attention_writer)
    after = model.get_submodule(block.attention_out) if block.attention_out in block.norms else None
    with torch.enable_grad():
        value = z.detach().requires_grad_()
        out = writer.forward(value.flatten(1)[:, None])[:, 0]  # forward: beside the pass, its hooks stay out
        out = out if after is None else frozen(after, out)
        (pull,) = torch.autograd.grad((out.float() * direction).sum(), value)
    return (pull.float() * value.detach().float()).sum(-1)
