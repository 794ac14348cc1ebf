"""The last position's query alone: where only the next token is asked, the last attention needs no other one."""

from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from hooks import anatomy
from hooks import trace_modules as probe
from hooks.batching import remembered, short_rows, unhooked
from hooks.logit_difference import forward_as
from surgery.forward.batching import Batch


def cut_queries(model: PreTrainedModel, names: list[str], running: list[Batch], stack: ExitStack) -> None:
    """Until ``stack`` closes, the last attention computes the query of each prompt's last position, and repeats it.

    ``names`` are those of the matrices that give it (``queries``).

    So every shape stays as it was: what stands at the other positions is wrong and unused. Keys and values still see
    every position. The same for the product with the keys, where attention is torch's fused one.
    """
    attention = anatomy.find(model).blocks[-1].attention
    if attention is None:
        return

    def cut(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (running[-1].only_last(args[0]), *args[1:])

    def repeat(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        return running[-1].placed(output).expand(-1, running[-1].ids.shape[1], -1)

    for name in names:
        stack.callback(model.get_submodule(name).register_forward_pre_hook(cut).remove)
        stack.callback(model.get_submodule(name).register_forward_hook(repeat).remove)
    module: Any = model.get_submodule(attention)
    whole = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with _LastQuery(running[-1]):
            return whole(*args, **kwargs)

    stack.enter_context(forward_as(module, forward))


def queries(model: PreTrainedModel) -> list[str]:
    """The matrices inside the last attention whose output has no say in the next token but at the last position.

    Those are where the gradient of its logits by the matrix's output is exactly zero at every other position: a query
    or a gate, never a key or a value. A matrix that gives queries, keys and values together is none. Found out once.
    """

    def find() -> list[str]:
        block, seen = anatomy.find(model).blocks[-1], {}
        inside = f"{block.attention}."

        def watch(name: str) -> Any:
            def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
                seen[name] = torch.zeros_like(output, requires_grad=True)
                return output + seen[name]

            return hook

        row = short_rows(model)[0]
        with probe.unchanged(model), unhooked(model), torch.enable_grad(), ExitStack() as stack:
            for name, module in model.named_modules():
                written = f"{name}.".startswith(f"{block.attention_writer}.")  # it, or a LoRA layer's matrices in it
                if name.startswith(inside) and not written and isinstance(module, nn.Linear):
                    stack.callback(module.register_forward_hook(watch(name)).remove)
            ids = torch.tensor([row], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -1]
            if not seen:
                return []
            given = torch.autograd.grad(logits.float().logsumexp(-1), list(seen.values()), allow_unused=True)
        return [
            name
            for name, gradient in zip(seen, given, strict=True)
            if gradient is not None and gradient.ndim == 3 and gradient.shape[1] == len(row)  # (batch, pos, width)
            if gradient[:, -1].any() and not gradient[:, :-1].any()
        ]

    found: list[str] = remembered(model, "queries", find)
    return found


class _LastQuery(TorchFunctionMode):
    """Inside, torch's fused attention gives the last position's output, repeated for all."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()
        self.batch = batch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        called = self._attention if func is scaled_dot_product_attention else func
        return called(*args, **(kwargs or {}))

    def _attention(
        self,
        query: Float[Tensor, "batch head pos d_head"],
        key: Float[Tensor, "batch head pos d_head"],
        value: Float[Tensor, "batch head pos d_head"],
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        **rest: Any,
    ) -> Float[Tensor, "batch head pos d_head"]:
        width = key.shape[-2]
        if is_causal:
            attn_mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
        if attn_mask is not None:
            whole = attn_mask[(None,) * (4 - attn_mask.ndim)].expand(len(query), -1, query.shape[-2], -1)
            attn_mask = self._last(whole)
        one = scaled_dot_product_attention(self._last(query), key, value, attn_mask, dropout_p, **rest)
        return self.batch.placed(one.transpose(1, 2)).transpose(1, 2).expand(-1, -1, query.shape[-2], -1)

    def _last(self, tensor: Tensor) -> Tensor:
        return self.batch.only_last(tensor.transpose(1, 2)).transpose(1, 2)
