"""ADMM pruning as a stateful driver around :mod:`hf_ntp.functional`: when is the Trainer's business, what is here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..functional import (
    Residuals,
    add_penalty_gradient_,
    apportion_zeros,
    cardinality_mask,
    cubic_sparsity,
    global_cardinality_mask,
    hard_anchor,
    hard_dual,
    n_m_mask,
    residuals,
    soft_anchor,
    soft_dual,
    soft_threshold,
)


def parse_n_m(pattern: str) -> tuple[int, int] | None:
    """Return (n, m) for a pattern such as "2:4", and None for any other word."""
    n, colon, m = pattern.partition(":")
    return (int(n), int(m)) if colon and n.isdigit() and m.isdigit() else None


def sparsity_masks(tensors: Sequence[Tensor], pattern: str, sparsity: float) -> list[Tensor]:
    """Masks that keep the largest magnitudes of ``tensors`` at ``sparsity``.

    Args:
        tensors: One per prunable weight.
        pattern: "layer" or "l1" (every layer at the same sparsity), "global" (one budget for all), or "N:M".
        sparsity: Fraction of zeros. Below the final one an N:M pattern keeps more than N of every M.
    """
    if pattern == "global":
        return global_cardinality_mask(tensors, sparsity)
    if n_m := parse_n_m(pattern):
        n, m = n_m
        kept = max(n, round(m * (1 - sparsity)))
        return [n_m_mask(tensor, kept, m) for tensor in tensors]
    zeros = apportion_zeros([tensor.numel() for tensor in tensors], sparsity)
    return [cardinality_mask(tensor, count) for tensor, count in zip(tensors, zeros, strict=True)]


class ADMMPruner:
    """Prunes ``weights`` gradually by ADMM, then fixes the mask.

    One tensor per weight is kept (see :mod:`hf_ntp.functional.admm`): the anchor Z - U for hard patterns, W + U for
    "l1", and after :meth:`finish` the mask itself, in the same storage.

    Args:
        weights: Prunable parameters by name, on their final device.
        sparsity: Final fraction of zeros, in [0, 1).
        pattern: "layer", "global", "N:M" or "l1" (soft threshold while training, magnitude per layer at the end).
        rho: Penalty parameter, > 0.
        l1_weight: Weight mu of the L1 norm; only with the pattern "l1".
    """

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        sparsity: float,
        pattern: str = "layer",
        rho: float = 5e-3,
        l1_weight: float = 1e-4,
    ) -> None:
        self.weights = dict(weights)
        self.final_sparsity = sparsity
        self.pattern = pattern
        self.rho = rho
        self.threshold = l1_weight / rho
        self.sparsity = 0.0
        self.finished = False
        # A first Z-step with U = 0: X = W; at sparsity 0 a hard projection leaves Z = W, and the anchor is W too.
        self.stored = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @property
    def _soft(self) -> bool:
        return self.pattern == "l1"

    @torch.no_grad()
    def add_penalty_gradient(self) -> None:
        """Add rho (W - Z + U) to every gradient that this step has; nothing to do once the mask is fixed."""
        if self.finished:
            return
        gradients: list[Tensor] = []
        weights: list[Tensor] = []
        anchors: list[Tensor] = []
        for name, weight in self.weights.items():
            if weight.grad is not None:
                gradients.append(weight.grad)
                weights.append(weight)
                anchors.append(self.stored[name])
        if self._soft:
            anchors = [soft_anchor(x, self.threshold) for x in anchors]
        add_penalty_gradient_(gradients, weights, anchors, self.rho)

    def _sparse_and_shifted(self) -> tuple[list[Tensor], list[Tensor]]:
        """Return Z of the last Z-step and W + U, with U recovered from the stored tensors."""
        stored = list(self.stored.values())
        if self._soft:
            dual = [soft_dual(x, self.threshold) for x in stored]
            sparse = [x - u for x, u in zip(stored, dual, strict=True)]
        else:
            masks = sparsity_masks(stored, self.pattern, self.sparsity)
            dual = [hard_dual(v, mask) for v, mask in zip(stored, masks, strict=True)]
            sparse = [v * mask for v, mask in zip(stored, masks, strict=True)]
        return sparse, [weight + u for weight, u in zip(self.weights.values(), dual, strict=True)]

    @torch.no_grad()
    def update(self, progress: float) -> Residuals:
        """Z-step and U-step at the sparsity that the cubic schedule gives for ``progress`` in [0, 1].

        Returns:
            Primal and dual residuals (scalar tensors, not synchronised).

        Raises:
            RuntimeError: If the mask is already fixed.
        """
        self._require_unfinished("update")
        old, shifted = self._sparse_and_shifted()
        self.sparsity = cubic_sparsity(progress, self.final_sparsity)
        if self._soft:
            new, stored = [soft_threshold(x, self.threshold) for x in shifted], shifted
        else:
            masks = sparsity_masks(shifted, self.pattern, self.sparsity)
            new = [x * mask for x, mask in zip(shifted, masks, strict=True)]
            stored = [hard_anchor(x, mask) for x, mask in zip(shifted, masks, strict=True)]
        for target, value in zip(self.stored.values(), stored, strict=True):
            target.copy_(value)
        return residuals(list(self.weights.values()), new, old, self.rho)

    @torch.no_grad()
    def finish(self) -> None:
        """Hard prune: W <- projection of W + U at exactly the requested sparsity, and fix the mask.

        Raises:
            RuntimeError: If the mask is already fixed.
        """
        self._require_unfinished("finish")
        _, shifted = self._sparse_and_shifted()
        masks = sparsity_masks(shifted, self.pattern, self.final_sparsity)
        for (name, weight), x, mask in zip(self.weights.items(), shifted, masks, strict=True):
            weight.copy_(x * mask)
            self.stored[name].copy_(mask)
        self.sparsity = self.final_sparsity
        self.finished = True

    @torch.no_grad()
    def enforce_mask(self) -> None:
        """Set pruned weights back to zero, after an optimizer step of the masked phase."""
        torch._foreach_mul_(list(self.weights.values()), list(self.stored.values()))

    def _require_unfinished(self, what: str) -> None:
        if self.finished:
            raise RuntimeError(
                f"{what}() was called after finish(): the mask is fixed. Make a new ADMMPruner to prune further."
            )

    def tensors(self) -> dict[str, Tensor]:
        """State tensors by weight name, for a checkpoint; with :meth:`scalars` they are the whole state."""
        return dict(self.stored)

    def scalars(self) -> dict[str, float | bool]:
        """JSON part of the state."""
        return {"sparsity": self.sparsity, "finished": self.finished}

    def load(self, tensors: Mapping[str, Tensor], scalars: Mapping[str, float | bool]) -> None:
        """Restore what :meth:`tensors` and :meth:`scalars` gave.

        Raises:
            ValueError: If the tensors belong to other weights.
        """
        if tensors.keys() != self.stored.keys():
            differing = sorted(tensors.keys() ^ self.stored.keys())
            raise ValueError(
                f"the ADMM state in the checkpoint is for other weights (differing: {differing[:5]}); needed: the "
                "model, prune_include and prune_exclude of the run that wrote it."
            )
        for name, stored in self.stored.items():
            stored.copy_(tensors[name])
        self.sparsity, self.finished = float(scalars["sparsity"]), bool(scalars["finished"])
