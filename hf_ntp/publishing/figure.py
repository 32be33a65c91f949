"""The picture of a report: learning curves with bands over seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .card import ARM_LABELS
from .evidence import measured_sources, measured_targets
from .wording import plain

_LABELS = {"scratch": "from scratch", **ARM_LABELS}
# Colour, line and marker.
_STYLES = {
    "scratch": ("#555555", "--", "s"),
    "unprotected": ("#d1495b", "-", "o"),
    "protected_mask": ("#00798c", "-", "v"),
    "protected_dense": ("#edae49", "-", "^"),
}


def plot_learning_curves(results: Mapping[str, Any], path: str | Path) -> None:
    """Draw the curves of a ``results.json`` to a PNG, a panel for each domain.

    Args:
        results: With "slc", "slc_auc" and the names of the domains.
        path: Where to write the picture.
    """
    authorized = plain(" and ".join(found["domain"] for found in measured_sources(results)))
    forbidden = (
        f"What the checkpoint is worth on the unauthorized domain\n(authorized: {authorized}; "
        "lower is better for the owner; dashed: no checkpoint at all)"
    )
    panels = [(forbidden, found) for found in measured_targets(results)]
    if "third" in results:
        panels.append(
            ("A third domain, which nobody has forbidden:\ncollateral damage of the protection", results["third"])
        )
    rows, columns = -(-len(panels) // 2), min(2, len(panels))
    figure = Figure(figsize=(7.5 * columns, 4.8 * rows), dpi=144, layout="constrained")
    for place, (title, found) in enumerate(panels, start=1):
        _draw_panel(figure.add_subplot(rows, columns, place), title, found)
    figure.savefig(path)


def _draw_panel(axes: Axes, title: str, found: Mapping[str, Any]) -> None:
    sizes, domain = found["slc"]["sample_sizes"], plain(found["target"]["domain"])
    for arm, accuracies in found["slc"]["curves"].items():
        _draw_curve(axes, arm, sizes, np.asarray(accuracies), found["slc_auc"].get(arm))
    axes.set_xscale("log")
    axes.set_xticks(sizes, [str(size) for size in sizes])
    axes.minorticks_off()
    axes.set_xlabel(f"labelled {domain} images the attacker has")
    axes.set_ylabel(f"test accuracy on {domain}")
    axes.set_title(title, fontsize=10)
    axes.grid(alpha=0.25)
    seeds = len(found["slc"]["seeds"])
    axes.legend(fontsize=8.5, loc="lower right", title=f"mean, min-max of {seeds} seeds", title_fontsize=8.5)


def _draw_curve(axes: Axes, arm: str, sizes: list[int], accuracies: np.ndarray, area: dict[str, Any] | None) -> None:
    label = _LABELS.get(arm, arm)
    color, line, marker = _STYLES.get(arm, (None, "-", "o"))
    if area is not None:
        label += f"  (SLC-AUC {area['normalized']:+.3f})"
    axes.plot(sizes, accuracies.mean(0), line, color=color, marker=marker, label=label)
    axes.fill_between(sizes, accuracies.min(0), accuracies.max(0), color=color, alpha=0.15, linewidth=0)
