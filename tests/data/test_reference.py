"""What records say of domains, also of those that `load_domain` has not loaded."""

import datasets
import pytest
from PIL import Image

from hf_ntp import DomainReference


def images(feature, column="label", labels=(0, 1, 2)):
    rows = {"image": [Image.new("RGB", (8, 8), (40 * i, 0, 0)) for i in range(6)], column: list(labels) * 2}
    return datasets.Dataset.from_dict(rows, features=datasets.Features({"image": datasets.Image(), column: feature}))


@pytest.mark.parametrize(
    ("data", "classes"),
    [
        (images(datasets.ClassLabel(names=["a", "b", "c"])), ["a", "b", "c"]),
        (images(datasets.ClassLabel(names=["a", "b", "c"]), "labels"), ["a", "b", "c"]),
        (images(datasets.Value("int64")), ["0", "1", "2"]),
        (images(datasets.Value("string"), labels=("x", "z", "y")), ["x", "y", "z"]),
    ],
)
def test_classes(data, classes):
    assert DomainReference.of("mine", {"owner": data}).classes == classes


def test_one_dataset_is_no_parts():
    with pytest.raises(TypeError, match="parts is Dataset; needed: a dict of datasets by what they were used for"):
        DomainReference.of("mine", images(datasets.Value("int64")))
