"""Collapse of unauthorized tokens: information that is gone cannot be brought out again by fine-tuning.

After RepNoise (Rosati et al., 2024), which removes information at every layer instead of hiding it at the output.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def _alone(value: Tensor) -> Tensor:
    return value


def token_spread(tokens: Tensor, average: Callable[[Tensor], Tensor] = _alone) -> Tensor:
    """Variance over images of layer-normalised tokens, a scalar: 0 when all images look the same to the encoder.

    Normalising first means that nothing is gained by scaling tokens down.

    Args:
        tokens: [N, T, D]: N images, T tokens or positions, D channels.
        average: Mean of a tensor over equal parts of a batch, where ``tokens`` are one of several.
    """
    normalised = F.layer_norm(tokens.float(), tokens.shape[-1:])
    # Moving the mean changes no variance to first order; several parts would each see a share of that alone.
    mean = average(normalised.detach().mean(0))
    return average((normalised - mean).square().mean())


def relative_collapse(
    target: Tensor, source: Tensor, floor: float = 1e-4, average: Callable[[Tensor], Tensor] = _alone
) -> Tensor:
    """Logarithm of the spread of target tokens relative to that of source tokens: a scalar (nats) to be minimised.

    The logarithm keeps the pull constant while the spread shrinks by orders of magnitude; no gradient reaches the
    source tokens.

    Args:
        target: [N, T, D].
        source: [M, T, D].
        floor: Relative spread below which nothing is gained any more.
        average: See :func:`token_spread`.
    """
    spread = token_spread(source.detach(), average).clamp_min(1e-12)
    return (token_spread(target, average) / spread + floor).log()
