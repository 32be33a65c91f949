import pytest
import torch

from hf_ntp.training.paired_data import PairedDataset

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
