"""What an MLP would have to write at a subject for a word to follow: DAMA's values, by gradient descent."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks.tokens import text_tokens
from surgery.edits.erasure.closed_form import dama
from surgery.edits.erasure.folding import written
from surgery.errors import SurgeryError
from surgery.forward.batching import batches_for, pad
from surgery.modules.projection import Projection


@dataclass(frozen=True)
class Search:
    """DAMA's settings of the search for a value (the authors' file for LLaMA 7B)."""

    steps: int = 20
    rate: float = 0.5
    decay: float = 0.5
    """Of the value's squared length over that of what was written."""
    kl: float = 0.0625
    """Weight of the KL, at the end of the essence prompt ("The nurse is a"), to what the model said there."""
    clamp: float = 4.0
    """The longest value, in lengths of what was written."""


@dataclass(frozen=True)
class Subjects:
    """Prompts with where their subject ends, and prompts that say what the subject is, with the same."""

    ids: tuple[tuple[int, ...], ...]
    ends: Int[Tensor, " n"]
    essence: tuple[tuple[int, ...], ...]
    essence_ends: Int[Tensor, " n"]


def subjects(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], names: Sequence[str]) -> Subjects:
    """The texts encoded; the subject's last token is that before which text and the part behind the name differ.

    Raises ``SurgeryError`` for a text without its name.
    """
    essence = [f"The {name} is a" for name in names]
    found = []
    for lines in (texts, essence):
        starts = []
        for text, name in zip(lines, names, strict=True):
            place = text.lower().find(name.lower())
            if place < 0:
                raise SurgeryError(f"{text!r}: does not hold its subject {name!r}; expected prompts about a subject")
            starts.append(text[: place + len(name)])
        ends = torch.tensor([len(row) - 1 for row in text_tokens(tokenizer, starts)])
        found.append((tuple(text_tokens(tokenizer, lines)), ends))
    (ids, ends), (other, other_ends) = found
    return Subjects(ids, ends, other, other_ends)


def fit_dama(
    model: PreTrainedModel, given: Subjects, words: Sequence[int], *, rank: int, search: Search | None = None
) -> Callable[[str, Tensor], Projection]:
    """What ``surgery.edits.erasure.erase`` asks for each place: DAMA's projection of what is written at the subject.

    Two words. What differs from the authors' code: no sentences are put before the prompts, what enters the matrix is
    not whitened by Wikipedia's covariance, and the value is sought in every block that is edited.

    Raises ``SurgeryError`` for any other number of words.
    """
    if len(words) != 2:
        raise SurgeryError(f"dama: got {len(words)} words, expected two")

    def fit(name: str, _: Tensor) -> Projection:
        at_subject = written(model, given.ids, name, given.ends)
        first, second = (values(model, given, name, word, search or Search()) for word in words)
        return dama(at_subject, first - second, rank)

    return fit


def values(model: PreTrainedModel, given: Subjects, name: str, word: int, search: Search) -> Float[Tensor, "n width"]:
    """What would have to be added to what the module ``name`` writes at each subject for ``word`` to come next.

    The loss: -log P(word), the essence prompt's KL, and the value's length, each prompt for itself.
    """
    rows: list[Tensor | None] = [None] * len(given.ids)
    asked = [param for param in model.parameters() if param.requires_grad]
    for param in asked:
        param.requires_grad_(False)
    try:
        for chosen in batches_for(model, given.ids):
            for row, value in zip(chosen, _search(model, given, name, word, search, list(chosen)), strict=True):
                rows[row] = value
    finally:
        for param in asked:
            param.requires_grad_(True)
    return torch.stack([row for row in rows if row is not None])


def _search(
    model: PreTrainedModel, given: Subjects, name: str, word: int, search: Search, chosen: list[int]
) -> Float[Tensor, "n width"]:
    module = model.get_submodule(name)
    main, essence = pad(given.ids, chosen, model.device), pad(given.essence, chosen, model.device)
    ends, other_ends = given.ends[chosen].to(model.device), given.essence_ends[chosen].to(model.device)
    seen: list[Tensor] = []

    def logs(batch: Any, at: Tensor, value: Tensor | None) -> Tensor:
        def add(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            flat = output.reshape(len(chosen) * batch.ids.shape[1], -1)
            where = torch.arange(len(chosen), device=at.device) * batch.ids.shape[1] + at
            if value is None:
                seen.append(flat[where].detach())
                return output
            return flat.index_add(0, where, value.to(flat)).reshape(output.shape)

        handle = module.register_forward_hook(add)
        try:
            return batch.at_last(model(**batch.inputs(), use_cache=False).logits).float().log_softmax(-1)
        finally:
            handle.remove()

    with torch.no_grad():
        logs(main, ends, None)
        before = logs(essence, other_ends, None)
    length = seen[0].float().norm(dim=-1)
    with torch.enable_grad():
        value = torch.zeros(len(chosen), seen[0].shape[-1], device=model.device, requires_grad=True)
        optimizer = torch.optim.Adam([value], lr=search.rate)
        for _ in range(search.steps):
            optimizer.zero_grad()
            loss = -logs(main, ends, value)[:, word]
            after = logs(essence, other_ends, value)
            loss = loss + search.kl * (before.exp() * (before - after)).sum(-1)
            loss = loss + search.decay * value.square().sum(-1) / length.clamp(min=1e-6)
            loss.sum().backward()
            optimizer.step()
            with torch.no_grad():
                value.mul_((search.clamp * length / value.norm(dim=-1).clamp(min=1e-12)).clamp(max=1.0)[:, None])
    return value.detach().double().cpu()
