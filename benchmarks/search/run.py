"""Which settings protect best? Candidates x pairs of domains x protection seeds, chosen on validation data only.

    python -m benchmarks.search.run --pairs mnist-optdigits mnist-mnistm --seeds 0 1 --candidates defaults

(from the root of the repository). Every candidate of CANDIDATES, or those named, is protected like a cell of
benchmarks/strength/run.py and attacked, on validation data: source accuracy is that of the source's validation part;
the target's validation part is halved, one half tunes the attacks and the other scores them. Test data is never
looked at, so that the strength benchmark stays a measurement. results.json and table.md are rewritten after every
run; a run whose result is there is not done again until the candidate's options or the number of protection steps
change (after a change of the method, delete its entry). Entries whose names are not in CANDIDATES are of values and
options that did not pay and were taken out again ("source attackers": half of the simulated attackers began with
steps on source images; "domain separation": a term that makes source and target linearly separable after every
block), or ("guard in nats") of a source_tolerance of [0.4, 0.02] nats on training batches, or ("new heads only") of
simulated attackers who never kept the model's head (attacker_keeps_head of 0), in a ResNet ("batch statistics") nor
the statistics of its BatchNorm (attacker_keeps_statistics of 0). Their settings in results.json are those of then;
options that the library no longer has are among them. Attacks that begin with source images are compared with plain
scratch here. The guard looks at the same validation images, so that "after" flatters all candidates alike.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from time import perf_counter
from typing import Any

import joblib
from transformers import ViTImageProcessorPil

import hf_ntp
from benchmarks.common import rounded, write_results
from benchmarks.strength.run import (
    ARCHITECTURES,
    Cell,
    load,
    pretrain,
    protect,
    source_accuracy,
)
from benchmarks.strength.run import sparsity as sparsity_of
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.publishing.wording import markdown_table, percent

HERE = Path(__file__).parent
ATTACKS = ("dense", "mask_kept", "first_block_reinit", "source_all_kept", "source_all_new")
SAMPLE_SIZES = (30, 100)
ATTACK_STEPS = 400
RATES = {"vit": (3e-4, 1e-3), "resnet": (3e-4, 1e-3, 3e-3)}
TRACED = ("step", "source_excess", "target_strength", "collapse_loss", "fisher_loss", "attacker_loss")

CANDIDATES: dict[str, dict[str, Any]] = {
    "defaults": {},
    "half_as_long": {"max_steps": 3000},
    "collapse_first": {"max_steps": 3000, "collapse_weight": 1.0},
}
"""Options on top of the architecture's preset, by name."""


def validation_arena(cell: Cell) -> hf_ntp.AttackData:
    """Return the attacker's data, with the halves of the target's validation part to tune and to score."""
    size = ARCHITECTURES[cell.architecture].image_size
    processor = ViTImageProcessorPil(size={"height": size, "width": size})
    halves = hf_ntp.split_owner_attacker(hf_ntp.load_domain(cell.target)["validation"], 0.5)
    return hf_ntp.AttackData(
        load(cell.target, size).attacker,
        *(hf_ntp.PixelDataset.from_dataset(half, processor) for half in halves),
        source=load(cell.source, size).validation,
    )


def settings_of(cell: Cell, options: dict[str, Any]) -> dict[str, Any]:
    """What tells results of an older definition of a candidate."""
    attack = [SAMPLE_SIZES, ATTACK_STEPS, RATES[cell.architecture]]
    return {"max_steps": ARCHITECTURES[cell.architecture].protection_steps, **options, "attack": attack}


def measure(cell: Cell, options: dict[str, Any], seed: int, work: Path, folder: Path) -> dict[str, Any]:
    """Protect the model with one candidate and attack it."""
    shape = ARCHITECTURES[cell.architecture]
    base = work / "models" / cell.architecture / cell.source / "unprotected" / "model"
    if not base.exists():
        pretrain(cell.architecture, cell.source, base)
    start = perf_counter()
    log = protect(cell, base, folder, shape.adaptive, {"seed": seed, "logging_steps": 250, **options})
    seconds = perf_counter() - start
    attacked = run_attacks(
        {"protected": str(folder), "unprotected": str(base)},
        validation_arena(cell),
        ATTACKS,
        SAMPLE_SIZES,
        seeds=(0,),
        protocol=hf_ntp.FineTuneProtocol(steps=ATTACK_STEPS, learning_rates=RATES[cell.architecture], extensions=0),
        cache_dir=work / "fits",
        jobs=1,
    )
    validation = load(cell.source, shape.image_size).validation
    protected = attacked["starts"]["protected"]
    return {
        "source_accuracy": [source_accuracy(str(path), validation) for path in (base, folder)],
        "sparsity": sparsity_of(str(folder)),
        "seconds": seconds,
        "scratch": attacked["scratch"][str(ATTACK_STEPS)]["accuracies"][0],
        "unprotected": attacked["starts"]["unprotected"]["dense"]["normalized"],
        "areas": {name: protected[name]["normalized"] for name in ATTACKS},
        "accuracies": {name: protected[name]["accuracies"][0] for name in ATTACKS},
        "dense_retained": attacked["retained_transfer"]["protected"]["dense"],
        "log": [{key: entry[key] for key in TRACED if key in entry} for entry in log if "loss" in entry],
    }


def table(results: dict[str, Any]) -> str:
    """One row per run: source accuracy, and normalized SLC-AUC of the attacks (validation data)."""
    head = ["run", "source before", "after", "sparsity", "unprotected", *ATTACKS, "dense retained", "seconds"]
    rows = [head]
    for name, run in results.items():
        accuracies = [f"{value:.3f}" for value in (*run["source_accuracy"], run["sparsity"])]
        # Older entries have fewer attacks.
        areas = [run["unprotected"], *(run["areas"].get(attack) for attack in ATTACKS)]
        cells = ["" if area is None else f"{area:+.3f}" for area in areas]
        rows.append([name, *accuracies, *cells, percent(run["dense_retained"]), f"{run['seconds']:.0f}"])
    return markdown_table(rows)


def parse(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="runs/search", help="models and finished fits")
    parser.add_argument("--out", default=str(HERE), help="where results.json and table.md go")
    parser.add_argument("--architecture", default="vit", choices=list(ARCHITECTURES))
    parser.add_argument("--pairs", nargs="+", default=["mnist-optdigits"], help="source-target")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="protection seeds")
    parser.add_argument("--candidates", nargs="+", default=list(CANDIDATES), choices=list(CANDIDATES))
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the search and return its results."""
    arguments = parse(argv)
    work, out = Path(arguments.work_dir), Path(arguments.out)
    known = out / "results.json"
    results = json.loads(known.read_text()) if known.exists() else {}
    for seed, pair, name in [
        (s, p, c) for s in arguments.seeds for p in arguments.pairs for c in arguments.candidates
    ]:
        cell = Cell(arguments.architecture, *pair.split("-"))
        key = f"{cell}/{name}/seed {seed}"
        settings = json.loads(json.dumps(settings_of(cell, CANDIDATES[name])))
        if results.get(key, {}).get("settings") == settings:
            continue
        folder = work / "models" / f"{key.replace(' ', '')}-{joblib.hash(settings)[:8]}"
        results[key] = {"settings": settings, **rounded(measure(cell, CANDIDATES[name], seed, work, folder))}
        write_results(results, table(results), out)
        print(f"\n{table(results)}\n", flush=True)
    return results


if __name__ == "__main__":
    main(sys.argv[1:])
