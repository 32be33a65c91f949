"""What does it cost not to know the target? Pairs of domains x labelled, unlabelled and no target data.

    python -m benchmarks.access.run

(from the root of the repository). The small ViT is pretrained and protected as in benchmarks/strength/run.py, once
for each `target_access`, and attacked with images that no protection has seen. Options were chosen on validation data
of the first pair; the rows were measured anew when attacks changed. Finished models and fits are kept in --work_dir;
results.json and table.md are rewritten after every pair and seed, and what is there is not run again until a setting
changes. `--only syn-mnist` (any part of a pair) runs some pairs only, `--seeds 0 1 2` protects with several seeds.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib

from benchmarks.common import rounded, write_results
from benchmarks.strength.run import ARCHITECTURES as SHAPES
from benchmarks.strength.run import (
    Cell,
    arena,
    load,
    pretrain,
    protect,
    settings_of,
    source_accuracy,
)
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.publishing.wording import markdown_table, percent

HERE = Path(__file__).parent
ARCHITECTURE = "vit"
PAIRS = (("mnist", "optdigits"), ("syn", "mnist"))
ATTACKS = ("mask_kept", "dense")
ACCESS: dict[str, dict[str, Any]] = {
    "labelled": {"target_access": "labelled"},
    "unlabelled": {"target_access": "unlabelled"},
    "none": {"target_access": "none"},
}
"""Options on top of the architecture's preset."""


def models_of(cell: Cell, seed: int, work: Path, jobs: int) -> dict[str, Path]:
    """Pretrain and protect what is missing, as much at a time as there are processes."""
    base = work / "models" / cell.source / "unprotected" / "model"
    models = {name: work / "models" / cell.source / cell.target / f"{name}{seed}" / "model" for name in ACCESS}
    adaptive = SHAPES[cell.architecture].adaptive
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        if not base.exists():
            pretrain(cell.architecture, cell.source, base)
        joblib.Parallel(n_jobs=jobs)(
            joblib.delayed(protect)(cell, base, folder, adaptive, {"seed": seed, **ACCESS[name]})
            for name, folder in models.items()
            if not folder.exists()
        )
    return {"unprotected": base, **models}


def measure(cell: Cell, models: dict[str, Path], work: Path, jobs: int | None) -> dict[str, Any]:
    """Attack all protected models and the unprotected one alike."""
    data, settings = arena(cell, work, jobs)
    paths = {name: str(path) for name, path in models.items()}
    # The suite calls one start "protected" and takes any others beside it.
    starts = {"protected" if name == "labelled" else name: path for name, path in paths.items()}
    test = load(cell.source, SHAPES[cell.architecture].image_size).test
    return {
        "source_accuracy": {name: source_accuracy(path, test) for name, path in paths.items()},
        "attacks": run_attacks(starts, data, ATTACKS, **settings),
    }


def rows_of(run: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Figures by access: source before and after, normalized areas, and what is retained and kept."""
    attacks, accuracy = run["attacks"], run["source_accuracy"]
    areas = {
        start: {name: entry["normalized"] for name, entry in found.items()}
        for start, found in attacks["starts"].items()
    }
    before, labelled = areas["unprotected"]["dense"], areas["protected"]
    rows = {}
    for name in ACCESS:
        start = "protected" if name == "labelled" else name
        rows[name] = {
            "source": (accuracy["unprotected"], accuracy[name]),
            "unprotected": before,
            "areas": areas[start],
            "retained": attacks["retained_transfer"][start]["dense"],
            # Of the transfer that labelled protection takes away, which share is taken away without labels.
            "kept": {attack: kept_share(before, labelled[attack], areas[start][attack]) for attack in ATTACKS},
        }
    return rows


def kept_share(unprotected: float, labelled: float, other: float) -> float | None:
    """Share of the labelled protection that another one keeps; None where there is none to keep."""
    return (unprotected - other) / (unprotected - labelled) if unprotected > labelled else None


def table(results: dict[str, Any]) -> str:
    """One row per pair, protection seed and access; SLC-AUC normalized."""
    head = ["pair", "seed", "access", "source before", "after", "unprotected", *ATTACKS, "dense retained"]
    head += [f"of the labelled protection, {attack}" for attack in ATTACKS]
    rows = [head]
    for key, run in results.items():
        pair, _, seed = key.partition("/seed ")
        for access, row in rows_of(run).items():
            rows.append([
                pair, seed, access, *(f"{value:.3f}" for value in row["source"]), f"{row['unprotected']:+.3f}",
                *(f"{row['areas'][attack]:+.3f}" for attack in ATTACKS), percent(row["retained"]),
                *(percent(row["kept"][attack]) for attack in ATTACKS),
            ])  # fmt: skip
    return markdown_table(rows, text=range(3))


def digest_of(cell: Cell) -> str:
    """What decides the numbers of a pair, to tell results of older settings."""
    return joblib.hash([settings_of(cell), ACCESS, ATTACKS])[:12]


def parse(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="runs/access", help="models and finished fits")
    parser.add_argument("--out", default=str(HERE), help="where results.json and table.md go")
    parser.add_argument("--only", nargs="*", help="parts of names of pairs, such as mnist-optdigits")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="protection seeds")
    parser.add_argument("--jobs", type=int, help="processes; default one per core")
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the benchmark and return its results."""
    arguments = parse(argv)
    work, out = Path(arguments.work_dir), Path(arguments.out)
    known = out / "results.json"
    results = json.loads(known.read_text()) if known.exists() else {}
    pairs = {"-".join(pair): Cell(ARCHITECTURE, *pair) for pair in PAIRS}
    chosen = {name: cell for name, cell in pairs.items() if any(part in name for part in arguments.only or [""])}
    for seed in arguments.seeds:
        for pair, cell in chosen.items():
            key, settings = f"{pair}/seed {seed}", digest_of(cell)
            if results.get(key, {}).get("settings") == settings:
                continue
            start = perf_counter()
            models = models_of(cell, seed, work / settings, arguments.jobs or joblib.cpu_count())
            found = rounded(measure(cell, models, work, arguments.jobs))
            results[key] = {"settings": settings, "seconds": round(perf_counter() - start), **found}
            write_results(results, table(results), out)
            print(f"\n{table(results)}\n", flush=True)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
