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
        first: Running means of the gradients, laid out in memory as the parameters; begin with 0.
        second: Those of their squares.
        step: Number of this step, from 1.
        rate: Learning rate.
        betas: How much of the running means stays at every step.
    """
    # The kernel goes through memory without a look at strides.
    pairs = zip(parameters, gradients, strict=True)
    gradients = [g if g.stride() == p.stride() else torch.empty_like(p).copy_(g) for p, g in pairs]
    steps = [torch.full((), float(step), device=parameters[0].device)] * len(parameters)
    torch._fused_adam_(
        parameters,
        gradients,
        first,
        second,
        [],
        steps,
        lr=rate,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=0.0,
        eps=_EPSILON,
        amsgrad=False,
        maximize=False,
    )
