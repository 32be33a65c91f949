"""Table and figure of what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.cost import measurements
from hf_ntp.publishing.wording import markdown_table

STEP_BARS = {**dict.fromkeys(measurements.SMALL, "<= 1.10"), measurements.VIT_B: "<= 1.05"}


def mib(count: float) -> str:
    """Bytes in MiB."""
    return f"{count / 2**20:.0f} MiB"


def rows_of_steps(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table: what, how much, bar."""
    rows = []
    for name, batches in found.items():
        kinds = batches[str(measurements.IMAGES)]
        for kind in measurements.KINDS[1:]:
            entry = kinds[kind]
            bar = STEP_BARS.get(name, "") if kind == "published terms" else ""
            value = f"{entry['ratio']:.2f} ({entry['lowest']:.2f} to {entry['highest']:.2f})"
            if entry["allowance"] > 1:
                bar = f"attackers' images alone: {entry['allowance']:.2f}"
            rows.append((f"step over plain Trainer, {kind}: {name}", value, bar))
    return rows


def rows_of_memory(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    rows, plain = [], found["plain"]
    for kind in measurements.KINDS[1:]:
        held, weights = found[kind], found[kind]["prunable"]
        extra = f"{(held['peak'] - plain['peak']) / weights:.2f} x ({mib(held['peak'])} after {mib(plain['peak'])})"
        rows.append((f"peak memory over plain training, ViT-S, {kind}, per byte of prunable weights", extra, ""))
        parts = ("admm", "heads", "teacher", "attackers")
        bars = {"admm": "<= 1.00 x"}
        rows += [
            (f"held by {part}, {kind}", f"{held[part] / weights:.2f} x", bars.get(part, ""))
            for part in parts
            if held[part]
        ]
    return rows


def rows_of_admm(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    return [
        (
            f"ADMM {what}, {entry['weights'] / 1e6:.1f} M weights",
            versus(entry[key][0], entry[key][i]),
            bar if last else "",
        )
        for key, i, what, bar in (
            ("update", 1, "update", ">= 5 x"),
            ("update", 2, "update, reference with torch.kthvalue", ""),
            ("penalty", 1, "penalty, per step", ""),
        )
        for entry in found
        for last in [entry is found[-1]]
    ]


def versus(ours: float, plain: float) -> str:
    """Two times and their ratio."""
    return f"{plain / ours:.1f} x faster ({1e3 * ours:.1f} ms, reference {1e3 * plain:.1f} ms)"


def rows_of_fisher(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    rows = []
    for entry in found:
        ours, *plain = entry["seconds"]
        value = versus(ours, *plain) if plain else f"{1e3 * ours:.1f} ms"
        largest = (entry["term"], entry["classes"], entry["width"]) == (
            "trace_ratio",
            measurements.CLASSES[-1],
            measurements.WIDTHS[-1],
        )
        name = f"Fisher term {entry['term']}, {entry['classes']} classes, width {entry['width']}"
        rows.append((name, value, ">= 10 x" if largest else ""))
    return rows


def rows_of_sweep(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    one = found["one process"]["seconds"]
    rows = [
        (
            f"sweep of {found['one process']['fits']} fits, {name}",
            f"{one / found[name.partition(' (')[0]]['seconds']:.2f} x",
            bar,
        )
        for name, bar in (
            ("2 jobs (workers' start included)", ""),
            ("2 processes", ">= 1.7 x"),
            ("trained as one (GPU)", ">= 5 x"),
        )
        if name.partition(" (")[0] in found
    ]
    cached = found["from the cache"]["seconds"]
    return [*rows, ("the same sweep from the cache", f"{cached:.1f} s ({one:.0f} s the first time)", "< 5 s")]


def rows_of_publish(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    dense, sparse = found["bytes"]["dense"], found["bytes"]["sparse"]
    size = f"{mib(dense)}, sparse {mib(sparse)} ({sparse / dense:.0%})"
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in found["seconds"].items())
    return [
        (f"published size of a ViT-S at {found['sparsity']:.0%} zeros", size, ""),
        ("time to publish and load it", times, ""),
    ]


def rows_of_protect(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Rows of the table."""
    rows = []
    for preset in ("adaptive", "published"):
        entry = found[preset]
        worth = ", ".join(f"{attack} {entry[attack]:+.3f}" for attack in measurements.PAPER_ATTACKS)
        source = f"source {entry['source_before']:.3f} -> {entry['source_after']:.3f}"
        what = f"protection of the small ViT in {found['steps']} steps, preset {preset}"
        rows.append((what, f"{entry['seconds']:.0f} s; {source}; SLC-AUC {worth}", ""))
    rows.append(("the same before protection", f"SLC-AUC {found['unprotected']:+.3f}", ""))
    return rows


ROWS: dict[str, Callable[[Any], list[tuple[str, str, str]]]] = {
    "step": rows_of_steps,
    "memory": rows_of_memory,
    "admm": rows_of_admm,
    "fisher": rows_of_fisher,
    "sweep": rows_of_sweep,
    "publish": rows_of_publish,
    "protect": rows_of_protect,
    "gpu_step": rows_of_steps,
    "gpu_sweep": rows_of_sweep,
    "gpu_admm": rows_of_admm,
    "gpu_fisher": rows_of_fisher,
    "gpu_step_convnet": rows_of_steps,
}


def table(results: dict[str, Any], with_bar: bool = False) -> str:
    """Everything that was measured, or only what there is a bar for."""
    rows = [("measured", "found", "bar")]
    for name, rows_of in ROWS.items():
        place = f", on one {results['gpu']}" if name.startswith("gpu_") and name in results else ""
        found = rows_of(results[name]) if name in results else []
        rows += [(f"{what}{place}", value, bar) for what, value, bar in found if bar or not with_bar]
    return markdown_table(rows, text=range(3))


def plot(results: dict[str, Any], path: Path) -> None:
    """Draw how the costs grow."""
    figure = Figure(figsize=(13, 7), dpi=120, layout="constrained")
    axes = figure.subplots(2, 3).flat

    def panel(title: str, x: str, y: str, log: bool = True) -> Any:
        axis = next(axes)
        axis.set(title=title, xlabel=x, ylabel=y, **({"xscale": "log", "yscale": "log"} if log else {}))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.tick_params(labelsize=8)
        return axis

    if "step" in results:
        axis = panel("Step of NTPTrainer / step of Trainer", "images per step", "ratio", log=False)
        for name, batches in results["step"].items():
            for kind, style in (("published terms", "o-"), ("default", "s--")):
                ratios = [entry[kind]["ratio"] for entry in batches.values()]
                axis.plot([int(images) for images in batches], ratios, style, label=f"{name.split(',')[0]}, {kind}")
        axis.axhline(1.1, color="gray", linewidth=0.8)
        axis.legend(fontsize=7)
    if "memory" in results:
        axis = panel("Held beyond plain training, ViT-S", "", "bytes per byte of prunable weights", log=False)
        for kind in measurements.KINDS[1:]:
            bottom = 0.0
            for part, color in zip(("admm", "heads", "teacher", "attackers"), ("C0", "C1", "C2", "C3"), strict=True):
                height = results["memory"][kind][part] / results["memory"][kind]["prunable"]
                axis.bar(
                    kind, height, bottom=bottom, color=color, label=part if kind == measurements.KINDS[1] else None
                )
                bottom += height
        axis.legend(fontsize=7)
    if "admm" in results:
        axis = panel("ADMM", "weights", "seconds")
        for key, color in (("update", "C0"), ("penalty", "C1")):
            for i, (who, style) in enumerate((("ours", "o-"), ("reference", "s--"))):
                line = [entry[key][i] for entry in results["admm"]]
                axis.plot([e["weights"] for e in results["admm"]], line, style, color=color, label=f"{key}, {who}")
        axis.legend(fontsize=7)
    for key, fixed in (("classes", "width"), ("width", "classes")) if "fisher" in results else ():
        value = measurements.REFERENCE_WIDTH if fixed == "width" else measurements.CLASSES[-1]
        axis = panel(f"Fisher term, {value} {fixed}".replace("width", "features"), key, "seconds")
        for term, color in (("trace_ratio", "C0"), ("whitened_discriminant", "C1")):
            entries = [e for e in results["fisher"] if e["term"] == term and e[fixed] == value]
            for i, (who, style) in enumerate((("ours", "o-"), ("reference", "s--"))):
                points = sorted((e[key], e["seconds"][i]) for e in entries if len(e["seconds"]) > i)
                axis.plot(*zip(*points, strict=True), style, color=color, label=f"{term}, {who}")
        axis.legend(fontsize=7)
    if "sweep" in results:
        axis = panel(f"Sweep of {results['sweep']['one process']['fits']} fits", "", "seconds", log=False)
        axis.bar(list(results["sweep"]), [entry["seconds"] for entry in results["sweep"].values()])
    for axis in axes:
        axis.axis("off")
    figure.savefig(path)
