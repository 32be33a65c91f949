"""What keeps the source alive: the original model as a teacher, and a guard that holds the target terms back."""

from __future__ import annotations

import copy

import torch
from accelerate.utils import reduce
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .arguments import ProtectionArguments

_MEMORY = 0.9


class SourceGuard:
    """A frozen copy of the original model, and a running mean of how much worse than it the model has become.

    Args:
        model: The model before protection; copied.
        options: ``source_distillation`` and ``source_tolerance``.
        device: Where the copy goes.
    """

    def __init__(self, model: PreTrainedModel, options: ProtectionArguments, device: torch.device) -> None:
        self.options = options
        self.excess = torch.zeros((), device=device)
        self.original: nn.Module | None = None
        if options.source_distillation or options.source_tolerance:
            self.original = nn.Module.to(copy.deepcopy(model), device).requires_grad_(False).eval()

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
            self.excess = torch.lerp(reduce(worse, reduction="mean"), self.excess, _MEMORY)
        student, teacher = F.log_softmax(logits.float(), -1), F.log_softmax(teacher, -1)
        return F.kl_div(student, teacher, reduction="batchmean", log_target=True)

    def share(self, progress: float) -> Tensor | float:
        """Share of its weight that everything aimed at the target may have, in [0, 1].

        It falls from 1 to 0 as the excess rises from the tolerance to twice the tolerance. The tolerance itself falls
        geometrically: first room to find another solution, then none to be worse.

        Args:
            progress: Share of all steps that is done.
        """
        if self.original is None or not self.options.source_tolerance:
            return 1.0
        first, last = self.options.source_tolerance
        return (2 - self.excess / (first * (last / first) ** progress)).clamp(0, 1)
