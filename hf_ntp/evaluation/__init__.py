"""Evaluation: what a checkpoint is worth to somebody who fine-tunes it (import names from ``hf_ntp``)."""
