"""Batches that hold authorized and unauthorized images side by side, in an order that can be resumed exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from typing import Any, TypeAlias

import datasets
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from transformers import BaseImageProcessor, default_data_collator

from ..data import MOST_CLASSES, PixelDataset, PixelValues, check_labels, check_target, fetch_rows

ImageData: TypeAlias = datasets.Dataset | Dataset
Index = tuple[int, int, tuple[tuple[int, ...], ...]]
Transform = Callable[[Tensor, np.random.Generator], Tensor]


class PairedDataset(Dataset):
    """Map-style dataset whose index names the epoch, one source row and some rows of every target.

    One dataset with explicit indices is what makes an interrupted run resume bit for bit: two data loaders, or a
    dataset with an epoch of its own, do not survive a restart.

    Args:
        source: Authorized data; items are dicts with "pixel_values" and, where they are needed, "labels".
        targets: Unauthorized data by domain name; items are dicts with both.
        source_transform: Augmentation of source batches; its randomness is seeded by epoch and row, not by history.
        seed: Seed of the run.
        compared: Whether a term looks at target images; if not, only those of the attackers are read.
    """

    def __init__(
        self,
        source: Dataset,
        targets: Mapping[str, Dataset],
        source_transform: Transform | None = None,
        seed: int = 0,
        compared: bool = True,
    ) -> None:
        self.source = source
        self.targets = dict(targets)
        self.source_transform = source_transform
        self.seed = seed
        self.compared = compared

    def __len__(self) -> int:
        return length_of(self.source)

    def __getitem__(self, index: Index) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: Sequence[Index]) -> dict[str, Any]:
        """Return a collated batch: "pixel_values", "labels", and both by domain under "targets" and "attacked"."""
        epoch, first, _ = indices[0]
        batch = _batch(self.source, [source for _, source, _ in indices])
        if self.source_transform is not None:
            rng = np.random.default_rng([self.seed, epoch, first])
            batch["pixel_values"] = self.source_transform(batch["pixel_values"], rng)
        batch["targets"], batch["attacked"] = {}, {}
        for i, (name, dataset) in enumerate(self.targets.items()):
            rows = [targets[i] for _, _, targets in indices]
            if self.compared:
                batch["targets"][name] = _batch(dataset, [first for first, *_ in rows])
            if spare := [row for _, *rest in rows for row in rest]:
                batch["attacked"][name] = _batch(dataset, spare)
        return batch


def collate(rows: Any) -> dict[str, Any]:
    """Pass a batch of :class:`PairedDataset` on; collate rows of an ordinary (evaluation) dataset."""
    if isinstance(rows, dict):
        return rows
    batch = default_data_collator(rows)
    if batch.get("pixel_values") is not None and batch["pixel_values"].dtype == torch.float64:
        batch["pixel_values"] = batch["pixel_values"].float()  # what numpy makes of image / 255
    labels = batch.get("labels")
    if labels is not None and labels.numel() == len(rows) and not labels.is_floating_point():
        batch["labels"] = labels.long().flatten()  # as losses take them, whatever kind of integers they were
    return batch


class PairedSampler(Sampler[Index]):
    """Order of an epoch: every source row once, beside rows of each target, all shuffled.

    The order depends on (seed, epoch) alone, so all ranks agree and a resumed epoch continues where it stopped.
    Targets smaller than the source are gone through several times, each time in a new order.

    Args:
        source_size: Rows of the source.
        target_sizes: Rows of every target.
        seed: Seed of the run.
        draws: Rows of every target beside one source row: the first for the objective, the rest for the attackers.
        source_parts: Sizes of the domains that the source is joined of, and the share of an epoch that each has: then
            rows of some come several times and not all of others.
    """

    def __init__(
        self,
        source_size: int,
        target_sizes: Sequence[int],
        seed: int,
        draws: int = 1,
        source_parts: Sequence[tuple[int, float]] = (),
    ) -> None:
        self.source_size = source_size
        self.source_parts = list(source_parts)
        self.target_sizes = list(target_sizes)
        self.draws = draws
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration gives."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.source_size

    def __iter__(self) -> Iterator[Index]:
        sources = self._sources(np.random.default_rng([self.seed, self.epoch, 0])).tolist()
        targets = (
            _shuffled(size, self.draws * self.source_size, np.random.default_rng([self.seed, self.epoch, stream]))
            .reshape(self.draws, self.source_size)
            .T.tolist()
            for stream, size in enumerate(self.target_sizes, start=1)
        )
        for source, *rows in zip(sources, *targets, strict=True):
            yield self.epoch, source, tuple(tuple(drawn) for drawn in rows)

    def _sources(self, rng: np.random.Generator) -> np.ndarray:
        if not self.source_parts:
            return rng.permutation(self.source_size)
        sizes, shares = zip(*self.source_parts, strict=True)
        counts = np.diff(np.rint(self.source_size * np.cumsum([0.0, *shares])).astype(int))
        starts = np.cumsum([0, *sizes])
        rows = [s + _shuffled(n, count, rng) for s, n, count in zip(starts, sizes, counts, strict=False) if count]
        return rng.permutation(np.concatenate(rows))


def _shuffled(size: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Return ``length`` indices below ``size``: whole permutations one after another, the last one cut."""
    rounds = -(-length // size)
    return np.concatenate([rng.permutation(size) for _ in range(rounds)])[:length]


def _batch(dataset: Dataset, indices: list[int]) -> dict[str, Any]:
    """Collate the rows of ``indices``; pixels that are not finite are an error (stored uint8 pixels always are)."""
    batch = collate(fetch_rows(dataset, indices))
    pixels = batch["pixel_values"]
    # A sum takes a fraction of the time of looking at every pixel, and is not finite where one of them is not.
    if not isinstance(dataset, PixelDataset) and not bool(pixels.sum().isfinite()):
        broken = (~pixels.isfinite()).flatten(1).any(1).nonzero().flatten().tolist()
        if broken:  # and not just a sum that is too large
            raise ValueError(
                f"row {indices[broken[0]]} of a {type(dataset).__name__} has NaN or infinite pixel_values; needed: "
                "finite numbers. Repair or remove the image."
            )
    return batch


def length_of(dataset: Dataset) -> int:
    """Number of rows of a map-style dataset."""
    if not isinstance(dataset, Sized):
        raise TypeError(
            f"{type(dataset).__name__} has no length; needed: a map-style dataset. Streams cannot be resumed exactly: "
            "download the split, or take a part of it with IterableDataset.take and Dataset.from_list."
        )
    return len(dataset)


def labels_of(dataset: Dataset, name: str) -> np.ndarray:
    """All labels of a dataset, [N] int64: its ``labels`` attribute where that has one per row, else read row by row.

    Args:
        dataset: Map-style dataset.
        name: What errors call it.

    Raises:
        ValueError: If rows have no "pixel_values" or "labels", or a label is not a class number.
    """
    size = length_of(dataset)
    first = dataset[0] if size else {}
    if size and not (isinstance(first, Mapping) and {"pixel_values", "labels"} <= set(first)):
        raise ValueError(
            f"{name}: rows {_keys_of(first)}; needed: 'pixel_values' and 'labels'. Pass a datasets.Dataset with an "
            "image and a label column, or dicts with these keys."
        )
    if size:
        _batch(dataset, [0])
    labels: Any = getattr(dataset, "labels", None)
    # Others may be names of classes, or labels of a larger dataset.
    if not isinstance(labels, Sized) or len(labels) != size or not _equal(labels, first):
        labels = [dataset[i]["labels"] for i in range(size)]
    values = np.asarray([label.item() if isinstance(label, Tensor) else label for label in labels])
    check_target(values, name)
    check_labels(values, MOST_CLASSES, name)
    return values.astype(np.int64)


def count_classes(dataset: Dataset, labels: np.ndarray) -> int:
    """Classes of a dataset: as many as have names, also where some have no image, or else up to the largest label."""
    return max(len(getattr(dataset, "class_names", None) or ()), int(labels.max()) + 1)


def _equal(labels: Any, first: Mapping[str, Any]) -> bool:
    """Whether labels, which may be anything, begin with that of the first row."""
    try:
        return not first or bool(np.asarray(labels[0]).item() == np.asarray(first["labels"]).item())
    except (KeyError, TypeError, ValueError):
        return False


def _keys_of(row: Any) -> str:
    return f"have the keys {sorted(row)}" if isinstance(row, Mapping) else f"are of type {type(row).__name__}"


def check_images(dataset: Dataset, name: str) -> None:
    """Raise ``ValueError`` where a dataset without labels cannot be used: no rows, or rows without "pixel_values"."""
    first = dataset[0] if length_of(dataset) else None
    if not isinstance(first, Mapping) or "pixel_values" not in first:
        found = "there are no rows" if first is None else f"rows {_keys_of(first)}"
        raise ValueError(
            f"{name}: {found}; needed: rows with 'pixel_values'. Pass a datasets.Dataset with an image column, or "
            "rename the keys."
        )
    _batch(dataset, [0])


def as_pixels(
    data: ImageData, image_processor: BaseImageProcessor | None, name: str, labelled: bool = True
) -> Dataset:
    """Return a dataset of "pixel_values" and "labels": images are pre-processed once, other datasets kept.

    Args:
        data: Images, or a dataset that is kept (one of pixel values gives its rows as tensors).
        image_processor: Image processor (PIL backend).
        name: What errors call the dataset.
        labelled: Whether labels are needed; if not, a column of labels need not be there, and is not looked at.

    Raises:
        ValueError: If images come without a processor.
    """
    if isinstance(data, datasets.IterableDataset) and _has_images(data):
        raise ValueError(
            f"{name} is a stream of images; needed: a datasets.Dataset, whose images are resized once, or rows with "
            "'pixel_values'. Load it without streaming=True, or add them with map()."
        )
    if not isinstance(data, datasets.Dataset):
        return data
    if "pixel_values" in data.features and not _has_images(data):
        return PixelValues(data)
    if image_processor is None:
        raise ValueError(
            f"{name} holds images but processing_class is None; needed: the model's image processor. Pass "
            "processing_class=AutoImageProcessor.from_pretrained(..., backend='pil')."
        )
    return PixelDataset.from_dataset(data, image_processor, labelled=labelled)


def _has_images(data: datasets.Dataset | datasets.IterableDataset) -> bool:
    return any(isinstance(feature, datasets.Image) for feature in (data.features or {}).values())


def evaluation_data(data: Any, image_processor: BaseImageProcessor | None, labelled: bool = True) -> Any:
    """Return what Trainer takes as ``eval_dataset``: one dataset or several by name, images pre-processed."""
    if isinstance(data, dict):
        return {name: as_pixels(part, image_processor, f"eval {name!r}", labelled) for name, part in data.items()}
    return None if data is None else as_pixels(data, image_processor, "eval_dataset", labelled)
