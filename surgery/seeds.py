"""The largest seed that every library here takes, with what is made of it."""

SEEDS = 2**32 - 1
