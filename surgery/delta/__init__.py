"""The delta file: what an edit changes, as one small safetensors file.

How to read one:
 1. It is a safetensors file; a tensor in it is bf16 where every number of it is one, else fp32; its header is
    written with sorted keys.
 2. `__metadata__` has one key, "surgery": JSON with sorted keys and no timestamp, so equal deltas are equal
    files.
 3. `kind` is "dense", "lora" or "module"; `format` is 1.
 4. dense: the tensor NAME of the file is the difference (edited - base) of the checkpoint's tensor NAME.
 5. lora: the difference of NAME is the product `NAME.lora_B` [rows, r] @ `NAME.lora_A` [r, columns].
 6. module: `module.NAME` is the tensor NAME of a new part, which a plain checkpoint cannot hold; the metadata's
    `module` has its type and settings. What else is in the file are differences, as in 5 or 4.
 7. `tensors` has, per NAME of the base: `shape`, `dtype`, `sha256` of the base's stored bytes, `norm` and
    `sketch` (64 little-endian fp32 in base64; `surgery/files/weight_fingerprint.py`), which tell how far a target
    is from the base.
 8. `architecture` holds the facts of the base's config.json, `unsaid` what its family means by those that a config
    leaves out, `base` its name, `tokenizer` a hash of its tokens.
 9. `recipe` (TOML), `seed`, `tool` (version), `parents` (of a composed delta), `measured` (effects) and
    `prefix` (what the live model's names have before the checkpoint's, e.g. "transformer.") say where it
    comes from.
10. To apply: fp32(stored) + scale * difference, rounded once to the stored dtype, as `rounding` says ("auto" where
    it is absent: stochastic into 16 bits) with `seed`; `surgery.apply` does it on disk.
"""

from surgery.delta.algebra import compose
from surgery.delta.check import check_edit
from surgery.delta.extract import diff, make
from surgery.delta.format import Delta, DeltaFile, open_delta

__all__ = ["Delta", "DeltaFile", "check_edit", "compose", "diff", "make", "open_delta"]
