"""What the encoder makes of images before it is protected."""

from __future__ import annotations

import numpy as np
import torch
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel, default_data_collator

from ..functional import whitening_of
from ..models import recorded_features
from .paired_data import length_of

_BATCH_SIZE = 128
# For a covariance; more would only take longer.
_MOST_IMAGES = 4096


@torch.no_grad()
def pooled_features(data: Dataset, model: PreTrainedModel, head: nn.Module, device: torch.device) -> Tensor:
    """Features [N, D] that enter the head, in eval mode.

    Args:
        data: Rows with "pixel_values".
        model: The encoder; is where it was, and in the mode it was in, afterwards.
        head: Its head, whose input the features are.
        device: Where features are computed.
    """
    training, home = model.training, model.device
    nn.Module.to(model.eval(), device)
    images = DataLoader(data, _BATCH_SIZE, collate_fn=_pixel_values)
    with recorded_features(head) as features:
        for batch in images:
            model(pixel_values=batch.to(device))
    nn.Module.to(model.train(training), home)
    return torch.cat(features)


def whitening(
    data: Dataset, model: PreTrainedModel, head: nn.Module, device: torch.device, shrinkage: float
) -> Tensor:
    """Matrix [D, D] that whitens the pooled features of images, see :func:`hf_ntp.functional.whitening_of`.

    Images in regular intervals stand for many. All processes get what the first one finds.
    """
    rows = length_of(data)
    chosen = np.linspace(0, rows - 1, min(rows, _MOST_IMAGES)).astype(int).tolist()
    return broadcast(whitening_of(pooled_features(Subset(data, chosen), model, head, device), shrinkage))


def _pixel_values(rows: list[dict[str, Tensor]]) -> Tensor:
    return default_data_collator([{"pixel_values": row["pixel_values"]} for row in rows])["pixel_values"]
