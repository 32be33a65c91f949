"""Training: configuration, objective, pruning and the Trainer that composes them (import names from ``hf_ntp``)."""
