"""Adapters of the `peft` library: into a delta, and out of one."""
