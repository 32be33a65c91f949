"""Tables and figure of the strength benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import into_readme, write_results
from hf_ntp.attacks import DECISIVE
from hf_ntp.publishing.attack_report import attacks_table, plot_attacks
from hf_ntp.publishing.card import attack_label
from hf_ntp.publishing.wording import markdown_table, percent

ARCHITECTURES = {"resnet": "ResNet", "vit": "ViT"}


def summary(results: dict[str, Any]) -> str:
    """Make the README's table: what the source loses and the attacker keeps in every cell, and means.

    In the means a share below 0 counts as 0: where a checkpoint is worth less than random weights, the attacker begins
    with those, which makes up for no other pair.
    """
    head = ["", "source", "lost", "unprotected", "mask kept", "all weights", "retained", "worst case", "worst attack"]
    rows = [head]
    for key, architecture in ARCHITECTURES.items():
        cells = {name: cell for name, cell in results["cells"].items() if name.startswith(f"{key}/")}
        if not cells:
            continue
        numbers = np.array([_numbers(cell) for cell in cells.values()], dtype=float)
        means = [*numbers[:, :5].mean(axis=0), *np.nanmean(numbers[:, 5:].clip(0), axis=0)]
        for (name, cell), row in zip(cells.items(), numbers, strict=True):
            attack = attack_label(cell["adaptive"]["worst_case"]["protected"]["attack"])
            rows.append([f"{architecture}, {name.removeprefix(f'{key}/').replace('-', ' → ')}", *_texts(row), attack])
        rows.append([f"**{architecture}, mean**", *_texts(means), ""])
    return markdown_table(rows, text=(0, len(head) - 1))


def _numbers(cell: dict[str, Any]) -> list[float | None]:
    """Return accuracy on the source, points lost against the reference, three areas in decades, and two shares."""
    found, accuracy = cell["adaptive"], cell["source_accuracy"]
    starts, retained = found["starts"], found["retained_transfer"]["protected"]["dense"]
    return [
        accuracy["adaptive"],
        100 * (accuracy["reference"] - accuracy["adaptive"]),
        starts["unprotected"]["dense"]["decades"],
        starts["protected"]["mask_kept"]["decades"],
        starts["protected"]["dense"]["decades"],
        retained,
        found["worst_case"]["protected"]["retained_transfer"],
    ]


def _texts(numbers: Sequence[float]) -> list[str]:
    accuracy, lost, *areas, retained, worst = numbers
    return [f"{accuracy:.3f}", f"{lost:.1f}", *(f"{area:+.3f}" for area in areas), *map(_share, (retained, worst))]


def _share(value: float) -> str:
    return percent(None if np.isnan(value) else value)


def table(results: dict[str, Any]) -> str:
    """One row per cell: accuracy on the source, then SLC-AUC (decades) of the attacks and what is retained."""
    columns, paper = list(DECISIVE), next(iter(results["cells"].values()))["paper"]["starts"]["protected"]
    head = [
        "cell",
        "source before",
        "reference",
        "protected",
        "unprotected",
        *columns,
        "dense retained",
        "by other protection seeds",
        "worst retained",
        *(f"paper: {name}" for name in paper),
        "paper: source",
    ]
    rows = [head]
    for name, cell in results["cells"].items():
        protected = cell["adaptive"]["starts"]["protected"]
        retained, worst = (
            cell["adaptive"]["retained_transfer"]["protected"],
            cell["adaptive"]["worst_case"]["protected"],
        )
        accuracy = cell["source_accuracy"]
        others = results["other_seeds"].get(name, {}).get("retained_transfer", {})
        rows.append([
            name,
            *(f"{accuracy[key]:.3f}" for key in ("unprotected", "reference", "adaptive")),
            f"{cell['adaptive']['starts']['unprotected']['dense']['decades']:+.3f}",
            *(f"{protected[key]['decades']:+.3f}" if key in protected else "" for key in columns),
            percent(retained["dense"]),
            ", ".join(percent(others[start]["dense"]) for start in others if start != "protected"),
            percent(worst["retained_transfer"]),
            *(f"{cell['paper']['starts']['protected'][key]['decades']:+.3f}" for key in paper),
            f"{accuracy['paper']:.3f}",
        ])  # fmt: skip
    return markdown_table(rows)


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw the retained transfer of the decisive attacks in every cell: one look says where protection breaks."""
    cells = list(results["cells"])
    shares = np.full((len(cells), len(DECISIVE)), np.nan)
    for i, cell in enumerate(cells):
        retained = results["cells"][cell]["adaptive"]["retained_transfer"]["protected"]
        for j, name in enumerate(DECISIVE):
            value = retained.get(name)
            shares[i, j] = np.nan if value is None else value
    figure = Figure(figsize=(9, 1.8 + 0.4 * len(cells)), dpi=144, layout="constrained")
    axes = figure.add_subplot()
    picture = axes.imshow(shares, cmap="RdYlBu_r", vmin=-1, vmax=1, aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        text, color = (
            ("n/a", "black") if np.isnan(share) else (percent(share), "white" if abs(share) > 0.6 else "black")
        )
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(DECISIVE)), [name.replace("_", " ") for name in DECISIVE], rotation=20, fontsize=8)
    axes.set_yticks(range(len(cells)), cells, fontsize=8)
    axes.set_title(
        "Retained transfer: SLC-AUC of the protected model / SLC-AUC of the unprotected one, same attack\n"
        "100 %: no protection, 0 %: worth as much as random weights, below 0: worth less",
        fontsize=9,
    )
    figure.colorbar(picture, ax=axes, label="retained transfer")
    figure.savefig(path)


def write(results: dict[str, Any], out: Path) -> None:
    """Write results, tables and figures; and the README's table, if they go where the committed ones are."""
    write_results(results, table(results), out)
    plot(results, out / "strength.png")
    if out.resolve() == Path(__file__).parent:
        into_readme("strength", summary(results))
    for name, full in results["full_suite"].items():
        stem = f"full_{name.replace('/', '_')}"
        (out / f"{stem}.md").write_text(attacks_table(full["attacks"] | {"third_domain": full["third_domain"]}) + "\n")
        plot_attacks(full["attacks"], out / f"{stem}.png", f"All attacks on {name}")
