"""Augmentations for small images, on batches of pixel values; all randomness comes from the generator passed in."""

from __future__ import annotations

from dataclasses import dataclass
from math import radians

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


@dataclass(frozen=True)
class RandomView:
    """One of the many ways to see an image that contrastive learning tells an encoder to see as one (SimCLR).

    A random crop, resized and turned a little; brightness and contrast of every channel, light and dark exchanged;
    blur and noise. No mirroring: a mirrored digit is another sign. Every image gets a draw of its own. Colours change
    in units of the image's own mean and spread, whatever its processor's normalisation.

    Args:
        smallest_crop: Shortest side of a crop, as a share of the image's; crops have any aspect ratio above it.
        rotation: Largest angle, degrees.
        jitter: Largest change of brightness (in standard deviations) and, relatively, of contrast.
        invert: Probability that light and dark are exchanged.
        blur: Probability of a blur.
        noise: Largest standard deviation of the noise, as a share of the image's.
    """

    smallest_crop: float = 0.65
    rotation: float = 15.0
    jitter: float = 0.5
    invert: float = 0.2
    blur: float = 0.2
    noise: float = 0.2

    def __call__(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        """Return views of ``images`` [N, C, H, W]."""
        return self._recoloured(self._moved(images, rng), rng)

    def _moved(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        count = len(images)
        width, height = uniform(rng, self.smallest_crop, 1.0, 2, count)
        # The crop's centre, such that it stays inside: coordinates run from -1 to 1.
        across, down = uniform(rng, -1.0, 1.0, 2, count)
        angle = uniform(rng, -radians(self.rotation), radians(self.rotation), count)
        rows = [
            torch.stack([width * angle.cos(), -height * angle.sin(), across * (1 - width)], -1),
            torch.stack([width * angle.sin(), height * angle.cos(), down * (1 - height)], -1),
        ]
        grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, padding_mode="border", align_corners=False)

    def _recoloured(self, images: Tensor, rng: np.random.Generator) -> Tensor:
        shape = (len(images), images.shape[1], 1, 1)
        single = (len(images), 1, 1, 1)
        blurred = F.avg_pool2d(F.pad(images, [1] * 4, mode="replicate"), 3, stride=1)
        images = torch.where(uniform(rng, 0, 1, *single) < self.blur, blurred, images)
        spread, mean = torch.std_mean(images, (1, 2, 3), keepdim=True)
        low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
        inverted = uniform(rng, 0, 1, *single) < self.invert
        images, mean = (torch.where(inverted, low + high - value, value) for value in (images, mean))
        contrast = 1 + uniform(rng, -self.jitter, self.jitter, *shape)
        brightness = spread * uniform(rng, -self.jitter, self.jitter, *shape)
        grain = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32))
        noise = spread * uniform(rng, 0, self.noise, *single) * grain
        return (images - mean) * contrast + mean + brightness + noise


def uniform(rng: np.random.Generator, low: float, high: float, *shape: int) -> Tensor:
    """Draw numbers in [low, high), float32."""
    return torch.from_numpy(rng.uniform(low, high, shape).astype(np.float32))
