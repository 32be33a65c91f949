"""Protect a vision model: pretrain (or take yours), prune against an unauthorized domain, measure, write the result.

The embedded demo, with the settings of ntp_vit.yaml:

    accelerate launch recipes/ntp_vit.py

Your own model and data, from the Hub or from folders:

    accelerate launch recipes/ntp_vit.py --model_name_or_path ORG/MODEL --source_dataset ORG/AUTHORIZED \
        --target_dataset ORG/UNAUTHORIZED --output_dir runs/mine

Every option of NTPConfig and transformers.TrainingArguments is understood too. The result is OUTPUT_DIR/protected.
Running the same command again continues an interrupted run.
"""

from __future__ import annotations

import sys
from argparse import ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_ntp.training.arguments import ProtectionArguments

if TYPE_CHECKING:
    from datasets import DatasetDict
    from transformers import BaseImageProcessor, PreTrainedModel

    from hf_ntp import NTPConfig


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the launch lines as they are written."""


@dataclass
class RecipeArguments:
    """Model, data and evaluation."""

    config: str = field(
        default=str(Path(__file__).with_suffix(".yaml")), metadata={"help": "YAML file with defaults of all options."}
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to protect, Hub id or folder. Default: a small ViT trained here."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of that model."})
    source_dataset: str = field(
        default="mnist",
        metadata={"help": "Authorized domain: mnist, mnistm, optdigits, syn, a Hub id, a folder of images, parquet."},
    )
    source_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    source_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    source_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    source_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    source_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    source_max_samples: int | None = field(default=None, metadata={"help": "Use at most so many images per split."})
    target_dataset: str = field(default="optdigits", metadata={"help": "Unauthorized domain, as above."})
    target_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    target_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    target_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    target_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    target_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    target_max_samples: int | None = field(default=None, metadata={"help": "Use at most so many images per split."})
    owner_fraction: float = field(
        default=0.5,
        metadata={"help": "Share of the target's training images that protection sees; the attacker gets the rest."},
    )
    pretrain_steps: int = field(
        default=1500, metadata={"help": "Training steps on the source, for a new model or a new head."}
    )
    pretrain_learning_rate: float = field(default=1e-3, metadata={"help": "Peak rate of that training."})
    augment_shift: int = field(default=1, metadata={"help": "Random shift of source images, in pixels."})
    sample_sizes: list[int] = field(
        default_factory=lambda: [10, 30, 100], metadata={"help": "Labelled target images of the learning curves."}
    )
    attack_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the attacks."})
    attack_steps: int = field(default=800, metadata={"help": "Optimizer steps of every fit."})
    attack_batch_size: int = field(default=32, metadata={"help": "Images per step of every fit."})
    attack_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3, 3e-3], metadata={"help": "Rates the attacker chooses from."}
    )
    jobs: int | None = field(default=None, metadata={"help": "Processes that fit curves; default one per core."})
    repo_id: str = field(default="path/to/this/folder", metadata={"help": "What the card says to load."})
    license: str = field(default="other", metadata={"help": "Licence id for the card."})


SMALL_VIT_SIZE = 16

# Change where or how fast a run goes, not what comes out.
_FREE = ("config", "jobs", "repo_id", "license")


def parse(argv: list[str]) -> tuple[RecipeArguments, NTPConfig]:
    """Read YAML defaults and command-line options; unknown keys in either are errors."""
    if {"-h", "--help"} & set(argv):
        # Only the options of the recipe and the method: importing TrainingArguments takes seconds.
        shown: Any = [RecipeArguments, ProtectionArguments]
        HfArgumentParser(shown, description=__doc__, formatter_class=HelpFormatter).parse_args(argv)
    from hf_ntp import NTPConfig

    types: Any = [RecipeArguments, NTPConfig]
    parser = HfArgumentParser(types)
    known = {action.dest for action in parser._actions}
    first, _ = parser.parse_known_args(argv)
    defaults = yaml.safe_load(Path(first.config).read_text()) or {}
    if unknown := sorted(defaults.keys() - known):
        parser.error(f"{first.config} has unknown keys: {', '.join(unknown)}; see --help for the options")
    parser.set_defaults(**defaults)
    recipe, config = parser.parse_args_into_dataclasses(argv)
    return recipe, config


def load(recipe: RecipeArguments, side: str) -> DatasetDict:
    """Load the "source" or the "target" domain."""
    from hf_ntp import load_domain

    options = {key.removeprefix(f"{side}_"): value for key, value in vars(recipe).items() if key.startswith(side)}
    return load_domain(options.pop("dataset"), **options)


def base_model(recipe: RecipeArguments, labels: list[str]) -> tuple[PreTrainedModel, BaseImageProcessor, bool]:
    """Return model, image processor and whether the model still has to learn the source's classes."""
    from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTImageProcessorPil

    from hf_ntp.models import replace_head
    from hf_ntp.training.pretraining import small_vit

    if recipe.model_name_or_path is None:
        model = small_vit(labels, SMALL_VIT_SIZE)
        size = {"height": SMALL_VIT_SIZE, "width": SMALL_VIT_SIZE}
        return model, ViTImageProcessorPil(size=size), True
    name, revision = recipe.model_name_or_path, recipe.model_revision
    model = AutoModelForImageClassification.from_pretrained(name, revision=revision)
    processor = AutoImageProcessor.from_pretrained(name, revision=revision, backend="pil")
    new_head = model.config.num_labels != len(labels)
    if new_head:
        print(f"{name} has {model.config.num_labels} classes, the source {len(labels)}: training a new head on it.")
        replace_head(model, labels)
    return model, processor, new_head


def save(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Save model and image processor; the folder appears when it is whole."""
    from hf_ntp.run_folder import whole_folder

    with whole_folder(folder) as staged:
        model.save_pretrained(staged)
        processor.save_pretrained(staged)


def show(run: Path) -> dict[str, Any]:
    """Print and return the results of a finished run."""
    from hf_ntp.publishing.report import read_results, results_table

    results = read_results(run / "protected")
    print(f"\n{results_table(results)}\n\nThe protected model is in {run / 'protected'}")
    return results


def main(argv: list[str]) -> dict[str, Any]:
    """Run the recipe and return the content of ``results.json``."""
    recipe, config = parse(argv)

    import shutil

    from accelerate import PartialState
    from transformers import AutoModelForImageClassification
    from transformers.trainer_utils import get_last_checkpoint

    import hf_ntp
    from hf_ntp.data import RandomShift
    from hf_ntp.publishing.record import weight_digests
    from hf_ntp.publishing.report import build_results, write_report
    from hf_ntp.run_folder import Stopwatch, claim_run_folder, whole_folder
    from hf_ntp.training.pretraining import train_classifier

    # Whatever is wrong with options or data shows here, before any training starts.
    protocol = hf_ntp.FineTuneProtocol(
        recipe.attack_steps, recipe.attack_batch_size, tuple(recipe.attack_learning_rates)
    )
    source, target = load(recipe, "source"), load(recipe, "target")
    target["owner"], target["attacker"] = hf_ntp.split_owner_attacker(target.pop("train"), recipe.owner_fraction)
    for seed in recipe.attack_seeds:
        hf_ntp.nested_subsets(target["attacker"]["label"], recipe.sample_sizes, seed)
    model, processor, untrained = base_model(recipe, source["train"].features["label"].names)
    authorized, unauthorized = (
        {part: hf_ntp.PixelDataset.from_dataset(data, processor) for part, data in domain.items()}
        for domain in (source, target)
    )
    settings = {key: value for key, value in vars(recipe).items() if key not in _FREE}
    run = claim_run_folder(str(config.output_dir), {**settings, **config.fingerprint()})
    if (run / "protected").exists():
        return show(run)
    watch, state, augment = Stopwatch(run / "seconds.json"), PartialState(), RandomShift(recipe.augment_shift)

    base = run / "unprotected"
    with watch("pretrain"):
        if base.exists():
            model = AutoModelForImageClassification.from_pretrained(base)
        elif untrained:
            steps, rate = recipe.pretrain_steps, recipe.pretrain_learning_rate
            train_classifier(model, authorized["train"], str(run / "work"), steps, rate, transform=augment)
    if state.is_main_process and not base.exists():
        save(base, model, processor)

    config.output_dir = str(run / "work")
    trainer = hf_ntp.NTPTrainer(
        model,
        config,
        authorized["train"],
        {Path(recipe.target_dataset).name: unauthorized["owner"]},
        eval_dataset=authorized["validation"],
        processing_class=processor,
        source_transform=augment,
    )
    weights = run / "work" / "protected"
    with watch("protect"):
        if not weights.exists():
            trainer.train(get_last_checkpoint(config.output_dir) if Path(config.output_dir).exists() else None)
            if state.is_main_process:
                save(weights, model, processor)
    if not state.is_main_process:
        return {}

    attack = hf_ntp.AttackData(*(unauthorized[part] for part in ("attacker", "validation", "test")))
    with watch("evaluate"):
        measured = hf_ntp.measure_protection(
            base, weights, authorized["test"], attack, recipe.sample_sizes, recipe.attack_seeds, protocol,
            cache_dir=run / "work" / "fits", jobs=recipe.jobs,
        )  # fmt: skip
    references = (
        hf_ntp.DomainReference.of(recipe.source_dataset, source, recipe.source_config, recipe.source_revision),
        hf_ntp.DomainReference.of(recipe.target_dataset, target, recipe.target_config, recipe.target_revision),
    )
    results = build_results(*references, measured, watch.seconds)
    method = {name: getattr(config, name) for name in ProtectionArguments.__dataclass_fields__}
    name = recipe.model_name_or_path
    origin = {"name": None if name is None or Path(name).exists() else name, "weights": weight_digests(base)}
    with whole_folder(run / "protected") as folder:
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        write_report(folder, results, *references, origin, method, recipe.repo_id, recipe.license)
    return show(run)


if __name__ == "__main__":
    main(sys.argv[1:])
