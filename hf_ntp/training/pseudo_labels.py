"""Classes for images that come without labels: clusters of the original encoder's features."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedModel, default_data_collator

from ..data import contents_of, fetch_rows, fingerprint_of
from ..models import features_and_logits
from .paired_data import length_of

# Enough for classes to show; what varies less, relative to the first, is rounding error that whitening would raise.
_COMPONENTS = 32
_LEAST_VARIANCE = 1e-6
_RESTARTS = 4
_BATCH_SIZE = 128


class Relabelled(Dataset):
    """A dataset with other labels.

    Args:
        data: Rows with "pixel_values"; labels of their own are not looked at.
        labels: Class of every row, int64 [N].
    """

    def __init__(self, data: Dataset, labels: np.ndarray) -> None:
        self.data = data
        self.labels = labels
        self.contents = contents_of(data)
        digest = hashlib.sha256(labels.tobytes()).hexdigest()
        self.fingerprint = f"{fingerprint_of(data)}, labels {digest}"

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once."""
        rows = zip(fetch_rows(self.data, indices), self.labels[indices].tolist(), strict=True)
        return [{"pixel_values": row["pixel_values"], "labels": label} for row, label in rows]


def with_clusters(
    data: Dataset, model: PreTrainedModel, head: nn.Module, num_clusters: int, seed: int, device: torch.device
) -> Relabelled:
    """Give images the clusters of their pooled features as labels: k-means on whitened principal components.

    All processes get the labels that the first one finds.

    Args:
        data: Rows with "pixel_values".
        model: The encoder before protection; is where it was afterwards.
        head: Its head, whose input the features are.
        num_clusters: Clusters, at most one per image.
        seed: Of k-means.
        device: Where features are computed.

    Raises:
        ValueError: For fewer images than clusters.
    """
    if length_of(data) < num_clusters:
        raise ValueError(
            f"pseudo_classes is {num_clusters} for {length_of(data)} unlabelled images; needed: an image per class at "
            "least, better ten. Lower pseudo_classes, or pass more images."
        )
    home = model.device
    nn.Module.to(model, device)
    batches = DataLoader(data, _BATCH_SIZE, collate_fn=lambda rows: default_data_collator(rows)["pixel_values"])
    pooled = torch.cat([features_and_logits(model, images, head=head)[0] for images in batches])
    nn.Module.to(model, home)
    features = pooled.double().cpu().numpy()
    components = PCA(min(_COMPONENTS, *features.shape), random_state=seed).fit_transform(features)
    variance = components.var(0)
    kept = variance > _LEAST_VARIANCE * variance[0]
    whitened = components[:, kept] / np.sqrt(variance[kept])
    clusters = KMeans(num_clusters, n_init=_RESTARTS, random_state=seed).fit_predict(whitened)
    labels = broadcast_object_list([clusters.astype(np.int64)])[0]
    return Relabelled(data, labels)
