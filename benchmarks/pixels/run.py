"""What are the images worth without any model? A linear classifier on their pixels, next to the curves of the table.

    python -m benchmarks.pixels.run

(from the root of the repository; it reads the learning curves of benchmarks/strength). Logistic regression on the
attacker's images of every size and seed, its regularisation chosen on the validation images. SLC-AUC is
measured against a network that begins at random weights: where a linear classifier does better than that network, so
might another one. Writes results.json and table.md.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import joblib
import numpy as np

from benchmarks.common import rounded, write_results
from benchmarks.strength.report import ARCHITECTURES as NAMES
from benchmarks.strength.run import ARCHITECTURES, PAIRS, SAMPLE_SIZES, SEEDS, load
from benchmarks.strength.run import HERE as STRENGTH
from hf_ntp import PixelDataset
from hf_ntp.attacks.probes import KINDS
from hf_ntp.data import nested_subsets
from hf_ntp.evaluation.runner import LearningCurves
from hf_ntp.evaluation.summary import summarize
from hf_ntp.publishing.wording import markdown_table

GRID = tuple(10.0**power for power in range(-3, 4))
"""Inverse regularisation. On so many pixels, weaker ones take long and find nothing else."""


def pixels(data: PixelDataset) -> np.ndarray:
    """Pixel values of all images, [N, 3 * H * W]."""
    return data.tensors()[0].flatten(1).double().numpy()


def accuracies(architecture: str, target: str, seed: int) -> list[float]:
    """Test accuracy of the classifier at every sample size."""
    domain = load(target, ARCHITECTURES[architecture].image_size)
    train, validation, test = map(pixels, (domain.attacker, domain.validation, domain.test))
    kind = KINDS["linear"]
    found = []
    for rows in nested_subsets(domain.attacker.labels, SAMPLE_SIZES, seed).values():
        fits = [kind.build(value, train[rows]).fit(train[rows], domain.attacker.labels[rows]) for value in GRID]
        best = max(fits, key=lambda fit: fit.score(validation, domain.validation.labels))
        found.append(float(best.score(test, domain.test.labels)))
    return found


def measure(architecture: str, target: str, cells: dict[str, Any]) -> dict[str, Any]:
    """Accuracies with pixels and from random weights, and areas over the latter, in decades."""
    sources = [source for source, other in PAIRS if other == target]
    found = {source: cells[f"{architecture}/{source}-{target}"]["adaptive"] for source in sources}
    scratch = found[sources[0]]["scratch"][str(ARCHITECTURES[architecture].attack_steps)]["accuracies"]
    rows = joblib.Parallel(joblib.cpu_count())(
        joblib.delayed(accuracies)(architecture, target, seed) for seed in SEEDS
    )
    curves = LearningCurves(SAMPLE_SIZES, SEEDS, {"scratch": scratch, "pixels": rows}, {}, 0)
    return {
        "scratch": np.mean(scratch, axis=0).tolist(),
        "pixels": np.mean(rows, axis=0).tolist(),
        "slc_auc": summarize(curves)["pixels"]["decades"],
        "unprotected": {name: part["starts"]["unprotected"]["dense"]["decades"] for name, part in found.items()},
    }


def table(results: dict[str, Any]) -> str:
    """One row per architecture and target."""
    sizes = ", ".join(map(str, SAMPLE_SIZES))
    head = ["", f"from scratch, n = {sizes}", f"pixels, n = {sizes}", "SLC-AUC of pixels", "of the unprotected model"]
    rows = [head]
    for name, found in results.items():
        curves = [" ".join(f"{value:.3f}" for value in found[key]) for key in ("scratch", "pixels")]
        before = ", ".join(f"{area:+.3f} (from {source})" for source, area in found["unprotected"].items())
        rows.append([name, *curves, f"{found['slc_auc']:+.3f}", before])
    return markdown_table(rows)


def main() -> dict[str, Any]:
    """Measure and write."""
    cells = json.loads((STRENGTH / "results.json").read_text())["cells"]
    results = {
        f"{title}, {target}": rounded(measure(architecture, target, cells))
        for architecture, title in NAMES.items()
        for target in dict.fromkeys(target for _, target in PAIRS)
    }
    write_results(results, table(results), Path(__file__).parent)
    print(table(results))
    return results


if __name__ == "__main__":
    main()
