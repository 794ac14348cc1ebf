"""Modules that an edit may add to a model (CrAWD's cross-attention)."""
