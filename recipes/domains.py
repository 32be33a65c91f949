"""The domains of a recipe: loaded and checked, as pixels, measured, and described for the record. Not a script."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    from datasets import DatasetDict
    from torch.utils.data import Dataset
    from transformers import BaseImageProcessor, PreTrainedModel

    from hf_ntp import DomainReference, NTPConfig, PixelDataset
    from hf_ntp.evaluation.measure import Measurement, SourceAccuracy, Transfer
    from hf_ntp.evaluation.utility import SourceUtility

Part = TypeVar("Part")


class Domains(NamedTuple):
    """All domains of a run, in three groups; each domain has its parts by name."""

    source: dict[str, Any]
    target: dict[str, Any]
    third: dict[str, Any]


class Found(NamedTuple):
    """What was measured: the first authorized and unauthorized domain together, the others one by one."""

    first: Measurement
    other_sources: list[tuple[SourceAccuracy, SourceUtility | None]]
    other_targets: list[Transfer]
    third: Transfer | None


def load(recipe: Any, side: str) -> dict[str, DatasetDict]:
    """Load the "source" or the "target" domains by name; options beside the name are those of each of them.

    Raises:
        ValueError: If two would have one name.
    """
    from hf_ntp import load_domain
    from hf_ntp.data import domain_name

    options = {
        key.removeprefix(f"{side}_"): value for key, value in vars(recipe).items() if key.startswith(f"{side}_")
    }
    given = listed(options.pop("dataset"))
    names = [domain_name(dataset, options["config"]) for dataset in given]
    if len(set(names)) < len(names):
        raise ValueError(
            f"--{side}_dataset is {' '.join(given)}; needed: domains with names of their own. Rename a folder."
        )
    return {name: load_domain(dataset, **options) for name, dataset in zip(names, given, strict=True)}


def listed(given: str | list[str]) -> list[str]:
    """One name, as of the attack recipe, or several."""
    return [given] if isinstance(given, str) else given


def load_all(recipe: Any) -> Domains:
    """Load all domains, check them, and divide unauthorized training images between owner and attacker.

    Raises:
        ValueError: If a domain cannot be used.
    """
    from hf_ntp import split_owner_attacker
    from hf_ntp.data import check_target

    domains = Domains(load(recipe, "source"), load(recipe, "target"), load_third(recipe.third_dataset))
    names = Counter(name for group in domains for name in group)
    if both := sorted(name for name, count in names.items() if count > 1):
        raise ValueError(
            f"{', '.join(both)} would be the name of an authorized and of an unauthorized or third domain, or of both "
            "of these: record, card and terms could not tell them apart. Needed: names of their own. Rename a "
            "folder, or save what you take of a dataset under another name (Dataset.save_to_disk)."
        )
    for side, group in (("source", domains.source), ("target", domains.target)):
        for name, parts in group.items():
            check_target(parts["train"]["label"], f"the {side}" if len(group) == 1 else f"the {side} {name!r}")
    for parts in domains.target.values():
        parts["owner"], parts["attacker"] = split_owner_attacker(parts.pop("train"), recipe.owner_fraction)
    for parts in [*domains.target.values(), *domains.third.values()]:
        check_sizes(parts["attacker"], recipe.sample_sizes, recipe.attack_seeds)
    return domains


def load_third(dataset: str | None) -> dict[str, DatasetDict]:
    """Load the domain that is neither authorized nor not, by name, if there is one; nobody's but the attacker's.

    Raises:
        ValueError: If it cannot be used.
    """
    from hf_ntp import load_domain
    from hf_ntp.data import check_target, domain_name

    if dataset is None:
        return {}
    parts = load_domain(dataset)
    check_target(parts["train"]["label"], "the third domain")
    parts["attacker"] = parts.pop("train")
    return {domain_name(dataset): parts}


def check_sizes(images: Dataset, sample_sizes: list[int], seeds: list[int]) -> None:
    """Raise ``ValueError`` now, not after hours, where there are too few images for an attacker."""
    from hf_ntp import nested_subsets

    for seed in seeds:
        nested_subsets(images["label"], sample_sizes, seed)


def check_options(config: NTPConfig, model: PreTrainedModel, domains: Domains) -> None:
    """Find out before a model is pretrained what NTPTrainer would refuse afterwards.

    Args:
        config: Configuration of the protection.
        model: What will be protected.
        domains: See :func:`load_all`.

    Raises:
        ValueError: For options that do not fit the model or the domains.
        RuntimeError: If a tool that training is to be reported to is not installed.
    """
    import torch
    from transformers import SchedulerType, Trainer, get_scheduler
    from transformers.integrations import get_reporting_integration_callbacks

    from hf_ntp.data import check_target
    from hf_ntp.models import find_head, with_head
    from hf_ntp.models.adapters import with_adapter
    from hf_ntp.training.checks import check_fit, matches_features
    from hf_ntp.training.domains import NEIGHBOURHOOD, SOURCE, check_task, shares_of
    from hf_ntp.training.pruning import chosen_weights

    targets = [NEIGHBOURHOOD] if config.target_access == "none" else list(domains.target)
    shares_of(config.target_weights, targets, "target_weights")
    shares_of(config.source_weights, list(domains.source) if len(domains.source) > 1 else [SOURCE], "source_weights")
    # A copy: what has no part in an encoder's features, such as a decoder, is frozen for protection.
    network, _ = with_adapter(copy.deepcopy(model), config.adapter, config.device)
    network = with_head(network, config.head_name, config.encoder_name)
    if not matches_features(network, config):
        check_task(network, find_head(network, config.head_name)[1])
        for name, parts in domains.source.items() if config.source_tolerance else ():
            check_target(parts["validation"]["label"], f"the validation split of the source {name!r}")
    check_fit(network, config, sum(len(parts["train"]) for parts in domains.source.values()), len(targets))
    chosen_weights(network, config, config.head_name)
    Trainer.get_optimizer_cls_and_kwargs(config, network)
    optimizer = torch.optim.SGD(network.parameters(), config.learning_rate)
    kwargs: Any = config.lr_scheduler_kwargs
    try:
        get_scheduler(config.lr_scheduler_type, optimizer, 1, 2, kwargs)
    except (TypeError, ValueError) as error:
        kind = SchedulerType(config.lr_scheduler_type).value
        raise ValueError(
            f"lr_scheduler_kwargs is {kwargs} with lr_scheduler_type {kind!r} ({error}); "
            "needed: the options of that scheduler, as numbers (YAML takes 1e-4 for text: write 1.0e-4)."
        ) from error
    for callback in get_reporting_integration_callbacks(config.report_to):
        callback()


def as_pixels(domains: Domains, processor: BaseImageProcessor, same_classes: bool) -> Domains:
    """All parts of all domains as the model takes them.

    Args:
        domains: See :func:`load_all`.
        processor: Image processor.
        same_classes: Whether authorized domains share a head.

    Raises:
        ValueError: If they do and have different classes.
    """
    from hf_ntp import PixelDataset
    from hf_ntp.training.domains import check_same_classes

    pixels = Domains(
        *(
            {
                name: {part: PixelDataset.from_dataset(data, processor) for part, data in parts.items()}
                for name, parts in group.items()
            }
            for group in domains
        )
    )
    if same_classes:
        check_same_classes(part_of(pixels.source, "train"))
    return pixels


def in_order_of(names: list[str], group: dict[str, Any]) -> dict[str, Any]:
    """Domains with the labels that a model has for their classes, where these differ in order or capitals alone.

    Args:
        names: Names of the model's classes.
        group: Authorized domains.
    """

    def known(found: list[str]) -> bool:
        lower = {name.lower() for name in found}
        return found != names and len(lower) == len(found) == len(names) and lower == {name.lower() for name in names}

    numbers = {name: i for i, name in enumerate(names)}
    return {
        domain: type(parts)({
            part: data.align_labels_with_mapping(numbers, "label") if known(data.features["label"].names) else data
            for part, data in parts.items()
        })
        for domain, parts in group.items()
    }  # fmt: skip


def fingerprints(domains: Domains) -> dict[str, dict[str, dict[str, str]]]:
    """What tells the images of every part of every domain from others, see :func:`as_pixels`."""
    return {
        side: {name: {part: data.fingerprint for part, data in parts.items()} for name, parts in group.items()}
        for side, group in domains._asdict().items()
    }


def part_of(group: Mapping[str, Mapping[str, Part]], part: str) -> dict[str, Part]:
    """One part of every domain of a group."""
    return {name: parts[part] for name, parts in group.items()}


def only(parts: dict[str, Part]) -> Part | dict[str, Part]:
    """The single part where there is one, as trainers take it, else all by name."""
    return next(iter(parts.values())) if len(parts) == 1 else parts


def joined(parts: dict[str, PixelDataset]) -> Dataset:
    """All parts as one dataset."""
    from torch.utils.data import ConcatDataset

    return next(iter(parts.values())) if len(parts) == 1 else ConcatDataset(parts.values())


def measure(base: Any, weights: Any, pixels: Domains, recipe: Any, protocol: Any, **shared: Any) -> Found:
    """Measure every domain: accuracy on the authorized ones, what the checkpoint is worth on all others.

    Args:
        base: Folder of the model before protection.
        weights: Folder of the protected model.
        pixels: See :func:`as_pixels`.
        recipe: Options.
        protocol: How everything is fitted.
        shared: "cache_dir" and "jobs".
    """
    from hf_ntp import AttackData, measure_protection
    from hf_ntp.evaluation.measure import measure_source, measure_transfer

    def attackers(group: Mapping[str, Mapping[str, PixelDataset]]) -> list[AttackData]:
        return [AttackData(*(parts[part] for part in ("attacker", "validation", "test"))) for parts in group.values()]

    sources, targets = list(pixels.source.values()), attackers(pixels.target)
    curves = {"sample_sizes": recipe.sample_sizes, "seeds": recipe.attack_seeds, "protocol": protocol, **shared}
    third = [measure_transfer(base, weights, data, **curves) for data in attackers(pixels.third)]
    return Found(
        measure_protection(base, weights, sources[0]["test"], targets[0], source_train=sources[0]["train"], **curves),
        [measure_source(base, weights, parts["test"], parts["train"]) for parts in sources[1:]],
        [measure_transfer(base, weights, data, **curves) for data in targets[1:]],
        third[0] if third else None,
    )


def references(recipe: Any, domains: Domains, target_access: str) -> tuple[list[DomainReference], ...]:
    """Identities of the authorized, the unauthorized and the third domains; of what was used, and nothing else."""
    from hf_ntp import DomainReference

    source, target = (
        [
            DomainReference.of(dataset, parts, getattr(recipe, f"{side}_config"), getattr(recipe, f"{side}_revision"))
            for dataset, parts in zip(listed(getattr(recipe, f"{side}_dataset")), group.values(), strict=True)
        ]
        for side, group in (
            ("source", domains.source),
            ("target", {name: _seen(parts, target_access) for name, parts in domains.target.items()}),
        )
    )
    return source, target, [DomainReference.of(recipe.third_dataset, parts) for parts in domains.third.values()]


def _seen(parts: Mapping[str, Part], target_access: str) -> dict[str, Part]:
    return {name: part for name, part in parts.items() if name != "owner" or target_access != "none"}
