"""Probes: classical classifiers on the features of the frozen encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from transformers import PreTrainedModel

from ..models import batch_norms, features_and_logits, has_batch_norm
from .attack import Attack, FineTuneProtocol, Loot, Predict

_DECADES = tuple(10.0**power for power in range(-6, 7))
_MAX_ITERATIONS = 1000
_STATISTICS_BATCH = 64
# Relative to the largest singular value: what rounding in float32 leaves of a direction that is not there.
_ROUNDING = 1e-6


class _Kind(NamedTuple):
    grid: tuple[float, ...]
    build: Callable[[float, np.ndarray], Pipeline]
    """Unfitted classifier for a value of the grid and the features [n, D] that it will be fitted to."""


@dataclass(frozen=True)
class Probe(Attack):
    """Fit a scikit-learn classifier to the pooled features that enter the checkpoint's head, in eval mode.

    Args:
        kind: Name of :data:`KINDS`: "linear" (logistic regression), "whitened" (logistic regression on decorrelated
            features of unit variance, which undoes bad conditioning), "ridge" or "knn".
        target_statistics: Re-estimate BatchNorm's running statistics on the attacker's images first (AdaBN, Li et al.,
            2016): those of the checkpoint are the source's.

    Raises:
        ValueError: For unknown kinds.
    """

    kind: str = "linear"
    target_statistics: bool = False

    def __post_init__(self) -> None:
        """Check the kind."""
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; needed: one of {', '.join(KINDS)}.")

    def unsuitable(self, model: PreTrainedModel, num_labels: int) -> str | None:
        """Say so where statistics would have to be re-estimated that are not there."""
        return "the encoder has no BatchNorm" if self.target_statistics and not has_batch_norm(model) else None

    def grid(self, protocol: FineTuneProtocol) -> tuple[float, ...]:
        """Inverse regularisation (linear, whitened), its strength (ridge) or neighbours (knn); no learning rates."""
        return KINDS[self.kind].grid

    def fit(self, model: PreTrainedModel, loot: Loot, protocol: FineTuneProtocol, value: float, seed: int) -> Predict:
        """Fit the probe with ``value`` of the grid; the model stays as it is; see :class:`Attack`."""
        if self.target_statistics:
            reestimate_statistics(model, loot.images)
        features = _features(model, loot.images)
        probe = KINDS[self.kind].build(value, features).fit(features, loot.labels.numpy())

        def predict(images: Tensor) -> Tensor:
            return torch.from_numpy(probe.predict(_features(model, images))).long()

        return predict


@torch.no_grad()
def reestimate_statistics(model: PreTrainedModel, images: Tensor) -> None:
    """Replace BatchNorm's running statistics by those of images [N, 3, H, W], in place."""
    layers = batch_norms(model)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
    model.train()
    # Parts of one size count alike, as they have to, and none is a single image.
    for batch in images.tensor_split(-(-len(images) // _STATISTICS_BATCH)):
        model(pixel_values=batch.to(model.device))
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum


def _features(model: PreTrainedModel, images: Tensor) -> np.ndarray:
    features, _ = features_and_logits(model, images)
    return features.double().cpu().numpy()


def _on_standardised(*steps: Any) -> Pipeline:
    """Return the steps on features of zero mean and unit variance: no feature counts more for its scale."""
    return make_pipeline(StandardScaler(), *steps)


def _linear(value: float, features: np.ndarray) -> Pipeline:
    return _on_standardised(LogisticRegression(C=value, max_iter=_MAX_ITERATIONS))


def _whitened(value: float, features: np.ndarray) -> Pipeline:
    # Directions without variance would be divided by rounding noise: keep only those that the features span.
    singular_values = np.linalg.svd(StandardScaler().fit_transform(features), compute_uv=False)

    rank = max(int((singular_values > _ROUNDING * singular_values[0]).sum()), 1)
    whitening = PCA(rank, whiten=True, svd_solver="full")
    return _on_standardised(whitening, LogisticRegression(C=value, max_iter=_MAX_ITERATIONS))


def _ridge(value: float, features: np.ndarray) -> Pipeline:
    return _on_standardised(RidgeClassifier(alpha=value))


def _knn(value: float, features: np.ndarray) -> Pipeline:
    neighbours = min(int(value), len(features))
    return _on_standardised(KNeighborsClassifier(neighbours, weights="distance"))


KINDS: dict[str, _Kind] = {
    "linear": _Kind(_DECADES, _linear),
    "whitened": _Kind(_DECADES, _whitened),
    "ridge": _Kind(_DECADES, _ridge),
    "knn": _Kind((1, 3, 5, 10, 20), _knn),
}
"""Kinds of probe by name."""
