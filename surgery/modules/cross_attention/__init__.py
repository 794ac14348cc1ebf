"""CrAWD: attention of a text's last hidden states to reference words, decayed and fused (CrAWD 4.3 to 4.5).

with cross_attention.attached(model, tokenizer, reference=["he", "she"]) as module:
    ...  # train model.cross_attention
    delta = module_delta(cross_attention.weights_of(module), checkpoint, base="demo", recipe="", seed=0)
"""

from surgery.modules.cross_attention.attach import attach, attached, reattached, switched_off, without
from surgery.modules.cross_attention.maps import cross_weights
from surgery.modules.cross_attention.modeling_crawd import CrossAttention
from surgery.modules.cross_attention.weights import Weights, from_delta, weights_of

__all__ = [
    "CrossAttention",
    "Weights",
    "attach",
    "attached",
    "cross_weights",
    "from_delta",
    "reattached",
    "switched_off",
    "weights_of",
    "without",
]
