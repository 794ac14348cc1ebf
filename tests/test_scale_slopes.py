"""Derivatives of answers by the scales of a delta's parts, against central differences of the plain forward pass."""

from typing import Any

import numpy as np
import pytest
import torch
from families import build, state
from torch import Tensor, nn

from surgery.errors import SurgeryError
from surgery.forward.next_token import next_words
from surgery.forward.scale_slopes import Part, scales_in, word_slopes

IDS = [(5, 9, 11), (7, 8), (5, 9, 12, 40, 3), (6,), (20, 21, 22, 23)]
WORDS = [30, 31, 77]
STEP = 1e-3


def parts_of(model: nn.Module, *names: str) -> list[Part]:
    """A random direction of each named parameter; the last two names are one part."""
    torch.manual_seed(3)
    named = dict(model.named_parameters(remove_duplicate=False))
    each = [{name: 0.1 * torch.randn_like(named[name])} for name in names]
    return [*each[:-2], each[-2] | each[-1]]


def logs_at(model: Any, part: Part, scale: float) -> list[Tensor]:
    """Log-probabilities of every next token, each prompt alone, with the parameters moved by hand."""
    named = dict(model.named_parameters(remove_duplicate=False))
    kept = {name: named[name].detach().clone() for name in part}
    with torch.no_grad():
        for name, direction in part.items():
            named[name].add_(scale * direction)
        found = [model(input_ids=torch.tensor([row])).logits[0].log_softmax(-1) for row in IDS]
        for name, value in kept.items():
            named[name].copy_(value)
    return found


FAMILIES = {
    "llama": (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.2.post_attention_layernorm.weight",
    ),
    "gpt2": (
        "transformer.h.1.attn.c_attn.weight",
        "transformer.h.2.mlp.c_proj.weight",
        "transformer.h.2.mlp.c_proj.bias",
        "transformer.h.1.ln_1.bias",
    ),
    "mixtral": (
        "model.layers.1.mlp.experts.gate_up_proj",
        "model.layers.1.mlp.experts.down_proj",
        "model.layers.2.self_attn.v_proj.weight",
        "model.layers.2.post_attention_layernorm.weight",
    ),
}
OUTSIDE = ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.up_proj.weight")


@pytest.mark.parametrize("family", [*FAMILIES, "outside", "tied"])
def test_slopes_are_those_of_the_plain_pass(family: str) -> None:
    """From the kept stream and with every cut, and (what lies outside of the blocks) through the whole model."""
    inside = family in FAMILIES
    model: Any = build(family if inside else "llama", tie_word_embeddings=family == "tied").eval()
    model = model if family == "mixtral" else model.double()  # torch's product of all experts takes none
    names = FAMILIES.get(family, OUTSIDE)
    parts, before = parts_of(model, *names), state(model)
    prefix = next_words(model, IDS, WORDS, keep=[1]).prefixes[1] if inside else None
    done: list[int] = []
    values, slopes = word_slopes(model, IDS, WORDS, parts, prefix=prefix, step=done.append)
    after = state(model)
    assert [key for key in before if before[key] != after[key]] == []
    assert sum(done) == len(IDS) and slopes.shape == (len(parts), len(IDS), len(WORDS))

    plain = logs_at(model, {}, 0.0)
    assert values == pytest.approx(np.stack([row[-1, WORDS].numpy() for row in plain]), abs=1e-5)
    for number, part in enumerate(parts):
        up, down = (logs_at(model, part, sign * STEP) for sign in (1, -1))
        words = [((a - b) / (2 * STEP))[-1, WORDS].numpy() for a, b in zip(up, down, strict=True)]
        assert np.abs(words).max() > 1e-3  # the part says something
        assert slopes[number] == pytest.approx(np.stack(words), rel=1e-2, abs=2e-4), names[number]


def test_no_part_is_only_a_look() -> None:
    model: Any = build("llama").eval()
    values, slopes = word_slopes(model, IDS, WORDS, [])
    assert slopes.shape == (0, len(IDS), len(WORDS))
    assert np.exp(values) == pytest.approx(next_words(model, IDS, WORDS).probabilities, rel=1e-4)


def test_what_is_read_past_its_module_is_refused() -> None:
    """Its slope would be 0 without a word."""
    model: Any = build("llama").eval()
    model.model.layers[2].mlp.unused = nn.Linear(2, 2)
    with pytest.raises(SurgeryError, match=r"mlp\.unused\.weight: no module"):
        word_slopes(model, IDS[:2], WORDS, [{"model.layers.2.mlp.unused.weight": torch.ones(2, 2)}])


def test_a_module_inside_another_that_moves_is_refused() -> None:
    """Forward differentiation has one level: what it gives inside another one would be wrong."""

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(2)), nn.Linear(2, 2)

    outer = nn.ModuleDict({"outer": Outer()})
    parts = [{"outer.gain": torch.ones(2)}, {"outer.inner.weight": torch.ones(2, 2)}]
    with pytest.raises(SurgeryError, match="outer: "), scales_in(outer, parts):
        pass
