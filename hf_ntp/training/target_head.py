"""The simulated attacker's head: a softmax regression that follows the encoder as it moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TargetHead(nn.Module):
    """Linear head of one unauthorized domain, refitted on detached features at every step.

    Its problem is convex for fixed features, so a warm start loses nothing against a fresh head. A head frozen at the
    start would stop being an adversary.

    Args:
        in_features: Width of the pooled features.
        num_classes: Classes of the domain.
        learning_rate: Adam's rate for the head.
        seed: Seed of the initial weights; the same on every rank.
    """

    def __init__(self, in_features: int, num_classes: int, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.learning_rate = learning_rate
        self._optimizer: torch.optim.Adam | None = None

    @property
    def optimizer(self) -> torch.optim.Adam:
        """Adam over the head, made on first use: by then the head is on its device."""
        if self._optimizer is None:
            self._optimizer = torch.optim.Adam(self.linear.parameters(), lr=self.learning_rate, fused=True)
        return self._optimizer

    @torch.no_grad()
    def refit(self, features: Tensor, labels: Tensor, steps: int) -> None:
        """Take ``steps`` Adam steps on the cross-entropy of features [N, D], those of all ranks.

        The gradient of a softmax regression is written out, which costs a fraction of building a graph for it.
        """
        features = features.float()
        wanted = F.one_hot(labels, self.linear.out_features)
        for _ in range(steps):
            error = (self(features).softmax(-1) - wanted) / len(labels)
            self.linear.weight.grad = error.T @ features
            self.linear.bias.grad = error.sum(0)
            self.optimizer.step()

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D]; the gradient reaches the features only."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), self.linear.weight.detach(), self.linear.bias.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by name, for a checkpoint."""
        state = {name: parameter.detach() for name, parameter in self.linear.named_parameters()}
        for name, parameter in self.linear.named_parameters():
            state |= {f"{name}.{key}": value for key, value in self.optimizer.state[parameter].items()}
        return state

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` gave."""
        with torch.no_grad():
            for name, parameter in self.linear.named_parameters():
                parameter.copy_(tensors[name])
                prefix = f"{name}."
                self.optimizer.state[parameter] = {
                    key.removeprefix(prefix): value.clone().to(parameter.device)
                    for key, value in tensors.items()
                    if key.startswith(prefix)
                }
