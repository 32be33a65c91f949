"""What an encoder without a head is worth on the authorized domain: probes on its frozen features."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import KFold, cross_val_score
from transformers import PreTrainedModel

from ..attacks.probes import KINDS
from ..data import PixelDataset
from ..models import features_and_logits

_FOLDS = 5


@dataclass(frozen=True)
class FeatureAccuracy:
    """Test accuracies on the authorized domain of classifiers fitted to the pooled features of its training split."""

    linear_probe: float
    knn: float


@dataclass(frozen=True)
class SourceUtility:
    """The same before and after protection."""

    before: FeatureAccuracy
    after: FeatureAccuracy


def source_utility(model: PreTrainedModel, train: PixelDataset, test: PixelDataset, seed: int = 0) -> FeatureAccuracy:
    """Fit a linear probe and k nearest neighbours to the pooled features of an encoder, and test them.

    Regularisation and number of neighbours are chosen by five-fold cross-validation on ``train``; the final fit is on
    all of it.

    Args:
        model: Any model that :func:`~hf_ntp.models.load_model` gives; stays as it is.
        train: Labelled authorized images.
        test: Authorized test split.
        seed: Of the folds.

    Raises:
        ValueError: If images have no labels.
    """
    features, labels = _features(model, train, "train")
    test_features, test_labels = _features(model, test, "test")
    folds = KFold(min(_FOLDS, len(labels)), shuffle=True, random_state=seed)
    # There can be no more neighbours than images that a fold is fitted to.
    smallest = features[: len(labels) - -(-len(labels) // folds.n_splits)]
    scores = {}
    for name in ("linear", "knn"):
        kind = KINDS[name]
        chosen = max(
            sorted(kind.grid),
            key=lambda value: cross_val_score(kind.build(value, smallest), features, labels, cv=folds).mean(),
        )
        scores[name] = float(kind.build(chosen, features).fit(features, labels).score(test_features, test_labels))
    return FeatureAccuracy(scores["linear"], scores["knn"])


def _features(model: PreTrainedModel, data: PixelDataset, name: str) -> tuple[np.ndarray, np.ndarray]:
    if not data.labelled:
        raise ValueError(
            f"the authorized {name} images have no labels; needed: some, to see what the features are worth. Pass a "
            "PixelDataset of labelled images; protection itself needs none."
        )
    features = [features_and_logits(model, images)[0].double().cpu().numpy() for images, _ in data.batches()]
    return np.concatenate(features), data.labels
