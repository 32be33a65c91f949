"""What protection costs, next to what one would run otherwise; every ratio is taken side by side in one run.

    python -m benchmarks.cost.run

(from the root of the repository; a quarter of an hour on 2 cores.) Rewrites results.json, table.md, cost.png and the
table in the README.
`--gpu` measures on a GPU instead: steps of ViT-B/16 and ResNet-50 at 224 pixels, the terms, a sweep.
`--only step admm` measures some sections again and keeps the others, and `--recipe` alone measures the peak memory of
the default recipe.
"""

from __future__ import annotations

import json
import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from time import perf_counter

import torch

from benchmarks.common import into_readme, rounded, write_results
from benchmarks.cost.measurements import SECTIONS, memory_of, recipe_peak, sweep_of
from benchmarks.cost.report import mib, plot, table

HERE = Path(__file__).parent


def parse(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="sections to measure")
    parser.add_argument("--gpu", action="store_true", help="measure on a GPU instead")
    parser.add_argument("--recipe", action="store_true", help="measure the peak memory of the default recipe instead")
    parser.add_argument("--out", default=str(HERE), help="where results.json, table.md and cost.png go")
    parser.add_argument("--worker", nargs="+", help="for the benchmark itself: call a function and print its result")
    return parser.parse_args(argv)


def main(argv: list[str]) -> None:
    """Run the benchmark."""
    arguments = parse(argv)
    if arguments.worker:
        function, *words = arguments.worker
        found = {"memory_of": memory_of, "sweep_of": sweep_of}[function](*words)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found))
        return
    if arguments.recipe:
        print(f"peak memory of one process of the default recipe: {mib(recipe_peak())}")
        return
    out = Path(arguments.out)
    known = out / "results.json"
    results = json.loads(known.read_text()) if known.exists() else {}
    for name in arguments.only or [name for name in SECTIONS if name.startswith("gpu_") == arguments.gpu]:
        start = perf_counter()
        results[name] = rounded(SECTIONS[name]())
        print(f"{name}: {perf_counter() - start:.0f} s", flush=True)
        if name.startswith("gpu_"):
            results["gpu"] = torch.cuda.get_device_name()
        results = {key: results[key] for key in (*SECTIONS, "gpu") if key in results}
        write_results(results, table(results), out)
        plot(results, out / "cost.png")
        if out.resolve() == HERE.resolve():
            into_readme("cost", table(results, with_bar=True))
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
