"""Adapters of the `peft` library: into a delta, and out of one."""

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # the files of an adapter's folder
ROOT = "base_model.model."  # what stands before a module's name in the second
