"""Rows of any map-style dataset, many at a time where it can."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset

from .columns import Content, column_values, short_digest
from .images import NO_LABEL


class PixelValues(Dataset):
    """Rows "pixel_values" and, where there are some, "labels" of a `datasets.Dataset`, as tensors.

    Args:
        data: Dataset with these columns, or "label" for the second.
    """

    def __init__(self, data: datasets.Dataset) -> None:
        if "labels" not in data.features and "label" in data.features:
            data = data.rename_column("label", "labels")
        self._rows = data.select_columns([name for name in ("pixel_values", "labels") if name in data.features])
        self._rows.set_format("torch")
        self.class_names: list[str] | None = None
        if "labels" in data.features:
            self.labels = column_values(data, "labels")
            self.class_names = getattr(data.features["labels"], "names", None)

    @property
    def labelled(self) -> bool:
        """Whether every row has a label."""
        return hasattr(self, "labels") and not {None, NO_LABEL}.intersection(self.labels)

    @cached_property
    def contents(self) -> frozenset[Content]:
        """What images and labels are; reads all of them, so not before somebody asks."""
        images, each = hashlib.sha256(f"{len(self)}\n".encode()), bytearray()
        for batch in self._rows.select_columns("pixel_values").with_format("numpy").iter(batch_size=100):
            for image in batch["pixel_values"]:  # one by one: they may be of different sizes, which others refuse
                pixels = np.ascontiguousarray(image).data
                images.update(pixels)
                each += short_digest(pixels)
        labels = repr(self.labels).encode() if hasattr(self, "labels") else b""
        labelled = hashlib.sha256(images.digest() + labels).hexdigest()
        return frozenset({Content(labelled, images.hexdigest(), bytes(each))})

    @property
    def fingerprint(self) -> str:
        """Identity of images and labels."""
        (content,) = self.contents
        return content.labelled

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return several rows at once."""
        return self._rows.__getitems__(indices)


def fetch_rows(dataset: Dataset, indices: Sequence[int]) -> list[dict[str, Any]]:
    """Return the rows of ``indices``, through ``__getitems__`` where the dataset has it, as data loaders do."""
    together = getattr(dataset, "__getitems__", None)
    return together(indices) if together else [dataset[index] for index in indices]


def contents_of(dataset: Any) -> frozenset[Content]:
    """What the images of a dataset are, and of all that it joins or relabels, where that is known."""
    return getattr(dataset, "contents", frozenset())


def fingerprint_of(dataset: Dataset) -> Any:
    """What tells a dataset from others: its ``fingerprint`` where it has one, else its number of rows."""
    rows: Any = dataset
    return getattr(dataset, "fingerprint", f"{len(rows)} rows")
