"""A tiny config of any architecture that transformers knows: its own defaults with every size made small."""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 96
LAYERS = 4
POSITIONS = 64
# What a size is called over all of transformers, and its small value; the first pattern that fits counts.
SIZES: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size|task_type_vocab_size|.*_langs|.*spkrs", 2),
    (r".*vocab_size(_per_layer_input)?|encoder_hash_byte_group_vocab", VOCABULARY),
    (r"num_hidden_layers|n_layers?|num_layers|(num_)?(speech_|t2u_)?(encoder|decoder)_layers|depth", LAYERS),
    (r"swa_num_key_value_heads|num_key_value_heads|num_kv_heads|kv_n_heads|num_query_groups", 2),
    (
        r"(.*_)?num_attention_heads|(.*_)?attention_heads|(num_|n_)?heads?|linear_num_(key|value)_heads|linear_num_heads",
        4,
    ),
    (r"index_n_heads", 2),
    (r"num_(encoder|decoder|self|cross)_attention_heads|n_mamba_heads", 4),
    (r"(.*_)?head_dim|d_kv|kv_channels|d_head|dim_head|attention_head_size|linear_(key|value)_head_dim", 8),
    (r"attention_hidden_size|lru_width|embedding_dim|d_latents|d_embedds", 32),
    (r"(.*_)?intermediate_size(_mlp)?|(.*_)?ffn_dim|d_ff|dff|dim_ff|n_inner|d_inner|hidden_dim|mlp_dim", 48),
    (r"(.*_)?ffn_hidden_size|feed_forward_size", 48),
    (r"hidden_size(_global)?|d_model|n_embd|dim|emb_dim|word_embed_proj_dim|(input_|output_)?embedding_size", 32),
    (r"true_hidden_size|intra_bottleneck_size|hidden_size_per_layer_input|backbone_hidden_size|input_size", 32),
    (r"num_experts_per_tok(en)?|moe_topk|moe_top_k|top_k(_experts)?|moe_k|index_topk", 2),
    (r"n_routed_experts|num_local_experts|num_experts|moe_num_experts", 4),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|num_kv_shared_layers", 1),
    (r"n_group|topk_group|num_expert_group", 1),
    (
        r".*max_position_embeddings|n_positions|max_seq_len|n_ctx|max_(source|target)_positions|context_length",
        POSITIONS,
    ),
    (r"model_max_length|max_2d_position_embeddings|max_(encoder|decoder)_position_embeddings", POSITIONS),
    (r"(q|kv|o)_lora_rank|laurel_rank|gated_norm_rank|adapter_rank|hc_lowrank|embedding_rank", 16),
    (r"sliding_window(_size)?|attention_window(_size)?|local_attention|attention_chunk_size|global_block_size", 16),
    (r"(mamba_)?(chunk_size|d_state)|state_size|ssm_state_size|local_attn_chunk_length|lsh_attn_chunk_length", 8),
    (r"codebook_size", 64),
    (r"time_step_rank|mamba_dt_rank|num_landmarks", 4),
    (r"num_latents|segment_means_seq_len", 16),
    (r"n_groups|mamba_n_?groups", 2),
    (r"rotary_dim", 4),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
)
_LAYER_LISTS = re.compile(
    r".*layer_types|layers_block_type|no_rope_layers|attn_layers|indexer_types|activation_sparsity_pattern|"
    r"layer_rope_theta|intermediate_size|num_attention_heads_per_layer"
)
_TOKENS = {"pad": 0, "bos": 1, "eos": 2, "cls": 1, "sep": 2, "decoder_start": 0, "mask": 3}
# What a family needs beyond small sizes: sizes that depend on one another.
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_expand": 2, "mamba_n_groups": 1}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": _MAMBA | {"layer_types": ["mamba", "attention", "mamba", "attention"]},
    "blenderbot": {"encoder_layers": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 48},
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
    | {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots3_note_text": {"num_key_value_heads": 4, "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4}
    | {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_v_head_dim": 8}
    | {"swa_qk_nope_head_dim": 8, "swa_qk_rope_head_dim": 8},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "expert_ffn_hidden_size": 24, "zero_expert_num": 2, "num_layers": 2},
    "llama4_text": {"moe_layers": [1, 3]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "neomme": {"head_dim": 16, "hidden_size": 64},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
    | {"indexer_compress_ratio": 2, "ngram_vocab_size_base": 50, "split_ngram_parts": 1, "ple_embed_dim": 32},
    "reformer": {"axial_pos_shape": [8, 8], "axial_pos_embds_dim": [16, 16], "is_decoder": True},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "chunk_size": 64, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "gemma3n_text": {"intermediate_size": 48, "vocab_size_per_layer_input": VOCABULARY, "num_kv_shared_layers": 2},
    "nystromformer": {"num_landmarks": 16, "segment_means_seq_len": 16},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "n_mamba_heads": 2, "use_mamba_kernels": False},
    "zamba2": {"attention_hidden_size": 64, "attention_head_dim": 16, "mamba_headdim": 8, "n_mamba_heads": 8}
    | {"mamba_ngroups": 1, "use_mamba_kernels": False, "num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]}
    | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
}


def sizes(config: dict[str, Any], kind: str = "") -> dict[str, Any]:
    """The small values of what `config` (a config's `to_dict`) holds; nested configs are small inside."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict) and key not in ("id2label", "label2id", "rope_parameters", "task_specific_params"):
            if "model_type" in value:
                found[key] = sizes(value, str(value["model_type"])) | {"model_type": value["model_type"]}
        elif key.endswith(("_token_id", "_token_index")):
            name = re.sub(r"_token_(id|index)$", "", key)
            found[key] = _TOKENS.get(name, VOCABULARY - 1 - len(name) % 8)
        elif _LAYER_LISTS.fullmatch(key) and isinstance(value, list | tuple) and value:
            found[key] = _few(list(value))
        elif key == "qk_head_dim":  # follows from its two parts
            continue
        elif isinstance(value, int) and not isinstance(value, bool):
            small = next((small for pattern, small in SIZES if re.fullmatch(pattern, key)), None)
            if small is not None and (value > small or key in ("num_hidden_layers", "vocab_size")):
                found[key] = small
    if config.get("is_encoder_decoder"):
        found.setdefault("decoder_start_token_id", 0)
    if "kv_lora_rank" in found:  # multi-head latent attention has as many of the one as of the other
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found | SPECIAL.get(kind, {})


def _few(values: list[Any]) -> list[Any]:
    """As many values as there are layers, with every kind that `values` has among them, in order."""
    kinds = list(dict.fromkeys(map(str, values)))
    first = [values[[str(v) for v in values].index(kind)] for kind in kinds][:LAYERS]
    return (first + values[len(first) :] + [values[-1]] * LAYERS)[:LAYERS]


def tiny(config_class: type, **settings: Any) -> Any:
    """A tiny config of `config_class`."""
    kind = config_class.model_type  # type: ignore[attr-defined]
    return config_class(**sizes(config_class().to_dict(), kind) | settings)
