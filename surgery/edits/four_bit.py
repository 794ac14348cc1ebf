"""A checkpoint in 4 bits, to train LoRA factors beside it (QLoRA, CrAWD appendix A.1)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from surgery.errors import SurgeryError


def four_bit(directory: Path | str, device: torch.device) -> PreTrainedModel:
    """The checkpoint as a causal model with 4-bit weights (NF4, Dettmers et al. 2023), to train factors beside them.

    Raises ``SurgeryError`` without a CUDA device or without bitsandbytes.
    """
    check_four_bit(device)
    settings: Any = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16, **settings)
    model = AutoModelForCausalLM.from_pretrained(
        directory, quantization_config=quantised, dtype=torch.bfloat16, device_map={"": device}
    )
    return cast(PreTrainedModel, model.eval())


def check_four_bit(device: torch.device) -> None:
    """Raises ``SurgeryError`` where ``four_bit`` cannot be."""
    if device.type != "cuda" or find_spec("bitsandbytes") is None:
        got = f"this model is on {device.type}" if device.type != "cuda" else "bitsandbytes is not installed"
        raise SurgeryError(
            f"four_bit: {got}; expected a CUDA device and bitsandbytes (pip install bitsandbytes); or leave it off"
        )
