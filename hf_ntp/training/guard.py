"""What keeps the source alive: the original model as a teacher, and a guard that holds the target terms back.

With labels the original's predictions are kept, without labels its features, or what a masked autoencoder does.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import PreTrainedModel

from ..functional import FeatureDistance, feature_distance
from ..models import find_head, frozen_batch_norm_statistics, mask_noise, plain_model, recorded_features
from .arguments import ProtectionArguments
from .distributed import average, gather_rows

_MEMORY = 0.9


class Guard:
    """A running mean of how much worse than the original the model has become on the source, and its limit.

    Args:
        tolerance: Limit at the first and at the last step; empty for none.
        device: Where the mean is kept.
    """

    def __init__(self, tolerance: Sequence[float], device: torch.device) -> None:
        self.tolerance = tolerance
        self.excess = torch.zeros((), device=device)

    def share(self, progress: float) -> Tensor | float:
        """Share of its weight that everything aimed at the target may have, in [0, 1].

        It falls from 1 to 0 as the excess rises from the tolerance to twice the tolerance. The tolerance itself falls
        geometrically: first room to find another solution, then none to be worse.

        Args:
            progress: Share of all steps that is done.
        """
        if not self.tolerance:
            return 1.0
        first, last = self.tolerance
        return (2 - self.excess / (first * (last / first) ** progress)).clamp(0, 1)

    def _note(self, worse: Tensor) -> None:
        self.excess = torch.lerp(worse, self.excess, _MEMORY)


class SourceGuard(Guard):
    """With labels: the excess is cross-entropy beyond that of a frozen copy of the original model, in nats.

    Args:
        model: The model before protection; copied.
        options: ``source_distillation`` and ``source_tolerance``.
        device: Where the copy goes.
    """

    def __init__(self, model: PreTrainedModel, options: ProtectionArguments, device: torch.device) -> None:
        super().__init__(options.source_tolerance, device)
        needed = options.source_distillation or options.source_tolerance
        self.original = _frozen_copy(model, device) if needed else None

    def compare(self, images: Tensor, logits: Tensor, labels: Tensor) -> Tensor | None:
        """Note the excess on a source batch, averaged over ranks, and return the distillation loss.

        Args:
            images: Pixel values [N, 3, H, W].
            logits: Of the model under protection, [N, K].
            labels: [N].

        Returns:
            KL divergence of the predictions from the original model's (Hinton et al., 2015), a scalar in nats; None
            where no option needs the original model.
        """
        if self.original is None:
            return None
        with torch.no_grad():
            teacher = self.original(pixel_values=images).logits.float()
            worse = F.cross_entropy(logits.float(), labels) - F.cross_entropy(teacher, labels)
            self._note(average(worse))
        student, teacher = F.log_softmax(logits.float(), -1), F.log_softmax(teacher, -1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)


class FeatureGuard(Guard):
    """Without labels: the excess is the relative error of the pooled features, see :class:`FeatureDistance`.

    Args:
        model: The model before protection; copied.
        options: ``feature_tolerance`` and ``head_name``.
        device: Where the copy goes.
    """

    def __init__(self, model: PreTrainedModel, options: ProtectionArguments, device: torch.device) -> None:
        super().__init__(options.feature_tolerance, device)
        self.original = _frozen_copy(model, device)
        self._head = find_head(self.original, options.head_name)[1]
        self._norms = [module for module in self.original.modules() if isinstance(module, _BatchNorm)]

    def match(self, images: Tensor, features: Tensor) -> Tensor:
        """Note the excess on a source batch, that of all ranks, and return the loss that keeps the features.

        Args:
            images: Pixel values [N, 3, H, W].
            features: Pooled features of the model under protection, in training mode, [N, D].

        Returns:
            Cosine distance plus relative error, a scalar: 0 for equal features, about 2 where nothing is left.
        """
        distance = self.distance(images, features, batch_statistics=True)
        self._note(distance.relative_error.detach())
        return distance.sum()

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
        with torch.no_grad(), frozen, recorded_features(self._head) as reference:
            self.original(pixel_values=images)
        return feature_distance(*gather_rows(features, reference[-1]))


class ReconstructionGuard(FeatureGuard):
    """For masked autoencoders: the excess is by how much worse than the original it reconstructs, relatively.

    The decoder stays as it is: the encoder has to give it what it understands.
    """

    def reconstruct(self, model: PreTrainedModel, images: Tensor, seed: int) -> Tensor:
        """Note the excess on a source batch, averaged over ranks, and return the loss of the autoencoder.

        Args:
            model: The model under protection, unwrapped.
            images: Pixel values [N, 3, H, W].
            seed: Decides which patches are hidden, alike for the original.

        Returns:
            Its reconstruction loss over that of the original, a scalar: 1 where both are as good.
        """
        encoder, original = plain_model(model), plain_model(self.original)
        noise = mask_noise(encoder, images, seed)
        with torch.no_grad():
            reference = original(pixel_values=images, noise=noise).loss
        ratio = encoder(pixel_values=images, noise=noise).loss / reference
        self._note(average(ratio.detach() - 1))
        return ratio


def _frozen_copy(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    return nn.Module.to(copy.deepcopy(model), device).requires_grad_(False).eval()
