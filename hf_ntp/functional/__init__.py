"""The mathematics: pure functions on tensors, no models, no data, no training."""

from .adam import adam_step_
from .admm import (
    add_penalty_gradient_,
    dual_residual,
    hard_anchor,
    hard_dual,
    penalty,
    primal_residual,
    soft_anchor,
    soft_dual,
)
from .collapse import relative_collapse, token_spread
from .features import FeatureDistance, feature_distance, standardized
from .fisher import (
    between_class_scatter,
    class_means,
    trace_ratio,
    whitened_discriminant,
    within_class_scatter,
)
from .learning_curve import (
    SLCAUC,
    Interval,
    check_sample_sizes,
    confidence_interval,
    retained_transfer,
    slc_auc,
)
from .losses import clamped_ascent, softened_divergence, uniform_cross_entropy
from .proximal import (
    GlobalSelector,
    LayerSelector,
    apportion_zeros,
    cardinality_mask,
    cubic_sparsity,
    global_cardinality_mask,
    n_m_mask,
    num_zeros,
    project_cardinality,
    project_global_cardinality,
    project_n_m,
    soft_threshold,
)

__all__ = [
    "SLCAUC",
    "FeatureDistance",
    "GlobalSelector",
    "Interval",
    "LayerSelector",
    "adam_step_",
    "add_penalty_gradient_",
    "apportion_zeros",
    "between_class_scatter",
    "cardinality_mask",
    "check_sample_sizes",
    "clamped_ascent",
    "class_means",
    "confidence_interval",
    "cubic_sparsity",
    "dual_residual",
    "feature_distance",
    "global_cardinality_mask",
    "hard_anchor",
    "hard_dual",
    "n_m_mask",
    "num_zeros",
    "penalty",
    "primal_residual",
    "project_cardinality",
    "project_global_cardinality",
    "project_n_m",
    "relative_collapse",
    "retained_transfer",
    "slc_auc",
    "soft_anchor",
    "soft_dual",
    "soft_threshold",
    "softened_divergence",
    "standardized",
    "token_spread",
    "trace_ratio",
    "uniform_cross_entropy",
    "whitened_discriminant",
    "within_class_scatter",
]
