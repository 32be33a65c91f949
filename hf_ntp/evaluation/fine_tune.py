"""One fit of one arm: plain fine-tuning of all weights, as an attacker would do it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    PreTrainedModel,
    default_data_collator,
    get_scheduler,
)

from ..models import noted_prunable_weights, replace_head
from .protocol import Arm, FineTuneProtocol


class Accuracies(NamedTuple):
    """Result of one fit, in eval mode."""

    validation: float
    test: float


def build_model(arm: Arm, num_labels: int, seed: int) -> PreTrainedModel:
    """Load or initialise the arm's encoder and put a fresh head with ``num_labels`` outputs on it."""
    torch.manual_seed(seed)
    if arm.random_init:
        model = AutoModelForImageClassification.from_config(
            AutoConfig.from_pretrained(arm.checkpoint), dtype=torch.float32
        )
    else:
        model = AutoModelForImageClassification.from_pretrained(arm.checkpoint, dtype=torch.float32)
    replace_head(model, num_labels, torch.Generator().manual_seed(seed))
    return model


def zero_masks(model: PreTrainedModel) -> list[tuple[nn.Parameter, Tensor]]:
    """Pruning masks that a checkpoint came with: the zeros of its prunable weights (patterns of ``config.ntp``)."""
    return [(weight, weight.detach() != 0) for weight in noted_prunable_weights(model).values()]


def fine_tune(
    model: PreTrainedModel,
    images: Tensor,
    labels: Tensor,
    protocol: FineTuneProtocol,
    learning_rate: float,
    seed: int,
    keep_mask: bool = False,
) -> None:
    """Fine-tune all weights on labelled images, in place.

    Args:
        model: Encoder with a fresh head, on its device.
        images: Pixel values [N, 3, H, W], float32.
        labels: [N], int64.
        protocol: Steps, batch size and optimizer.
        learning_rate: Peak rate.
        seed: Seed of the batch order and of dropout.
        keep_mask: Hold the zeros of the present weights at zero.
    """
    masks = zero_masks(model) if keep_mask else []
    images, labels = images.to(model.device), labels.to(model.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=protocol.weight_decay, fused=True)
    schedule = get_scheduler("cosine", optimizer, protocol.warmup_steps, protocol.steps)
    torch.manual_seed(seed)
    model.train()
    batches = _batches(len(labels), protocol.batch_size, seed)
    for _ in range(protocol.steps):
        batch = next(batches).to(model.device)
        loss = F.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for weight, mask in masks:
                weight.mul_(mask)


def _batches(size: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Yield index batches for ever: a new order every pass, incomplete batches left out."""
    rng, batch_size = np.random.default_rng(seed), min(size, batch_size)
    while True:
        order = torch.from_numpy(rng.permutation(size))
        yield from (part for part in order.split(batch_size) if len(part) == batch_size)


@torch.no_grad()
def accuracy_of(model: PreTrainedModel, data: Dataset, batch_size: int = 256) -> float:
    """Share of images classified correctly, in eval mode."""
    model.eval()
    correct = total = 0
    for batch in DataLoader(data, batch_size=batch_size, collate_fn=default_data_collator):
        predictions = model(pixel_values=batch["pixel_values"].to(model.device)).logits.argmax(-1)
        correct += int((predictions == batch["labels"].to(model.device)).sum())
        total += len(predictions)
    return correct / total
