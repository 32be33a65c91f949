"""Train a classifier on the authorized domain before protecting it: plain Trainer, nothing of the method."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from .paired_data import Transform, collate
from .terms import not_finite

SMALL_VIT: dict[str, Any] = {
    "patch_size": 4,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
}
"""Shape of the small transformers that are trained here (0.1 M weights)."""


def small_vit(labels: list[str], image_size: int = 16, seed: int = 0) -> ViTForImageClassification:
    """A ViT that trains in a minute on one core: patch 4, width 64, 3 blocks, 4 heads, MLP 128 (0.1 M weights).

    Args:
        labels: Class names.
        image_size: Height and width, a multiple of 4.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=image_size,
        **SMALL_VIT,
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ViTForImageClassification(config)


def small_resnet(labels: list[str], seed: int = 0) -> ResNetForImageClassification:
    """A ResNet for 32x32 images that trains in half a minute on one core: 16, 32 and 64 channels (0.08 M weights).

    Args:
        labels: Class names.
        seed: Seed of the weights.
    """
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=16,
        hidden_sizes=[16, 32, 64],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=dict(enumerate(labels)),
        label2id={label: i for i, label in enumerate(labels)},
    )
    return ResNetForImageClassification(config)


def train_classifier(
    model: PreTrainedModel,
    train_dataset: Dataset,
    output_dir: str,
    steps: int,
    learning_rate: float = 1e-3,
    batch_size: int = 64,
    transform: Transform | None = None,
    seed: int = 0,
    **options: Any,
) -> None:
    """Train ``model`` in place on labelled images: AdamW, weight decay 0.05, warm-up and cosine decay.

    Args:
        model: Model with an image-classification head.
        train_dataset: Items with "pixel_values" and "labels".
        output_dir: For Trainer; nothing is saved there.
        steps: Optimizer steps.
        learning_rate: Peak rate.
        batch_size: Images per step, over all processes.
        transform: Augmentation of batches.
        seed: Seed of order and augmentation.
        options: "use_cpu", "bf16" and "fp16" of `TrainingArguments`; the same as in a configuration made before:
            device and precision are those of the process, which cannot change them.
    """

    def views(batch: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        return batch if transform is None else {**batch, "pixel_values": transform(batch["pixel_values"], rng)}

    # Some take no labels, and so give no loss (DeiT with its two heads).
    loss = None if "labels" in inspect.signature(model.forward).parameters else _cross_entropy
    train(model, train_dataset, output_dir, steps, learning_rate, batch_size, views, seed, loss, **options)


def _cross_entropy(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    # Trainer counts the images of all processes and accumulated batches, and multiplies by the processes.
    images = len(labels) if num_items_in_batch is None else num_items_in_batch
    return F.cross_entropy(outputs.logits, labels, reduction="sum") / images


def train(
    model: nn.Module,
    train_dataset: Dataset,
    output_dir: str,
    steps: int,
    learning_rate: float,
    batch_size: int,
    views: Callable[[dict[str, Any], np.random.Generator], dict[str, Any]],
    seed: int = 0,
    loss: Callable[..., torch.Tensor] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """What every kind of pretraining shares: :func:`train_classifier` for any ``model`` that returns its loss first.

    ``views`` makes its inputs of a batch of "pixel_values" and, where there are any, "labels". ``loss``, of outputs
    and labels, is for a model that returns none. Returns Trainer's log.
    """
    args = TrainingArguments(
        output_dir=output_dir,
        max_steps=steps,
        learning_rate=learning_rate,
        per_device_train_batch_size=batch_size,
        weight_decay=0.05,
        warmup_steps=min(50, steps // 10),
        lr_scheduler_type="cosine",
        save_strategy="no",
        logging_steps=max(1, steps // 5),
        report_to="none",
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        seed=seed,
        **options,
    )
    # As many images per step whatever the number of processes.
    args.per_device_train_batch_size = math.ceil(batch_size / args.world_size)
    rng = np.random.default_rng(seed)
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=train_dataset,
        data_collator=lambda rows: views(collate(rows), rng),
        compute_loss_func=loss,
    )
    trainer.train()
    if broken := not_finite({"the weights": [*model.parameters(), *model.buffers()]}):
        raise FloatingPointError(
            f"{', '.join(broken)} are not finite after {steps} steps of training on the authorized images; needed: a "
            f"model that has learned them. Lower learning_rate, {learning_rate} (a recipe's pretrain_learning_rate)."
        )
    return trainer.state.log_history
