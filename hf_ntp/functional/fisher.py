"""Fisher discriminant of a batch of features: how separable the classes are (NTP, ECCV 2024, section 3).

Scatter matrices are normalised by the number of samples, so that S_W + S_B = S_T, the covariance. Classes without
a sample in the batch take no part; a class with one sample adds nothing to S_W.

Both criteria are regularised relative to the *total* scatter: this keeps them invariant under translation, rotation
and rescaling of the features, and finite when every class has a single sample (S_W = 0).
"""

from __future__ import annotations

import torch
from torch import Tensor


def class_means(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Mean feature and number of samples of every class.

    Args:
        features: [..., N, D].
        labels: [N], integers in [0, num_classes).
        num_classes: K, including classes that this batch lacks.

    Returns:
        Means [..., K, D] (zero where a class is absent; weigh by the counts) and counts [K].
    """
    counts = features.new_zeros(num_classes).index_add(0, labels, features.new_ones(len(labels)))
    sums = features.new_zeros(*features.shape[:-2], num_classes, features.shape[-1]).index_add(-2, labels, features)
    return sums / counts.clamp(min=1).unsqueeze(-1), counts


def _deviations(features: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Return [..., N, D] deviations within classes and [..., M, D] deviations of the means, over sqrt(N).

    A mean counts once per class, with the root of its share (M = K), or, where most classes are absent, once per
    sample (M = N): S_B is the same, and nothing has the size of all classes.
    """
    size = len(labels)
    if size == 0 or features.dim() < 2 or features.shape[-2] != size:
        raise ValueError(
            f"features have shape {tuple(features.shape)} and labels {tuple(labels.shape)}; "
            "needed: [..., N, D] and [N] with N >= 1. Pool the features to one vector per sample first."
        )
    many = num_classes >= size
    if many:  # number the classes by their first sample
        labels, num_classes = (labels[:, None] == labels).int().argmax(1), size
    means, counts = class_means(features, labels, num_classes)
    own, mean = means.index_select(-2, labels), features.mean(-2, keepdim=True)
    if many:
        return (features - own) / size**0.5, (own - mean) / size**0.5
    # The square root is taken of counts, not of learnt values: absent classes give 0 with no gradient.
    return (features - own) / size**0.5, (means - mean) * (counts / size).sqrt().unsqueeze(-1)


def within_class_scatter(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """S_W = (1/N) sum_i (x_i - mean_{y_i})(x_i - mean_{y_i})^T, shape [..., D, D]."""
    within, _ = _deviations(features, labels, num_classes)
    return within.mT @ within


def between_class_scatter(features: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """S_B = (1/N) sum_c n_c (mean_c - mean)(mean_c - mean)^T, shape [..., D, D]."""
    _, between = _deviations(features, labels, num_classes)
    return between.mT @ between


def trace_ratio(features: Tensor, labels: Tensor, num_classes: int, shrinkage: float = 1e-3) -> Tensor:
    """Fisher's trace ratio ``tr(S_B) / (tr(S_W) + shrinkage * tr(S_T))``, in [0, 1 / shrinkage].

    With ``shrinkage=0`` it is the published ``tr(S_B) / tr(S_W)``. The traces are computed without the matrices.

    Args:
        features: [..., N, D], the leading axes a batch of feature sets; computed in float32 whatever their type.
        labels: [N], integers in [0, num_classes).
        num_classes: Number of classes K.
        shrinkage: Share of the total scatter added to the denominator, >= 0.

    Returns:
        One value per feature set, shape [...].

    Raises:
        ValueError: If the shapes do not fit.
    """
    within, between = (part.square().sum((-2, -1)) for part in _deviations(features.float(), labels, num_classes))
    tiny = torch.finfo(within.dtype).tiny
    return between / (within + shrinkage * (within + between) + tiny)


def whitened_discriminant(features: Tensor, labels: Tensor, num_classes: int, shrinkage: float = 0.1) -> Tensor:
    """Whitened Fisher criterion ``tr(((1 - g) S_W + g tr(S_T)/D I)^-1 S_B)`` with shrinkage g, >= 0.

    Unlike the trace ratio it cannot be lowered by inflating the within-class scatter along directions that carry no
    class information.

    Args:
        features: [..., N, D], the leading axes a batch of feature sets; computed in float32 whatever their type.
        labels: [N], integers in [0, num_classes).
        num_classes: Number of classes K.
        shrinkage: g in [0, 1]; 0 gives ``tr(S_W^-1 S_B)``, which needs a non-singular S_W.

    Returns:
        One value per feature set, shape [...].

    Raises:
        ValueError: If the shapes do not fit or the shrinkage lies outside [0, 1].
    """
    if not 0 <= shrinkage <= 1:
        raise ValueError(f"shrinkage is {shrinkage}; needed: a value in [0, 1].")
    within, between = _deviations(features.float(), labels, num_classes)
    size, dim = within.shape[-2:]
    total = within.square().sum((-2, -1)) + between.square().sum((-2, -1))
    ridge = shrinkage * total / dim + torch.finfo(total.dtype).tiny
    if shrinkage and dim > 2 * size:
        # The same by Woodbury's identity, with a matrix of the size of the batch instead of the features'.
        factor = _ridge_factor((1 - shrinkage) * within @ within.mT, ridge)
        explained = torch.linalg.solve_triangular(factor, within @ between.mT, upper=False).square().sum((-2, -1))
        return (between.square().sum((-2, -1)) - (1 - shrinkage) * explained) / ridge
    factor = _ridge_factor((1 - shrinkage) * within.mT @ within, ridge)
    return torch.linalg.solve_triangular(factor, between.mT, upper=False).square().sum((-2, -1))


def _ridge_factor(scatter: Tensor, ridge: Tensor) -> Tensor:
    """Cholesky factor of ``scatter + ridge * I`` for matrices [..., n, n] and scalars [...]."""
    identity = torch.eye(scatter.shape[-1], device=scatter.device)
    return torch.linalg.cholesky_ex(scatter + ridge[..., None, None] * identity)[0]
