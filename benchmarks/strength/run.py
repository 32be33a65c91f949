"""How strong is the protection? Pairs of domains x architectures x presets x attacks, on the embedded digits.

    python -m benchmarks.strength.run

(from the root of the repository). Everything is made on the spot: models are pretrained on the source, protected
against the owner's part of the target, and attacked with the attacker's part, which the protection has never seen.
Finished models and fits are kept in --work_dir, so that an interrupted run continues; results.json, tables and figures
are rewritten after every cell, and a cell whose result is there is not run again until a setting changes. `--only
resnet/mnist-mnistm` (any part of a cell's name) runs some cells only.
"""

from __future__ import annotations

import hashlib
import json
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

import joblib
from transformers import AutoModelForImageClassification, PreTrainedModel, ViTImageProcessorPil

import hf_ntp
from benchmarks.common import rounded
from benchmarks.strength.report import table, write
from hf_ntp.attacks import ATTACKS, DECISIVE
from hf_ntp.attacks.fine_tuning import predictor
from hf_ntp.data import RandomShift
from hf_ntp.evaluation.cache import FIT_VERSION
from hf_ntp.evaluation.controls import prune_without_protection
from hf_ntp.evaluation.runner import RETUNE_MARGIN, accuracy_of
from hf_ntp.evaluation.suite import run_attacks
from hf_ntp.models import load_model, noted_prunable_weights, zero_fraction
from hf_ntp.run_folder import whole_folder
from hf_ntp.training.arguments import PRESETS, ProtectionArguments
from hf_ntp.training.checkpoint import last_checkpoint
from hf_ntp.training.pretraining import small_resnet, small_vit, train_classifier

HERE = Path(__file__).parent
PAIRS = (
    ("mnist", "mnistm"),
    ("syn", "mnist"),
    ("mnist", "optdigits"),
    ("mnistm", "mnist"),
    ("syn", "mnistm"),
    ("optdigits", "mnist"),
)
FULL_SUITE = ("vit/mnist-optdigits", "resnet/mnist-mnistm")
THIRD = "syn"
"""Unrelated domain on which the collateral damage of the full-suite cells is measured."""
PAPER_ATTACKS = ("mask_kept", "dense")
PROTECTION_SEEDS = (1, 2)
"""Seeds of further protected models of every cell, which meet the paper's attacks alone."""
SAMPLE_SIZES = (10, 30, 100)
SEEDS = (0, 1, 2)
OWNER_FRACTION = 0.75
LONG_PRETRAINING = {("vit", "syn"): 50000, ("vit", "mnistm"): 50000}
"""Sources that the small ViT learns slowly: of "syn", it misreads half after 2,500 steps, 1 % after 50,000."""
WITHOUT_TARGET: dict[str, Any] = {"attackers": 0, "fisher_weight": 0.0, "collapse_weight": 0.0, "target_weight": 0.0}


@dataclass(frozen=True)
class Architecture:
    """A small model, how long it is trained, protected, and attacked (until scratch is converged)."""

    build: Callable[..., PreTrainedModel]
    image_size: int
    adaptive: str
    """Preset of the adversarially trained protection."""
    pretrain_steps: int
    protection_steps: int
    attack_steps: int


ARCHITECTURES = {
    "resnet": Architecture(small_resnet, 32, "adaptive_convnet", 2500, 5000, 300),
    "vit": Architecture(small_vit, 16, "adaptive", 10000, 6000, 600),
}


class Cell(NamedTuple):
    """One row of the table."""

    architecture: str
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.architecture}/{self.source}-{self.target}"


class Domain(NamedTuple):
    """A domain's parts as pixels."""

    train: hf_ntp.PixelDataset
    owner: hf_ntp.PixelDataset
    attacker: hf_ntp.PixelDataset
    validation: hf_ntp.PixelDataset
    test: hf_ntp.PixelDataset
    names: list[str]


@cache
def load(name: str, image_size: int) -> Domain:
    """Load a domain and divide its training part between owner and attacker."""
    processor = ViTImageProcessorPil(size={"height": image_size, "width": image_size})
    parts = hf_ntp.load_domain(name)
    owner, attacker = hf_ntp.split_owner_attacker(parts["train"], OWNER_FRACTION)
    five = (parts["train"], owner, attacker, parts["validation"], parts["test"])
    pixels = [hf_ntp.PixelDataset.from_dataset(part, processor) for part in five]
    return Domain(*pixels, names=parts["train"].features["label"].names)


def pretrain_steps(architecture: str, source: str) -> int:
    """How long the unprotected model is trained."""
    return LONG_PRETRAINING.get((architecture, source), ARCHITECTURES[architecture].pretrain_steps)


def pretrain(architecture: str, source: str, folder: Path) -> None:
    """Train the unprotected model."""
    shape = ARCHITECTURES[architecture]
    data = load(source, shape.image_size)
    model = shape.build(data.names)
    steps = pretrain_steps(architecture, source)
    train_classifier(model, data.train, str(folder.parent / "trainer"), steps, transform=RandomShift(1))
    save(model, folder)


def protect(cell: Cell, base: Path, folder: Path, preset: str, options: dict[str, Any]) -> list[dict[str, float]]:
    """Protect the model, or train it on with the same budget and no target terms; return the training log."""
    shape = ARCHITECTURES[cell.architecture]
    source, target = load(cell.source, shape.image_size), load(cell.target, shape.image_size)
    model = load_model(str(base))
    schedule = {
        "max_steps": shape.protection_steps,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 50,
        "save_strategy": "no",
        "logging_steps": 500,
        "report_to": "none",
        "disable_tqdm": True,
    }
    settings = hf_ntp.NTPConfig.from_preset(preset, output_dir=str(folder.parent / "trainer"), **schedule | options)
    seen = None if settings.target_access == "none" else target.owner
    trainer = hf_ntp.NTPTrainer(
        model, settings, source.train, seen, eval_dataset=source.validation, source_transform=RandomShift(1)
    )
    # A run that was asked to end has left a checkpoint.
    trainer.train(last_checkpoint(settings.output_dir))
    save(trainer.model, folder)
    return trainer.state.log_history


def save(model: PreTrainedModel, folder: Path) -> None:
    """Save a model; the folder appears when it is whole."""
    with whole_folder(folder) as staged:
        model.save_pretrained(staged)


class Arena(NamedTuple):
    """What the attacks on a cell share."""

    target: hf_ntp.AttackData
    settings: dict[str, Any]


def arena(cell: Cell, work: Path, jobs: int | None) -> Arena:
    """Return the attacker's data, with authorized images for the attacks that begin there, and the budget."""
    shape = ARCHITECTURES[cell.architecture]
    source, target = load(cell.source, shape.image_size), load(cell.target, shape.image_size)
    data = hf_ntp.AttackData(target.attacker, target.validation, target.test, source.validation)
    settings = {
        "sample_sizes": SAMPLE_SIZES,
        "seeds": SEEDS,
        "protocol": hf_ntp.FineTuneProtocol(steps=shape.attack_steps),
        "cache_dir": work / "fits",
        "jobs": jobs,
    }
    return Arena(data, settings)


def attack(cell: Cell, models: dict[str, Path], work: Path, jobs: int | None) -> dict[str, Any]:
    """Measure one cell with the decisive attacks."""
    data, settings = arena(cell, work, jobs)
    test = load(cell.source, ARCHITECTURES[cell.architecture].image_size).test
    paths = {name: str(path) for name, path in models.items()}
    starts = {"protected": paths["adaptive"], "unprotected": paths["unprotected"]}
    return {
        "source_accuracy": {name: source_accuracy(path, test) for name, path in paths.items()},
        "sparsity": {name: sparsity(paths[name]) for name in ("adaptive", "paper")},
        "adaptive": run_attacks(starts, data, DECISIVE, **settings),
        "paper": run_attacks({"protected": paths["paper"]}, data, PAPER_ATTACKS, **settings),
    }


def attack_with_everything(cell: Cell, models: dict[str, Path], work: Path, jobs: int | None) -> dict[str, Any]:
    """Measure one cell with the whole suite, controls and an unrelated domain."""
    data, settings = arena(cell, work, jobs)
    starts = {"protected": str(models["adaptive"]), "unprotected": str(models["unprotected"])}
    controls = {**starts, "without_target_terms": str(models["reference"])}
    for kind in ("magnitude", "random"):
        folder = models["adaptive"].parent / f"{kind}_pruned"
        if not folder.exists():
            prune_without_protection(models["unprotected"], folder, models["adaptive"], kind)
        controls[folder.name] = str(folder)
    third = load(THIRD, ARCHITECTURES[cell.architecture].image_size)
    elsewhere = hf_ntp.AttackData(third.attacker, third.validation, third.test)
    everything = run_attacks(starts, data, list(ATTACKS), **settings)
    few = run_attacks(controls, data, PAPER_ATTACKS, **settings)
    for part in ("starts", "retained_transfer", "worst_case", "not_run"):
        everything[part] = few[part] | everything[part]
    return {
        "attacks": everything,
        "third_domain": {"name": THIRD, **run_attacks(starts, elsewhere, ("dense",), **settings)},
    }


def attack_other_seeds(cell: Cell, models: dict[str, Path], work: Path, jobs: int | None) -> dict[str, Any]:
    """Measure models that differ in the seed of their protection with the paper's attacks."""
    folder = models["adaptive"].parents[1]
    seeds = {f"seed_{seed}": folder / f"adaptive_seed_{seed}" / "model" for seed in PROTECTION_SEEDS}
    preset = ARCHITECTURES[cell.architecture].adaptive
    options = {name: (preset, {"seed": seed}) for name, seed in zip(seeds, PROTECTION_SEEDS, strict=True)}
    protect_missing(cell, models["unprotected"], seeds, options, jobs)
    data, settings = arena(cell, work, jobs)
    test = load(cell.source, ARCHITECTURES[cell.architecture].image_size).test
    starts = {"protected": models["adaptive"], "unprotected": models["unprotected"], **seeds}
    paths = {name: str(path) for name, path in starts.items()}
    return {
        "source_accuracy": {name: source_accuracy(paths[name], test) for name in seeds},
        **run_attacks(paths, data, PAPER_ATTACKS, **settings),
    }


def source_accuracy(folder: str, test: hf_ntp.PixelDataset) -> float:
    """Accuracy on the authorized test split, in eval mode."""
    return accuracy_of(predictor(AutoModelForImageClassification.from_pretrained(folder)), test)


def sparsity(folder: str) -> float:
    """Share of zeros among the prunable weights."""
    return zero_fraction(
        list(noted_prunable_weights(AutoModelForImageClassification.from_pretrained(folder)).values())
    )


def make_models(cell: Cell, work: Path, jobs: int | None) -> dict[str, Path]:
    """Pretrain and protect what is missing for a cell."""
    root = work / "models" / cell.architecture / cell.source
    adaptive = ARCHITECTURES[cell.architecture].adaptive
    base = root / "unprotected" / "model"
    models = {
        "adaptive": root / cell.target / "adaptive" / "model",
        "paper": root / cell.target / "paper" / "model",
        "reference": root / "without_target_terms" / "model",
    }
    options = {"adaptive": (adaptive, {}), "paper": ("paper", {}), "reference": (adaptive, WITHOUT_TARGET)}
    if not base.exists():
        pretrain(cell.architecture, cell.source, base)
    protect_missing(cell, base, models, options, jobs)
    return {"unprotected": base, **models}


def protect_missing(
    cell: Cell, base: Path, models: dict[str, Path], options: dict[str, tuple[str, dict[str, Any]]], jobs: int | None
) -> None:
    """Protect with every preset and options whose model is missing, as many at a time as there are processes."""
    with joblib.parallel_config("loky", inner_max_num_threads=1):
        joblib.Parallel(n_jobs=jobs or joblib.cpu_count())(
            joblib.delayed(protect)(cell, base, folder, *options[name])
            for name, folder in models.items()
            if not folder.exists()
        )


def settings_of(cell: Cell) -> str:
    """Digest of what decides a cell's numbers, to tell results of older settings."""
    shape = ARCHITECTURES[cell.architecture]
    protection = asdict(hf_ntp.NTPConfig.from_preset(shape.adaptive, output_dir="none", report_to="none"))
    method = {field.name: protection[field.name] for field in fields(ProtectionArguments)}
    protocol = asdict(hf_ntp.FineTuneProtocol(steps=shape.attack_steps))
    data = [pretrain_steps(cell.architecture, cell.source), OWNER_FRACTION, SAMPLE_SIZES, SEEDS, WITHOUT_TARGET]
    attacks = [DECISIVE, PAPER_ATTACKS, FIT_VERSION, RETUNE_MARGIN, protocol]
    content = [hf_ntp.__version__, method, PRESETS["paper"], shape.protection_steps, data, attacks]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12]


def suite_settings_of(cell: Cell) -> str:
    """The same for a cell that is attacked with everything."""
    attacks = {name: [type(attack).__name__, attack.settings()] for name, attack in ATTACKS.items()}
    return hashlib.sha256(json.dumps([settings_of(cell), attacks, THIRD]).encode()).hexdigest()[:12]


def seeds_settings_of(cell: Cell) -> str:
    """The same for the models of other protection seeds."""
    return hashlib.sha256(json.dumps([settings_of(cell), PROTECTION_SEEDS]).encode()).hexdigest()[:12]


def parse(argv: list[str]) -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", default="runs/strength", help="models and finished fits")
    parser.add_argument("--out", default=str(HERE), help="where results.json, table.md and strength.png go")
    parser.add_argument("--only", nargs="*", help="parts of names of cells, such as vit or resnet/mnist-mnistm")
    parser.add_argument("--jobs", type=int, help="processes; default one per core")
    return parser.parse_args(argv)


def main(argv: list[str]) -> dict[str, Any]:
    """Run the benchmark and return its results."""
    arguments = parse(argv)
    work, out = Path(arguments.work_dir), Path(arguments.out)
    known = out / "results.json"
    results = json.loads(known.read_text()) if known.exists() else {}
    every = [Cell(architecture, *pair) for pair in PAIRS for architecture in ARCHITECTURES]
    cells = [cell for cell in every if any(part in str(cell) for part in arguments.only or [""])]
    measured = (
        ("cells", attack, settings_of),
        ("full_suite", attack_with_everything, suite_settings_of),
        ("other_seeds", attack_other_seeds, seeds_settings_of),
    )
    for part, *_ in measured:
        results.setdefault(part, {})
    for part, measure, describe in measured:
        for cell in cells:
            settings = describe(cell)
            if results[part].get(str(cell), {}).get("settings") == settings:
                continue
            if part == "full_suite" and str(cell) not in FULL_SUITE:
                continue
            start = perf_counter()
            # Models of other settings are other models.
            models = make_models(cell, work / settings_of(cell), arguments.jobs)
            found = measure(cell, models, work, arguments.jobs)
            results[part][str(cell)] = rounded({"settings": settings, "seconds": perf_counter() - start, **found})
            write(results, out)
            print(f"\n{table(results)}\n", flush=True)
    return results


if __name__ == "__main__":
    # By its name: worker processes do not find what belongs to a script.
    from benchmarks.strength import run

    run.main(sys.argv[1:])
