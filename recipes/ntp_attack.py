r"""Attack a protected checkpoint, ours or anybody's, and say what each attack gets out of it.

    python recipes/ntp_attack.py --checkpoint runs/ntp_vit/protected --unprotected runs/ntp_vit/unprotected \
        --target_dataset optdigits --source_dataset mnist --output_dir runs/attacks

Checkpoints are folders or Hub ids, datasets are what recipes/ntp_vit.py takes. Without --unprotected there is no
retained transfer, only SLC-AUC. Running the same command again continues an interrupted run. Processes that Accelerate
or torchrun started, on one or several machines that see the same OUTPUT_DIR, share the fits out among them. The result
is OUTPUT_DIR/results.json, table.md and attacks.png.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from hf_ntp.recipes.common import HelpFormatter, fit_protocol, read_options, run_script


@dataclass
class AttackArguments:
    """Checkpoints, data, attacks and budget."""

    checkpoint: str = field(metadata={"help": "Protected model: folder or Hub id."})
    target_dataset: str = field(metadata={"help": "Unauthorized domain: embedded name, Hub id, folder, parquet."})
    output_dir: str = field(metadata={"help": "Folder of this run."})
    unprotected: str | None = field(default=None, metadata={"help": "The model before protection, if there is one."})
    image_processor: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of another image processor, where the checkpoint comes without one or "
            "transformers has its own for torchvision alone (DINOv3)."
        },
    )
    target_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    target_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    target_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    target_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    target_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    target_max_samples: int | None = field(default=None, metadata={"help": "Use at most so many images per split."})
    owner_fraction: float = field(
        default=0.75,
        metadata={
            "help": "Share of the target's training images that protection has seen and that are left out; 0: none. "
            "This and the options of the target above have to be those of the protection, or images that it has seen "
            "are the attacker's."
        },
    )
    source_dataset: str | None = field(
        default=None, metadata={"help": "Authorized domain, for the attacks that fine-tune on it first."}
    )
    source_config: str | None = field(default=None, metadata={"help": "Configuration of that Hub dataset."})
    source_split: str | None = field(default=None, metadata={"help": "Take only this split, and divide it."})
    source_revision: str | None = field(default=None, metadata={"help": "Revision of that Hub dataset."})
    source_image_column: str | None = field(default=None, metadata={"help": "Its image column."})
    source_label_column: str | None = field(default=None, metadata={"help": "Its label column."})
    num_source_images: int = field(default=500, metadata={"help": "Authorized images that the attacker has, at most."})
    third_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Another control: a domain that is neither authorized nor unauthorized, on which all weights are "
            "tuned. What is lost there is collateral damage."
        },
    )
    attacks: list[str] = field(
        default_factory=lambda: ["decisive"], metadata={"help": "Names of attacks, 'decisive' or 'all'."}
    )
    controls: bool = field(
        default=False,
        metadata={"help": "Attack magnitude-pruned and randomly pruned (not repaired) copies of --unprotected too."},
    )
    reference: str | None = field(
        default=None,
        metadata={
            "help": "Another control: a model pruned and trained as long as the protected one, without what is aimed "
            "at the target (attackers, target_weight, fisher_weight and collapse_weight of 0)."
        },
    )
    sample_sizes: list[int] = field(
        default_factory=lambda: [10, 30, 100], metadata={"help": "Labelled target images of the learning curves."}
    )
    # The same options have these other names in the recipes that protect, too.
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"aliases": ["--attack_seeds"], "help": "Attack seeds."}
    )
    steps: int = field(default=600, metadata={"aliases": ["--attack_steps"], "help": "Optimizer steps of a fit."})
    batch_size: int = field(
        default=32, metadata={"aliases": ["--attack_batch_size"], "help": "Images per step of a fit."}
    )
    learning_rates: list[float] = field(
        default_factory=lambda: [3e-4, 1e-3, 3e-3, 1e-2],
        metadata={
            "aliases": ["--attack_learning_rates"],
            "help": "Rates the attacker chooses from. Large pretrained models are usually fine-tuned at 1e-5 to 1e-4: "
            "begin there with yours, or both models look worthless to the attacker.",
        },
    )
    extensions: int = field(
        default=2,
        metadata={
            "aliases": ["--attack_extensions"],
            "help": "How many higher rates are tried, while the highest of three or more is the best.",
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of finished fits, which runs with other attacks may share; default: in OUTPUT_DIR."},
    )
    jobs: int | None = field(
        default=None,
        metadata={
            "help": "Fits at a time in one launched process; default one per core that it has, or one on a GPU "
            "(small models leave room for more)."
        },
    )


def parse(argv: list[str]) -> AttackArguments:
    """Read the command line."""
    from transformers.hf_argparser import HfArgumentParser

    types: Any = AttackArguments
    parser = HfArgumentParser(types, description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    (arguments,) = read_options(parser, argv)
    if arguments.controls and arguments.unprotected is None:
        parser.error("--controls needs --unprotected: the controls are pruned copies of it")
    return arguments


def main(argv: list[str]) -> dict[str, Any]:
    """Run the recipe and return the content of ``results.json``."""
    arguments = parse(argv)

    import os
    from functools import partial

    from hf_ntp.recipes import domains
    from transformers import AutoConfig, AutoImageProcessor

    import hf_ntp
    from hf_ntp.attacks import ATTACKS, DECISIVE
    from hf_ntp.data import check_target
    from hf_ntp.evaluation.cache import local_folder
    from hf_ntp.evaluation.claims import Claims
    from hf_ntp.evaluation.controls import prune_without_protection
    from hf_ntp.evaluation.runner import check_seeds
    from hf_ntp.evaluation.suite import check_suite, run_attacks
    from hf_ntp.models import class_names
    from hf_ntp.publishing.attack_report import attacks_table, plot_attacks
    from hf_ntp.run_folder import claim_run_folder, weight_digests, whole_file

    words = {"decisive": list(DECISIVE), "all": list(ATTACKS)}
    attacks = list(dict.fromkeys(name for word in arguments.attacks for name in words.get(word, [word])))
    protocol = fit_protocol(arguments.steps, arguments.batch_size, arguments.learning_rates, arguments.extensions)
    starts = {"protected": arguments.checkpoint}
    if arguments.unprotected is not None:
        starts["unprotected"] = arguments.unprotected
    if arguments.reference is not None:
        starts["reference"] = arguments.reference
    # Whatever is wrong with options or data shows here, before a folder is claimed for them.
    check_suite(starts, attacks, arguments.sample_sizes)
    check_seeds(arguments.seeds)
    if arguments.source_dataset is None and all(ATTACKS[name].needs_source for name in attacks):
        raise ValueError(
            f"all of the attacks ({', '.join(attacks)}) begin with authorized images; needed: some. Give "
            "--source_dataset, or other attacks."
        )
    if arguments.num_source_images < 1:
        raise ValueError(f"num_source_images is {arguments.num_source_images}; needed: at least 1.")
    ((target_name, target),) = domains.load(arguments, "target").items()
    check_target(target["train"]["label"])
    parts = {"attacker": target["train"], "validation": target["validation"], "test": target["test"]}
    if arguments.owner_fraction != 0:
        _, parts["attacker"] = hf_ntp.split_owner_attacker(target["train"], arguments.owner_fraction)
    domains.check_sizes(parts["attacker"], arguments.sample_sizes, arguments.seeds)
    preparing = arguments.image_processor or arguments.checkpoint
    try:
        processor = AutoImageProcessor.from_pretrained(preparing, backend="pil")
    except OSError as error:
        raise OSError(f"{error}\nGive the one that the checkpoint was trained with: --image_processor.") from error
    source = None
    if arguments.source_dataset is not None:
        authorized = domains.load(arguments, "source")
        if names := class_names(AutoConfig.from_pretrained(arguments.checkpoint)):
            authorized = domains.in_order_of(names, authorized)
        (domain,) = authorized.values()
        images = domain["train"]
        size = min(arguments.num_source_images, len(images))
        images = images.select(hf_ntp.nested_subsets(images["label"], [size], seed=0)[size])
        source = hf_ntp.PixelDataset.from_dataset(images, processor)
    train, validation, test = pixels = [hf_ntp.PixelDataset.from_dataset(part, processor) for part in parts.values()]
    data = hf_ntp.AttackData(train, validation, test, source)
    elsewhere: dict[str, hf_ntp.AttackData] = {}
    for name, third in domains.load_third(arguments.third_dataset).items():
        if name == target_name:
            raise ValueError(f"third_dataset is {name}, as target_dataset is; needed: another domain.")
        domains.check_sizes(third["attacker"], arguments.sample_sizes, arguments.seeds)
        kept = [hf_ntp.PixelDataset.from_dataset(third[part], processor) for part in parts]
        elsewhere[name] = hf_ntp.AttackData(*kept)
        pixels += kept
    # What lies under a name may be another thing tomorrow, and the controls would not be its any more.
    found = {
        "weights_of_starts": {start: weight_digests(local_folder(name)) for start, name in starts.items()},
        "data": [part.fingerprint for part in (*pixels, source) if part is not None],
    }
    run = claim_run_folder(
        arguments.output_dir,
        {key: value for key, value in vars(arguments).items() if key not in ("jobs", "cache_dir")} | found,
    )
    if arguments.controls and arguments.unprotected is not None:
        for kind in ("magnitude", "random"):
            folder = run / f"{kind}_pruned"
            control = partial(prune_without_protection, arguments.unprotected, folder, arguments.checkpoint, kind)
            Claims(run).make_once(folder, control)
            starts[folder.name] = str(folder)
    fits = arguments.cache_dir or run / "fits"
    budget = (arguments.sample_sizes, arguments.seeds, protocol, fits, arguments.jobs)
    results = run_attacks(starts, data, attacks, *budget)
    for name, third_data in elsewhere.items():
        results["third_domain"] = {"name": name, **run_attacks(starts, third_data, ["dense"], *budget)}
    reference = hf_ntp.DomainReference.of(arguments.target_dataset, parts)
    results = {
        "checkpoint": arguments.checkpoint,
        "weights": weight_digests(local_folder(arguments.checkpoint)),
        "target": reference.dataset,
        "fingerprint": reference.fingerprint,
        **results,
    }
    if os.environ.get("RANK", "0") != "0":
        return results
    table = attacks_table(results)
    with whole_file(run / "results.json") as staged:
        staged.write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    (run / "table.md").write_text(table + "\n")
    plot_attacks(results, run / "attacks.png", f"{arguments.checkpoint} on {arguments.target_dataset}")
    for where, part in {"": results, ", third domain": results.get("third_domain", {})}.items():
        for start, reasons in part.get("not_run", {}).items():
            for name, reason in reasons.items():
                print(f"not run on {start}{where}: {name} ({reason})")
    print(
        f"\n{table}\n\nSLC-AUC, normalized: mean accuracy gap to scratch with the same images. Everything is in {run}"
    )
    return results


if __name__ == "__main__":
    run_script(main)
