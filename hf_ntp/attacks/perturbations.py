"""Perturbations of pixel values, from five groups; strengths are relative to the batch's spread.

Functions of pixel values [N, C, H, W] and a CPU generator, which draws the same on every device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F


def _uniform(images: Tensor, low: float, high: float, channels: int, generator: torch.Generator) -> Tensor:
    """Return one value per image and channel, [N, channels, 1, 1]."""
    drawn = torch.rand(len(images), channels, 1, 1, generator=generator)
    return (low + (high - low) * drawn).to(images)


def brightness_contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    """Scale contrast by .5 to 1.5 and shift brightness by up to half a standard deviation."""
    contrast = _uniform(images, 0.5, 1.5, 1, generator)
    shift = _uniform(images, -0.5, 0.5, 1, generator) * images.std()
    means = images.mean((1, 2, 3), keepdim=True)
    return means + contrast * (images - means) + shift


def noise(images: Tensor, generator: torch.Generator) -> Tensor:
    """Add Gaussian noise of .1 to .5 standard deviations."""
    strength = _uniform(images, 0.1, 0.5, 1, generator) * images.std()
    return images + strength * torch.randn(images.shape, generator=generator).to(images)


def blur(images: Tensor, generator: torch.Generator) -> Tensor:
    """Average over 3x3 windows one to three times."""
    for _ in range(int(torch.randint(1, 4, (), generator=generator))):
        images = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return images


def colour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Exchange the channels and scale each of them by .5 to 1.5."""
    channels = images.shape[1]
    order = torch.randperm(channels, generator=generator).to(images.device)
    return images[:, order] * _uniform(images, 0.5, 1.5, channels, generator)


def occlusion(images: Tensor, generator: torch.Generator) -> Tensor:
    """Cover a patch of half the height and width, anywhere, with the mean value."""
    count, _, height, width = images.shape
    inside = torch.ones(count, 1, height, width, dtype=torch.bool)
    for size, shape in ((height, (1, 1, height, 1)), (width, (1, 1, 1, width))):
        patch = max(size // 2, 1)
        start = torch.randint(0, size - patch + 1, (count, 1, 1, 1), generator=generator)
        position = torch.arange(size).view(shape)
        inside = inside & (start <= position) & (position < start + patch)
    return torch.where(inside.to(images.device), images.mean(), images)


PERTURBATIONS: tuple[Callable[[Tensor, torch.Generator], Tensor], ...] = (
    brightness_contrast,
    noise,
    blur,
    colour,
    occlusion,
)
"""One of each group."""


def perturb(images: Tensor, generator: torch.Generator) -> Tensor:
    """Perturb a batch in one way, chosen at random."""
    choice = int(torch.randint(len(PERTURBATIONS), (), generator=generator))
    return PERTURBATIONS[choice](images, generator)
