"""Which columns hold the images and the labels, whether these can be used, and what identifies them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import datasets
import fsspec
import numpy as np

MOST_CLASSES = 1_000_000
"""Labels without names of classes are numbers below that; beyond, they identify something else."""
# Tried in this order where types alone do not decide (cifar100 has both fine_label and coarse_label).
USUAL_LABEL_NAMES = ("label", "labels", "fine_label", "class", "class_label", "target", "category", "digit")


def find_columns(
    dataset: datasets.Dataset, image_column: str | None = None, label_column: str | None = None
) -> tuple[str, str]:
    """Find the image column and the label column of a dataset.

    Args:
        dataset: Any dataset.
        image_column: Name of the image column; by default the only one of type ``datasets.Image``.
        label_column: Name of the label column; by default the first usual name (``label``, ``labels``,
            ``fine_label``, ``class``, ``target``, ...) of a ``ClassLabel``, or where there is no ``ClassLabel``, of an
            integer or string column; else the only ``ClassLabel``, unless a column of another type has a usual name.

    Returns:
        The names of the image column and of the label column.

    Raises:
        ValueError: If a column is missing, ambiguous or of an unusable type; the columns found are listed.
    """
    return find_image_column(dataset, image_column), _label_column(dataset, label_column)


def find_image_column(dataset: datasets.Dataset, wanted: str | None = None) -> str:
    """Find the image column of a dataset; see :func:`find_columns`."""
    images = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.Image)]
    if wanted is None and len(images) == 1:
        return images[0]
    if wanted in images:
        return str(wanted)
    needed = "one column of type Image" if wanted is None else f"{wanted!r} to be a column of type Image"
    fix = (
        f"Keep one of {images} (remove_columns); load_domain takes its name, image_column=."
        if images
        else "Convert it: cast_column(name, Image())."
    )
    raise ValueError(f"found {describe_columns(dataset)}; needed {needed}. {fix}")


def _label_column(dataset: datasets.Dataset, wanted: str | None) -> str:
    classes = [name for name, feature in dataset.features.items() if isinstance(feature, datasets.ClassLabel)]
    usable = [name for name, feature in dataset.features.items() if _can_be_label(feature)]
    usual = [name for name in USUAL_LABEL_NAMES if name in usable]
    if wanted is None:
        if not usual and len(classes) == 1:
            return classes[0]
        # Beside "label", a ClassLabel of another name may be anything: the quality of the image, or its true class.
        if usual and (not classes or set(usual) & set(classes)):
            return next((name for name in usual if name in classes), usual[0])
    if wanted in usable:
        return str(wanted)
    needed = "a label column" if wanted is None else f"{wanted!r} to be a label column"
    fix = (
        f"Call one of {usable} 'label' and keep no other (rename_column, remove_columns); load_domain takes its name, "
        "label_column=."
        if usable
        else "Add a column with the class of every image."
    )
    raise ValueError(
        f"found {describe_columns(dataset)}; needed {needed} of ClassLabel, integer or string type. {fix}"
    )


def has_labels(dataset: datasets.Dataset) -> bool:
    """Whether there is a label column with labels in it, not withheld (-1 or missing) as in many test splits."""
    try:
        column = find_columns(dataset)[1]
    except ValueError:
        return False
    return not set(column_values(dataset, column)) <= {-1, None}


def _can_be_label(feature: object) -> bool:
    if isinstance(feature, datasets.ClassLabel):
        return True
    dtype = feature.dtype if isinstance(feature, datasets.Value) else ""
    return dtype.startswith(("int", "uint")) or dtype in ("string", "large_string")


def describe_columns(dataset: datasets.Dataset) -> str:
    """Return the columns of a dataset with their types, for error messages."""
    kinds = {
        name: feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
        for name, feature in dataset.features.items()
    }
    return "columns " + ", ".join(f"{name} ({kind})" for name, kind in kinds.items())


def column_values(dataset: datasets.Dataset, column: str) -> list[Any]:
    """Return all values of one column as a list, without touching (decoding) the others."""
    return dataset.select_columns(column).with_format(None)[:][column]


def check_labels(labels: Iterable[Any], num_labels: int, dataset_name: str) -> None:
    """Check that labels are integers of ``num_labels`` classes.

    Args:
        labels: Labels of all rows: a list, an array or a tensor, ``[n]``.
        num_labels: Number of classes; labels must lie in ``[0, num_labels)``.
        dataset_name: How the dataset is called in the message.

    Raises:
        ValueError: If a label is not an integer (booleans and floats are not) or out of range; the first such
            row and its value are named.
    """
    array = np.asarray(labels if hasattr(labels, "__len__") else list(labels))
    if np.issubdtype(array.dtype, np.integer) and array.ndim == 1:
        outside = np.flatnonzero((array < 0) | (array >= num_labels))
        bad = int(outside[0]) if len(outside) else None
    else:
        bad = next((row for row, label in enumerate(array) if not _is_label(label, num_labels)), None)
    if bad is not None:
        found = array[bad].item() if isinstance(array[bad], np.generic) else array[bad]
        raise ValueError(
            f"{dataset_name}: row {bad} has label {found!r} ({type(found).__name__}); labels must be "
            f"integers from 0 to {num_labels - 1}. Drop unlabelled rows; number the classes from 0, all parts and "
            "splits alike, best as a ClassLabel with their names (Dataset.cast_column; class_encode_column numbers "
            "the classes that one dataset has)."
        )


def _is_label(value: object, num_labels: int) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        return False
    return 0 <= int(value) < num_labels


def check_target(labels: Iterable[Any], dataset_name: str = "the target") -> None:
    """Check that a domain can be classified at all.

    Args:
        labels: Labels of all rows: a list, an array or a tensor, ``[n]``.
        dataset_name: How the dataset is called in the message.

    Raises:
        ValueError: If there are no rows, or rows of fewer than two classes.
    """
    array = np.asarray(labels if hasattr(labels, "__len__") else list(labels))
    classes = np.unique(array)
    if len(classes) < 2:
        found = f"{len(array)} rows of class {classes[0]} only" if len(classes) else "no rows"
        raise ValueError(
            f"{dataset_name} has {found}; at least 2 classes are needed to measure anything on it. "
            "Choose another dataset, or check its split and label column."
        )


class Content(NamedTuple):
    """SHA-256 (hex) of the stored images of a dataset in their order, with their labels and without."""

    labelled: str
    images: str
    each: bytes
    """Eight bytes for every image by itself, see :func:`short_digest`."""


def short_digest(image: bytes | memoryview) -> bytes:
    """First eight bytes of the SHA-256 of an image: enough to find the same one in two datasets."""
    return hashlib.sha256(image).digest()[:8]


def shared_images(some: Iterable[Content], others: Iterable[Content]) -> int:
    """Number of different images that are on both sides, whatever their order and labels."""
    first, second = (np.frombuffer(b"".join(content.each for content in side), "<u8") for side in (some, others))
    return len(np.intersect1d(first, second))


def dataset_fingerprint(dataset: datasets.Dataset) -> str:
    """Hash the content of a labelled image dataset: stored image bytes, labels and their order.

    Unlike ``datasets``' own fingerprint it does not depend on paths, on the cache or on how the dataset was
    made, so it is equal between processes and machines. Column and class names do not take part.

    Args:
        dataset: Dataset with an image column and an integer label column.

    Returns:
        SHA-256, 64 hexadecimal digits.

    Raises:
        ValueError: If the image or label column cannot be found.
    """
    return dataset_content(dataset).labelled


def dataset_content(dataset: datasets.Dataset) -> Content:
    """Return :func:`dataset_fingerprint`, and the same without labels."""
    image_column, label_column = find_columns(dataset)
    digest, alone, each = hashlib.sha256(), hashlib.sha256(), bytearray()
    stored = dataset.select_columns([image_column, label_column]).with_format("arrow")
    for batch in stored.iter(batch_size=1000):
        images, labels = batch[image_column].to_pylist(), batch[label_column].to_pylist()
        for image, label in zip(images, labels, strict=True):
            content = _image_bytes(image)
            # Lengths first: without them, bytes could move from one field to the next unnoticed.
            digest.update(f"{len(content)} {label!r}\n".encode())
            digest.update(content)
            alone.update(f"{len(content)}\n".encode())
            alone.update(content)
            each += short_digest(content)
    return Content(digest.hexdigest(), alone.hexdigest(), bytes(each))


def _image_bytes(stored: dict[str, Any] | None) -> bytes:
    if stored is None:
        return b""
    if stored["bytes"] is not None:
        return bytes(stored["bytes"])
    with fsspec.open(stored["path"], "rb") as file:
        return bytes(file.read())
