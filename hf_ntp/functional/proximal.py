"""Proximal operators and projections used by ADMM pruning.

Every hard projection is ``x * mask`` with the mask that keeps the entries of largest magnitude, which solves

    project(x) = argmin_z ||z - x||^2   subject to  z in the sparse set.

Masks are exact (never one zero too many or too few) and deterministic: among equal magnitudes the entry that
comes first is kept.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def soft_threshold(x: Tensor, threshold: float) -> Tensor:
    """Proximal operator of ``threshold * ||.||_1``: ``argmin_z threshold*||z||_1 + 0.5*||z - x||^2``.

    Args:
        x: Any shape.
        threshold: Non-negative. In ADMM with L1 weight mu and penalty rho it is ``mu / rho``.

    Returns:
        ``sign(x) * max(|x| - threshold, 0)``, same shape.

    Raises:
        ValueError: If ``threshold`` is negative.
    """
    if threshold < 0:
        raise ValueError(f"threshold is {threshold}; the L1 proximal operator needs a value >= 0.")
    return x - x.clamp(-threshold, threshold)


def num_zeros(size: int, sparsity: float) -> int:
    """Number of zeros that ``sparsity`` (fraction in [0, 1)) asks of ``size`` weights, rounded half up.

    Raises:
        ValueError: If ``sparsity`` lies outside [0, 1).
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity is {sparsity}; it is the fraction of zeros and must lie in [0, 1).")
    return int(sparsity * size + 0.5)


def apportion_zeros(sizes: Sequence[int], sparsity: float) -> list[int]:
    """Split ``num_zeros(sum(sizes), sparsity)`` over layers in proportion to their sizes.

    Rounding each layer on its own would miss the requested total by up to half a weight per layer; rounding the
    running total does not.

    Returns:
        One count per layer; they sum to the requested total exactly.
    """
    counts, before, total = [], 0, 0
    for size in sizes:
        total += size
        after = num_zeros(total, sparsity)
        counts.append(after - before)
        before = after
    return counts


def cardinality_mask(x: Tensor, zeros: int) -> Tensor:
    """Boolean mask with exactly ``zeros`` False entries, at the smallest magnitudes of ``x``.

    Args:
        x: Any shape.
        zeros: How many entries to drop, in [0, x.numel()].

    Raises:
        ValueError: If ``zeros`` is outside that range.
    """
    if not 0 <= zeros <= x.numel():
        raise ValueError(f"zeros is {zeros}; a tensor of {x.numel()} entries can lose 0 to {x.numel()} of them.")
    if zeros == 0:
        return torch.ones_like(x, dtype=torch.bool)
    magnitude = x.detach().abs().flatten().float()
    threshold = magnitude.kthvalue(zeros).values
    keep = magnitude > threshold
    # Entries equal to the threshold fill the places that are left, first come first kept; no device sync.
    tied = magnitude == threshold
    keep |= tied & (tied.cumsum(0) <= magnitude.numel() - zeros - keep.sum())
    return keep.view(x.shape)


def project_cardinality(x: Tensor, sparsity: float) -> Tensor:
    """Euclidean projection on tensors with at least ``num_zeros(x.numel(), sparsity)`` zeros (per layer).

    Args:
        x: Any shape.
        sparsity: Fraction of zeros in [0, 1).
    """
    return x * cardinality_mask(x, num_zeros(x.numel(), sparsity))


def global_cardinality_mask(tensors: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks that drop the smallest magnitudes over *all* tensors together, ``num_zeros`` of them in total."""
    flat = torch.cat([tensor.detach().flatten().float() for tensor in tensors])
    mask = cardinality_mask(flat, num_zeros(flat.numel(), sparsity))
    parts = mask.split([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def project_global_cardinality(tensors: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Euclidean projection of a list of tensors on a joint budget of non-zeros."""
    masks = global_cardinality_mask(tensors, sparsity)
    return [tensor * mask for tensor, mask in zip(tensors, masks, strict=True)]


def n_m_mask(x: Tensor, n: int, m: int) -> Tensor:
    """Mask that keeps the ``n`` largest magnitudes of every ``m`` consecutive inputs of each output row.

    Args:
        x: Weight of shape [out, in, ...]; a row is everything after the first axis, flattened.
        n: Kept entries per group, 0 < n <= m.
        m: Group size; it must divide the row length.

    Raises:
        ValueError: If ``n`` and ``m`` do not fit each other or the shape.
    """
    row = x[0].numel()
    if not 0 < n <= m or row % m:
        raise ValueError(
            f"n:m is {n}:{m} on rows of {row} weights; needed: 0 < n <= m and m a divisor of the row length. "
            "Choose another pattern or leave this layer out."
        )
    groups = x.detach().abs().reshape(-1, m).float()
    order = groups.argsort(dim=1, descending=True, stable=True)[:, :n]
    return torch.zeros_like(groups, dtype=torch.bool).scatter_(1, order, True).view(x.shape)


def project_n_m(x: Tensor, n: int, m: int) -> Tensor:
    """Euclidean projection on the N:M pattern: at most ``n`` non-zeros in every ``m`` consecutive weights."""
    return x * n_m_mask(x, n, m)


def cubic_sparsity(progress: float, sparsity: float) -> float:
    """Gradual pruning schedule ``s * (1 - (1 - t)^3)``: fast while much is redundant, slow at the end.

    Args:
        progress: Share ``t`` of the pruning phase that is over; clipped to [0, 1].
        sparsity: Final sparsity ``s``, reached exactly at ``t = 1``.
    """
    remaining = 1 - min(max(progress, 0.0), 1.0)
    return sparsity * (1 - remaining**3)
