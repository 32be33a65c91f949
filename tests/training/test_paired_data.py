import datasets
import pytest
import torch

from hf_ntp.training.paired_data import PairedDataset, as_pixels, labels_of

from ..conftest import Rows


def batch_of(pixels):
    source, target = Rows(size=4), Rows(size=4)
    source.images[2] = pixels
    rows = [(0, index, ((index,),)) for index in range(4)]
    return PairedDataset(source, {"target": target}).__getitems__(rows)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_pixels_that_are_not_finite_are_named(value):
    with pytest.raises(ValueError, match="row 2 of a Rows has NaN or infinite pixel_values"):
        batch_of(float(value))


def test_infinities_that_cancel_are_found():
    pixels = torch.zeros(3, 8, 8)
    pixels[0, 0, 0], pixels[1, 0, 0] = float("inf"), float("-inf")
    with pytest.raises(ValueError, match="row 2"):
        batch_of(pixels)


def test_large_pixels_are_finite_even_where_their_sum_is_not():
    assert (batch_of(3e38)["pixel_values"][2] == 3e38).all()


def test_a_dataset_of_pixel_values_is_taken_as_it_is():
    """What map() made of images, of lists or with a format of its own; labels are read without the images."""
    images, labels = torch.randn(4, 3, 8, 8), [2, 0, 1, 0]
    made = datasets.Dataset.from_dict({"pixel_values": images.tolist(), "labels": labels})
    for data in (made, made.with_format("numpy")):
        rows = as_pixels(data, None, "train_dataset")
        torch.testing.assert_close(
            torch.stack([row["pixel_values"] for row in rows.__getitems__([1, 3])]), images[[1, 3]]
        )
        assert labels_of(rows, "train_dataset").tolist() == labels
    batch = PairedDataset(as_pixels(made, None, "source"), {"target": Rows(size=4)}).__getitems__([(0, 2, ((1,),))])
    torch.testing.assert_close(batch["pixel_values"], images[[2]])
    assert batch["labels"].tolist() == [1]
    with pytest.raises(ValueError, match="rows have the keys"):
        labels_of(as_pixels(made.rename_column("labels", "label"), None, "source"), "source")
