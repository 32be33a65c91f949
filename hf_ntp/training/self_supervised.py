"""Train an encoder on authorized images without labels, before protecting it: plain Trainer, nothing of the method.

Two methods: masked autoencoding (He et al., 2022), which `transformers` has, and contrastive learning (SimCLR, Chen et
al., 2020) with the NT-Xent loss of `pytorch-metric-learning`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import PreTrainedModel, ViTConfig, ViTMAEConfig, ViTMAEForPreTraining, ViTModel

from ..data import RandomView
from ..models import EncoderWithHead, recorded_features, untrained
from .paired_data import Transform
from .pretraining import SMALL_VIT, train


def small_encoder(method: str, image_size: int = 16, seed: int = 0) -> PreTrainedModel:
    """Return an untrained encoder of the size of :func:`~hf_ntp.training.pretraining.small_vit`.

    Args:
        method: "mae" gives a ViTMAE with its decoder (one block, width 32) that sees 40 % of the patches, "simclr" a
            ViT without pooler.
        image_size: Height and width, a multiple of 4.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    if method == "simclr":
        return ViTModel(ViTConfig(image_size=image_size, **SMALL_VIT), add_pooling_layer=False)
    pretext: dict[str, Any] = {
        "mask_ratio": 0.6,  # there are few patches: with the usual 0.75 features came out clearly worse
        "decoder_hidden_size": 32,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 4,
        "decoder_intermediate_size": 64,
    }
    return untrained(ViTMAEForPreTraining, ViTMAEConfig(image_size=image_size, **SMALL_VIT, **pretext))


def pretrain(
    method: str,
    encoder: PreTrainedModel,
    train_dataset: Dataset,
    output_dir: str,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 128,
    transform: Transform | None = None,
    seed: int = 0,
    **options: Any,
) -> list[dict[str, float]]:
    """Train ``encoder`` in place on images; labels are not looked at.

    Args:
        method: "mae", for a ViTMAEForPreTraining; or "simclr", for any encoder without a head.
        encoder: See :func:`small_encoder`.
        train_dataset: Items with "pixel_values".
        output_dir: For Trainer; nothing is saved there.
        steps: Optimizer steps.
        learning_rate: Peak rate.
        batch_size: Images per step, over all processes; "simclr" tells each from the others on its device.
        transform: Augmentation of batches, before "simclr" makes two views of them.
        seed: Seed of order, augmentation, masks and the projection head.
        options: See :func:`~hf_ntp.training.pretraining.train_classifier`.

    Returns:
        Trainer's log, with "loss" five times.
    """
    view = RandomView()

    def views(batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Tensor]:
        images = batch["pixel_values"] if transform is None else transform(batch["pixel_values"], rng)
        if method == "mae":
            return {"pixel_values": images}
        return {"pixel_values": view(images, rng), "other_view": view(images, rng)}

    torch.manual_seed(seed)
    model = encoder if method == "mae" else Contrastive(encoder)
    return train(model, train_dataset, output_dir, steps, learning_rate, batch_size, views, seed, **options)


class Contrastive(nn.Module):
    """SimCLR: pooled features, a projection head that is thrown away, and NT-Xent between two views of every image.

    Args:
        encoder: Any vision encoder without a head; trained in place.
        width: Outputs of the projection head.
        temperature: Of the loss.

    Raises:
        ImportError: If pytorch-metric-learning is not installed.
    """

    def __init__(self, encoder: PreTrainedModel, width: int = 64, temperature: float = 0.2) -> None:
        from pytorch_metric_learning.losses import SelfSupervisedLoss, SupConLoss  # optional

        super().__init__()
        # Features as protection and attackers see them.
        self.encoder = EncoderWithHead(encoder)
        features = self.encoder.head.in_features
        self.projection = nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, width))
        # With one positive per row this is NT-Xent; the library's NTXentLoss makes N^3 numbers of it, and is slow.
        self.loss = SelfSupervisedLoss(SupConLoss(temperature))

    def forward(self, pixel_values: Tensor, other_view: Tensor) -> dict[str, Tensor]:
        """Loss of two views of the same images, [N, 3, H, W] each."""
        with recorded_features(self.encoder.head) as features:
            self.encoder(pixel_values=torch.cat([pixel_values, other_view]))
        first, second = self.projection(features[-1]).chunk(2)
        return {"loss": self.loss(first, second)}
