"""Table and figure of an attack suite: one look says where a protection breaks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from .wording import interval, markdown_table, percent, plain

_BROKEN, _HELD, _UNPROTECTED = "#d1495b", "#00798c", "#9a9a9a"


def attacks_table(results: Mapping[str, Any]) -> str:
    """Markdown table of every attack: what the checkpoint was worth before and after protection.

    Under "at edge" is for how many points of its curves the protected model's attacker chose the first or last value
    of the grid, extensions included: one that goes further might get more. Controls have no worst case where they
    went through fewer attacks. The last row is of the third domain, where there is one.

    Args:
        results: What :func:`hf_ntp.evaluation.suite.run_attacks` returns; "third_domain" may be what it returns for
            a domain that is neither authorized nor unauthorized, with its "name".
    """
    protected, unprotected = results["starts"]["protected"], results["starts"].get("unprotected", {})
    controls = [start for start in results["starts"] if start not in ("protected", "unprotected")]
    head = ["attack", "unprotected", "protected", "95 % interval", "retained", "at edge", *controls]
    by_area = sorted(protected, key=lambda name: -protected[name]["normalized"])
    rows = [head, *(_row(name, name, results, controls) for name in by_area)]
    worst = results["worst_case"]
    rows.append(
        [
            "**worst case**",
            f"{worst['unprotected']['slc_auc']:+.3f}" if unprotected else "",
            f"{worst['protected']['slc_auc']:+.3f}",
            "",
            percent(worst["protected"]["retained_transfer"]),
            "",
            *(
                f"{worst[start]['slc_auc']:+.3f}" if results["starts"][start].keys() >= protected.keys() else ""
                for start in controls
            ),
        ]
    )
    if third := results.get("third_domain"):
        rows += [
            _row(name, f"third domain {third['name']}: {name}", third, controls)
            for name in third["starts"]["protected"]
        ]
    return markdown_table(rows)


def _row(name: str, title: str, results: Mapping[str, Any], controls: Sequence[str]) -> list[str]:
    starts = results["starts"]
    entry = starts["protected"][name]
    edge = entry["at_edge"]
    return [
        title,
        _area(starts.get("unprotected", {}).get(name)),
        _area(entry),
        interval(entry["ci"]["normalized"]),
        percent(results["retained_transfer"]["protected"][name]),
        f"{edge} of {len(results['sample_sizes']) * len(results['seeds'])}" if edge else "",
        *(_area(starts.get(start, {}).get(name)) for start in controls),
    ]


def _area(entry: Mapping[str, Any] | None) -> str:
    return "" if entry is None else f"{entry['normalized']:+.3f}"


def plot_attacks(results: Mapping[str, Any], path: str | Path, title: str = "") -> None:
    """Draw SLC-AUC per attack, before and after protection, with intervals over seeds, to a PNG.

    Args:
        results: What :func:`hf_ntp.evaluation.suite.run_attacks` returns.
        path: Where to write the picture.
        title: Names of the domains, for example.
    """
    protected, unprotected = results["starts"]["protected"], results["starts"].get("unprotected", {})
    names = sorted(protected, key=lambda name: protected[name]["normalized"])
    figure = Figure(figsize=(8, 1.6 + 0.32 * len(names)), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    axes.axvline(0, color="#333333", linewidth=1)
    for row, name in enumerate(names):
        if name in unprotected:
            axes.plot(unprotected[name]["normalized"], row, "o", color=_UNPROTECTED, markerfacecolor="white")
        entry = protected[name]
        low, high = entry["ci"]["normalized"]
        color = _BROKEN if entry["normalized"] > 0 else _HELD
        if low is not None:
            axes.plot([low, high], [row, row], color=color, linewidth=1.5, alpha=0.6)
        axes.plot(entry["normalized"], row, "o", color=color)
        share = results["retained_transfer"]["protected"][name]
        if share is not None:
            axes.annotate(
                percent(share), (1.01, row), xycoords=("axes fraction", "data"), va="center", fontsize=8, color=color
            )
    axes.set_yticks(range(len(names)), [name.replace("_", " ") for name in names], fontsize=9)
    axes.set_xlabel(
        "SLC-AUC, normalized: mean accuracy gap to scratch with the same images (right of 0 the checkpoint helps)\n"
        "filled: protected, with 95 % interval over attack seeds · hollow: unprotected · right: retained transfer",
        fontsize=8.5,
    )
    axes.set_title(plain(title) or "What the checkpoint is worth to each attacker", fontsize=10)
    axes.grid(alpha=0.25, axis="x")
    figure.savefig(path)
