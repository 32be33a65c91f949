"""Vision encoders: head, features, prunable weights."""

from .encoder import (
    LiveWeights,
    blocks_of,
    check_precision,
    find_head,
    frozen_batch_norm_statistics,
    has_batch_norm,
    layers_with_weights,
    live_weights,
    noted_prunable_weights,
    prunable_weights,
    recorded_features,
    replace_head,
    scale_free_weights,
    stage_tokens,
    zero_fraction,
)

__all__ = [
    "LiveWeights",
    "blocks_of",
    "check_precision",
    "find_head",
    "frozen_batch_norm_statistics",
    "has_batch_norm",
    "layers_with_weights",
    "live_weights",
    "noted_prunable_weights",
    "prunable_weights",
    "recorded_features",
    "replace_head",
    "scale_free_weights",
    "stage_tokens",
    "zero_fraction",
]
