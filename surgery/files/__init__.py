"""Bytes on disk, without torch: atomic writes, safetensors, checkpoint folders, names, rounding, fingerprints."""
