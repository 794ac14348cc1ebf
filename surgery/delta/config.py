"""What a checkpoint's config.json means once its family's class has filled in what it leaves unsaid (transformers)."""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from surgery.errors import SurgeryError
from surgery.files.architecture import completed, differences, facts, spelled
from surgery.files.checkpoint_files import CheckpointFiles

# What may differ between two configs of models that compute the same: bookkeeping, special tokens, generation, and
# what only training or the form of the output takes notice of.
_NEUTRAL = re.compile(
    r"^_|dtype$|^architectures$|^transformers_version$|^auto_map$|^model_type$|_token_id$|_token_ids$|^id2label$|^label2id$"
    r"|^num_labels$|^problem_type$|^finetuning_task$|^task_specific_params$|^tokenizer_class$|^prefix$|^name_or_path$"
    r"|dropout|_drop$|pdrop$|^initializer|_init_|_initializer|init_std$|loss|^output_|return_dict|use_cache|cache_implementation"
    r"|gradient_checkpointing|^pretraining_tp$|^torchscript$|^chunk_size_feed_forward$|jitter|^summary_|^vocab_size$"
    r"|^tie_word_embeddings$|^(max|min)_length$|^do_sample$|^early_stopping$|^num_beams$|^temperature$|^top_[kp]$"
    r"|^repetition_penalty$|^length_penalty$|^quantization_config$|^max_position_embeddings$|^n_positions$|^n_ctx$"
    r"|^max_window_layers$|^max_seq_len$|^use_mamba_kernels$|^is_encoder_decoder$"
)
_LENGTH_MATTERS = ("dynamic", "longrope")  # rotary types that look at max_position_embeddings


def resolved(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(facts, unsaid): the facts of a config.json with all defaults of its family, and what the family means by each
    fact where a config of such a model leaves it out.

    A model type that transformers does not know has the facts that its config.json states, and nothing unsaid.
    """
    whole = _whole(config)
    if whole is None:
        return facts(config), {}
    found = completed(facts(config), facts(whole))
    unsaid = {}
    for name in found:
        left_out = None if name == "model_type" else _whole(_without(config, spelled(name)))
        value = facts(left_out).get(name) if left_out is not None else None
        if value is not None:
            unsaid[name] = value
    return found, unsaid


def may_tie(config: Mapping[str, Any]) -> bool:
    """Whether embedding and head of such a model may be one matrix; True also where nothing is known of it."""
    whole = _whole(config) or dict(config)
    inner = whole.get("text_config")
    said = [part.get("tie_word_embeddings") for part in (whole, inner) if isinstance(part, Mapping)]
    said = [value for value in said if value is not None]
    return any(said) or not said


def config_changes(left: CheckpointFiles, right: CheckpointFiles) -> list[str]:
    """What makes the models of two configs compute differently, as `logits_scaling: 1.0, then 8.0`."""
    wholes = _whole(left.config), _whole(right.config)
    if wholes[0] is None or wholes[1] is None:
        texts = {*differences(left.facts, right.facts), *differences(right.facts, left.facts)}
        return sorted(texts)
    if odd := differences(facts(wholes[0]), facts(wholes[1])):
        return odd
    flat = [_flat(whole) for whole in wholes]
    lengths = any(str(value) in _LENGTH_MATTERS for side in flat for key, value in side.items() if "rope_type" in key)
    return [
        f"{key}: {_show(flat[0].get(key))}, then {_show(flat[1].get(key))}"
        for key in sorted(flat[0].keys() | flat[1].keys())
        if flat[0].get(key) != flat[1].get(key)
        and (not _neutral(key) or (lengths and key.endswith("max_position_embeddings")))
    ]


def refuse_other_config(left: CheckpointFiles, right: CheckpointFiles) -> None:
    """Raises: SurgeryError when the two checkpoints' configs describe models that compute differently."""
    found = config_changes(left, right)
    if found:
        raise SurgeryError(
            f"{right.path}: its config.json describes another model than {left.path}'s ({'; '.join(found[:3])}"
            f"{f'; {len(found) - 3} more' if len(found) > 3 else ''}), which a difference of weights cannot hold; put "
            "its config.json into a copy of the base and diff against that"
        )


def _whole(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The config with its family's defaults, or None where transformers does not know the family or refuses it.

    Nobody may change it: each is asked for some thirty times a delta, and is made once.
    """
    return _made(json.dumps(dict(config), sort_keys=True))


@lru_cache(maxsize=256)
def _made(config: str) -> dict[str, Any] | None:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    values = json.loads(config)
    kind = values.pop("model_type", None)
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # a family's advice on its settings, once for each of them
    try:
        return CONFIG_MAPPING[kind].from_dict(values).to_dict() if kind else None
    except Exception:  # whatever a class makes of a config that lacks what it needs; the stated facts remain
        return None
    finally:
        logging.set_verbosity(level)


def _without(config: Mapping[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in keys}
    inner = kept.get("text_config")
    return kept | {"text_config": _without(inner, keys)} if isinstance(inner, Mapping) else kept


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        if value is not None:
            found |= _flat(value, f"{path}.{key}" if path else str(key))
    return found


def _neutral(key: str) -> bool:
    return any(_NEUTRAL.search(part) for part in key.split("."))


def _show(value: Any) -> str:
    return "unsaid" if value is None else str(value)[:60]
