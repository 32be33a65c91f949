"""The standard measurement of a protected model: does it still work, and what is it worth to an attacker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import PreTrainedModel

from ..attacks import FineTuneProtocol
from ..attacks.fine_tuning import predictor
from ..data import Content, PixelDataset, check_pixels
from ..functional import check_sample_sizes
from ..models import (
    LiveWeights,
    class_names,
    find_head,
    has_head,
    live_weights,
    load_model,
    noted_prunable_weights,
    notes_of,
    zero_fraction,
)
from ..run_folder import weight_digests
from ..training.domains import classifies
from ..training.paired_data import collate
from .arms import Arm, standard_arms
from .runner import AttackData, LearningCurves, accuracy_of, sample_wise_learning_curves, to_accelerator
from .suite import check_same_architecture
from .utility import SourceUtility, source_utility

_LIVE_IMAGES = 256


@dataclass(frozen=True)
class SourceAccuracy:
    """Accuracy on the authorized test split, eval mode, before and after protection (on the published weights).

    ``measure`` is "classification" by the model's own head, or "linear_probe" where it has none for these classes.
    """

    before: float
    after: float
    images: int
    measure: str = "classification"


@dataclass(frozen=True)
class SparsityReport:
    """Zeros among the prunable weights of the published model, and among those that get any gradient ("live")."""

    requested: float
    achieved: float
    prunable_weights: int
    live: float
    live_fraction: float
    layers: dict[str, dict[str, int]]
    """"weights" and "zeros" of every prunable parameter, by name."""


@dataclass(frozen=True)
class ScratchConvergence:
    """Mean accuracy of the scratch arm at the largest size, and after training three times as long."""

    sample_size: int
    steps: int
    accuracy: float
    accuracy_3x: float


@dataclass(frozen=True)
class Measurement:
    """Everything that a report states about one protected model."""

    accuracy: SourceAccuracy
    sparsity: SparsityReport
    curves: LearningCurves
    convergence: ScratchConvergence
    protocol: FineTuneProtocol
    utility: SourceUtility | None = None
    """Probes on the features of a model without a head."""
    weights: Mapping[str, str] | None = None
    """Digest of every weight file of the protected model, where that is known."""
    images: Mapping[str, frozenset[Content]] = field(default_factory=dict)
    """What was measured with, where that is known: "source", and "attacker", "validation" and "test" of the target."""


@dataclass(frozen=True)
class Transfer:
    """What a checkpoint and the one it was made from are worth to an attacker on one domain."""

    curves: LearningCurves
    convergence: ScratchConvergence
    protocol: FineTuneProtocol


def measure_transfer(
    unprotected: str | Path,
    protected: str | Path,
    target: AttackData,
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
) -> Transfer:
    """Learning curves of the standard arms on one domain; arguments as in :func:`measure_protection`."""
    protocol = protocol or FineTuneProtocol()
    check_sample_sizes(sample_sizes)
    check_same_architecture({"unprotected": str(unprotected), "protected": str(protected)})
    shared: dict[str, Any] = {"data": target, "seeds": seeds, "cache_dir": cache_dir, "jobs": jobs}
    arms = standard_arms(str(unprotected), str(protected))
    curves = sample_wise_learning_curves(arms, sample_sizes=sample_sizes, protocol=protocol, **shared)
    if curves.diverged:
        raise FloatingPointError(
            f"fits of {', '.join(curves.diverged)} diverged at every rate of {list(protocol.learning_rates)} at "
            "some size and seed; needed: an attacker who learns, or the model would look protected. Lower the "
            "learning rates."
        )
    return Transfer(curves, scratch_convergence(arms[0], curves, protocol, shared), protocol)


def measure_protection(
    unprotected: str | Path,
    protected: str | Path,
    source_test: PixelDataset,
    target: AttackData,
    sample_sizes: Sequence[int],
    seeds: Sequence[int] = (0, 1, 2),
    protocol: FineTuneProtocol | None = None,
    requested_sparsity: float | None = None,
    cache_dir: str | Path | None = None,
    jobs: int | None = None,
    source_train: PixelDataset | None = None,
) -> Measurement:
    """Measure a protected model against the one it was made from.

    Args:
        unprotected: Folder or Hub id of the model before protection.
        protected: Folder of the protected model.
        source_test: Authorized test split.
        target: Unauthorized data that the protection has not seen.
        sample_sizes: Sizes of the learning curves.
        seeds: Attack seeds.
        protocol: How every arm is fitted.
        requested_sparsity: What the owner asked for; default what ``config.ntp`` says.
        cache_dir: Where finished fits are kept.
        jobs: Processes.
        source_train: Labelled authorized images, for probes on a model without a head for them; others do not need
            any.

    Raises:
        FloatingPointError: If fits diverge at every learning rate of the protocol.
        TypeError: If a model is given instead of a folder.
        ValueError: If the model has no head for the authorized classes and ``source_train`` is not given, or images
            have no labels, or the two models are of different architectures.
    """
    for name, path in (("unprotected", unprotected), ("protected", protected)):
        if not isinstance(path, (str, Path)):
            raise TypeError(f"{name} is {type(path).__name__}; needed: a folder or Hub id. Save the model first.")
    check_sample_sizes(sample_sizes)
    accuracy, utility = measure_source(unprotected, protected, source_test, source_train)
    sparsity = measure_sparsity(to_accelerator(load_model(str(protected))), source_test, requested_sparsity)
    transfer = measure_transfer(unprotected, protected, target, sample_sizes, seeds, protocol, cache_dir, jobs)
    return Measurement(
        accuracy,
        sparsity,
        transfer.curves,
        transfer.convergence,
        transfer.protocol,
        utility,
        weight_digests(protected),
        {
            "source": source_test.contents,
            "attacker": target.train.contents,
            "validation": target.validation.contents,
            "test": target.test.contents,
        },
    )


def measure_source(
    unprotected: str | Path, protected: str | Path, test: PixelDataset, train: PixelDataset | None = None
) -> tuple[SourceAccuracy, SourceUtility | None]:
    """Accuracy on an authorized domain before and after, and probes on the features of a model without a head for it.

    A head is taken for one of the domain's classes if it has as many outputs as there are, under the same names where
    both have names.

    Args:
        unprotected: Folder of the model before protection.
        protected: Folder of the protected model.
        test: Authorized test split.
        train: Labelled authorized images, for those probes.

    Raises:
        TypeError: If the images are no `PixelDataset`.
        ValueError: If the model has no such head and ``train`` is not given.
    """
    check_pixels(test, "the authorized test split")
    if not test.labelled:
        raise ValueError(
            "the images of the authorized test split have no labels; needed: labelled ones, or every accuracy would "
            "be 0. Protection itself needs none."
        )
    before, after = (to_accelerator(load_model(str(path))) for path in (unprotected, protected))
    if _knows_classes(before, test) and _knows_classes(after, test):
        first, last = (accuracy_of(predictor(model), test) for model in (before, after))
        return SourceAccuracy(first, last, len(test)), None
    if train is None:
        raise ValueError(
            f"the model has no classification head for the {test.num_classes} classes of the authorized images, and "
            "source_train is None; needed: labelled authorized images, to which a linear probe and nearest neighbours "
            "are fitted. Pass source_train; or, if only the spelling of the names differs, set the model's id2label, "
            "and if their order does, use align_labels_with_mapping on the images."
        )
    found = SourceUtility(*(source_utility(model, train, test) for model in (before, after)))
    return SourceAccuracy(found.before.linear_probe, found.after.linear_probe, len(test), "linear_probe"), found


def _knows_classes(model: PreTrainedModel, data: PixelDataset) -> bool:
    """Whether the outputs of a model are the classes of the data, as far as numbers and names tell."""
    if not has_head(model):
        return False
    head, names, wanted = find_head(model)[1], class_names(model.config), data.class_names
    if not classifies(model, head) or (names and wanted and names != wanted):
        return False
    return head.out_features == data.num_classes if wanted else head.out_features >= data.num_classes


def measure_sparsity(
    model: PreTrainedModel, source: PixelDataset | Dataset, requested: float | None = None
) -> SparsityReport:
    """Count zeros over prunable and over live weights of a protected model."""
    notes = notes_of(model)
    weights = noted_prunable_weights(model)
    # Dataset has no __len__ for the type checker, but every map-style dataset has one.
    some: Dataset = Subset(source, range(min(len(source), _LIVE_IMAGES)))  # type: ignore[arg-type]
    batches: Iterable[dict[str, Any]] = DataLoader(some, 64, collate_fn=collate)
    inside = "" if has_head(model) else f"{model.base_model_prefix}."  # parameters are named as in the file of weights
    classes = 0 if inside else find_head(model)[1].out_features
    batches = (batch if _fit_head(batch, classes) else {"pixel_values": batch["pixel_values"]} for batch in batches)
    live: LiveWeights = live_weights(model, weights, batches)
    achieved = zero_fraction(list(weights.values()))
    return SparsityReport(
        requested=notes.get("requested_sparsity", achieved) if requested is None else requested,
        achieved=achieved,
        prunable_weights=sum(weight.numel() for weight in weights.values()),
        live=live.sparsity,
        live_fraction=live.fraction,
        layers={
            name.removeprefix(inside): {"weights": weight.numel(), "zeros": int((weight == 0).sum())}
            for name, weight in weights.items()
        },
    )


def _fit_head(batch: Mapping[str, Tensor], classes: int) -> bool:
    """Whether the labels of a batch can be those of a head."""
    labels = batch.get("labels")
    if labels is None or labels.is_floating_point() or labels.dim() != 1:
        return False
    return bool(labels.min() >= 0) and bool(labels.max() < classes)


def scratch_convergence(
    scratch: Arm, curves: LearningCurves, protocol: FineTuneProtocol, shared: dict[str, Any]
) -> ScratchConvergence:
    """Train the scratch arm three times as long at the largest size, each seed at the rate that it chose there.

    An under-trained baseline would flatter every model.

    Args:
        scratch: The arm with ``random_init``.
        curves: The curves to check.
        protocol: How they were fitted.
        shared: Other arguments of :func:`sample_wise_learning_curves`.
    """
    size = curves.sample_sizes[-1]
    chosen = [row[-1] for row in curves.learning_rates["scratch"]]
    found = []
    for rate in sorted(set(chosen)):
        longer = replace(protocol, steps=3 * protocol.steps, learning_rates=(rate,))
        seeds = [seed for seed, own in zip(curves.seeds, chosen, strict=True) if own == rate]
        again = sample_wise_learning_curves(
            [scratch], sample_sizes=[size], protocol=longer, **{**shared, "seeds": seeds}
        )
        found += again.accuracies["scratch"]
    return ScratchConvergence(
        sample_size=size,
        steps=protocol.steps,
        accuracy=float(np.mean([row[-1] for row in curves.accuracies["scratch"]])),
        accuracy_3x=float(np.mean(found)),
    )
