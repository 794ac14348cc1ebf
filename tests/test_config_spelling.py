"""A config.json as transformers 4 wrote it, as transformers 5 holds it and writes it again: one architecture."""

import copy
import os

import deltakit as kit
import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import logging

from surgery import SurgeryError
from surgery import delta as deltas
from surgery.apply import apply
from surgery.delta.config import resolved
from surgery.files.architecture import differences, facts

SAMPLE = (
    "llama",
    "gpt2",
    "phi",
    "stablelm",
    "glm4",
    "gemma2",
    "gemma3",
    "qwen2_vl",
    "mixtral",
    "gpt_oss",
    "modernbert",
)
EVERY = bool(os.environ.get("SURGERY_EVERY_FAMILY"))


def old_spelling(config):
    """What transformers 4 wrote of the same model: rotary parameters beside rope_theta, torch_dtype."""
    old = {key: old_spelling(value) if key == "text_config" else value for key, value in config.items()}
    rope = copy.deepcopy(old.get("rope_parameters"))
    if isinstance(rope, dict) and not any(isinstance(value, dict) for value in rope.values()):
        del old["rope_parameters"]
        for name in ("rope_theta", "partial_rotary_factor"):
            if rope.get(name) is not None:
                old[name] = rope.pop(name)
        rope["type"] = rope.pop("rope_type", "default")
        old["rope_scaling"] = None if rope["type"] == "default" else rope
    if "dtype" in old:
        old["torch_dtype"] = old.pop("dtype")
    return old


def spellings(kind):
    """{how it is written: the config}, of the family's own defaults; {} where it has none."""
    try:
        config = CONFIG_MAPPING[kind]()
        whole = config.to_dict()
        CONFIG_MAPPING[kind].from_dict(copy.deepcopy(whole))
    except Exception:  # a family whose config needs to be told what it is made of
        return {}
    return {
        "whole": whole,
        "again": config.to_diff_dict() | {"model_type": whole["model_type"]},
        "old": old_spelling(whole),
    }


@pytest.fixture
def quiet():
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    yield
    logging.set_verbosity(level)


def wrong(kind):
    """What two spellings of one config are said to differ in."""
    found = []
    written = spellings(kind)
    for base, config in written.items():
        known, unsaid = resolved(config)
        for name, target in written.items():
            found += [(kind, base, name, odd) for odd in differences(known, facts(target), unsaid)]
        found += [(kind, base, "live", odd) for odd in differences(known, facts(written["whole"]))]
    return found


@pytest.mark.parametrize("kind", SAMPLE)
def test_one_architecture_in_every_spelling(kind, quiet):
    assert spellings(kind) and wrong(kind) == []


@pytest.mark.skipif(not EVERY, reason="three minutes: SURGERY_EVERY_FAMILY=1 asks for it")
def test_every_family_in_every_spelling(quiet):
    assert [odd for kind in CONFIG_MAPPING for odd in wrong(kind)] == []


@pytest.mark.parametrize("kind", SAMPLE)
def test_a_change_is_seen_in_every_spelling(kind, quiet):
    written = spellings(kind)
    known, unsaid = resolved(written["old"])
    for name in set(known) - {"tied", "vocab_size", "model_type", "activation", "rope"}:
        assert differences(known, known | {name: known[name] + 1}, unsaid), (kind, name)
    if isinstance(known.get("rope"), dict) and "rope_theta" in known["rope"]:
        for target in (written["old"], written["whole"]):
            inner = target.get("text_config")
            stated = copy.deepcopy(inner or target) | {"rope_theta": 12345.0}
            if stated.get("rope_parameters"):
                stated["rope_parameters"]["rope_theta"] = 12345.0
            changed = target | {"text_config": stated} if inner else stated
            assert differences(known, facts(changed), unsaid), kind


def test_what_a_target_leaves_unsaid_is_its_family_s_default(tmp_path):
    """Llama means 10000 by an absent rope_theta, and as many key-value heads as heads."""
    longer = kit.edit(kit.save(tmp_path / "longer", kit.weights(), rope_theta=500000.0))
    silent = kit.save(tmp_path / "silent", kit.weights(), rope_theta=None)
    with pytest.raises(SurgeryError, match=r"rope: the delta's base has rope_theta 500000.0.*rope_theta 10000"):
        apply(longer, silent, tmp_path / "out")
    plain = kit.edit(kit.save(tmp_path / "plain", kit.weights()))
    with pytest.raises(SurgeryError, match="kv_heads: the delta's base has 2, the target 4"):
        apply(plain, kit.save(tmp_path / "heads", kit.weights(), num_key_value_heads=None), tmp_path / "out")
    assert apply(plain, silent, tmp_path / "out").notes == ()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"rope_theta": 1e6}, "rope_theta 1000000"),
        ({"attention_bias": True}, "attention_bias: False, then True"),
        ({"rms_norm_eps": 1e-6}, "norm_eps"),
        ({"hidden_act": "gelu"}, "activation"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "factor 2.0"),
    ],
)
def test_diff_refuses_a_child_whose_config_computes_something_else(tmp_path, change, text):
    base = kit.save(tmp_path / "base", kit.weights())
    child = kit.save(tmp_path / "child", kit.weights(seed=1), **change)
    with pytest.raises(SurgeryError, match=f"another model.*{text}.*put its config.json into a copy of the base"):
        deltas.diff(base, child)


def test_diff_takes_the_same_config_in_other_words(tmp_path):
    base = kit.save(tmp_path / "base", kit.weights())
    words = {"torch_dtype": "bfloat16", "use_cache": False, "eos_token_id": 3, "attention_dropout": 0.1}
    words |= {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}
    assert deltas.diff(base, kit.save(tmp_path / "child", kit.weights(seed=1), **words)).shapes


def test_a_family_that_ties_without_saying_so(tmp_path):
    """Gemma files leave tie_word_embeddings out; the class ties."""
    tensors = kit.weights(tie_word_embeddings=True)
    settings = {"model_type": "gemma", "architectures": ["GemmaForCausalLM"], "tie_word_embeddings": None}
    base = kit.save(tmp_path / "base", tensors, **settings)
    delta = kit.edit(base, (kit.EMBED,))
    assert delta.metadata["architecture"]["tied"] is True and "tied" not in facts({"model_type": "gemma"})
    assert apply(delta, base, tmp_path / "out").changed
