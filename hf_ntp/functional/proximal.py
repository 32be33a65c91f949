"""Proximal operators and projections used by ADMM pruning.

Every hard projection is ``x * mask`` with the mask that keeps the entries of largest magnitude, which solves

    project(x) = argmin_z ||z - x||^2   subject to  z in the sparse set.

Masks are exact (never one zero too many or too few) and deterministic: among equal magnitudes the entry that
comes first is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
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
    return LayerSelector([zeros])(0, x)


class LayerSelector:
    """Masks for "the smallest magnitudes of every tensor"; the threshold of a tensor is sought once and remembered.

    Args:
        zeros: How many entries every tensor loses.
    """

    def __init__(self, zeros: Sequence[int]) -> None:
        self._zeros = zeros
        self._thresholds: dict[int, Tensor] = {}

    def __call__(self, i: int, tensor: Tensor) -> Tensor:
        """Mask of the i-th tensor; it has to have the same magnitudes whenever it is asked for.

        Raises:
            ValueError: If it has fewer entries than it is to lose.
        """
        zeros = self._zeros[i]
        if not 0 <= zeros <= tensor.numel():
            raise ValueError(
                f"zeros is {zeros}; a tensor of {tensor.numel()} entries can lose 0 to {tensor.numel()} of them."
            )
        if zeros == 0:
            return torch.ones_like(tensor, dtype=torch.bool)
        magnitude = tensor.detach().abs().flatten().float()
        if i not in self._thresholds:
            self._thresholds[i] = _kth_smallest(magnitude, zeros)
        keep = magnitude > self._thresholds[i]
        # On a CPU, where looking costs no wait for a device: without ties that is it.
        if keep.device.type != "cpu" or np.count_nonzero(keep.numpy()) < keep.numel() - zeros:
            # Entries equal to the threshold fill the places that are left, first come first kept.
            tied = magnitude == self._thresholds[i]
            keep |= tied & (tied.cumsum(0) <= keep.numel() - zeros - keep.sum())
        return keep.view(tensor.shape)


def _kth_smallest(values: Tensor, k: int) -> Tensor:
    if values.device.type == "cpu":  # half the time of kthvalue, which carries indices along
        return torch.from_numpy(np.partition(values.numpy(), k - 1)[k - 1 : k].copy())
    return values.sort().values[k - 1 : k].clone()  # kthvalue took ten times as long on a GPU


def project_cardinality(x: Tensor, sparsity: float) -> Tensor:
    """Euclidean projection on tensors with at least ``num_zeros(x.numel(), sparsity)`` zeros (per layer).

    Args:
        x: Any shape.
        sparsity: Fraction of zeros in [0, 1).
    """
    return x * cardinality_mask(x, num_zeros(x.numel(), sparsity))


def _magnitude_bits(x: Tensor) -> Tensor:
    """Magnitudes as integers in the same order: the bits of non-negative floats sort like the floats."""
    return x.detach().float().abs().flatten().view(torch.int32)


class GlobalSelector:
    """Masks for "the smallest magnitudes over all tensors together", one tensor at a time and exactly.

    Two counting passes over the tensors find the threshold, so that nothing the size of all weights is ever made.

    Args:
        tensors: Called several times; gives the tensors one after another.
        sparsity: Fraction of zeros over all of them, in [0, 1).
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]], sparsity: float) -> None:
        zeros = num_zeros(sum(tensor.numel() for tensor in tensors()), sparsity)
        self._threshold, self._ties_kept = -1, 0
        if zeros == 0:
            return
        high, below = self._bucket(tensors, zeros, lambda bits: bits >> 16)
        low, below_low = self._bucket(tensors, zeros - below, lambda bits: (bits & 0xFFFF)[bits >> 16 == high])
        self._threshold = (high << 16) | low
        ties = sum(int((_magnitude_bits(tensor) == self._threshold).sum()) for tensor in tensors())
        self._ties_kept = ties - (zeros - below - below_low)

    @staticmethod
    def _bucket(
        tensors: Callable[[], Iterable[Tensor]], zeros: int, key: Callable[[Tensor], Tensor]
    ) -> tuple[int, int]:
        """Return the bucket in which the ``zeros``-th smallest entry lies, and how many entries lie below it."""
        counts = sum(torch.bincount(key(_magnitude_bits(tensor)), minlength=1 << 16) for tensor in tensors())
        running = torch.as_tensor(counts).cumsum(0)
        bucket = int(torch.searchsorted(running, zeros))
        return bucket, int(running[bucket - 1]) if bucket else 0

    def __call__(self, tensor: Tensor) -> Tensor:
        """Mask of the next tensor; call once per tensor, in the order they were given in."""
        bits = _magnitude_bits(tensor)
        tied = bits == self._threshold
        kept = tied & (tied.cumsum(0) <= self._ties_kept)
        self._ties_kept -= int(kept.sum())
        return ((bits > self._threshold) | kept).view(tensor.shape)


def global_cardinality_mask(tensors: Sequence[Tensor], sparsity: float) -> list[Tensor]:
    """Masks that drop the smallest magnitudes over *all* tensors together, ``num_zeros`` of them in total."""
    select = GlobalSelector(lambda: tensors, sparsity)
    return [select(tensor) for tensor in tensors]


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
