"""Are self-supervised encoders protected? Two methods x two pairs of domains x three seeds, on the embedded digits.

    python -m benchmarks.ssl.run

(from the root of the repository). Encoders are pretrained on the source without labels, protected with the settings of
recipes/ntp_ssl.yaml against the owner's part of the target, and attacked with the attacker's part; the seed of a run
is that of its protection and of its attacks. The source is measured by linear probe and nearest neighbours. Finished
models and fits are kept in --work_dir; results.json and table.md are rewritten after every run, and a run whose result
is there is not done again until a setting changes. `--validation` never looks at test data, to choose settings: the
probes are scored on the source's validation part, the attacks on half of the target's.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from dataclasses import asdict, fields
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import joblib
import yaml
from hf_ntp.recipes.ntp_ssl import SSLArguments

import hf_ntp
from benchmarks.common import rounded, write_results
from benchmarks.search.run import validation_arena
from benchmarks.strength.run import (
    ARCHITECTURES,
    OWNER_FRACTION,
    Cell,
    load,
    protect,
    save,
)
from hf_ntp.data import RandomShift
from hf_ntp.evaluation.cache import FIT_VERSION
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.evaluation.summary import retained_share
from hf_ntp.evaluation.utility import source_utility
from hf_ntp.models import load_model, noted_prunable_weights, zero_fraction
from hf_ntp.publishing.wording import markdown_table, percent
from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.self_supervised import pretrain, small_encoder

HERE = Path(__file__).parent
METHODS = ("mae", "simclr")
# One source: contrastive learning on "syn" finds backgrounds and no digits, and from the small "optdigits" there is
# nothing to transfer.
PAIRS = (("mnist", "optdigits"), ("mnist", "mnistm"))
SEEDS = (0, 1, 2)
ATTACKS = ("mask_kept", "dense")
SAMPLE_SIZES = (10, 30, 100)
SHAPE = ARCHITECTURES["vit"]
# The rates of the recipes, not extended.
PROTOCOL = hf_ntp.FineTuneProtocol(steps=SHAPE.attack_steps, learning_rates=(3e-4, 1e-3, 3e-3), extensions=0)

# Options of the recipe that say where to write and how often, not what comes out.
PLACES = ("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to")


def recipe_settings() -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the protection as the recipe's file has them, and the recipe's options of pretraining."""
    written = yaml.safe_load(Path(SSLArguments.config).read_text())
    ours = {field.name: field.default for field in fields(SSLArguments)}
    protection = {key: value for key, value in written.items() if key not in (*ours, *PLACES)}
    names = ("pretrain_steps", "pretrain_learning_rate", "pretrain_seed", "augment_shift")
    return protection, {name: written.get(name, ours[name]) for name in names}


def settings_of(validation: bool) -> dict[str, Any]:
    """What decides the numbers of a run, to tell results of other settings."""
    protection, pretraining = recipe_settings()
    preset = asdict(hf_ntp.NTPConfig.from_preset(SHAPE.adaptive, output_dir="none", report_to="none", **protection))
    method = {field.name: preset[field.name] for field in fields(ProtectionArguments)}
    attacks = [ATTACKS, SAMPLE_SIZES, asdict(PROTOCOL), FIT_VERSION, OWNER_FRACTION]
    settings = [hf_ntp.__version__, method, protection, pretraining, attacks]
    return {"digest": joblib.hash(json.dumps(settings))[:12], "validation": validation}


def pretrained(method: str, source: str, work: Path) -> Path:
    """Return the folder of the unprotected encoder; it is pretrained on the source if it is not there yet."""
    options = recipe_settings()[1]
    folder = work / "models" / f"{method}-{source}-{joblib.hash(options)[:12]}" / "unprotected"
    if not folder.exists():
        encoder = small_encoder(method, SHAPE.image_size, options["pretrain_seed"])
        pretrain(
            method,
            encoder,
            load(source, SHAPE.image_size).train,
            str(folder.parent / "trainer"),
            options["pretrain_steps"],
            options["pretrain_learning_rate"] or 1e-3,
            transform=RandomShift(options["augment_shift"]),
            seed=options["pretrain_seed"],
        )
        save(encoder, folder)
    return folder


def measure(method: str, cell: Cell, seed: int, validation: bool, work: Path) -> dict[str, Any]:
    """Protect an encoder with one seed, look at what is left of it on the source, and attack it."""
    base = pretrained(method, cell.source, work)
    folder = base.parent / f"{cell.target}-{settings_of(validation)['digest']}" / f"seed-{seed}" / "model"
    if not folder.exists():
        protect(cell, base, folder, SHAPE.adaptive, {**recipe_settings()[0], "seed": seed})
    source, target = load(cell.source, SHAPE.image_size), load(cell.target, SHAPE.image_size)
    data = hf_ntp.AttackData(target.attacker, target.validation, target.test)
    starts = {"protected": str(folder), "unprotected": str(base)}
    attacked = run_attacks(
        starts,
        validation_arena(cell) if validation else data,
        ATTACKS,
        SAMPLE_SIZES,
        seeds=(seed,),
        protocol=PROTOCOL,
        cache_dir=work / "fits",
        jobs=1,
    )
    test = source.validation if validation else source.test
    return {
        "source": {
            when: asdict(source_utility(load_model(path), source.train, test))
            for when, path in (("before", str(base)), ("after", str(folder)))
        },
        "sparsity": zero_fraction(list(noted_prunable_weights(load_model(str(folder))).values())),
        "areas": {
            "unprotected": attacked["starts"]["unprotected"]["dense"]["decades"],
            **{name: attacked["starts"]["protected"][name]["decades"] for name in ATTACKS},
        },
        "attacks": attacked,
    }


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over the seeds of one method and pair, and whether the bars are reached."""
    areas = {name: mean(run["areas"][name] for run in runs) for name in runs[0]["areas"]}
    source = {
        when: {name: mean(run["source"][when][name] for run in runs) for name in ("linear_probe", "knn")}
        for when in ("before", "after")
    }
    # As decades: one of them here, which is the normalized area.
    retained = retained_share(areas["dense"], areas["unprotected"])
    bars = {
        "probe_drop": source["before"]["linear_probe"] - source["after"]["linear_probe"] <= 0.01,
        "mask_kept": areas["mask_kept"] < 0,
        "retained": retained is not None and retained <= 0.5,
    }
    return {"seeds": len(runs), "source": source, "areas": areas, "retained": retained, "bars": bars}


def table(results: dict[str, Any]) -> str:
    """One row per method and pair: means over the seeds, SLC-AUC in decades with the single seeds behind it."""
    head = ["encoder", "seeds", "linear probe", "k-NN", "unprotected", *ATTACKS, "retained", "bars missed"]
    rows = [head]
    cells: dict[str, list[dict[str, Any]]] = {}
    for name, run in results["runs"].items():
        cells.setdefault(name.rpartition("/")[0], []).append(run)
    for name, runs in cells.items():
        found = summary(runs)
        kept = [
            f"{found['source']['before'][probe]:.3f} → {found['source']['after'][probe]:.3f}"
            for probe in ("linear_probe", "knn")
        ]
        areas = []
        for key, area in found["areas"].items():
            single = ", ".join(f"{run['areas'][key]:+.3f}" for run in runs)
            areas.append(f"{area:+.3f} ({single})")
        missed = ", ".join(bar for bar, reached in found["bars"].items() if not reached) or "none"
        rows.append([name, str(found["seeds"]), *kept, *areas, percent(found["retained"]), missed])
    return markdown_table(rows, text=(0, 1, len(head) - 1))


def parse(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="runs/ssl", help="models and finished fits")
    parser.add_argument("--out", default=str(HERE), help="where results.json and table.md go")
    parser.add_argument("--only", nargs="*", help="parts of names of runs, such as mae/ or simclr/mnist-mnistm/0")
    parser.add_argument("--validation", action="store_true", help="score on validation data")
    parser.add_argument("--jobs", type=int, help="runs at a time; default one per core")
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the benchmark and return its results."""
    arguments = parse(argv)
    work, out = Path(arguments.work_dir), Path(arguments.out)
    known, settings = out / "results.json", settings_of(arguments.validation)
    results = json.loads(known.read_text()) if known.exists() else {}
    if results.get("settings") != settings:
        results = {"settings": settings, "runs": {}}
    every = [(method, Cell("vit", *pair), seed) for seed in SEEDS for method in METHODS for pair in PAIRS]
    names = {f"{method}/{cell.source}-{cell.target}/{seed}": (method, cell, seed) for method, cell, seed in every}
    wanted = [n for n in names if any(part in n for part in arguments.only or [""]) and n not in results["runs"]]
    jobs = arguments.jobs or joblib.cpu_count()
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        # One pretraining for all runs from one source.
        starts = dict.fromkeys((names[name][0], names[name][1].source) for name in wanted)
        joblib.Parallel(n_jobs=jobs)(joblib.delayed(pretrained)(*start, work) for start in starts)
        work_left = (joblib.delayed(_timed)(name, *names[name], arguments.validation, work) for name in wanted)
        for name, found in joblib.Parallel(n_jobs=jobs, return_as="generator_unordered", batch_size=1)(work_left):
            results["runs"] = {n: r for n in names if (r := {**results["runs"], name: rounded(found)}.get(n))}
            write_results(results, table(results), out)
            print(f"\n{table(results)}\n", flush=True)
    return results


def _timed(name: str, method: str, cell: Cell, seed: int, validation: bool, work: Path) -> tuple[str, dict[str, Any]]:
    start = perf_counter()
    found = measure(method, cell, seed, validation, work)
    return name, {"seconds": perf_counter() - start, **found}


if __name__ == "__main__":
    main(sys.argv[1:])
