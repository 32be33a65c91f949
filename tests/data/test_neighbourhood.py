import numpy as np
import pytest
import torch

from hf_ntp.data import Neighbourhood
from hf_ntp.data.neighbourhood import CHANGES, invert, move, recolour, restyle, surroundings, thicken

from ..conftest import Rows


def images(count=6, size=12):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("shape", [(5, 3, 12, 12), (1, 3, 7, 10)])
def test_every_change_changes_and_can_be_repeated(change, shape):
    before = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    kept = before.clone()
    after = change(before, rng())
    assert after.shape == shape
    assert after.dtype == torch.float32
    assert torch.isfinite(after).all()
    assert torch.equal(before, kept), "in place"
    assert torch.equal(after, change(before, rng()))
    assert (after - before).abs().mean() > 0.03


def test_changes_by_hand():
    dot = torch.zeros(1, 3, 5, 5)
    dot[:, :, 2, 2] = 1
    assert torch.equal(invert(dot, rng()), 1 - dot)
    assert {float(thicken(dot, rng(seed)).sum()) for seed in range(8)} == {27.0, 0.0}  # 3 x 3 x 3, or swallowed
    two = recolour(dot, rng())
    assert torch.allclose(two[0, :, 0, 0], two[0, :, 4, 1])
    assert not torch.allclose(two[0, :, 0, 0], two[0, :, 2, 2])


def test_moving_keeps_the_centre_and_the_amount_of_what_is_there():
    spot = torch.zeros(20, 3, 25, 25)
    spot[:, :, 11:14, 11:14] = 1
    moved = move(spot, rng())
    assert (moved[:, :, 12, 12] > 0.5).all()
    assert (moved.sum((1, 2, 3)) / 27 > 0.25).all()


def test_another_style_keeps_the_phases():
    before = images()
    phases = [torch.fft.rfft2(x)[:, :, 1:3, 1:3] for x in (before, restyle(before, rng()))]
    cosine = (phases[0] * phases[1].conj()).real / (phases[0].abs() * phases[1].abs())
    assert cosine.median() > 0.99


def test_surroundings_are_outside():
    before = images(64)
    after = surroundings(before, rng())
    assert after.min() >= 0
    assert after.max() <= 1
    assert ((after - before).abs().mean((1, 2, 3)) > 0.02).all(), "an image that stays as it is"


def test_a_neighbourhood_keeps_range_labels_and_order():
    source = Rows()
    ours = Neighbourhood(source, seed=3)
    rows = ours.__getitems__([4, 9])
    assert [row["labels"] for row in rows] == [4 % 3, 0]
    assert len(ours) == len(source)
    for channel in range(3):
        low, high = source.images[:, channel].min(), source.images[:, channel].max()
        values = torch.stack([row["pixel_values"][channel] for row in rows])
        assert values.min() >= low - 1e-5
        assert values.max() <= high + 1e-5
    assert torch.equal(rows[1]["pixel_values"], ours.__getitems__([4, 9])[1]["pixel_values"])
    assert not torch.equal(
        rows[1]["pixel_values"], Neighbourhood(source, seed=4).__getitems__([4, 9])[1]["pixel_values"]
    )
    assert not torch.equal(rows[0]["pixel_values"], source.images[4])
