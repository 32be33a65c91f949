"""What keeps the source alive: the original model as a teacher, and a guard that holds the target terms back.

With labels the original's predictions are kept, without labels its features, or what a masked autoencoder does.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import PreTrainedModel

from ..data import fetch_rows
from ..functional import FeatureDistance, feature_distance, softened_divergence
from ..models import batch_norms, find_head, frozen_batch_norm_statistics, mask_noise, plain_model, recorded_features
from .config import NTPConfig
from .distributed import average, gather_rows
from .paired_data import collate, length_of

logger = logging.getLogger(__name__)

_FEATURE_SHARE = 0.3
"""Of a look in the running mean of a distance of features."""
_WINDOW = 1280
"""Images that the running mean of an error rate stands for."""
_FIRST_LOOK = 128
"""Images on which the original is checked before training."""
_ABOVE_CHANCE = 0.1
"""Of the way from chance to perfect: who is no further does not know a domain."""
_HELD_BACK = 0.1
"""Mean share of its weight below which what is aimed at the target did next to nothing."""
_LOSS_OF_NOTE = 0.02
"""Errors on so few images as a guard sees scatter by less."""
_NO_CLASS = -1
"""Label that no prediction equals."""
_LOOK_EVERY = 8
"""Optimizer steps between two looks: at held-out images, each costs the passes of as many training steps."""


class Guard:
    """What keeps the source alive, a running mean of how much worse than the original the model has become, its limit.

    The mean is of the model as it is used, in evaluation mode: with dropout, stochastic depth or the BatchNorm
    statistics of a batch, a model differs from itself.

    Args:
        tolerance: Limit at the first and at the last step; empty for none, and no look.
        args: Device, batch size, seed and processes.
        source: Training images.
        held_out: Images to look at instead of those of the training.
        autocast: Gives the context of a forward pass.
    """

    option: ClassVar[str]
    """Name of the option that holds the tolerance."""
    remedy = "Lower the sparsity"
    """What helps first where the tolerance is exceeded all the time."""

    def __init__(
        self,
        tolerance: Sequence[float],
        args: NTPConfig,
        source: Dataset,
        held_out: Dataset | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self.tolerance, self.held_out = tolerance, held_out
        self._args, self._autocast = args, autocast
        self._judged = source if held_out is None else held_out
        self.excess = torch.zeros((), device=args.device)

    def terms(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss that keeps the source alive on a training batch, and its single terms for the log.

        Args:
            model: The model under protection, unwrapped.
            inputs: "pixel_values" [N, 3, H, W] and, where they are needed, "labels" [N].
            logits: Of the model, [N, K].
            features: Its pooled features, [N, D].
            step: Number of optimizer steps taken, which alone decides what is random.
        """
        raise NotImplementedError

    def check_original(self) -> None:
        """Warn, before training, of an original with which nothing can be kept; nothing to warn of by default."""

    @torch.no_grad()
    def look(self, model: PreTrainedModel, step: int) -> None:
        """Note the excess, if there is a limit and it is time to; all ranks look at a part.

        Args:
            model: The model under protection, unwrapped.
            step: Number of optimizer steps taken, which alone decides what is looked at.
        """
        if not self.tolerance or (step % _LOOK_EVERY and step != 1):
            return
        training = model.training
        model.eval()
        with self._autocast():
            worse, share = self._worse(model, step)
        model.train(training)
        # The first looks count alike: a mean that began with 0 would take long to notice anything.
        self.excess = torch.lerp(self.excess, worse, max(share, 1 / (1 + step // _LOOK_EVERY)))

    def _worse(self, model: PreTrainedModel, step: int) -> tuple[Tensor, float]:
        """Excess on some images, a scalar alike on all ranks, and its share in the running mean."""
        raise NotImplementedError

    def _rows(self, size: int, step: int, count: int) -> list[int]:
        """Rows on this rank of the next ``count`` of ``size``, in random order and again from the first."""
        order = np.random.default_rng(self._args.seed).permutation(size)
        rows = order[np.arange(step // _LOOK_EVERY * count, (step // _LOOK_EVERY + 1) * count) % size]
        return rows[self._args.process_index :: self._args.world_size].tolist()

    def warn(self, strength: float) -> None:
        """Say so, after training, if the guard held back what was to protect, or the model lost more than it may.

        Args:
            strength: Mean share of its weight that everything aimed at the target had.
        """
        images = "training" if self.held_out is None else "evaluation"
        if strength < _HELD_BACK:
            logger.warning(
                "Everything aimed at the target had %.0f %% of its weight on average (target_strength): on authorized "
                "%s images the model stayed worse than the original by more than %s=%s allows. Expect weak "
                "protection. %s, or raise %s and watch the accuracy.",
                100 * strength,
                images,
                self.option,
                self.tolerance,
                self.remedy,
                self.option,
            )
        excess, last = float(self.excess), self.tolerance[-1] if self.tolerance else math.inf
        if excess > max(2 * last, last + _LOSS_OF_NOTE):
            logger.warning(
                "On authorized images the model ends %.3g worse than the original (source_excess); %s allows %g. "
                "Train longer, or lower learning_rate, sparsity or attacker_weight.",
                excess,
                self.option,
                last,
            )

    def share(self, progress: float) -> Tensor:
        """Share of its weight that everything aimed at the target may have, in [0, 1].

        It falls from 1 to 0 as the excess rises from the tolerance to twice the tolerance. The tolerance itself falls
        geometrically: first room to find another solution, then none to be worse.

        Args:
            progress: Share of all steps that is done.
        """
        if not self.tolerance:
            return torch.ones_like(self.excess)
        first, last = self.tolerance
        return (2 - self.excess / (first * (last / first) ** progress)).clamp(0, 1)

    def _log(self) -> dict[str, Tensor]:
        return {"source_excess": self.excess} if self.tolerance else {}


class SourceGuard(Guard):
    """With labels: the excess is the error rate beyond that of a frozen copy of the original model, in [-1, 1].

    It is judged on held-out images where there are some. An original that has its training images by heart is hardly
    ever wrong there, and what was pruned from it is, however well it does on others.

    Args:
        model: The model before protection; copied.
        args: ``source_distillation`` and ``source_tolerance``, too.
        source: Training rows of "pixel_values" and "labels".
        held_out: Rows that no step trains on; None to judge on those of the training.
        autocast: See :class:`Guard`.
    """

    option = "source_tolerance"

    def __init__(
        self,
        model: PreTrainedModel,
        args: NTPConfig,
        source: Dataset,
        held_out: Dataset | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(args.source_tolerance, args, source, held_out, autocast)
        needed = args.source_distillation or args.source_tolerance
        self.original = _frozen_copy(model, args.device) if needed else None
        if held_out is None:
            self.remedy = "An original that has memorised those images makes this likely: pass others as eval_dataset"

    def terms(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, and the distance from the original's predictions; see :meth:`Guard.terms`."""
        loss = F.cross_entropy(logits, inputs["labels"], label_smoothing=self._args.label_smoothing_factor)
        terms = {"source_loss": loss.detach()}
        if self._args.source_distillation:
            distillation = self.distillation(inputs["pixel_values"], logits)
            terms["distillation_loss"] = distillation.detach()
            loss = loss + self._args.source_distillation * distillation
        return loss, terms | self._log()

    @torch.no_grad()
    def check_original(self) -> None:
        """Warn if the original does not classify the images that the excess is judged on; see the base class."""
        if self.original is None:
            return
        rows = np.random.default_rng(0).permutation(length_of(self._judged))[:_FIRST_LOOK].tolist()
        right, labels = 0, []
        for images, truth in self._batches(rows):
            right += int((self.original(pixel_values=images).logits.argmax(-1) == truth).sum())
            labels += truth.tolist()
        accuracy, chance = right / len(labels), max(map(labels.count, set(labels))) / len(labels)
        if accuracy <= chance + _ABOVE_CHANCE * (1 - chance):
            logger.warning(
                "The model before protection classifies %.0f %% of %d authorized images correctly, of which the most "
                "frequent class has %.0f %%: it does not know the source, so that nothing can be kept. Train its head "
                "first (recipes/ntp_vit.py does), or check that its classes have the order of your labels.",
                100 * accuracy,
                len(labels),
                100 * chance,
            )

    def distillation(self, images: Tensor, logits: Tensor) -> Tensor:
        """KL divergence of the predictions from the original model's (Hinton et al., 2015), a scalar in nats.

        Args:
            images: Pixel values [N, 3, H, W].
            logits: Of the model under protection, [N, K].
        """
        assert self.original is not None
        with torch.no_grad(), self._autocast():
            teacher = self.original(pixel_values=images).logits
        return softened_divergence(teacher.float(), logits.float())

    def _worse(self, model: PreTrainedModel, step: int) -> tuple[Tensor, float]:
        assert self.original is not None
        args, size = self._args, length_of(self._judged)
        images_of_a_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        seen = _LOOK_EVERY * images_of_a_step
        # Reading images of the training again takes time from the training, and there is hardly an error to count.
        count = min(size, images_of_a_step if self.held_out is None else seen)
        rows = self._rows(size, step, count)
        own = len(rows)
        # As many passes on every rank, or under FSDP some would wait in vain: where others have one image more, one
        # of no class.
        rows += [0] * (math.ceil(count / args.world_size) - own)
        lost = torch.zeros((), device=args.device)
        for images, labels in self._batches(rows):
            labels[max(own, 0) :] = _NO_CLASS
            own -= len(labels)
            lost += _lost(self.original(pixel_values=images).logits, model(pixel_values=images).logits, labels)
        return average(lost) * args.world_size / count, min(1.0, min(size, seen) / _WINDOW)

    def _batches(self, rows: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixel values [N, 3, H, W] and labels [N] of rows, as many at a time as a training batch has."""
        size = self._args.per_device_train_batch_size
        for start in range(0, len(rows), size):
            batch = collate(fetch_rows(self._judged, rows[start : start + size]))
            yield batch["pixel_values"].to(self._args.device), batch["labels"].to(self._args.device)


def _lost(before: Tensor, after: Tensor, labels: Tensor) -> Tensor:
    """How many more images logits [N, K] classify wrongly ``after`` than ``before``, a scalar."""
    return (before.argmax(-1) == labels).sum().float() - (after.argmax(-1) == labels).sum()


class FeatureGuard(Guard):
    """Without labels: the excess is the relative error of the pooled features, see :class:`FeatureDistance`.

    Args:
        model: The model before protection; copied.
        args: ``feature_tolerance`` and ``head_name``, too.
        source: Training rows of "pixel_values".
        autocast: See :class:`Guard`.
    """

    option = "feature_tolerance"

    def __init__(
        self,
        model: PreTrainedModel,
        args: NTPConfig,
        source: Dataset,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        super().__init__(args.feature_tolerance, args, source, autocast=autocast)
        self.original = _frozen_copy(model, args.device)
        self._head = find_head(self.original, args.head_name)[1]
        self._norms = batch_norms(self.original)

    def terms(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cosine distance plus relative error of the features, a scalar: 0 for equal ones, about 2 for lost ones."""
        loss = self.distance(inputs["pixel_values"], features, batch_statistics=True).sum()
        return loss, {"source_loss": loss.detach(), **self._log()}

    def _worse(self, model: PreTrainedModel, step: int) -> tuple[Tensor, float]:
        args = self._args
        # As many on every rank: their features are put together.
        rows = self._rows(length_of(self._judged), step, args.per_device_train_batch_size * args.world_size)
        images = collate(fetch_rows(self._judged, rows))["pixel_values"].to(args.device)
        return self._excess(model, images, step), _FEATURE_SHARE

    def _excess(self, model: PreTrainedModel, images: Tensor, step: int) -> Tensor:
        with recorded_features(find_head(model, self._args.head_name)[1]) as features:
            model(pixel_values=images)
        return self.distance(images, features[-1]).relative_error

    def distance(self, images: Tensor, features: Tensor, batch_statistics: bool = False) -> FeatureDistance:
        """Distance of features [N, D] from the original's on the same images, over the rows of all ranks.

        Args:
            images: Pixel values [N, 3, H, W].
            features: Of the model under protection.
            batch_statistics: Whether BatchNorm normalises with the batch, as it did for ``features``.
        """
        for norm in self._norms:
            norm.train(batch_statistics)
        frozen = frozen_batch_norm_statistics(self.original)
        with torch.no_grad(), self._autocast(), frozen, recorded_features(self._head) as reference:
            self.original(pixel_values=images)
        return feature_distance(*gather_rows(features, reference[-1]))


class ReconstructionGuard(FeatureGuard):
    """For masked autoencoders: the excess is by how much worse than the original it reconstructs, relatively.

    The decoder stays as it is: the encoder has to give it what it understands.
    """

    def terms(
        self, model: PreTrainedModel, inputs: Mapping[str, Any], logits: Tensor, features: Tensor, step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Reconstruction loss relative to the original's; see :meth:`Guard.terms`."""
        loss = self.reconstruct(model, inputs["pixel_values"], self.mask_seed(step))
        return loss, {"source_loss": loss.detach(), **self._log()}

    def _excess(self, model: PreTrainedModel, images: Tensor, step: int) -> Tensor:
        return average(self.reconstruct(model, images, self.mask_seed(step)) - 1)

    def mask_seed(self, step: int) -> int:
        """Of a step on this rank, so that a resumed run hides the same patches."""
        entropy = (self._args.seed, step, self._args.process_index)
        return int(np.random.SeedSequence(entropy).generate_state(1)[0])

    def reconstruct(self, model: PreTrainedModel, images: Tensor, seed: int) -> Tensor:
        """Reconstruction loss of the autoencoder over that of the original, a scalar: 1 where both are as good.

        Args:
            model: The model under protection, unwrapped.
            images: Pixel values [N, 3, H, W].
            seed: Decides which patches are hidden, alike for the original.
        """
        encoder, original = plain_model(model), plain_model(self.original)
        noise = mask_noise(encoder, images, seed)
        # Accelerate knows of the model around the encoder alone.
        with self._autocast():
            with torch.no_grad():
                reference = original(pixel_values=images, noise=noise).loss
            return encoder(pixel_values=images, noise=noise).loss / reference


def _frozen_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return nn.Module.to(copy.deepcopy(model), device).requires_grad_(False).eval()
