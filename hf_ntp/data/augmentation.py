"""Augmentations for small images, on batches of pixel values; all randomness comes from the generator passed in."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class RandomShift:
    """Shift every image by up to ``pixels`` in both directions; the border is repeated.

    Args:
        pixels: Largest shift, >= 0.
    """

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return shifted copies of ``images`` [N, C, H, W]."""
        count, _, height, width = images.shape
        padded = F.pad(images, [self.pixels] * 4, mode="replicate")
        top, left = (torch.from_numpy(rng.integers(0, 2 * self.pixels + 1, count)) for _ in range(2))
        rows = (top[:, None] + torch.arange(height))[:, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, :]
        return padded.permute(0, 2, 3, 1)[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)
