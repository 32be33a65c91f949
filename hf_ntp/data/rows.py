"""Rows of any map-style dataset, many at a time where it can."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from .columns import Content


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
