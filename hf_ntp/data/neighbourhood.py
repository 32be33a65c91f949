"""Images near a domain and clearly outside of it, made from its own: what a protection sees without target data.

Every change is a function of images [N, 3, H, W] in [0, 1] and a numpy Generator, and returns the same shape; what an
image shows stays recognisable.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, default_collate

from .augmentation import uniform
from .rows import fetch_rows, fingerprint_of

_RANGE_ROWS = 256


def invert(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Dark becomes bright."""
    return 1 - images


def recolour(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Dark and bright become two colours that are drawn for every image and channel."""
    first, second = uniform(rng, 0, 1, 2, *images.shape[:2], 1, 1)
    return torch.lerp(first, second, images)


def blend(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Absolute difference to smooth colour noise, as MNIST-M has it to photographs (Ganin et al., 2016)."""
    cells = int(rng.integers(2, 9))
    noise = F.interpolate(uniform(rng, 0, 1, *images.shape[:2], cells, cells), images.shape[-2:], mode="bicubic")
    return (images - noise.clamp(0, 1)).abs()


def restyle(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Amplitudes of the spectrum of another image of the batch and of noise, own phases (Yang & Soatto, 2020)."""
    spectrum = torch.fft.rfft2(images)
    others = torch.fft.rfft2(images[torch.from_numpy(rng.permutation(len(images)))])
    gain = uniform(rng, 0.3, 1.7, *spectrum.shape)
    return torch.fft.irfft2(torch.polar(others.abs() * gain, spectrum.angle()), images.shape[-2:])


def coarsen(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Half to a third of the resolution."""
    height, width = images.shape[-2:]
    share = rng.uniform(0.33, 0.5)
    small = F.interpolate(images, (max(1, round(share * height)), max(1, round(share * width))), mode="area")
    return F.interpolate(small, (height, width), mode=str(rng.choice(["nearest", "bilinear"])))


def thicken(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Bright parts grow, or dark ones."""
    sign = 1 if rng.random() < 0.5 else -1
    return sign * F.max_pool2d(sign * images, 3, stride=1, padding=1)


def move(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Turned by 15 to 40 degrees to either side, scaled by 0.6 to 1.5 and sheared; the border is repeated."""
    count = len(images)
    angle = uniform(rng, 0.26, 0.7, count) * torch.from_numpy(rng.choice([-1.0, 1.0], count)).float()
    width, height = uniform(rng, 0.6, 1.5, 2, count)
    shear, cos, sin = uniform(rng, -0.3, 0.3, count), angle.cos(), angle.sin()
    zero = torch.zeros(count)
    matrix = torch.stack([cos / width, (shear - sin) / width, zero, sin / height, cos / height, zero], 1)
    grid = F.affine_grid(matrix.view(-1, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


CHANGES: tuple[Callable[[Tensor, np.random.Generator], Tensor], ...] = (
    invert,
    recolour,
    blend,
    restyle,
    coarsen,
    thicken,
    move,
)
_MOST_CHANGES = 3


def surroundings(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Change every image by one to three different ones of :data:`CHANGES`, in random order.

    Args:
        images: [N, C, H, W] in [0, 1].
        rng: The only source of randomness.

    Returns:
        The same shape, in [0, 1].
    """
    count = len(images)
    orders = rng.permuted(np.tile(np.arange(len(CHANGES)), (count, 1)), axis=1)
    depths = rng.integers(1, _MOST_CHANGES + 1, count)
    images = images.clone()
    for step in range(_MOST_CHANGES):
        for kind, change in enumerate(CHANGES):
            chosen = torch.from_numpy((orders[:, step] == kind) & (depths > step))
            if chosen.any():
                images[chosen] = change(images[chosen], rng).clamp(0, 1)
    return images


class Neighbourhood(Dataset):
    """A dataset whose rows are another's with images changed by :func:`surroundings`, anew in every batch.

    Which change a batch gets depends on the seed and its rows alone, so that a resumed run sees the same.

    Args:
        data: Rows with "pixel_values" [C, H, W] of any range.
        seed: Seed of the changes.
    """

    def __init__(self, data: Dataset, seed: int = 0) -> None:
        self.data: Any = data
        self.seed = seed
        self.fingerprint = f"neighbourhood of {fingerprint_of(data)}"
        # Pixels are normalised in ways that only their processor knows: ranges come from some of the images.
        rows = fetch_rows(data, range(min(_RANGE_ROWS, len(self))))
        some = torch.stack([torch.as_tensor(row["pixel_values"]) for row in rows])
        self._low, high = (
            find(some.transpose(0, 1).flatten(1), 1).view(-1, 1, 1) for find in (torch.amin, torch.amax)
        )
        self._span = (high - self._low).clamp_min(1e-6)

    @property
    def labels(self) -> Any:
        """Labels of all rows, where the other dataset has them at hand."""
        return self.data.labels

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several changed rows at once."""
        rows = fetch_rows(self.data, indices)
        images = (default_collate([row["pixel_values"] for row in rows]) - self._low) / self._span
        rng = np.random.default_rng([self.seed, *(int(index) for index in indices)])
        changed = surroundings(images.clamp(0, 1), rng) * self._span + self._low
        return [{**row, "pixel_values": image} for row, image in zip(rows, changed, strict=True)]
