"""Vision encoders: head, features, prunable weights."""

from .encoder import (
    FeatureTap,
    LiveWeights,
    find_head,
    frozen_batch_norm_statistics,
    has_batch_norm,
    live_weights,
    prunable_weights,
    replace_head,
    stage_features,
    zero_fraction,
)

__all__ = [
    "FeatureTap",
    "LiveWeights",
    "find_head",
    "frozen_batch_norm_statistics",
    "has_batch_norm",
    "live_weights",
    "prunable_weights",
    "replace_head",
    "stage_features",
    "zero_fraction",
]
