"""The weights of a model's cross-attention module for one text, as CrAWD's Figure 4 shows them."""

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hooks import trace_modules as probe
from hooks.activations import model_inputs
from hooks.reference_attention import CrossWeights
from hooks.tokens import reads_whole, text_tokens
from surgery.errors import SurgeryError
from surgery.modules.cross_attention.modeling_crawd import CrossAttention
from surgery.modules.cross_attention.reference import NAME, last_states, place_of, read_reference


def cross_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    words: Sequence[str] | None = None,
    *,
    decayed: bool = False,
) -> CrossWeights:
    """beta of the module in `model` for one text: (1 head pos word), for `hooks.plots.cross_attention_map`.

        hooks.plots.cross_attention_map(cross_weights(model, tokenizer, "The doctor said that"))

    words: other reference words than the module's own, run through the model now. A word's tokens are summed.
    decayed: after Eq. 2 instead of before; the rows then no longer sum to 1. Of encoder-decoders the text is what
    the decoder has written.

    Raises SurgeryError for a model without a module, and for words as `attached` does.
    """
    core = probe.pretrained(model)
    module = core._modules.get(NAME)
    if not isinstance(module, CrossAttention):
        raise SurgeryError(f"{type(core).__name__}: it has no cross-attention module; attach one first")
    ids = torch.tensor(text_tokens(tokenizer, [text], closed=reads_whole(core)))
    with probe.unchanged(core):
        inputs = model_inputs(core, ids)
        if core.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        stream = last_states(core, inputs, place_of(core))
        keys, owners = module.states(), module.words
        if words is not None:
            reference = read_reference(tokenizer, words, decoder=not core.config.is_encoder_decoder)
            found = last_states(core, model_inputs(core, torch.tensor([reference.ids])), place_of(core, 0))
            keys, owners = found[0, list(reference.places)], reference.words
        beta = module.weights(stream, keys)
        beta = module.decayed(beta) if decayed else beta
    names = list(dict.fromkeys(owners))
    belongs = torch.tensor([[float(owner == name) for name in names] for owner in owners]).to(beta)
    return CrossWeights((beta @ belongs).cpu(), tuple(tokenizer.convert_ids_to_tokens(ids[0].tolist())), tuple(names))
