"""What a frozen checkpoint says about images: pooled features and logits, in eval mode."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..models import find_head, recorded_features


@torch.no_grad()
def features_and_logits(model: PreTrainedModel, images: Tensor, batch_size: int = 256) -> tuple[Tensor, Tensor]:
    """Features [N, D] that enter the head, and logits [N, K], for pixel values [N, 3, H, W]; on the model's device.

    Computed in eval mode (no dropout, running statistics of BatchNorm); the model's own mode is given back.
    """
    training = model.training
    model.eval()
    _, head = find_head(model)
    with recorded_features(head) as features:
        logits = [model(pixel_values=batch.to(model.device)).logits for batch in images.split(batch_size)]
    model.train(training)
    return torch.cat(features), torch.cat(logits)
