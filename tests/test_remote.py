"""Instruments on models of nnsight: in their process, and rehearsed as if on the remote service."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import hooks
from hooks import HookError

TEXTS = ["The nurse said that", "The driver said that"]
METHODS: dict[str, Callable[..., Any]] = {
    "bmi": lambda model, tokenizer, **o: hooks.bmi(model, tokenizer, TEXTS, **o).raw,
    "lens": lambda model, tokenizer, **o: hooks.lens(model, tokenizer, TEXTS, **o).ranking(),
    "patch": lambda model, tokenizer, **o: hooks.patch(model, tokenizer, TEXTS, TEXTS[::-1], **o).ranking(),
    "attribution_patch": lambda model, tokenizer, **o: hooks.attribution_patch(
        model, tokenizer, TEXTS, TEXTS[::-1], **o
    ).ranking(),
    "attention_to": lambda model, tokenizer, **o: hooks.attention_to(
        model, tokenizer, TEXTS, ["nurse", "driver"], **o
    ).ranking(),
    "cross_attention": lambda model, tokenizer, **o: hooks.cross_attention(
        model, tokenizer, TEXTS, ["he", "she"], **o
    ).ranking(),
}


@pytest.fixture(scope="module")
def pair(checkpoint: Path) -> tuple[Any, Any, Any]:
    import nnsight
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    wrapped = nnsight.TransformersModel(str(checkpoint), task="text-generation", dispatch=True, dtype=torch.float32)
    plain = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    return wrapped, plain, PreTrainedTokenizerFast.from_pretrained(checkpoint)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("remote", [False, "local"])
def test_the_same_ranking_where_the_model_is(pair: Any, method: str, remote: bool | str) -> None:
    wrapped, plain, tokenizer = pair
    expected = METHODS[method](plain, tokenizer)
    weights = {name: value.clone() for name, value in wrapped._module.state_dict().items()}
    found = METHODS[method](wrapped, tokenizer, remote=remote)
    np.testing.assert_array_equal(found.scores, expected.scores)
    assert all(torch.equal(weights[name], value) for name, value in wrapped._module.state_dict().items())


def test_nothing_stays_registered_for_shipping(pair: Any) -> None:
    from cloudpickle import list_registry_pickle_by_value

    before = set(list_registry_pickle_by_value())
    METHODS["bmi"](pair[0], pair[2], remote="local")
    assert set(list_registry_pickle_by_value()) == before


def test_remote_needs_a_model_of_nnsight(pair: Any) -> None:
    with pytest.raises(HookError, match="bmi: remote=True needs an nnsight model that names its checkpoint"):
        hooks.bmi(pair[1], pair[2], TEXTS, remote=True)
