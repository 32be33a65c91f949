"""Stratified splits and nested subsets, from labels alone.

Everything is read off one idea: put the rows in an order every prefix of which is stratified. A prefix is
then a subset, longer prefixes contain shorter ones, and consecutive pieces are disjoint splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import datasets
import numpy as np

from .columns import column_values, find_columns


def _order(labels: np.ndarray, seed: int, *, proportional: bool) -> np.ndarray:
    """Return a random row order, int64 ``[n]``, whose prefixes are balanced or proportional over the classes.

    Balanced: class by class in turn (until a class runs out). Proportional: by each row's quantile in its
    class.
    """
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    key = np.empty(len(labels))
    for label in np.unique(labels):
        members = np.flatnonzero(labels[shuffled] == label)
        rank = np.arange(len(members))
        key[members] = (rank + 0.5) / len(members) if proportional else rank
    return shuffled[np.lexsort((rng.random(len(labels)), key))]


def stratified_pieces(
    labels: Sequence[int] | np.ndarray,
    sizes: Sequence[int],
    seed: int = 0,
) -> list[np.ndarray]:
    """Cut the rows into disjoint random pieces, each with the class proportions of the whole.

    Args:
        labels: Class of every row, ``[n]``.
        sizes: Rows wanted in each piece; they sum to ``n`` at most, and left-over rows make one more piece.
        seed: Seed; equal seeds give equal pieces.

    Returns:
        One sorted int64 index array for each size, then one with the remaining rows.

    Raises:
        ValueError: If the sizes are negative or sum to more than ``n``.
    """
    if min(sizes, default=0) < 0 or sum(sizes) > len(labels):
        raise ValueError(
            f"sizes are {list(sizes)} for {len(labels)} rows; they must not be negative and must sum to "
            f"{len(labels)} at most. Ask for smaller pieces."
        )
    order = _order(np.asarray(labels), seed, proportional=True)
    return [np.sort(piece) for piece in np.split(order, np.cumsum(np.asarray(sizes, dtype=np.int64)))]


def split_owner_attacker(
    train: datasets.Dataset, owner_fraction: float = 0.75, seed: int = 0
) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split a target training set into the owner's part and the attacker's part, disjoint and stratified.

    Protection may see the owner's part only; learning curves are measured on the attacker's part only. With
    one shared part, protection would be measured on images it was fitted to.

    Args:
        train: Dataset with an image column and an integer label column.
        owner_fraction: Share of the rows that goes to the owner, strictly between 0 and 1.
        seed: Seed; equal seeds give equal parts.

    Returns:
        The owner's and the attacker's dataset.

    Raises:
        TypeError: If ``train`` is not one split.
        ValueError: If the fraction is not between 0 and 1, or a class would be missing from one of the parts.
    """
    if not isinstance(train, datasets.Dataset):
        raise TypeError(
            f"train is {type(train).__name__}; needed: a datasets.Dataset, one split, such as data['train']."
        )
    if not 0 < owner_fraction < 1:
        raise ValueError(f"owner_fraction is {owner_fraction}; it must lie between 0 and 1. Pass 0.75, say.")
    labels = np.asarray(column_values(train, find_columns(train)[1]))
    parts = stratified_pieces(labels, [round(owner_fraction * len(labels))], seed)
    for name, part in zip(("owner", "attacker"), parts, strict=True):
        if missing := sorted(set(labels.tolist()) - set(labels[part].tolist())):
            count = int((labels == missing[0]).sum())
            raise ValueError(
                f"class {missing[0]} has {count} row(s) and is missing from the {name}'s part "
                f"(owner_fraction {owner_fraction}); both parts need every class. Give more rows of it, "
                "drop it, or choose a fraction nearer 0.5."
            )
    return train.select(parts[0]), train.select(parts[1])


def nested_subsets(
    labels: Sequence[int] | np.ndarray, sample_sizes: Sequence[int], seed: int
) -> dict[int, np.ndarray]:
    """Draw a random subset for each sample size, containing the smaller ones, as balanced as possible.

    Class counts differ by at most 1 as long as no class runs out of rows, and every class is present as soon
    as the size reaches the number of classes.

    Args:
        labels: Class of every row, ``[n]``.
        sample_sizes: Strictly increasing positive integers, ``n`` at most.
        seed: Seed; equal seeds give equal subsets.

    Returns:
        For each size, its row indices, int64 ``[size]``: the first ``m`` of them are the subset of size
        ``m``.

    Raises:
        ValueError: If the sizes are empty, not integers, not positive, not strictly increasing or exceed
            ``n``.
    """
    sizes = _checked_sizes(sample_sizes, len(labels))
    order = _order(np.asarray(labels), seed, proportional=False)
    return {size: order[:size].copy() for size in sizes}


def _checked_sizes(sample_sizes: Sequence[int], available: int) -> list[int]:
    sizes = list(sample_sizes)
    integers = all(isinstance(size, (int, np.integer)) and not isinstance(size, bool) for size in sizes)
    if not sizes or not integers or sizes[0] < 1 or any(a >= b for a, b in pairwise(sizes)):
        raise ValueError(
            f"sample_sizes are {sizes}; they must be strictly increasing positive integers. "
            "Sort them and remove repeats, for example [10, 20, 50, 100]."
        )
    if sizes[-1] > available:
        raise ValueError(
            f"sample_sizes go up to {sizes[-1]}, but only {available} labelled rows are available. "
            f"Use sizes of {available} at most, or more data; where the owner trains on a target, the attacker "
            "has what owner_fraction leaves."
        )
    return [int(size) for size in sizes]
