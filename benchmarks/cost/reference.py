"""Straightforward versions of the ADMM update and of the Fisher terms, to compare ours with.

Written for this benchmark, from the formulas. They do what research code for non-transferable pruning does: Python
loops over parameters and over classes, the penalty as a loss that autograd differentiates, Z, U and a float mask
stored apart, the threshold as a percentile of the sorted magnitudes. They leave out what that code does wrong (an
unsquared norm, absent classes as zero means, masks that can only shrink) or twice; results are those of ours.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn


class ReferenceADMM:
    """ADMM with Z, U and mask stored apart.

    Args:
        weights: Prunable parameters by name.
        rho: Penalty parameter.
        selects: Whether the threshold is selected (`torch.kthvalue`) instead of read off a sorted list.
    """

    def __init__(self, weights: Mapping[str, nn.Parameter], rho: float, selects: bool = False) -> None:
        self.weights, self.rho, self.selects = weights, rho, selects
        self.sparse = {name: weight.detach().clone() for name, weight in weights.items()}
        self.dual = {name: torch.zeros_like(weight) for name, weight in weights.items()}
        self.mask = {name: torch.ones_like(weight) for name, weight in weights.items()}

    def penalty_step(self) -> None:
        """Add the gradient of (rho / 2) ||W - Z + U||^2 to the gradients, through autograd."""
        loss = torch.zeros(())
        for name, weight in self.weights.items():
            loss = loss + self.rho / 2 * torch.norm(weight - self.sparse[name] + self.dual[name]) ** 2
        loss.backward()

    @torch.no_grad()
    def update(self, sparsity: float) -> tuple[Tensor, Tensor]:
        """Z-step and U-step; return primal and dual residual."""
        primal = dual = torch.zeros(())
        for name, weight in self.weights.items():
            shifted = weight + self.dual[name]
            magnitude = shifted.abs()
            place = max(1, int(sparsity * magnitude.numel() + 0.5))
            if self.selects:
                threshold = magnitude.flatten().kthvalue(place).values
            else:
                threshold = torch.sort(magnitude.flatten()).values[place - 1]
            self.mask[name] = (magnitude > threshold).float()
            previous, self.sparse[name] = self.sparse[name], shifted * self.mask[name]
            self.dual[name] = self.dual[name] + weight - self.sparse[name]
            primal = primal + torch.norm(weight - self.sparse[name]) ** 2
            dual = dual + torch.norm(self.rho * (self.sparse[name] - previous)) ** 2
        return primal.sqrt(), dual.sqrt()


def trace_ratio(features: Tensor, labels: Tensor, num_classes: int, shrinkage: float) -> Tensor:
    """tr(S_B) / (tr(S_W) + shrinkage tr(S_T)) of features [N, D], class by class, without the matrices."""
    within = between = torch.zeros(())
    mean = features.mean(0)
    for label in range(num_classes):
        members = features[labels == label]
        if len(members):
            center = members.mean(0)
            within = within + ((members - center) ** 2).sum() / len(features)
            between = between + len(members) * ((center - mean) ** 2).sum() / len(features)
    return between / (within + shrinkage * (within + between))


def whitened_discriminant(features: Tensor, labels: Tensor, num_classes: int, shrinkage: float) -> Tensor:
    """tr(((1 - g) S_W + g tr(S_T)/D I)^-1 S_B) of features [N, D]: matrices summed class by class, then an inverse."""
    width = features.shape[1]
    within = between = features.new_zeros(width, width)
    mean = features.mean(0)
    for label in range(num_classes):
        members = features[labels == label]
        if len(members):
            center = members.mean(0)
            within = within + (members - center).T @ (members - center) / len(features)
            between = between + len(members) * torch.outer(center - mean, center - mean) / len(features)
    total = torch.trace(within) + torch.trace(between)
    scatter = (1 - shrinkage) * within + shrinkage * total / width * torch.eye(width).to(features)
    return torch.trace(torch.linalg.inv(scatter) @ between)
