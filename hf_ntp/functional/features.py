"""How far features have moved from a reference: what keeps an encoder without a head useful to its owner."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Of the reference's mean square: less spread than that is rounding.
_ROUNDING = 1e-6
_NO_VARIANCE = 1e-12


class FeatureDistance(NamedTuple):
    """Distance of features from a reference; both are 0 where they are equal, and do not depend on the units.

    A row at the reference's centre has no direction: its cosine distance is 1.
    """

    cosine: Tensor
    """Mean of 1 - cosine similarity, directions seen from the reference's centre; in [0, 2]."""
    relative_error: Tensor
    """Mean squared distance over the reference's variance: 1 is as bad as its mean in place of every row."""

    def sum(self) -> Tensor:
        """Both together: the loss that keeps features, about 2 where nothing is left."""
        return self.cosine + self.relative_error


def feature_distance(features: Tensor, reference: Tensor) -> FeatureDistance:
    """Distance of features [N, D] from a reference [N, D], row by row; two scalars.

    What all rows have in common is taken away first: it tells nothing about an image, and would hide what does. A
    single row has no spread and is measured against its own length.
    """
    features, reference = features.float(), reference.float()
    rows = len(reference)
    centre = reference.mean(0) if rows > 1 else torch.zeros_like(reference[0])
    spread = (reference - centre).square().sum(-1).sum() / max(rows - 1, 1)
    length = reference.square().sum(-1).mean()
    error = (features - reference).square().sum(-1).mean()
    similarity = F.cosine_similarity(features - centre, reference - centre)
    return FeatureDistance(1 - similarity.mean(), error / (spread + _ROUNDING * length).clamp_min(1e-12))


def standardized(features: Tensor) -> Tensor:
    """Give every feature mean 0 and variance 1 over the batch: [..., N, D].

    Where there is next to no variance in any, nothing is left of it, nor of a gradient, which would overflow.
    """
    features = features.float()
    variance, mean = torch.var_mean(features, dim=-2, keepdim=True, correction=0)
    alive = variance.mean(-1, keepdim=True) > _NO_VARIANCE
    return (features - mean) / (variance + _NO_VARIANCE).sqrt() * alive
