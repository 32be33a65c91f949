"""What the protection recipes share: options, the run from data to report, resumption. Not a script.

A recipe brings the model to protect, and how it is pretrained where it has not learned the source yet.
"""

from __future__ import annotations

import logging
import math
import shlex
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import yaml
from transformers.hf_argparser import HfArgumentParser

from hf_ntp.interruption import EXPECTED, unwind_on_sigterm
from hf_ntp.training.arguments import PRESETS, ProtectionArguments

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

    from hf_ntp import FineTuneProtocol, NTPConfig


logger = logging.getLogger(__name__)


def run_script(main: Callable[[list[str]], Any]) -> None:
    """Run a recipe's ``main`` on the command line; what may go wrong ends it with a sentence, not a traceback."""
    unwind_on_sigterm()
    try:
        main(sys.argv[1:])
    except EXPECTED as error:
        if isinstance(error, ValueError) and "need" not in str(error):
            raise  # Python's own: a bug, whose place is wanted
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")


class HelpFormatter(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Shows defaults, and the launch lines as they are written."""


@dataclass
class RecipeArguments:
    """Model, data and evaluation."""

    config: str = field(default="", metadata={"help": "YAML file with defaults of all options."})
    preset: str = field(
        default="adaptive",
        metadata={
            "help": "Defaults of the options, see hf_ntp/training/arguments.py.",
            "choices": [*PRESETS],
        },
    )
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to protect, Hub id or folder. Default: a small one trained here."}
    )
    model_revision: str | None = field(default=None, metadata={"help": "Revision of that model."})
    image_processor: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of another image processor for that model, where transformers has its own for "
            "torchvision alone (DINOv3): a ViTImageProcessorPil with its size, image_mean and image_std, saved."
        },
    )
    source_dataset: list[str] = field(
        default_factory=lambda: ["mnist"],
        metadata={
            "help": "Authorized domains: mnist, mnistm, optdigits, syn, Hub ids, folders of images, parquet. Several "
            "have the same classes where the model has a head; the options below are then for each of them."
        },
    )
    source_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    source_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    source_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    source_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    source_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    source_max_samples: int | None = field(default=None, metadata={"help": "Use at most so many images per split."})
    target_dataset: list[str] = field(
        default_factory=lambda: ["optdigits"],
        metadata={
            "help": "Unauthorized domains, as above, each with classes of its own; what of them the protection sees "
            "is --target_access."
        },
    )
    third_dataset: str | None = field(
        default=None, metadata={"help": "A domain that is neither, on which collateral damage is measured."}
    )
    target_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    target_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    target_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    target_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    target_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    target_max_samples: int | None = field(default=None, metadata={"help": "Use at most so many images per split."})
    owner_fraction: float = field(
        default=0.75,
        metadata={"help": "Share of the target's training images that protection sees; the attacker gets the rest."},
    )
    pretrain_steps: int = field(
        default=2500, metadata={"help": "Training steps on the source, where the model has not learned it yet."}
    )
    pretrain_learning_rate: float | None = field(
        default=None, metadata={"help": "Peak rate of that training; default 1e-3 for a small model, 5e-5 for yours."}
    )
    pretrain_seed: int = field(default=0, metadata={"help": "Seed of that training and of a small model's weights."})
    augment_shift: int = field(default=1, metadata={"help": "Random shift of source images, in pixels."})
    sample_sizes: list[int] = field(
        default_factory=lambda: [10, 30, 100], metadata={"help": "Labelled target images of the learning curves."}
    )
    attack_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the attacks."})
    attack_steps: int = field(default=600, metadata={"help": "Optimizer steps of every fit."})
    attack_batch_size: int = field(default=32, metadata={"help": "Images per step of every fit."})
    attack_learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3],
        metadata={
            "help": "Rates the attacker chooses from. Large pretrained models are usually fine-tuned at 1e-5 to 1e-4: "
            "begin there with yours, or it looks worthless to the attacker, protected or not."
        },
    )
    attack_extensions: int = field(
        default=2,
        metadata={"help": "How many higher rates are tried, while the highest of three or more is the best."},
    )
    jobs: int | None = field(
        default=None,
        metadata={
            "help": "Fits at a time in one launched process; default one per core that it has, or one on a GPU "
            "(small models leave room for more)."
        },
    )
    repo_id: str | None = field(
        default=None, metadata={"help": "What the card says to load; can be filled in later (hf-ntp report)."}
    )
    license: str = field(default="other", metadata={"help": "Licence id for the card."})
    terms: str | None = field(
        default=None, metadata={"help": "What you allow, in words, for record, card and gating prompt."}
    )

    def __post_init__(self) -> None:
        """Find out at once what would end the run after hours.

        Raises:
            ValueError: For a number or a word that cannot be.
        """
        for name, least in (("attack_steps", 1), ("augment_shift", 0), ("jobs", 1)):
            if (value := getattr(self, name)) is not None and value < least:
                raise ValueError(f"{name} is {value}; needed: at least {least}.")
        if self.pretrain_learning_rate is not None and not 0 < self.pretrain_learning_rate < math.inf:
            raise ValueError(
                f"pretrain_learning_rate is {self.pretrain_learning_rate}; needed: a positive, finite number, or null."
            )
        self.license = str(self.license or "").strip()  # YAML takes some words for others
        if not self.license:
            raise ValueError("license is empty; needed: a licence id of the Hub, such as 'mit', or 'other'.")


class BaseModel(NamedTuple):
    """The model before protection."""

    model: PreTrainedModel
    processor: BaseImageProcessor
    learning_rate: float | None
    """Rate at which it still has to learn the source; None when it has."""
    revision: str | None = None
    """Commit on the Hub, where it came from there."""


Pretrain = Callable[..., None]
"""Trains a model in place: (model, images, folder for Trainer, steps, rate, and what it takes by name)."""

SMALL_SIZE = 16
"""Height and width of the images of a small model."""

_DATASETS = ("source_dataset", "target_dataset")

# Change where or how fast a run goes, not what comes out.
_FREE = ("config", "jobs", "repo_id", "license", "terms")


Arguments = TypeVar("Arguments", bound=RecipeArguments)


def parse(argv: list[str], kind: type[Arguments], description: str) -> tuple[Arguments, NTPConfig]:
    """Read YAML defaults and command-line options; unknown keys in either are errors.

    Args:
        argv: Command line.
        kind: Options of the recipe; its default of "config" names the file with the recipe's own defaults.
        description: For the help.
    """
    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", default=kind.config)
    first.add_argument("--preset")
    first.add_argument("--num_train_epochs", "--num-train-epochs")
    first.add_argument("--max_steps", "--max-steps")
    for option in ("model_name_or_path", *_DATASETS):
        first.add_argument(f"--{option}", f"--{option.replace('_', '-')}", nargs="+")
    early = first.parse_known_args(argv)[0]
    defaults = _read_defaults(first, early.config)
    if early.preset and early.config == kind.config:
        # What was asked for goes before the recipe's own file, as it does not before a file that was asked for, too.
        defaults |= PRESETS.get(early.preset, {})
    else:
        defaults = PRESETS.get(early.preset or defaults.get("preset", kind.preset), {}) | defaults
    # How long to train is one choice: epochs on the command line replace the file's number of steps.
    if early.num_train_epochs and not early.max_steps:
        defaults.pop("max_steps", None)
    types: Any = [kind, ProtectionArguments]
    if not {"-h", "--help"} & set(argv):
        # Importing TrainingArguments takes seconds; the help shows the options of the recipe and the method only.
        from hf_ntp import NTPConfig

        types = [kind, NTPConfig]
    parser = HfArgumentParser(types, description=description, formatter_class=HelpFormatter, allow_abbrev=False)
    known = {action.dest for action in parser._actions}
    unknown = sorted(defaults.keys() - known)
    if unknown and types[1] is not ProtectionArguments:
        parser.error(f"the configuration file has unknown keys: {', '.join(unknown)}; see --help for the options")
    given = {name for name, value in vars(early).items() if value} | defaults.keys()
    if "model_name_or_path" in given and (forgotten := [name for name in _DATASETS if name not in given]):
        parser.error(
            f"--model_name_or_path is given and --{' and --'.join(forgotten)} not: the defaults are the demo's. Name "
            "the domains of your model, or give the demo's by name"
        )
    for action in parser._actions:
        if defaults.get(action.dest) is not None:
            defaults[action.dest] = _as_given(parser, action, defaults[action.dest])
    parser.set_defaults(**{key: value for key, value in defaults.items() if key in known})
    recipe, config = read_options(parser, argv)
    for name in ("image_processor", "model_revision"):
        if recipe.model_name_or_path is None and getattr(recipe, name) is not None:
            parser.error(f"--{name} is given without --model_name_or_path; the small model has its own")
    if getattr(config, "adapter", None) is not None:
        parser.error(
            "--adapter is for Python: recipes load models without one. Give a PeftModel to NTPTrainer, or merge the "
            "adapter (merge_and_unload) and save the model first"
        )
    if getattr(config, "push_to_hub", False):
        parser.error(
            "--push_to_hub is of no use here: the folder to publish is made when everything is measured. Push it with "
            "hf-ntp push OUTPUT_DIR/protected ORG/NAME"
        )
    return recipe, config


def read_options(parser: HfArgumentParser, argv: list[str]) -> list[Any]:
    """Read a command line into the parser's dataclasses; an option that nobody knows ends the program."""
    *found, unknown = parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}; see --help for the options")
    return found


def _read_defaults(parser: ArgumentParser, path: str) -> dict[str, Any]:
    """Read a configuration file; what is none ends the program."""
    try:
        defaults = yaml.safe_load(Path(path).read_text()) or {}
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"the configuration file cannot be read ({error})")
    if not isinstance(defaults, dict):
        parser.error(f"{path} holds a {type(defaults).__name__}; needed: options by name, such as 'max_steps: 3000'")
    return defaults


def _as_given(parser: ArgumentParser, action: Any, value: Any) -> Any:
    """Read a value of the configuration file as if it stood on the command line: the parser takes it as it is."""
    if action.nargs != "+":
        if action.choices and value is False and "no" in action.choices:
            return "no"  # what YAML takes for False
        if action.choices and value not in action.choices:
            words = ", ".join(map(str, action.choices))
            parser.error(f"the configuration file has {action.dest}: {value}; needed: one of {words}")
        if action.type is int and isinstance(value, float):
            if not value.is_integer():
                parser.error(f"the configuration file has {action.dest}: {value}; needed: an integer")
            return int(value)
        return value
    try:  # YAML takes 1e-3 for text
        values = value if isinstance(value, list) else [value]
        return [action.type(each) if isinstance(each, str) else each for each in values]
    except (TypeError, ValueError) as error:
        parser.error(f"the configuration file has {action.dest}: {value} ({error})")


def small_processor() -> BaseImageProcessor:
    """Image processor of the small models."""
    from transformers import ViTImageProcessorPil

    return ViTImageProcessorPil(size={"height": SMALL_SIZE, "width": SMALL_SIZE})


def fit_protocol(steps: int, batch_size: int, learning_rates: list[float], extensions: int) -> FineTuneProtocol:
    """Budget of a fit from a recipe's options; of short ones, a tenth is warm-up."""
    from hf_ntp import FineTuneProtocol

    warmup = min(FineTuneProtocol.warmup_steps, steps // 10)
    return FineTuneProtocol(steps, batch_size, tuple(learning_rates), warmup_steps=warmup, extensions=extensions)


def given_model(recipe: RecipeArguments, model: PreTrainedModel, rate: float | None = None) -> BaseModel:
    """Complete what was loaded from ``recipe.model_name_or_path``; ``rate`` as in :class:`BaseModel`."""
    from transformers import AutoImageProcessor

    from hf_ntp.models import hub_commit

    if recipe.image_processor is not None:
        processor = AutoImageProcessor.from_pretrained(recipe.image_processor, backend="pil")
    else:
        processor = AutoImageProcessor.from_pretrained(
            recipe.model_name_or_path, revision=recipe.model_revision, backend="pil"
        )
    return BaseModel(model, processor, rate, hub_commit(str(recipe.model_name_or_path), recipe.model_revision))


def save(folder: Path, model: PreTrainedModel, processor: BaseImageProcessor) -> None:
    """Save model and image processor; the folder appears when it is whole."""
    from hf_ntp.run_folder import whole_folder

    with whole_folder(folder) as staged:
        model.save_pretrained(staged)
        processor.save_pretrained(staged)


def _warn_of_ignored(recipe: RecipeArguments, folder: Path) -> None:
    """Say so where a finished folder has not the licence, terms or name of a repository that were asked for."""
    from hf_ntp.publishing.card import card_repo_ids
    from hf_ntp.publishing.record import read_record

    terms = read_record(folder)["terms"]
    has = {"repo_id": next(iter(card_repo_ids(folder)), None), "license": terms["license"], "terms": terms["text"]}
    unused = {"repo_id": None, "license": RecipeArguments.license, "terms": None}
    wanted = {key: getattr(recipe, key) for key in has if getattr(recipe, key) not in (unused[key], has[key])}
    if wanted:
        logger.warning(
            "%s is finished and says otherwise than --%s; nothing was changed. To change it: hf-ntp report %s %s",
            folder,
            " and --".join(wanted),
            folder,
            " ".join(f"--{key} {shlex.quote(value)}" for key, value in wanted.items()),
        )


def show(run: Path) -> dict[str, Any]:
    """Print and return the results of a finished run."""
    from hf_ntp.publishing.results import read_results, results_table

    results = read_results(run / "protected")
    print(f"\n{results_table(results)}\n\nThe protected model is in {run / 'protected'}")
    return results


def run(
    recipe: RecipeArguments,
    config: NTPConfig,
    base_model: Callable[[Any, NTPConfig, list[str]], BaseModel],
    pretrain: Pretrain,
) -> dict[str, Any]:
    """Run a recipe and return the content of ``results.json`` (on the first process; {} on the others).

    Args:
        recipe: Options.
        config: Options; ``output_dir`` becomes the one of the Trainer inside the run.
        base_model: Loads or makes the model to protect; also takes the names of the source's classes.
        pretrain: Trains it where it has not learned the source yet.
    """
    import shutil

    from accelerate.utils import wait_for_everyone
    from hf_ntp.recipes import domains
    from huggingface_hub.utils import validate_repo_id

    import hf_ntp
    from hf_ntp.data import RandomShift
    from hf_ntp.evaluation.runner import check_seeds
    from hf_ntp.functional import check_sample_sizes
    from hf_ntp.models import class_names, hub_id, load_model, plain_model
    from hf_ntp.publishing.card import NO_REPO
    from hf_ntp.publishing.report import build_record, write_report
    from hf_ntp.publishing.results import build_results
    from hf_ntp.run_folder import Stopwatch, claim_run_folder, weight_digests, whole_folder
    from hf_ntp.training.checkpoint import last_checkpoint
    from hf_ntp.training.checks import matches_features

    # Whatever is wrong with options or data shows here, before any training starts.
    protocol = fit_protocol(
        recipe.attack_steps, recipe.attack_batch_size, recipe.attack_learning_rates, recipe.attack_extensions
    )
    check_sample_sizes(recipe.sample_sizes)
    check_seeds(recipe.attack_seeds)
    if recipe.repo_id is not None:
        validate_repo_id(recipe.repo_id)
    loaded = domains.load_all(recipe)
    model, processor, rate, commit = base_model(
        recipe, config, next(iter(loaded.source.values()))["train"].features["label"].names
    )
    if rate is not None and recipe.pretrain_steps < 1:
        raise ValueError(f"pretrain_steps is {recipe.pretrain_steps}; needed: at least 1.")
    if names := class_names(model.config):
        loaded = loaded._replace(source=domains.in_order_of(names, loaded.source))
    domains.check_options(config, model, loaded)
    pixels = domains.as_pixels(loaded, processor, same_classes=not matches_features(model, config))
    authorized = domains.part_of(pixels.source, "train")
    settings = {key: value for key, value in vars(recipe).items() if key not in _FREE} | config.fingerprint()
    # What lies under a name may be another thing tomorrow.
    settings["data"] = domains.fingerprints(pixels)
    if recipe.model_name_or_path is not None:
        settings["weights"] = commit or weight_digests(recipe.model_name_or_path)
    root, first = Path(str(config.output_dir)), config.process_index == 0
    if first:
        claim_run_folder(root, settings)
    wait_for_everyone()
    if (root / "protected").exists():
        if first:
            _warn_of_ignored(recipe, root / "protected")
        return show(root) if first else {}
    watch, augment = Stopwatch(root / "seconds.json" if first else None), RandomShift(recipe.augment_shift)

    base, weights = root / "unprotected", root / "work" / "protected"
    with watch("pretrain"):
        if not base.exists():
            if rate is not None:
                pretrain(
                    model, domains.joined(authorized), str(root / "work"), recipe.pretrain_steps, rate,
                    transform=augment, seed=recipe.pretrain_seed,
                    use_cpu=config.use_cpu, bf16=config.bf16, fp16=config.fp16,
                )  # fmt: skip
            if config.head_name or config.encoder_name:  # attackers have to find them too
                model.config.ntp = {"head_name": config.head_name, "encoder_name": config.encoder_name}
            if first:
                save(base, model, processor)
    wait_for_everyone()

    config.output_dir = str(root / "work")
    # A run that is continued begins with the saved model, so this one does, too.
    model = load_model(str(base), config.head_name, config.encoder_name)
    trainer = hf_ntp.NTPTrainer(
        model,
        config,
        domains.only(authorized),
        None if config.target_access == "none" else domains.part_of(pixels.target, "owner"),
        eval_dataset=domains.only(domains.part_of(pixels.source, "validation")),
        processing_class=processor,
        source_transform=augment,
    )
    with watch("protect"):
        if not weights.exists():
            trainer.train(last_checkpoint(config.output_dir))
            if first:
                save(weights, trainer.model, processor)
    wait_for_everyone()

    with watch("evaluate"):
        found = domains.measure(
            base, weights, pixels, recipe, protocol, cache_dir=root / "work" / "fits", jobs=recipe.jobs
        )
    if not first:
        return {}
    sources, targets, thirds = domains.references(recipe, loaded, config.target_access)
    third = thirds[0] if thirds else None
    name = recipe.model_name_or_path
    origin = {
        "name": hub_id(name),
        "revision": commit,
        "weights": weight_digests(base),
        **({} if name is None or rate is None else {"fine_tuning_steps": recipe.pretrain_steps}),
    }
    with whole_folder(root / "protected") as folder:
        shutil.copytree(weights, folder, dirs_exist_ok=True)
        results = build_results(
            sources[0], targets[0], found.first, watch.seconds, config.target_access,
            [(domain, *of) for domain, of in zip(sources[1:], found.other_sources, strict=True)],
            list(zip(targets[1:], found.other_targets, strict=True)),
            None if third is None or found.third is None else (third, found.third),
        )  # fmt: skip
        record = build_record(
            results, sources, targets, type(plain_model(trainer.model)).__name__, origin, config.summary(),
            found.first.sparsity, recipe.license, recipe.terms, third,
        )  # fmt: skip
        write_report(folder, record, results, repo_id=recipe.repo_id or NO_REPO)
    return show(root)
