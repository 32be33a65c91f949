"""The picture of a report: learning curves with bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

_STYLES = {
    "scratch": ("from scratch", "#555555", "--", "s"),
    "unprotected": ("unprotected", "#d1495b", "-", "o"),
    "protected_mask": ("protected, mask kept", "#00798c", "-", "v"),
    "protected_dense": ("protected, all weights tuned", "#edae49", "-", "^"),
}


def plot_learning_curves(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the curves of a ``results.json`` to a PNG.

    Args:
        results: With "slc", "slc_auc" and the names of the domains.
        path: Where to write the picture.
    """
    figure = Figure(figsize=(7.5, 4.8), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    sizes = results["slc"]["sample_sizes"]
    for arm, accuracies in results["slc"]["curves"].items():
        _draw_curve(axes, arm, sizes, np.asarray(accuracies), results["slc_auc"].get(arm))
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(f"labelled {results['target']['domain']} images the attacker has")
    axes.set_ylabel(f"test accuracy on {results['target']['domain']}")
    axes.set_title(
        f"What the checkpoint is worth on the unauthorized domain\n(authorized: {results['source']['domain']}; "
        "lower is better for the owner; dashed: no checkpoint at all)",
        fontsize=10,
    )
    axes.grid(alpha=0.25)
    seeds = len(results["slc"]["seeds"])
    axes.legend(fontsize=8.5, loc="lower right", title=f"mean, min-max of {seeds} seeds", title_fontsize=8.5)
    figure.savefig(path)


def _draw_curve(axes: Axes, arm: str, sizes: list[int], accuracies: np.ndarray, area: dict[str, Any] | None) -> None:
    label, color, line, marker = _STYLES.get(arm, (arm, None, "-", "o"))
    if area is not None:
        label += f"  (SLC-AUC {area['normalized']:+.3f})"
    axes.plot(sizes, accuracies.mean(0), line, color=color, marker=marker, label=label)
    axes.fill_between(sizes, accuracies.min(0), accuracies.max(0), color=color, alpha=0.15, linewidth=0)
