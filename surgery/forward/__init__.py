"""Every forward pass that yields numbers: next-token probabilities, token log-probabilities, the residual cache."""
