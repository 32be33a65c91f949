"""What would only fail amid training, train nothing or protect little is said before it begins."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import contents_of
from ..models import (
    EncoderWithHead,
    blocks_of,
    has_batch_norm,
    has_head,
    layer_weights,
    plain_model,
    reconstructs,
)
from .config import NTPConfig

logger = logging.getLogger(__name__)


def check_apart(source: Dataset, targets: Mapping[str, Dataset], held_out: Any) -> None:
    """Refuse images that are authorized and not; say so where those that shall judge are those that are trained on.

    Args:
        source: Authorized images.
        targets: Unauthorized ones by name.
        held_out: What ``source_tolerance`` is judged on, one dataset or several by name; None if on nothing.

    Raises:
        ValueError: If a target has the images of an authorized domain.
    """
    trained = _images(source)
    for name, data in targets.items():
        if trained & _images(data):
            raise ValueError(
                f"train_dataset and the target {name!r} have the same images; needed: other ones that are not "
                "authorized."
            )
    judges = held_out.values() if isinstance(held_out, Mapping) else [held_out]
    if any(trained & _images(data) for data in judges):
        logger.warning(
            "eval_dataset is train_dataset: source_tolerance is judged on images that the original knows by heart, "
            "and will hold the protection back. Pass images that it was not trained on."
        )


def _images(dataset: Any) -> set[str]:
    return {content.images for content in contents_of(dataset)}


def check_sizes(source: Dataset, targets: Mapping[str, Dataset]) -> None:
    """Raise ``ValueError`` where images are of different sizes: all go through the model together."""
    named = {"source": source, **{f"target {name!r}": data for name, data in targets.items()}}
    shapes = {name: tuple(np.shape(data[0]["pixel_values"])) for name, data in named.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(
            f"pixel_values have the shapes {shapes}; needed: one, that of the model. Pre-process all images alike."
        )


@torch.no_grad()
def check_call(network: PreTrainedModel, source: Dataset) -> None:
    """Raise ``ValueError`` where a model does not take the images as "pixel_values", or gives no logits for them."""
    image = torch.as_tensor(source[0]["pixel_values"])[None].to(network.device, network.dtype)
    training = network.training
    try:
        logits = network.eval()(pixel_values=image).logits
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"{type(network).__name__} does not take pixel_values of shape {tuple(image.shape)} and return logits "
            f"({type(error).__name__}: {str(error)[:200]}); needed: a vision model of transformers, and images as "
            "its image processor makes them. Check processing_class, and that config.return_dict is True."
        ) from error
    finally:
        network.train(training)
    if logits.dim() != 2:
        raise ValueError(f"{type(network).__name__} returns logits of shape {tuple(logits.shape)}; needed: [N, K].")


def matches_features(network: PreTrainedModel, args: NTPConfig) -> bool:
    """Whether the features of authorized images are kept, not predictions.

    Raises:
        ValueError: If ``source_loss`` does not fit the model.
    """
    headless = not has_head(network, args.head_name)
    if args.source_loss == "reconstruction" and not reconstructs(plain_model(network)):
        raise ValueError(
            f"source_loss is 'reconstruction' and the model is {type(plain_model(network)).__name__}; needed: a "
            "masked autoencoder with its decoder, such as ViTMAEForPreTraining. Use source_loss='features'."
        )
    if args.source_loss == "labels" and headless:
        raise ValueError(
            "source_loss is 'labels' but the model has no classification head; needed: 'features' or 'auto'. To "
            "train with labels, load the checkpoint with AutoModelForImageClassification and train its head first."
        )
    return headless if args.source_loss == "auto" else args.source_loss != "labels"


def check_fit(network: PreTrainedModel, args: NTPConfig, rows: int, targets: int) -> None:
    """Raise ``ValueError`` for what would only fail amid training, or train nothing.

    Args:
        network: What will be protected, with a head.
        args: Configuration.
        rows: Authorized images.
        targets: Unauthorized domains.
    """
    step = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and rows < step:
        raise ValueError(
            f"dataloader_drop_last is on and {rows} rows are no whole batch of {step}: no step would be taken; "
            "needed: as many rows as a batch has. Set it to False, or lower per_device_train_batch_size."
        )
    if args.simulated_attackers:
        if args.attackers < targets:
            raise ValueError(
                f"attackers is {args.attackers} for {targets} unauthorized domains; needed: at least one for each. "
                f"Set attackers={targets} or more, or 0."
            )
        if args.attacker_informed:
            blocks_of(network)
    if step == 1 and (args.fisher_weight or args.collapse_weight):
        raise ValueError(
            "a batch has one image of each domain, and the Fisher and collapse terms compare images; needed: two "
            "or more. Raise per_device_train_batch_size (accumulation does not help: these terms are of a batch), "
            "or set fisher_weight and collapse_weight to 0."
        )
    if not has_batch_norm(network):
        return
    enabled = any(getattr(part, "gradient_checkpointing", False) for part in network.modules())
    if args.gradient_checkpointing or enabled:
        raise ValueError(
            f"gradient_checkpointing is on and {type(network).__name__} has BatchNorm, whose statistics would see "
            "the images a second time, those of the target among them; needed: False. Leave it out, and call the "
            "model's gradient_checkpointing_disable() if it was enabled there."
        )
    if args.torch_compile:
        raise ValueError(
            f"torch_compile is on and {type(network).__name__} has BatchNorm, whose statistics are those of each "
            "domain: every step would be compiled anew; needed: False."
        )
    last = 0 if args.dataloader_drop_last or args.world_size > 1 else rows % args.train_batch_size
    if 1 in (args.per_device_train_batch_size, last):
        raise ValueError(
            f"{rows} rows in batches of {args.per_device_train_batch_size} make a batch of one image; needed: at "
            "least two, or BatchNorm has nothing to average. Set dataloader_drop_last=True or another batch size."
        )


def check_pairs(labels: Mapping[str, np.ndarray], batch: int) -> None:
    """Warn where a batch hardly ever has two images of one class: the Fisher term is then a constant.

    Args:
        labels: Of every unauthorized domain, [N] each, by name.
        batch: Images of a domain in a batch, over all processes.
    """
    for name, found in labels.items():
        shares = np.unique(found, return_counts=True)[1] / len(found)
        pairs = batch * (batch - 1) / 2 * float(np.square(shares).sum())
        if pairs < 1:
            logger.warning(
                "A batch has %d images of the target %r in %d classes, on average %.2g pairs of one class: without "
                "any, the Fisher term has no gradient. Raise per_device_train_batch_size (accumulation does not "
                "help), or set fisher_weight=0 to save its time.",
                batch,
                name,
                len(shares),
                pairs,
            )


def frozen_weights(network: PreTrainedModel, head_name: str) -> list[str]:
    """Names of layers' weights that will not be protected; says so, as an attacker can train them all the same."""
    unused = network.unused if isinstance(network, EncoderWithHead) else set()
    fixed = [
        name
        for name in layer_weights(network)
        if name.rpartition(".")[0] != head_name and not network.get_parameter(name).requires_grad
        if name.removeprefix("encoder.") not in unused
    ]
    if fixed:
        logger.warning(
            "%d layers are frozen (%s, ...): they are neither pruned nor trained against attackers, who can train "
            "them all the same. Unfreeze them with requires_grad_(True), or expect weaker protection.",
            len(fixed),
            ", ".join(fixed[:3]),
        )
    return fixed
