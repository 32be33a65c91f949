"""Adam as a function, for what is trained beside the model: heads and attackers that the Trainer knows nothing of."""

from __future__ import annotations

import torch
from torch import Tensor

_EPSILON = 1e-8


def adam_step_(
    parameters: list[Tensor],
    gradients: list[Tensor],
    first: list[Tensor],
    second: list[Tensor],
    step: int,
    rate: float,
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    """Take one step of Adam (Kingma & Ba, 2015) in place, without weight decay.

    `torch.optim.Adam` does the same, and takes many times as long for a small head, at every step of a run.

    Args:
        parameters: What moves.
        gradients: One per parameter.
        first: Running means of the gradients; begin with 0.
        second: Running means of their squares; begin with 0.
        step: Number of this step, from 1.
        rate: Learning rate.
        betas: How much of the running means stays at every step.
    """
    beta1, beta2 = betas
    torch._foreach_lerp_(first, gradients, 1 - beta1)
    torch._foreach_mul_(second, beta2)
    torch._foreach_addcmul_(second, gradients, gradients, 1 - beta2)
    scale = torch._foreach_sqrt(second)
    torch._foreach_div_(scale, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(scale, _EPSILON)
    torch._foreach_addcdiv_(parameters, first, scale, -rate / (1 - beta1**step))
