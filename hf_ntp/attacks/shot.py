"""Source-free domain adaptation: an attacker with target images, but without labels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..models import features_and_logits, heads_of
from .attack import Attack, FineTuneProtocol, Loot, Predict
from .fine_tuning import batches_of, predictor, train

# How often pseudo-labels are renewed over a fit; SHOT does so once in each of its 15 epochs.
_REFRESHES = 15


@dataclass(frozen=True)
class Shot(Attack):
    """Adapt the encoder to unlabelled target images under the checkpoint's frozen head (SHOT, Liang et al., 2020).

    The loss is information maximisation (confident predictions, :func:`information_loss`) + ``pseudo_weight`` *
    cross-entropy with labels from the nearest centroid, :func:`pseudo_labels`. No labels are used, and so all images
    of the attacker are, whatever the number of labelled ones; the learning rate is still chosen on labelled images.

    Args:
        pseudo_weight: >= 0; 0.3 in the paper.
        images: Most images that are used, drawn with the seed: they are held in memory.

    Raises:
        ValueError: If the weight is negative or there are no images.
    """

    uses_head: ClassVar[bool] = True
    pseudo_weight: float = 0.3
    images: int = 1000

    def __post_init__(self) -> None:
        """Check the values."""
        if self.pseudo_weight < 0 or self.images < 1:
            raise ValueError(f"{self} cannot run; needed: pseudo_weight >= 0 and images >= 1.")

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Adapt ``model`` in place at peak rate ``value``; see :class:`Attack`."""
        for head in heads_of(model).values():
            head.requires_grad_(False)
        body = [parameter for parameter in model.parameters() if parameter.requires_grad]
        images = loot.images
        if loot.pool is not None:
            images, _ = loot.pool.tensors(np.random.default_rng(seed).permutation(len(loot.pool))[: self.images])
        train(model, body, self._loss(model, images, protocol, seed), protocol, value, seed)
        return predictor(model)

    def _loss(
        self, model: PreTrainedModel, images: Tensor, protocol: FineTuneProtocol, seed: int
    ) -> Callable[[], Tensor]:
        images = images.to(model.device)
        batches, steps = batches_of(len(images), protocol.batch_size, seed), count()
        interval = max(protocol.steps // _REFRESHES, 1)
        labels = torch.empty(0)

        def loss() -> Tensor:
            nonlocal labels
            if next(steps) % interval == 0:
                labels = pseudo_labels(*features_and_logits(model, images))
            batch = next(batches).to(model.device)
            logits = model(pixel_values=images[batch]).logits
            return information_loss(logits) + self.pseudo_weight * F.cross_entropy(logits, labels[batch])

        return loss


def information_loss(logits: Tensor) -> Tensor:
    """Mean entropy of the predictions minus entropy of the mean prediction, nats, in [-log K, 0], for logits [N, K].

    Lowest where every prediction is certain and all classes are predicted equally often.
    """
    log_probabilities = logits.log_softmax(-1)
    probabilities = log_probabilities.exp()
    each = -(probabilities * log_probabilities).sum(-1).mean()
    mean = probabilities.mean(0)
    return each + torch.xlogy(mean, mean).sum()


def pseudo_labels(features: Tensor, logits: Tensor) -> Tensor:
    """Class of the nearest centroid by cosine similarity, [N], int64.

    Centroids are first weighted by the predictions, then recomputed once from the labels that they give. A class
    that nothing is assigned to has no centroid and gets no label.

    Args:
        features: [N, D].
        logits: [N, K].
    """
    directions = F.normalize(features, dim=-1)
    weights = logits.softmax(-1)
    for _ in range(2):
        centroids = F.normalize(weights.T @ directions, dim=-1)
        similarities = directions @ centroids.T
        labels = similarities.masked_fill(weights.sum(0) == 0, -torch.inf).argmax(-1)
        weights = F.one_hot(labels, logits.shape[-1]).to(directions)
    return labels
