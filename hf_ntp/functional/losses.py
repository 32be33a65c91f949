"""Bounded non-transferable losses: what the encoder does to the simulated attacker's head (NTP, section 3)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def clamped_ascent(target_loss: Tensor, bound: float) -> Tensor:
    """``-min(bound, L_T)``: minimising it raises the attacker's loss, up to ``bound`` (nats) and no further.

    Above the bound the gradient is zero (a dead zone): the head is fooled while the features may stay separable.
    :func:`uniform_cross_entropy` has no such zone.

    Args:
        target_loss: L_T, the attacker's mean cross-entropy, a scalar.
        bound: beta > 0, nats; ``log(num_classes)`` is chance level.

    Raises:
        ValueError: If the bound is not positive.
    """
    if bound <= 0:
        raise ValueError(f"bound is {bound}; clamped ascent needs a positive number of nats.")
    return -target_loss.clamp(max=bound)


def uniform_cross_entropy(logits: Tensor) -> Tensor:
    """Cross-entropy of the prediction to the uniform distribution, minus its minimum: KL(uniform || p), nats.

    It is 0 only where every class is equally likely, and its gradient vanishes only there.

    Args:
        logits: [N, K].

    Returns:
        Mean over the batch, a scalar >= 0.
    """
    num_classes = logits.shape[-1]
    uniform = logits.new_full(logits.shape, 1 / num_classes)
    return F.kl_div(F.log_softmax(logits.float(), dim=-1), uniform.float(), reduction="batchmean")


def softened_divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits [N, K] (Hinton et al., 2015).

    The factor keeps its gradient at the size of the cross-entropy's, whatever the temperature.

    Returns:
        Mean over the batch, a scalar in nats.
    """
    wanted, given = ((logits / temperature).log_softmax(-1) for logits in (teacher, student))
    return temperature**2 * F.kl_div(given, wanted, reduction="batchmean", log_target=True)
