"""Loading a domain by name: one of the embedded ones, a local folder or file, or a dataset on the Hub."""

from __future__ import annotations

import glob
import io
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict
from PIL import Image

from .columns import check_labels, column_values, find_columns
from .digits import IMAGES_LABELS, mnist, optdigits
from .folders import split_patterns
from .splits import stratified_pieces
from .synthetic import mnistm, syn

logger = logging.getLogger(__name__)

EMBEDDED_DOMAINS: dict[str, Callable[[], IMAGES_LABELS]] = {
    "mnist": mnist,
    "mnistm": mnistm,
    "optdigits": optdigits,
    "syn": syn,
}
SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {"valid": "validation", "val": "validation", "dev": "validation"}


def load_domain(
    name_or_path: str,
    *,
    config: str | None = None,
    split: str | None = None,
    revision: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    validation_fraction: float = 0.15,
    test_fraction: float = 0.25,
    seed: int = 0,
    max_samples: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> DatasetDict:
    """Load a labelled image domain as train, validation and test sets with columns ``image`` and ``label``.

    Splits that exist are used (``valid``, ``val`` and ``dev`` mean validation; other splits are left out, and
    so are unlabelled ones); missing ones are carved out of train, stratified by class. Labels become one
    ``ClassLabel`` for all splits, with the class names kept.

    Args:
        name_or_path: A key of ``EMBEDDED_DOMAINS``; else the path of a folder written by ``save_to_disk``, of
            a folder of images in class subdirectories, or of Parquet files; else a dataset id on the Hub.
        config: Configuration of a dataset with several.
        split: Take only this, for example ``"train[:5000]"``, and carve all three splits out of it.
        revision: Branch, tag or commit of a Hub dataset; a commit makes a run reproducible.
        image_column: Image column, where it cannot be told from the types.
        label_column: Label column, where it cannot be told from the types and names.
        validation_fraction: Share of train that a missing validation split takes.
        test_fraction: Share of train that a missing test split takes.
        seed: Seed of the carving and of ``max_samples``.
        max_samples: Keep at most this many rows of each split that exists, before others are carved.
        cache_dir: Where ``datasets`` keeps what it downloads or prepares; its usual place by default.

    Returns:
        The splits ``train``, ``validation`` and ``test``.

    Raises:
        FileNotFoundError: If there is no such path, and no such dataset on the Hub (or no access to it).
        ConnectionError: If the Hub cannot be reached and the dataset is not in the cache.
        ValueError: If splits, columns or labels cannot be used, or an argument does not apply.
    """
    splits = _load_splits(str(name_or_path), config, revision, cache_dir)
    splits = _named_splits(splits, split, name_or_path)
    for key, part in splits.items():
        splits[key] = _standard_columns(part, image_column, label_column)
    splits = encode_labels(_labelled_splits(splits, name_or_path))
    for key, part in splits.items():
        num_labels = part.features["label"].num_classes
        check_labels(column_values(part, "label"), num_labels, f"{name_or_path}, split {key}")
    if max_samples is not None:
        splits = _limited(splits, max_samples, seed)
    _warn_of_unknown_classes(splits, name_or_path)
    return _carved(splits, {"validation": validation_fraction, "test": test_fraction}, seed)


@cache  # encoding the images takes a second or more
def embedded_dataset(name: str) -> Dataset:
    """Build one of ``EMBEDDED_DOMAINS`` as a dataset in memory with the columns ``image`` and ``label``.

    Args:
        name: Key of ``EMBEDDED_DOMAINS``.

    Returns:
        The whole domain, unsplit.
    """
    images, labels = EMBEDDED_DOMAINS[name]()
    encoded = [{"bytes": _encode(image), "path": None} for image in images]
    names = [str(label) for label in range(int(labels.max()) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": encoded, "label": labels}, features=features)


def _encode(image: np.ndarray) -> bytes:
    # BMP, not PNG: without compression, bytes and fingerprints do not depend on the compression library.
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="BMP")
    return buffer.getvalue()


def _load_splits(
    name: str, config: str | None, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> DatasetDict:
    """Load all splits of an embedded domain, a path or a Hub dataset, as they are."""
    if name not in EMBEDDED_DOMAINS:
        if not os.path.exists(name):
            return _load_from_hub(name, config, revision, cache_dir)
        name = os.path.abspath(name)  # datasets calls what it makes of a folder by its name, and "." has none
    if revision is not None:
        raise ValueError(f"revision {revision!r} is given for {name!r}; only Hub datasets have any. Drop it.")
    saved = any(Path(name, file).is_file() for file in ("dataset_dict.json", "state.json"))
    if config is not None and (name in EMBEDDED_DOMAINS or saved or os.path.isfile(name)):
        raise ValueError(f"config={config!r} was given for {name!r}, which has no configurations. Remove it.")
    cache = str(cache_dir) if cache_dir is not None else None
    if name in EMBEDDED_DOMAINS:
        loaded: Any = embedded_dataset(name)
    elif saved:
        loaded = datasets.load_from_disk(name)
    elif os.path.isfile(name):
        loaded = datasets.load_dataset(_file_format(name), data_files=name, cache_dir=cache)
    else:
        if glob.has_magic(name):
            raise ValueError(
                f"the path {name!r} has one of * ? [, which datasets takes for a pattern; needed: a path without. "
                "Rename the folder, or link to it by another name."
            )
        patterns = None if config is not None else split_patterns(name)
        loaded = datasets.load_dataset(name, config, data_files=patterns, cache_dir=cache)
    return loaded if isinstance(loaded, DatasetDict) else DatasetDict({"train": loaded})


def _file_format(path: str) -> str:
    if not path.endswith(".parquet"):
        raise ValueError(
            f"found the file {path!r}; needed a .parquet file, or a folder of images or Parquet files. "
            "Convert it, or pass the folder that holds it."
        )
    return "parquet"


def _load_from_hub(
    name: str, config: str | None, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> DatasetDict:
    needed = f"needed one of {sorted(EMBEDDED_DOMAINS)}, an existing path, or a dataset id on the Hub"
    if not name or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"found no file or folder {name!r}; {needed}. Check the path.")
    try:
        return datasets.load_dataset(
            name, config, revision=revision, cache_dir=str(cache_dir) if cache_dir is not None else None
        )
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        if isinstance(error, ValueError) and "Couldn't find cache" not in str(error):
            raise
        raise FileNotFoundError(
            f"found no dataset {name!r} on the Hub ({error}); {needed}. "
            "Check the name and the revision; for a gated or private dataset, log in with `hf auth login`."
        ) from error
    except ConnectionError as error:
        raise ConnectionError(
            f"could not reach dataset {name!r} on the Hub, nor find it in the cache ({error}); {needed}. "
            "Check the network (and HF_HUB_OFFLINE), or use an embedded domain or a local copy."
        ) from error


def _named_splits(splits: DatasetDict, split: str | None, name: str) -> DatasetDict:
    """Keep train, validation and test under these names, or only ``split``, as train."""
    if split is not None:
        return DatasetDict({"train": _select(splits, split)})
    renamed = [SPLIT_ALIASES.get(key, key) for key in splits]
    if "train" not in renamed or len(set(renamed)) < len(renamed):
        raise ValueError(
            f"{name!r} has the splits {list(splits)}; needed train, and at most one validation and one test. "
            f"Choose one with split=, for example split={next(iter(splits), 'train')!r}."
        )
    if extra := [key for key in splits if SPLIT_ALIASES.get(key, key) not in SPLITS]:
        logger.info("%s: splits %s are not used.", name, extra)
    parts = zip(renamed, splits.values(), strict=True)
    return DatasetDict({key: part for key, part in parts if key in SPLITS})


def _select(splits: DatasetDict, split: str) -> Dataset:
    try:
        rows = datasets.ReadInstruction.from_spec(split).to_absolute({k: len(v) for k, v in splits.items()})
    except (ValueError, AssertionError) as error:
        raise ValueError(
            f"split is {split!r}, the splits are {list(splits)} ({error}); needed one of them or a slice. "
            f"Pass, for example, split='{next(iter(splits))}[:1000]'."
        ) from error
    parts = [splits[part.splitname].select(range(part.from_ or 0, part.to)) for part in rows]
    return parts[0] if len(parts) == 1 else datasets.concatenate_datasets(parts)


def _standard_columns(dataset: Dataset, image_column: str | None, label_column: str | None) -> Dataset:
    """Keep the image and the label column only, under the names ``image`` and ``label``."""
    for column, feature in dataset.features.items():
        # Parquet written by other tools holds images as {"bytes", "path"} without the type Image.
        if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
            dataset = dataset.cast_column(column, datasets.Image())
    found_image, found_label = find_columns(dataset, image_column, label_column)
    dataset = dataset.select_columns([found_image, found_label])
    names = {found_image: "image", found_label: "label"}
    return dataset.rename_columns({old: new for old, new in names.items() if old != new})


def _labelled_splits(splits: DatasetDict, name: str) -> DatasetDict:
    """Leave out splits whose labels are withheld (all -1 or missing), as many benchmarks' test splits are."""
    labelled = DatasetDict()
    for key, part in splits.items():
        if set(column_values(part, "label")) <= {-1, None}:
            logger.warning("%s: split %s is empty or unlabelled and is not used.", name, key)
        else:
            labelled[key] = part
    if "train" not in labelled:
        raise ValueError(f"{name!r} has no labelled train split; one is needed. Choose another with split=.")
    return labelled


def encode_labels(splits: DatasetDict) -> DatasetDict:
    """Give the ``label`` columns of all splits one common ``ClassLabel``.

    Equal ``ClassLabel`` features stay as they are. Others are merged by class name; strings are numbered
    alphabetically and integers in increasing order.

    Args:
        splits: Splits with a ``label`` column of ``ClassLabel``, integer or string type.

    Returns:
        The splits with encoded labels.

    Raises:
        ValueError: If labels are missing, or strings in one split and integers in another.
    """
    features = [part.features["label"] for part in splits.values()]
    if all(isinstance(feature, ClassLabel) and feature == features[0] for feature in features):
        return splits
    values = {key: _class_values(part, key) for key, part in splits.items()}
    if len({type(value) for labels in values.values() for value in labels}) > 1:
        found = {key: str(part.features["label"]) for key, part in splits.items()}
        raise ValueError(
            f"found labels that are strings in one split and integers in another: {found}; one type is "
            "needed. Cast them to one type, with equal names in all splits."
        )
    known = [name for feature in features if isinstance(feature, ClassLabel) for name in feature.names]
    seen = sorted({value for labels in values.values() for value in labels})
    classes = list(dict.fromkeys([*known, *seen]))  # an ordered union: numbers of known names stay
    number = {value: index for index, value in enumerate(classes)}
    feature = ClassLabel(names=[str(value) for value in classes])
    encoded = DatasetDict()
    for key, part in splits.items():
        column = [number[value] for value in values[key]]
        encoded[key] = part.remove_columns("label").add_column("label", column, feature=feature)
    return encoded


def _class_values(dataset: Dataset, split: str) -> list[str] | list[int]:
    """Return the labels as class names or integers; missing ones are an error."""
    labels, feature = column_values(dataset, "label"), dataset.features["label"]
    withheld = (None, -1)  # -1 is how integer labels say "unknown"
    if (bad := next((row for row, label in enumerate(labels) if label in withheld), None)) is not None:
        raise ValueError(
            f"split {split}: row {bad} has label {labels[bad]}; every row needs a class. Filter them out."
        )
    if isinstance(feature, ClassLabel):
        check_labels(labels, feature.num_classes, f"split {split}")
        return list(feature.int2str(labels))
    return labels


def _warn_of_unknown_classes(splits: DatasetDict, name: str | os.PathLike[str]) -> None:
    known = set(column_values(splits["train"], "label"))
    for key, part in splits.items():
        if missing := sorted(set(column_values(part, "label")) - known):
            names = ", ".join(part.features["label"].int2str(missing[:6]))
            logger.warning(
                "%s: split %s has %d class(es) that train has not (%s): who is trained on it cannot know them, and is "
                "wrong there.",
                name,
                key,
                len(missing),
                names,
            )


def _limited(splits: DatasetDict, max_samples: int, seed: int) -> DatasetDict:
    if max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}; at least 1 is needed. Raise it, or pass None.")
    limited = DatasetDict()
    for key, part in splits.items():
        rows = stratified_pieces(column_values(part, "label"), [min(max_samples, len(part))], seed)[0]
        limited[key] = part.select(rows)
    return limited


def _carved(splits: DatasetDict, fractions: dict[str, float], seed: int) -> DatasetDict:
    """Carve the missing splits out of train, each with train's class proportions."""
    wanted = {key: fraction for key, fraction in fractions.items() if key not in splits}
    train, labels = splits["train"], np.asarray(column_values(splits["train"], "label"))
    possible = all(0 < fraction < 1 for fraction in wanted.values())  # False for NaN, too
    sizes = [round(fraction * len(train)) for fraction in wanted.values()] if possible else [0]
    if 0 in sizes or sum(sizes) >= len(train):
        raise ValueError(
            f"{wanted} of {len(train)} train rows would leave a split empty; each share must be positive and "
            "all together below 1, with a row at least in each split. Change validation_fraction or "
            "test_fraction, or use more rows."
        )
    *carved, rest = stratified_pieces(labels, sizes, seed) if wanted else [np.arange(len(train))]
    parts = {"train": train.select(rest)}
    parts |= {key: train.select(rows) for key, rows in zip(wanted, carved, strict=True)}
    for key in wanted:
        if missing := sorted(set(labels.tolist()) - set(column_values(parts[key], "label"))):
            logger.warning("Classes %s have too few rows to be in the carved %s split.", missing, key)
    return DatasetDict({key: parts[key] if key in parts else splits[key] for key in SPLITS})
