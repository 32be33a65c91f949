"""The simulated attacker's head: a softmax regression that follows the encoder as it moves."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..functional import adam_step_


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

    first_weight: Tensor
    first_bias: Tensor
    second_weight: Tensor
    second_bias: Tensor

    def __init__(self, in_features: int, num_classes: int, learning_rate: float, seed: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(self.linear.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.linear.bias)
        self.learning_rate = learning_rate
        self._steps = 0
        for moment in ("first", "second"):
            for name, tensor in self.linear.state_dict().items():
                self.register_buffer(f"{moment}_{name}", torch.zeros_like(tensor))

    def _trained(self) -> list[Tensor]:
        return [self.linear.weight.detach(), self.linear.bias.detach()]

    @torch.no_grad()
    def refit(self, features: Tensor, labels: Tensor, steps: int) -> None:
        """Take ``steps`` Adam steps on the cross-entropy of features [N, D], those of all ranks.

        The gradient of a softmax regression is written out, which costs a fraction of building a graph for it.
        """
        features = features.float()
        wanted = F.one_hot(labels, self.linear.out_features)
        trained = self._trained()
        first, second = [self.first_weight, self.first_bias], [self.second_weight, self.second_bias]
        for _ in range(steps):
            error = (F.linear(features, *trained).softmax(-1) - wanted) / len(labels)
            self._steps += 1
            adam_step_(trained, [error.T @ features, error.sum(0)], first, second, self._steps, self.learning_rate)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [N, K] of features [N, D]; the gradient reaches the features only."""
        with torch.autocast(features.device.type, enabled=False):
            return F.linear(features.float(), *self._trained())

    def tensors(self) -> dict[str, Tensor]:
        """Weights and Adam's moments by name, for a checkpoint."""
        return {"steps": torch.tensor(self._steps), **self.state_dict()}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`tensors` gave."""
        self._steps = int(tensors["steps"])
        self.load_state_dict({name: tensor for name, tensor in tensors.items() if name != "steps"})
