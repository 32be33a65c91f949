"""Finding columns, checking labels, identifying content."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from PIL import Image

from hf_ntp.data import check_labels, check_target, dataset_fingerprint, find_columns

PICTURE = Image.new("L", (2, 2), 7)


def table(**types: object) -> Dataset:
    """Return one row with columns of the given types."""
    return Dataset.from_list([{name: _example(feature) for name, feature in types.items()}], Features(types))


def _example(feature: object) -> object:
    if isinstance(feature, datasets.Image):
        return PICTURE
    return {"i": 1, "u": 1, "f": 0.5, "s": "a"}[feature.dtype[0]]


IMAGE, CLASSES = datasets.Image(), ClassLabel(names=["a", "b"])


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        ({"img": IMAGE, "kind": CLASSES, "id": Value("int64")}, ("img", "kind")),
        ({"img": IMAGE, "id": Value("int64"), "labels": Value("uint8")}, ("img", "labels")),
        ({"img": IMAGE, "coarse_label": CLASSES, "fine_label": CLASSES}, ("img", "fine_label")),
        ({"img": IMAGE, "target": Value("string")}, ("img", "target")),
    ],
)
def test_find_columns(types, expected):
    assert find_columns(table(**types)) == expected


def test_named_columns_win():
    data = table(a=IMAGE, b=IMAGE, label=CLASSES, other=Value("int32"))
    assert find_columns(data, "b", "other") == ("b", "other")


@pytest.mark.parametrize(
    ("types", "given", "message"),
    [
        (
            {"x": Value("int64"), "label": CLASSES},
            {},
            r"columns x \(int64\), label \(ClassLabel\); needed one column",
        ),
        ({"a": IMAGE, "b": IMAGE, "label": CLASSES}, {}, r"Keep one of \['a', 'b'\].* image_column="),
        ({"a": IMAGE, "label": CLASSES}, {"image_column": "pic"}, "'pic' to be a column of type Image"),
        ({"a": IMAGE, "label": Value("float32")}, {}, r"label \(float32\); needed a label column"),
        ({"a": IMAGE, "score": Value("int64")}, {}, r"Call one of \['score'\] 'label'.* label_column="),
        (
            {"a": IMAGE, "label": Value("int64"), "quality": CLASSES},
            {},
            r"Call one of \['label', 'quality'\] 'label' and keep no other",
        ),
        (
            {"a": IMAGE, "s": Value("float64")},
            {"label_column": "s"},
            "'s' to be a label column of ClassLabel",
        ),
    ],
)
def test_find_columns_says_what_is_there(types, given, message):
    with pytest.raises(ValueError, match=message):
        find_columns(table(**types), **given)


@pytest.mark.parametrize("labels", [[0, 2], np.array([2], np.uint8), torch.tensor([1]), [], [np.int32(1)]])
def test_good_labels_pass(labels):
    check_labels(labels, 3, "digits")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, -1], "digits: row 2 has label -1"),
        (np.array([0, 3]), "row 1 has label 3 .*from 0 to 2"),
        ([0, 1.0], r"row 0 has label 0.0 \(float\)"),
        (np.array([True]), r"row 0 has label True \(bool\)"),
        (["cat"], "row 0 has label 'cat'"),
        ([0, None], r"row 1 has label None \(NoneType\)"),
        ([float("nan")], "row 0 has label nan"),
    ],
)
def test_bad_labels_are_named(labels, message):
    with pytest.raises(ValueError, match=message):
        check_labels(labels, 3, "digits")


def test_target_needs_two_classes():
    check_target([0, 1])
    check_target(torch.tensor([3, 1]))
    with pytest.raises(ValueError, match="no rows; at least 2 classes"):
        check_target([])
    with pytest.raises(ValueError, match="3 rows of class 4 only"):
        check_target(np.array([4, 4, 4]))


def pictures(values: list[int], labels: list[int], column: str = "image") -> Dataset:
    images = [Image.new("L", (2, 2), value) for value in values]
    features = Features({column: datasets.Image(), "label": ClassLabel(num_classes=3)})
    return Dataset.from_dict({column: images, "label": labels}, features=features)


def test_fingerprint_follows_content_only(tmp_path):
    base = pictures([1, 2], [0, 1])
    digest = dataset_fingerprint(base)
    assert len(digest) == 64
    base.save_to_disk(tmp_path / "saved")
    shuffled_twice = base.select([1, 0]).select([1, 0])
    same = [pictures([1, 2], [0, 1], "img"), datasets.load_from_disk(tmp_path / "saved"), shuffled_twice]
    assert {dataset_fingerprint(one) for one in same} == {digest}
    different = [pictures([1, 2], [0, 2]), pictures([1, 3], [0, 1]), pictures([1], [0]), base.select([1, 0])]
    assert digest not in {dataset_fingerprint(one) for one in different}


def test_fingerprint_reads_images_stored_by_path(tmp_path):
    base = pictures([1, 2], [0, 1])
    stored = base.with_format("arrow")[:]["image"].to_pylist()
    for row, image in enumerate(stored):
        (tmp_path / f"{row}.png").write_bytes(image["bytes"])
    paths = [str(tmp_path / f"{row}.png") for row in range(2)]
    by_path = Dataset.from_dict({"image": paths, "label": [0, 1]}, features=base.features)
    assert dataset_fingerprint(by_path) == dataset_fingerprint(base)
