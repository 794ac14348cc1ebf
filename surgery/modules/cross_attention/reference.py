"""The reference words of a cross-attention module: how a model reads them, and their last hidden states H_b."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import anatomy
from hooks import trace_modules as probe
from hooks.activations import model_inputs, run_base
from hooks.errors import Note
from hooks.tokens import added, word_pieces
from surgery.errors import SurgeryError
from surgery.modules.cross_attention.modeling_crawd import CrossAttention

NAME = "cross_attention"  # of the module as a child of the model: its parameters are cross_attention.query.weight ...


@dataclass(frozen=True)
class Reference:
    """The reference sequence b as the model reads it: ids; of them the places that are keys; the word of each key."""

    ids: tuple[int, ...]
    places: tuple[int, ...]
    words: tuple[str, ...]


class ReferenceRun:
    """Runs the reference words through a model."""

    def __init__(self, core: PreTrainedModel, reference: Reference) -> None:
        self.reference = reference
        self._core, self._inputs = core, model_inputs(core, torch.tensor([reference.ids]))
        self._place = place_of(core, 0)  # found now: the model's parts are looked for again when it gets the module
        self._seen: list[tuple[int, int]] | None = None

    def states(self) -> Float[Tensor, "token d_model"]:
        """H_b of the model's present weights, in its present mode."""
        return last_states(self._core, self._inputs, self._place)[0, list(self.reference.places)]

    def renew(self, known: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_model"]:
        """With gradients on H_b as training sees it; else in evaluation mode, and `known` while no weight changed."""
        if torch.is_grad_enabled():
            self._seen = None
            return self.states()
        # A weight changes in place (an optimizer's step) or is exchanged for another tensor (`trainable`).
        named = self._core.named_parameters()
        now = [(p.data_ptr(), p._version) for name, p in named if not name.startswith(NAME + ".")]
        if now == self._seen:
            return known
        self._seen = now
        with probe.unchanged(self._core):
            return self.states()


def read_reference(tokenizer: PreTrainedTokenizerBase, words: Sequence[str], *, decoder: bool) -> Reference:
    """The reference sequence: the words as they follow other text, between the tokenizer's special tokens.

    decoder: a tokenizer that puts nothing in front gets its start token (bos, cls or eos) there all the same.
    Raises SurgeryError for no words, an unknown word, or one that is named twice.
    """
    if isinstance(words, str) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise SurgeryError(f"reference: got {words!r}, expected a list of at least one word, such as ['he', 'she']")
    first, last = map(list, added(tokenizer))
    starts = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "cls", "eos")]
    if decoder and not first:
        first = [token for token in starts if token is not None][:1]
    ids, places, owners = list(first), list[int](), list[str]()
    for word in (word.strip() for word in words):
        pieces = list(word_pieces(tokenizer, word))
        if not pieces or tokenizer.unk_token_id in pieces:
            raise SurgeryError(f"reference: the tokenizer does not know {word!r}; choose another word")
        if word in owners:
            raise SurgeryError(f"reference: {word!r} is named twice; name each word once")
        if len(pieces) > 1:
            shown = ", ".join(tokenizer.convert_ids_to_tokens(pieces))
            warnings.warn(f"reference: {word!r} is {len(pieces)} tokens ({shown}); each is a key", Note, stacklevel=3)
        places += range(len(ids), len(ids) + len(pieces))
        owners += [word] * len(pieces)
        ids += pieces
    return Reference(tuple(ids + last), tuple(places), tuple(owners))


def last_states(model: PreTrainedModel, inputs: Mapping[str, Any], place: str) -> Float[Tensor, "batch pos d_model"]:
    """What `place` (see `place_of`) hands on in one pass over `inputs`, in the model's present mode, module off."""
    found: list[Tensor] = []

    def take(_: nn.Module, args: Any, output: Any) -> None:
        found.append(output if isinstance(output, Tensor) else output[0])

    module = model._modules.get(NAME)
    handle = model.get_submodule(place).register_forward_hook(take)
    try:
        if isinstance(module, CrossAttention):
            module.enabled = False
        run_base(model, inputs)
    finally:
        handle.remove()
        if isinstance(module, CrossAttention):
            module.enabled = True
    return found[-1]


def place_of(model: PreTrainedModel, stack: int = -1) -> str:
    """The module that returns a stack's last hidden states: its final norm, or the last block where there is none."""
    part = anatomy.find(model).stacks[stack]
    return part.final_norm or part.blocks[-1].name
