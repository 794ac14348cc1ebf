"""Whole operations: one readable file each, with its settings beside it; the folder is the registry."""
