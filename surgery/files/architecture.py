"""The facts of a model's config.json that decide whether a weight difference may be added to it.

Configs spell the same fact in several ways (n_embd and hidden_size; rope_theta at the top or inside
rope_parameters); `facts` gives each one name, so that a checkpoint saved by another library version compares
equal. What a config leaves unsaid is not guessed here: the family's class knows it (`surgery.delta.config`), and a
delta says it (`unsaid` in its metadata), so that `differences` can compare without torch.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from surgery.errors import SurgeryError
from surgery.files.safetensors_io import open_regular, parse_json, read_exactly

MAX_JSON_BYTES = 64 * 2**20  # a Gemma tokenizer.json has 33 MB, the index of a 91,000-tensor checkpoint 9 MB

# canonical fact: the config keys that can hold it, first match wins
_SPELLINGS = {
    "model_type": ("model_type",),
    "hidden_size": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "num_layers"),
    "heads": ("num_attention_heads", "n_head", "num_heads"),
    "kv_heads": ("num_key_value_heads", "num_kv_heads", "n_head_kv"),
    "head_dim": ("head_dim",),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "ffn_hidden_size"),
    "vocab_size": ("vocab_size",),
    "norm_eps": ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon"),
    "activation": ("hidden_activation", "hidden_act", "activation_function", "activation"),
    "tied": ("tie_word_embeddings",),
    "sliding_window": ("sliding_window",),
    "attention_softcap": ("attn_logit_softcapping",),
    "final_softcap": ("final_logit_softcapping",),
    "query_scale": ("query_pre_attn_scalar",),
    "attention_multiplier": ("attention_multiplier",),
    "residual_multiplier": ("residual_multiplier",),
    "embedding_multiplier": ("embedding_multiplier",),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts"),
}
_ROPE_BESIDE = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct", "rope_pct"),
    "original_max_position_embeddings": ("original_max_position_embeddings",),
}
_ROPE = (
    "rope_parameters",
    "rope_scaling",
    "rope_local_base_freq",
    *(key for keys in _ROPE_BESIDE.values() for key in keys),
)
# Facts that a target may change without changing what the edited weights mean; handled on their own.
FREE = ("vocab_size", "tied")
_INPUT_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings|embeddings)\.weight$")
_OUTPUT_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)\.(weight|bias)$")


def read_json(path: Path) -> Any:
    """JSON of a file beside the weights. Raises: SurgeryError (absent, too large, broken)."""
    fd = open_regular(path)
    try:
        size = os.fstat(fd).st_size
        if size > MAX_JSON_BYTES:
            raise SurgeryError(f"{path}: {size} bytes of JSON; at most {MAX_JSON_BYTES} are read")
        return parse_json(read_exactly(fd, 0, size, path), str(path))
    finally:
        os.close(fd)


def facts(config: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a config.json (or of `model.config.to_dict()`); a fact that the config does not state is absent."""
    inner = config.get("text_config")
    flat = {**config, **inner} if isinstance(inner, Mapping) else dict(config)
    found: dict[str, Any] = {}
    for name, spellings in _SPELLINGS.items():
        value = next((flat[key] for key in spellings if flat.get(key) is not None), None)
        if isinstance(value, bool | int | float | str):
            found[name] = value
    if isinstance(found.get("model_type"), str):
        found["model_type"] = _family(found["model_type"])
        if found["model_type"].startswith("gemma") and found.get("activation") == "gelu":
            found["activation"] = (
                "gelu_pytorch_tanh"  # what the first Gemma files mean by gelu (transformers GemmaConfig)
            )
    if flat.get("use_sliding_window") is False:
        found.pop("sliding_window", None)
    rope = _rope(flat)
    if rope:
        found["rope"] = rope
    return found


def _family(model_type: str) -> str:
    """A text model inside a model of more than text is of the same family."""
    return model_type.removesuffix("_text")


def spelled(name: str) -> tuple[str, ...]:
    """The keys of a config that can state the fact `name`."""
    return _ROPE if name == "rope" else _SPELLINGS[name]


def _rope(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary parameters in one form: {"rope_theta", "rope_type", ...}, or one such map per kind of layer; what is
    unsaid is absent."""
    stated = flat.get("rope_parameters") or flat.get("rope_scaling") or {}
    stated = {key: value for key, value in stated.items() if value is not None} if isinstance(stated, Mapping) else {}
    if any(isinstance(value, Mapping) for value in stated.values()):
        return {kind: _one_rope(value) for kind, value in stated.items() if isinstance(value, Mapping)}
    beside = {
        name: value
        for name, keys in _ROPE_BESIDE.items()
        if (value := next((flat[key] for key in keys if flat.get(key) is not None), None)) is not None
    }
    if flat.get("rope_local_base_freq") is not None:  # Gemma 3 before transformers 5
        local = {"rope_theta": flat["rope_local_base_freq"]}
        return {"full_attention": _one_rope({**beside, **stated}), "sliding_attention": _one_rope(local)}
    if not stated and "rope_theta" not in beside:
        return {}
    return _one_rope({**beside, **stated})


def _one_rope(values: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: value for key, value in values.items() if isinstance(value, bool | int | float | str | list)}
    kind = result.pop("type", "") or result.get("rope_type") or "default"
    result["rope_type"] = "default" if kind == "mrope" else kind  # Qwen2-VL before transformers 5
    return result


def differences(
    base: Mapping[str, Any], target: Mapping[str, Any], unsaid: Mapping[str, Any] | None = None
) -> list[str]:
    """The facts on which two models disagree, as `name: base 10000.0, target 500000.0`, sorted.

    unsaid: what the base's family means by a fact that a config leaves out; without it such a fact is not compared.
    """
    target = completed(target, unsaid or {})
    return [
        f"{name}: the delta's base has {_show(base[name])}, the target {_show(target[name])}"
        for name in sorted(base)
        if name in target and name not in FREE and not _agree(name, base[name], target[name])
    ]


def brief(odd: list[str]) -> str:
    """The first differences, the model type before all others, and how many more there are."""
    first = sorted(odd, key=lambda text: not text.startswith("model_type"))
    return "; ".join(first[:2]) + (f"; {len(odd) - 2} more" if len(odd) > 2 else "")


def completed(found: Mapping[str, Any], unsaid: Mapping[str, Any]) -> dict[str, Any]:
    """`found` with the facts, and the rotary parameters, that it does not state."""
    whole = {**unsaid, **found}
    if isinstance(found.get("rope"), Mapping) and isinstance(unsaid.get("rope"), Mapping):
        whole["rope"] = _same_form(unsaid["rope"], found["rope"])
    return whole


def _same_form(unsaid: Mapping[str, Any], stated: Mapping[str, Any]) -> dict[str, Any]:
    if not _by_layer(stated):
        return {**_by_layer(unsaid).get("full_attention", unsaid), **stated}
    return {kind: {**_by_layer(unsaid).get(kind, {}), **value} for kind, value in _by_layer(stated).items()}


def _by_layer(rope: Mapping[str, Any]) -> dict[str, Any]:
    """A rotary map for each kind of layer, {} where there is one for all."""
    return {kind: value for kind, value in rope.items() if isinstance(value, Mapping)}


def _agree(name: str, left: Any, right: Any) -> bool:
    if name == "model_type":
        return _family(str(left)) == _family(str(right))
    if name != "rope" or not isinstance(left, Mapping) or not isinstance(right, Mapping):
        return _equal(left, right)
    kinds = _by_layer(left), _by_layer(right)
    if all(kinds):
        return all(_same_rope(kinds[0][kind], kinds[1][kind]) for kind in kinds[0].keys() & kinds[1].keys())
    # One map for all stands for the layers that see the whole text, where a family has two (Gemma 3).
    one, two = (
        kind.get("full_attention", next(iter(kind.values()), side))
        for kind, side in zip(kinds, (left, right), strict=True)
    )
    return _same_rope(one, two)


def _same_rope(left: Mapping[str, Any], right: Mapping[str, Any]) -> bool:
    return all(_equal(left[key], right[key]) for key in left.keys() & right.keys())


def _show(value: Any) -> str:
    return (
        ", ".join(f"{k} {_show(v)}" for k, v in sorted(value.items()))
        if isinstance(value, Mapping)
        else str(value)[:60]
    )


def _equal(left: Any, right: Any) -> bool:
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, int | float) and isinstance(right, int | float):
        # A GGUF file keeps 1e-5 as the fp32 number 9.999999747378752e-06.
        return abs(left - right) <= 1e-6 * abs(left) if abs(left) < 1e30 > abs(right) else left == right
    return bool(left == right)


def is_embedding(name: str) -> bool:
    """True for the input embedding, whose rows are tokens."""
    return _INPUT_EMBEDDING.search(name) is not None


def is_head(name: str) -> bool:
    """True for the output head, whose rows are tokens."""
    return _OUTPUT_HEAD.search(name) is not None


def tokenizer_fingerprint(directory: Path, rows: int | None = None) -> dict[str, Any] | None:
    """{"tokens", "sha256"} of the first `rows` token strings of tokenizer.json (all when None).

    Returns None when the directory has no tokenizer.json, or one with no plain vocabulary.
    Raises: SurgeryError when the file is broken.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    content = read_json(path)
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):  # Unigram: [[token, score], ...]
        vocabulary = {item[0]: number for number, item in enumerate(vocabulary) if isinstance(item, list) and item}
    if not isinstance(vocabulary, dict):
        return None
    tokens = {number: token for token, number in vocabulary.items() if type(number) is int}
    for added in content.get("added_tokens") or []:
        if isinstance(added, dict) and type(added.get("id")) is int:
            tokens[added["id"]] = str(added.get("content"))
    kept = sorted(number for number in tokens if rows is None or number < rows)
    digest = hashlib.sha256()
    for number in kept:
        digest.update(f"{number}\0{tokens[number]}\n".encode("utf-8", "surrogatepass"))
    return {"tokens": len(kept), "sha256": digest.hexdigest()}
