"""Which training examples carry the bias: projected gradients kept for queries, and selection beside its controls."""
