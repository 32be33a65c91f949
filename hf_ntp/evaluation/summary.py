"""From learning curves to the figures that are reported."""

from __future__ import annotations

import math
from typing import Any

from ..functional import confidence_interval, retained_transfer, slc_auc
from .runner import LearningCurves

# Mean accuracy gap to scratch below which a checkpoint counts as worth nothing.
_LEAST = 0.01


def summarize(curves: LearningCurves, level: float = 0.95) -> dict[str, dict[str, Any]]:
    """SLC-AUC of every arm against scratch, in three units with intervals over seeds.

    Args:
        curves: With an arm called "scratch".
        level: Confidence of the two-sided t intervals.

    Returns:
        Arm name to ``{"nats", "decades", "normalized"}`` (means over seeds), ``"ci"`` (level and [low, high] per unit,
        null with a single seed) and ``"seeds"`` (normalized area of every seed).

    Raises:
        ValueError: Without such an arm.
    """
    if "scratch" not in curves.accuracies:
        raise ValueError(
            f"the arms are {', '.join(curves.accuracies)}; needed: one called 'scratch' to compare with, such as "
            "Arm('scratch', checkpoint, random_init=True)."
        )
    scratch = curves.accuracies["scratch"]
    summary = {}
    for name, accuracies in curves.accuracies.items():
        if name == "scratch":
            continue
        areas = slc_auc(accuracies, scratch, curves.sample_sizes)
        intervals = {unit: confidence_interval(values, level) for unit, values in areas._asdict().items()}
        bounds = {unit: [finite(i.low), finite(i.high)] for unit, i in intervals.items()}
        summary[name] = {
            **{unit: interval.mean for unit, interval in intervals.items()},
            "ci": {"level": level, **bounds},
            "seeds": areas.normalized.tolist(),
        }
    return summary


def retained(summary: dict[str, dict[str, Any]], arm: str) -> float | None:
    """Retained transfer of an arm (share of the unprotected SLC-AUC), or None where there was nothing to retain."""
    return retained_share(summary[arm]["normalized"], summary["unprotected"]["normalized"])


def retained_share(area: float, unprotected: float) -> float | None:
    """Area of a protected model as a share of the unprotected one's (normalized both).

    None where there was nothing to retain: seeds scatter by more than a mean gain of a point of accuracy, and a share
    of that is thousands of percent of nothing.
    """
    return finite(retained_transfer(area, unprotected)) if unprotected >= _LEAST else None


def finite(value: float) -> float | None:
    """Return the value, or None (null in JSON) where it is not a number."""
    return value if math.isfinite(value) else None
