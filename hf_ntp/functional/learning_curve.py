"""Sample-wise learning curves and the area between them (NTP, ECCV 2024, section 4).

    SLC-AUC = integral of [A_transfer(n) - A_scratch(n)] d log n        (trapezoid over the sample sizes)

> 0: the checkpoint helps the attacker; 0: worth as much as random initialisation; < 0: worse than nothing.
Units: ``nats`` (d ln n), ``decades`` (d log10 n) and ``normalized`` (divided by the log range: the mean accuracy gap).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from scipy import stats
from torch import Tensor

Curve = Tensor | Sequence[float] | Sequence[Sequence[float]]


class SLCAUC(NamedTuple):
    """The same area in three units; each a tensor with the leading shape of the curves (one entry per seed)."""

    nats: Tensor
    decades: Tensor
    normalized: Tensor


class Interval(NamedTuple):
    """Mean and two-sided confidence interval over seeds."""

    mean: float
    low: float
    high: float


def check_sample_sizes(sample_sizes: Sequence[int]) -> None:
    """Raise ``ValueError`` unless the sizes are at least two numbers, positive and strictly increasing."""
    try:
        sizes = torch.as_tensor(sample_sizes).tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"sample_sizes are {sample_sizes}; needed: numbers of images.") from error
    if not isinstance(sizes, list) or not all(
        isinstance(size, (int, float)) and math.isfinite(size) for size in sizes
    ):
        raise ValueError(f"sample_sizes are {sizes}; needed: a list of finite numbers, the same sizes for all seeds.")
    if len(sizes) < 2 or sizes[0] <= 0 or any(b <= a for a, b in pairwise(sizes)):
        raise ValueError(
            f"sample_sizes are {sizes}; needed: at least two positive sizes in strictly increasing order. "
            "Sort them and drop duplicates."
        )


def _gap(transfer: Curve, scratch: Curve, sample_sizes: Sequence[int]) -> Tensor:
    """Return the accuracy gap [..., sizes] after checking that both curves stand on one grid."""
    check_sample_sizes(sample_sizes)
    try:
        ours, reference = (torch.as_tensor(curve, dtype=torch.float64) for curve in (transfer, scratch))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"the curves are no numbers of one shape ({error}); needed: one accuracy per size, of every seed. Drop "
            "failed runs."
        ) from error
    for name, curve in (("transfer", ours), ("scratch", reference)):
        if curve.dim() == 0 or curve.shape[-1] != len(sample_sizes):
            raise ValueError(
                f"the {name} curve has shape {tuple(curve.shape)} on {len(sample_sizes)} sample sizes; needed: one "
                "accuracy per size on the last axis. Measure both curves on the same grid."
            )
        if not bool(((curve >= 0) & (curve <= 1)).all()):
            raise ValueError(
                f"the {name} curve holds values outside [0, 1] or NaN: {curve.tolist()}; needed: accuracies as "
                "fractions. Divide percentages by 100 and drop failed runs."
            )
    if ours.shape != reference.shape:
        raise ValueError(
            f"the curves have shapes {tuple(ours.shape)} and {tuple(reference.shape)}; needed: the same seeds and "
            "sizes, so that they can be compared pair by pair."
        )
    return ours - reference


def slc_auc(transfer: Curve, scratch: Curve, sample_sizes: Sequence[int]) -> SLCAUC:
    """Area between a transfer curve and the scratch curve, in all three units.

    Args:
        transfer: Accuracies in [0, 1], [sizes] or [seeds, sizes].
        scratch: Same shape: training from random initialisation, by the same protocol.
        sample_sizes: Labelled target samples per point, strictly increasing.

    Raises:
        ValueError: If sizes are unsorted or repeated, grids differ, or accuracies are not in [0, 1].
    """
    gap = _gap(transfer, scratch, sample_sizes)
    log_sizes = torch.log(torch.as_tensor(list(sample_sizes), dtype=torch.float64))
    nats = torch.trapezoid(gap, log_sizes)
    return SLCAUC(nats, nats / math.log(10), nats / (log_sizes[-1] - log_sizes[0]))


def confidence_interval(values: Tensor | Sequence[float], level: float = 0.95) -> Interval:
    """Student's t interval of the mean over seeds.

    Args:
        values: One value per seed, [seeds]. With a single seed the bounds are NaN: nothing is known of the spread.
        level: Two-sided confidence, in (0, 1).

    Raises:
        ValueError: For another level.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of confidence is {level}; needed: a number between 0 and 1, such as 0.95.")
    seeds = torch.as_tensor(values, dtype=torch.float64).flatten()
    mean = float(seeds.mean())
    if len(seeds) < 2:
        return Interval(mean, math.nan, math.nan)
    half = float(stats.t.ppf(0.5 + level / 2, len(seeds) - 1) * seeds.std() / math.sqrt(len(seeds)))
    return Interval(mean, mean - half, mean + half)


def retained_transfer(protected: float, unprotected: float) -> float:
    """Share of the transfer benefit that protection leaves: SLC-AUC(protected) / SLC-AUC(unprotected).

    1 = no protection, 0 = the checkpoint is worth nothing to this attacker. Both areas in the same unit.

    Returns:
        The ratio, or NaN where the unprotected checkpoint has nothing to give (area <= 0): there is no transfer to
        retain, and a ratio would mean nothing.
    """
    return protected / unprotected if unprotected > 0 else math.nan
