"""Logits of a few words from a residual stream, through the model's own final norm and head."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from hooks import trace_modules as probe
from hooks.activations import model_inputs, run_base
from hooks.anatomy import find
from hooks.batching import positions_limit
from hooks.errors import HookError
from hooks.forward_pass import last_token
from hooks.interventions import edit
from hooks.sites import normalize
from hooks.streaming import Text, token_batches
from hooks.tokens import word_pieces

Changes = dict[str, Callable[[Tensor], Tensor]]  # of `hooks.edit`


@dataclass(frozen=True)
class Prompts:
    """A batch of prompts: their places in the data, the model's inputs, and where the next word is read.

    at: index of that position in the last stack's stream (the last token, or the mask token of a masked
    model); ends: index of each prompt's last real token in the text.
    """

    places: tuple[int, ...]
    inputs: dict[str, Tensor]
    at: Int[Tensor, " batch"]
    ends: Int[Tensor, " batch"]


def word_tokens(tokenizer: Any, words: Sequence[str | int]) -> list[int]:
    """The one token of each word as it follows other text, that is with its leading space; ids stay ids.

    Raises HookError for a word that is several tokens, naming them, and for two words of the same token.
    """
    found: list[int] = []
    for word in words:
        if isinstance(word, str):
            if tokenizer is None:
                raise HookError(f"word {word!r} needs a tokenizer, got None; pass one, or a token id")
            pieces = word_pieces(tokenizer, word)
            if len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id:
                raise HookError(
                    f"word {word!r}: the tokenizer splits ' {word}' into {len(pieces)} tokens "
                    f"{tokenizer.convert_ids_to_tokens(list(pieces))}; expected one known token; choose another word"
                )
            word = pieces[0]
        if word in found:
            raise HookError(f"words {list(words)}: two of them are token {word}; name each word once")
        found.append(int(word))
    return found


def prompts_in_batches(
    model: nn.Module, tokenizer: Any, prompts: Iterable[Text], *, batch_tokens: int, reads: bool = True
) -> Iterator[Prompts]:
    """Token-budget batches with what the model needs to run them; `reads`: a word is read from the output.

    Raises HookError for a prompt longer than a learned position table, and for a prompt to a masked model
    without exactly one mask token, if it `reads`.
    """
    core = probe.pretrained(model)
    limit = positions_limit(model)
    mask_token = getattr(tokenizer, "mask_token_id", None)
    for batch in token_batches(tokenizer, prompts, batch_tokens=batch_tokens, model=model):
        if limit is not None and batch.input_ids.shape[1] > limit:
            raise HookError(
                f"prompt {batch.places[0]} has {batch.input_ids.shape[1]} tokens; the model has learned "
                f"positions for {limit}: shorten it"
            )
        inputs = model_inputs(model, {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask})
        ends = last_token(inputs["attention_mask"].bool())
        at = ends
        if core.config.is_encoder_decoder:
            at = torch.full_like(ends, inputs["decoder_input_ids"].shape[1] - 1)
        elif reads and "MaskedLM" in type(core).__name__ and mask_token is not None:
            masks = inputs["input_ids"] == mask_token
            wrong = (masks.sum(1) != 1).nonzero().flatten().tolist()
            if wrong:
                raise HookError(
                    f"prompt {batch.places[wrong[0]]} has {int(masks[wrong[0]].sum())} mask tokens; a masked "
                    f"model reads the word at exactly one {tokenizer.mask_token}"
                )
            at = masks.int().argmax(1)
        yield Prompts(batch.places, inputs, at, ends)


def logit_difference(model: nn.Module, batch: Prompts, tokens: list[int], changes: Changes) -> Float[Tensor, " batch"]:
    """logit(first word) - logit(second) at the position that is read, with `changes` made on the way."""
    kept: list[Tensor] = []
    rows = torch.arange(len(batch.at), device=batch.at.device)

    def keep(tensor: Tensor) -> Tensor:
        kept[:] = [tensor[rows.to(tensor.device), batch.at.to(tensor.device)]]
        return tensor

    # the reading edit is entered first: a later one at the same site runs before it
    with edit(model, {f"{find(model).blocks[-1].site}.hook_resid_post": keep}), edit(model, changes):
        run_base(model, batch.inputs)
    logits = head_logits(model, kept[0], tokens)
    return logits[:, 0] - logits[:, 1]


def check_head(model: nn.Module, batch: Prompts, tokens: Sequence[int]) -> None:
    """Raises HookError where `head_logits` of the stream is not what the model itself answers to the first prompt."""
    core = probe.pretrained(model)
    kept: list[Tensor] = []
    first = {key: value[:1] for key, value in batch.inputs.items()}
    at = int(batch.at[0])

    def keep(tensor: Tensor) -> Tensor:
        kept[:] = [tensor[:1, at]]
        return tensor

    with torch.no_grad():
        with edit(model, {f"{find(model).blocks[-1].site}.hook_resid_post": keep}):
            run_base(model, first)
        if not bool(kept[0].isfinite().all()):
            return  # the measurement names the site
        try:
            read = head_logits(model, kept[0], tokens)[0]
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError) as error:
            reason = str(error).strip().splitlines()
            raise HookError(
                f"{type(core).__name__} does not run from the stream after its last block ({type(error).__name__}: "
                f"{reason[0] if reason else 'no reason'}); no word can be read along the stream of this family"
            ) from error
        own = core(**first, **({"use_cache": False} if "use_cache" in probe.forward_arguments(core) else {})).logits
    right = own[0, at, list(tokens)].to(read.dtype)
    bound = 1e-3 if own.dtype == torch.float32 else 0.05
    if not float((read - right).abs().max() / own[0, at].abs().max().clamp(min=1e-30)) <= bound:
        raise HookError(
            f"{type(core).__name__}: logits read from the stream after the last block are {read.tolist()}, the model's "
            f"own {right.tolist()}: its head reads something else as well, so no word can be read along the stream"
        )


def head_logits(
    model: nn.Module,
    stream: Float[Tensor, "rows d_model"],
    tokens: Sequence[int],
    *,
    frozen_norm: bool = False,
) -> Float[Tensor, "rows words"]:
    """Logits of `tokens` for streams leaving the last block, as the model itself computes them; at least float32.

    The model's own forward pass runs over one position with its blocks handing on `stream`, so everything
    behind the last block is the real thing: norm, projection, transform, scaling and soft cap. Only the rows
    of the head for `tokens` are multiplied. frozen_norm: gradients see the final norm with its scale held
    fixed (direct logit attribution); values are the same.

    Call it outside of `edit`: the blocks' hooks would see the one position. Raises HookError for a model
    without a language-model head.
    """
    anatomy, core = find(model), probe.pretrained(model)
    if anatomy.head is None:
        raise HookError(
            f"{type(core).__name__} has no language-model head; a contrast of two words needs one: load the "
            "checkpoint with AutoModelForCausalLM, AutoModelForMaskedLM or AutoModelForSeq2SeqLM"
        )
    head: Any = model.get_submodule(anatomy.head)
    final = anatomy.blocks[-1].name

    def run(rows: bool) -> Tensor:
        with ExitStack() as stack:
            for block in (b for s in anatomy.stacks for b in s.blocks):
                give: Callable[..., Tensor] = _entering
                if block.name == final:
                    give = lambda *args, **kwargs: stream[:, None].to(_entering(*args, **kwargs).device)  # noqa: E731
                stack.enter_context(_forward(model.get_submodule(block.name), give, block.returns_tuple))
            if frozen_norm and anatomy.final_norm is not None:
                norm = model.get_submodule(anatomy.final_norm)
                stack.callback(norm.register_forward_hook(lambda m, args, out: frozen(m, args[0])).remove)
            if rows:
                weight = head.weight[list(tokens)]
                bias = None if head.bias is None else head.bias[list(tokens)]
                stack.enter_context(_forward(head, lambda x: functional.linear(x, weight, bias), False))
            one = torch.zeros(len(stream), 1, dtype=torch.long)
            accepted = probe.forward_arguments(core)
            cache = {"use_cache": False} if "use_cache" in accepted else {}
            logits = core(**model_inputs(model, one), **cache).logits[:, -1]
        if logits.shape[-1] != len(tokens):  # MobileBERT takes its head's weights without calling it
            logits = logits[:, list(tokens)]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    if (
        type(head) is nn.Linear
        and head.weight.device.type != "meta"
        and "final_logits_bias" not in dict(core.named_buffers())
    ):  # BART adds a bias over the whole vocabulary to what its head returns
        try:
            return run(rows=True)
        except RuntimeError:  # and ESM a bias that is no buffer: shapes differ
            return run(rows=False)
    return run(rows=False)


def _entering(*args: Any, **kwargs: Any) -> Tensor:
    """The stream among a block's arguments."""
    tensor = probe.first_tensor(args, kwargs)
    if tensor is None:
        raise HookError("a block received no tensor; expected the residual stream")
    return tensor


def frozen(norm: nn.Module, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... d_model"]:
    """`norm(x)`, where gradients see only the linear map that the norm is at its present scale."""

    def unit(tensor: Tensor) -> Tensor:
        return normalize(norm, tensor.reshape(1, -1, tensor.shape[-1])).float().reshape(tensor.shape)

    def centred(tensor: Tensor) -> Tensor:  # LayerNorm maps a constant to zero, an RMS norm does not
        return tensor.float() - tensor.float().mean(-1, keepdim=True) if layer_norm else tensor.float()

    with torch.no_grad():
        value = norm.forward(x)  # forward: beside the model's own pass, whose hooks must not see it
        signs = torch.ones_like(x.reshape(-1, x.shape[-1])[:1])
        layer_norm = bool(unit(signs).abs().max() < 0.5)
        signs[:, 1::2] = -1.0
        weight = (norm.forward(signs) - norm.forward(torch.zeros_like(signs))).float() / unit(signs)
        scale = centred(x).norm(dim=-1, keepdim=True) / unit(x).norm(dim=-1, keepdim=True).clamp(min=1e-30)
    linear = (weight[0] * centred(x) / scale).to(value.dtype)
    return value + (linear - linear.detach())


@contextmanager
def _forward(module: nn.Module, replacement: Callable[..., Tensor], as_tuple: bool) -> Iterator[None]:
    """Replace `module.forward` on this one object, and put back what stood there.

    A block that returns a tuple runs, for what it hands on beside the stream (T5: position biases).
    """
    own = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = replacement(*args, **kwargs)
        return (out, *own(*args, **kwargs)[1:]) if as_tuple else out

    with forward_as(module, forward):
        yield


@contextmanager
def forward_as(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Inside, this one module runs ``forward``; afterwards what stood there stands there again."""
    had, before = "forward" in module.__dict__, module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if had:
            module.forward = before  # type: ignore[assignment]
        else:
            del module.__dict__["forward"]
