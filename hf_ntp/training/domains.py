"""The domains of a run as the trainer takes them: authorized ones joined, unauthorized ones with classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence, Sized
from typing import Any

import datasets
import numpy as np
from torch import nn
from torch.utils.data import Dataset
from transformers import BaseImageProcessor, PreTrainedModel

from ..data import (
    Content,
    Neighbourhood,
    PixelDataset,
    PixelValues,
    check_labels,
    contents_of,
    fetch_rows,
    fingerprint_of,
)
from .paired_data import ImageData, as_pixels, check_images, labels_of, length_of

logger = logging.getLogger(__name__)

NEIGHBOURHOOD = "neighbourhood"
SOURCE = "train_dataset"
_OTHER_TASKS = ("regression", "multi_label_classification")


class Joined(Dataset):
    """Several datasets one after another, as one.

    Args:
        parts: Datasets by name.
        labels: Labels of each; if None, those that rows of some have are left out.
    """

    def __init__(self, parts: Mapping[str, Dataset], labels: Sequence[np.ndarray] | None) -> None:
        self.parts = dict(parts)
        self.fingerprint = [[name, fingerprint_of(part)] for name, part in parts.items()]  # rows go by their order
        self.contents = frozenset[Content]().union(*map(contents_of, parts.values()))
        self.class_names = next(iter(_names(parts).values()), None)
        if labels is not None:
            self.labels = np.concatenate(labels)
        self._keys = ("pixel_values",) if labels is None else ("pixel_values", "labels")
        self._starts = np.cumsum([0, *(length_of(part) for part in self.parts.values())])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once."""
        wanted = np.asarray(indices)
        rows: list[dict[str, Any]] = [{}] * len(wanted)
        for start, stop, part in zip(self._starts, self._starts[1:], self.parts.values(), strict=False):
            places = np.flatnonzero((start <= wanted) & (wanted < stop))
            for place, row in zip(places, fetch_rows(part, (wanted[places] - start).tolist()), strict=True):
                rows[place] = {key: row[key] for key in self._keys}
        return rows


def check_domain_names(source: Any, target: Any) -> None:
    """Raise ``ValueError`` unless domains that come by name have names of their own, which are text."""
    sides = [
        side for side in (source, target) if isinstance(side, Mapping) and not isinstance(side, datasets.DatasetDict)
    ]
    names = [name for side in sides for name in side]
    if odd := [name for name in names if not isinstance(name, str) or not name]:
        raise ValueError(f"domains are called {odd}; needed: text that is not empty, such as 'photos'.")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"{', '.join(map(repr, twice))} is the name of an authorized and of an unauthorized domain; needed: a "
            "name of its own for every domain."
        )


def source_domain(
    data: ImageData | Mapping[str, ImageData],
    image_processor: BaseImageProcessor | None,
    num_classes: int | None,
    class_names: Sequence[str] | None = None,
) -> Dataset:
    """Authorized images as one dataset.

    Args:
        data: What the user passed as ``train_dataset``.
        image_processor: Image processor (PIL backend), for datasets of images.
        num_classes: Classes of the head that all domains share; None where labels are not looked at.
        class_names: Their names, where the model has some.

    Raises:
        ValueError: For images or labels that cannot be used, and for domains of other classes than one another's or
            the model's.
    """
    if not isinstance(data, Mapping):
        images, labels = _checked(data, SOURCE, image_processor, num_classes)
        if labels is not None:
            check_same_classes({SOURCE: images}, class_names)
        return images
    _check_one_split(data, SOURCE)
    if not data:
        raise ValueError(f"{SOURCE} is an empty mapping; needed: at least one authorized domain by name.")
    checked = {name: _checked(part, f"{SOURCE} {name!r}", image_processor, num_classes) for name, part in data.items()}
    parts = {name: part for name, (part, _) in checked.items()}
    found = [part_labels for _, part_labels in checked.values() if part_labels is not None]
    if found:
        check_same_classes(parts, class_names)
    return Joined(parts, found or None)


def held_out(
    data: Any, names: Sequence[str], num_classes: int, class_names: Sequence[str] | None = None
) -> Dataset | None:
    """Authorized images that are not trained on, of what Trainer has as ``eval_dataset``; with a warning, None.

    Args:
        data: One dataset, or several by name: then the authorized ones alone.
        names: Names of the authorized domains, where they have some.
        num_classes: Classes of the head.
        class_names: Their names, where they are known.

    Raises:
        ValueError: For images or labels that cannot be used.
    """
    several = data if isinstance(data, Mapping) else {}
    parts = {name: part for name, part in several.items() if name in names} if several else {"eval_dataset": data}
    parts = {name: part for name, part in parts.items() if isinstance(part, Sized)}
    if parts and several and (missing := [name for name in names if name not in parts]):
        logger.warning(
            "source_tolerance is judged on %s alone: eval_dataset has nothing of %s, whose accuracy nobody watches. "
            "Better: other authorized images of every domain.",
            ", ".join(map(repr, parts)),
            ", ".join(map(repr, missing)),
        )
    if not parts:
        by_name = " by the name of their domain"
        if not names:
            by_name += f", and train_dataset as a dict with that name, such as {{{next(iter(several), '')!r}: ...}}"
        logger.warning(
            "source_tolerance is judged on training images, which the model may know by heart: eval_dataset is %s. "
            "Better: other authorized images, as a map-style dataset%s.",
            f"one of {', '.join(map(repr, several))}" if several else type(data).__name__,
            by_name if several else "",
        )
    labels = {name: labels_of(part, name) for name, part in parts.items()}
    for name, found in labels.items():
        check_labels(found, num_classes, name)
    check_same_classes(parts, class_names)
    return Joined(parts, list(labels.values())) if parts else None


def _checked(
    data: ImageData, name: str, image_processor: BaseImageProcessor | None, num_classes: int | None
) -> tuple[Dataset, np.ndarray | None]:
    """Images, and their labels where they are looked at; reading these may decode every image."""
    pixels = as_pixels(data, image_processor, name, labelled=num_classes is not None)
    if num_classes is None:
        check_images(pixels, name)
        return pixels, None
    labels = labels_of(pixels, name)
    check_labels(labels, num_classes, name)
    return pixels, labels


def _check_one_split(data: Any, name: str) -> None:
    if isinstance(data, datasets.DatasetDict):
        raise ValueError(
            f"{name} is a DatasetDict with the splits {', '.join(map(repr, data))}; needed: one split, such as "
            f"{name}=data[{'train' if 'train' in data else next(iter(data), '')!r}], and of several domains a plain "
            "dict by name. The splits of one dataset are not domains, and its test images must not be trained on."
        )


def _names(parts: Mapping[str, Dataset]) -> dict[str, Sequence[str]]:
    return {name: classes for name, part in parts.items() if (classes := getattr(part, "class_names", None))}


def check_same_classes(parts: Mapping[str, Dataset], class_names: Sequence[str] | None = None) -> None:
    """Check that domains which share a head mean the same by a label, where names of their classes tell.

    Args:
        parts: Authorized images by name of the domain.
        class_names: What the head's outputs are called, where that is known.

    Raises:
        ValueError: If they do not.
    """
    names = _names(parts) | ({} if class_names is None else {"the head": class_names})
    if len({tuple(classes) for classes in names.values()}) > 1:
        found = "; ".join(f"{name}: {', '.join(classes[:6])} ({len(classes)})" for name, classes in names.items())
        raise ValueError(
            f"the head and the authorized domains have different classes ({found}); needed: the same ones in the same "
            "order. If only the order differs, data.align_labels_with_mapping(model.config.label2id, 'label') brings "
            "labels into the model's; if only the spelling does, set model.config.id2label. For other classes put a "
            "new head on the model and train it first (recipes/ntp_vit.py does), or pass source_loss='features', "
            "which keeps the encoder's features on each domain and looks at no labels."
        )


def check_evaluated(data: Any, name: str, num_classes: int, class_names: Sequence[str] | None) -> None:
    """Check that the labels of images can be compared with the answers of a head.

    Of labelled images that are prepared: other datasets would be read for it.

    Args:
        data: Images.
        name: What errors call them.
        num_classes: Classes of the head.
        class_names: Their names, where they are known.

    Raises:
        ValueError: If labels are none of the head's, or its classes come in another order.
    """
    if isinstance(data, Joined):
        for part in data.parts.values():
            check_evaluated(part, name, num_classes, class_names)
    if not isinstance(data, (PixelDataset, PixelValues)) or not data.labelled:
        return
    check_labels(data.labels, num_classes, name)
    found = data.class_names
    if class_names and found and list(found) != list(class_names) and sorted(found) == sorted(class_names):
        check_same_classes({name: data}, class_names)


def classifies(model: PreTrainedModel, head: nn.Linear) -> bool:
    """Whether the outputs of a head are classes, one per image."""
    return getattr(model.config, "problem_type", None) not in _OTHER_TASKS and head.out_features > 1


def check_task(model: PreTrainedModel, head: nn.Linear) -> None:
    """Refuse a head whose outputs are no classes, where its predictions would have to be kept.

    Raises:
        ValueError: For multi-label and regression heads.
    """
    if not classifies(model, head):
        task = getattr(model.config, "problem_type", None)
        raise ValueError(
            f"the head has {head.out_features} output(s) and config.problem_type is {task!r}; needed: a head of two "
            "or more classes, one per image, to keep its predictions. For multi-label and regression models pass "
            "source_loss='features': it keeps what enters the head, and the head itself, and looks at no labels."
        )


def target_domains(
    data: ImageData | Mapping[str, ImageData] | None,
    source: Dataset,
    access: str,
    as_labelled: Callable[[Dataset], Dataset],
    image_processor: BaseImageProcessor | None,
    source_classes: bool,
    seed: int,
) -> dict[str, Dataset]:
    """Labelled images by name of the unauthorized domain.

    Args:
        data: What the user passed as ``target_dataset``.
        source: Authorized images.
        access: ``target_access``.
        as_labelled: Gives images pseudo-classes, see :func:`~hf_ntp.training.pseudo_labels.with_clusters`.
        image_processor: Image processor (PIL backend), for datasets of images.
        source_classes: Whether the authorized images have classes, which their neighbourhood then has, too.
        seed: Seed of the run.

    Raises:
        ValueError: If there are data with "none", or none otherwise.
    """
    if (data is None) != (access == "none"):
        found = "None" if data is None else type(data).__name__
        raise ValueError(
            f"target_dataset is {found} and target_access is {access!r}; needed: unauthorized images with 'labelled' "
            "or 'unlabelled', and None with 'none'. A public stand-in set counts as images: pass it with either."
        )
    if data is None:
        base = source if source_classes else as_labelled(source)
        return {NEIGHBOURHOOD: Neighbourhood(base, seed)}
    _check_one_split(data, "target_dataset")
    domains = data if isinstance(data, Mapping) else {"target": data}
    if not domains:
        raise ValueError("target_dataset is an empty mapping; needed: at least one unauthorized domain by name.")
    if access == "labelled":
        return {name: as_pixels(part, image_processor, f"target {name!r}") for name, part in domains.items()}
    images = {name: as_pixels(part, image_processor, f"target {name!r}", False) for name, part in domains.items()}
    for name, part in images.items():
        check_images(part, f"target {name!r}")
    return {name: as_labelled(part) for name, part in images.items()}


def shares_of(weights: Mapping[str, float] | str | None, names: Sequence[str], option: str) -> list[float] | None:
    """Shares that sum to 1, in the order of the domains; None where the user gave none.

    Args:
        weights: By name of the domain, in any unit.
        names: Names of all domains.
        option: What errors call it.

    Raises:
        ValueError: If names are missing or unknown.
    """
    if weights is None:
        return None
    assert not isinstance(weights, str)  # options read JSON when they are made
    if set(weights) != set(names):
        raise ValueError(
            f"{option} are for {', '.join(map(repr, weights))}; needed: one for each of the domains "
            f"{', '.join(map(repr, names))}, by these names."
        )
    total = sum(weights.values())
    return [weights[name] / total for name in names]
