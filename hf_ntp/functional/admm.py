"""ADMM with scaled dual for ``min f(W) + g(Z)  subject to  W = Z``  (NTP, ECCV 2024, section 3).

    W-step   gradient steps on f(W) + (rho/2) ||W - Z + U||^2
    Z-step   Z = prox_{g/rho}(W + U)
    U-step   U = U + W - Z

**One tensor instead of two.** With X = W + U before the Z-step, Moreau's identity gives Z = prox(X) and the new
U = X - prox(X), so Z and U need not both be stored. The W-step only needs the *anchor* V = Z - U = 2 prox(X) - X,
because the penalty's gradient is rho (W - V).

* Hard projections (magnitude): V equals X where an entry is kept and -X where it is pruned. |V| = |X|, so projecting
  V again gives the very same mask back; storing V is enough.
* Soft threshold: V cannot be inverted, so X is stored and V computed from it when it is needed.
"""

from __future__ import annotations

import torch
from torch import Tensor


def penalty(weight: Tensor, anchor: Tensor, rho: float) -> Tensor:
    """Augmented Lagrangian term ``(rho / 2) * ||W - Z + U||^2`` (squared Frobenius norm), a scalar.

    Args:
        weight: W, any shape.
        anchor: V = Z - U, same shape.
        rho: Penalty parameter, >= 0.
    """
    return 0.5 * rho * torch.linalg.vector_norm(weight - anchor).square()


def add_penalty_gradient_(gradients: list[Tensor], weights: list[Tensor], anchors: list[Tensor], rho: float) -> None:
    """Add ``rho * (W - V)``, the gradient of :func:`penalty`, to ``gradients`` in place, without autograd."""
    torch._foreach_add_(gradients, weights, alpha=rho)
    torch._foreach_add_(gradients, anchors, alpha=-rho)


def hard_anchor(x: Tensor, sparse: Tensor) -> Tensor:
    """V = 2 Z - X for the projection Z = X * mask: X where kept, -X where pruned, exactly."""
    return 2 * sparse - x


def hard_dual(anchor: Tensor, sparse: Tensor) -> Tensor:
    """U = Z - V recovered from the stored anchor and Z = V * mask: 0 where kept, -V where pruned, exactly."""
    return sparse - anchor


def soft_anchor(x: Tensor, threshold: float) -> Tensor:
    """V = 2 Z - X for Z = soft_threshold(X)."""
    return x - 2 * x.clamp(-threshold, threshold)


def soft_dual(x: Tensor, threshold: float) -> Tensor:
    """U = X - Z for Z = soft_threshold(X): the clipped part of X."""
    return x.clamp(-threshold, threshold)


def primal_residual(weight: Tensor, sparse: Tensor) -> Tensor:
    """``||W - Z||^2`` of one layer, a scalar: how far the weights are from their sparse copy.

    The residual of the whole problem is the root of the sum over layers.
    """
    return torch.linalg.vector_norm(weight - sparse).square()


def dual_residual(sparse: Tensor, previous: Tensor, rho: float) -> Tensor:
    """``rho^2 * ||Z - Z_previous||^2`` of one layer, a scalar: how far the sparse copy still moves."""
    return rho**2 * torch.linalg.vector_norm(sparse - previous).square()
