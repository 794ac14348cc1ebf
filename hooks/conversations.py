"""Chats as prompts, and the activations of a whole generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hooks import trace_modules as probe
from hooks.activations import capture, model_inputs
from hooks.display import Readable
from hooks.errors import HookError
from hooks.tokens import text_tokens


def chat(tokenizer: Any, messages: str | Sequence[Mapping[str, str]], *, answer: str = "") -> str:
    """A chat as the model's own template writes it, up to where the assistant begins, and `answer` behind that.

        prompts = [hooks.chat(tokenizer, f"Tell me about the {name}.", answer="Sure:") for name in ("nurse", "guard")]

    messages: what the user says, or a list of {"role", "content"}. What comes out is a prompt for every instrument
    here: a BOS that the template writes is not put before it twice. Raises HookError for a tokenizer without template.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise HookError(
            f"chat: {type(tokenizer).__name__} has no chat template (a base model's); give plain text, or set "
            "tokenizer.chat_template"
        )
    said = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return str(tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)) + answer


@dataclass(frozen=True, eq=False, repr=False)
class Generated(Readable):
    """A generation: its tokens (prompt and what came), how many are the prompt's, and site -> activations (pos ...).

    The activations at position t are those from which token t + 1 was chosen.
    """

    tokens: tuple[int, ...]
    prompt: int
    text: str
    activations: Mapping[str, Tensor]


def capture_generation(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    sites: str | Iterable[str],
    *,
    max_new_tokens: int = 20,
    **how: Any,
) -> Generated:
    """Generate from `prompt`, and the activations at `sites` of every step, the prompt's included.

        found = hooks.capture_generation(model, tokenizer, "The nurse said", "blocks.*.hook_resid_post")
        found.activations["blocks.3.hook_resid_post"]  # (pos d_model)

    The likeliest token is taken unless `how`, keyword arguments of `generate`, say otherwise. The activations come
    from one pass over the whole text, which in a causal model is what each step saw. Raises HookError for a model that
    does not generate from its prompt (encoder-decoders, masked models), and as `capture` does.
    """
    core: Any = probe.pretrained(model)
    if core.config.is_encoder_decoder or not core.can_generate():
        raise HookError(f"capture_generation: {type(core).__name__} does not go on with its prompt; use capture")
    ids = list(text_tokens(tokenizer, [prompt])[0])
    given = torch.tensor([ids], device=core.device)
    with probe.unchanged(model):
        made = core.generate(
            input_ids=given,
            attention_mask=torch.ones_like(given),
            max_new_tokens=max_new_tokens,
            **({"do_sample": False} | how),
        )[0]
        whole = made[None]
        with torch.no_grad(), capture(model, sites) as store:
            model(**model_inputs(model, {"input_ids": whole, "attention_mask": torch.ones_like(whole)}))
    text = tokenizer.decode(made[len(ids) :], skip_special_tokens=True)
    return Generated(tuple(made.tolist()), len(ids), text, {site: tensor[0] for site, tensor in store.items()})
