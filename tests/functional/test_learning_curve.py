import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from hf_ntp.functional import check_sample_sizes, confidence_interval, retained_transfer, slc_auc

SIZES = [10, 100, 1000]
TRANSFER = [0.5, 0.7, 0.9]
SCRATCH = [0.3, 0.6, 0.9]


def test_by_hand():
    # Gaps 0.2, 0.1, 0.0 one decade apart: (0.2 + 0.1)/2 + (0.1 + 0)/2 = 0.2 decades over a range of 2 decades.
    area = slc_auc(TRANSFER, SCRATCH, SIZES)
    assert float(area.decades) == pytest.approx(0.2)
    assert float(area.nats) == pytest.approx(0.2 * math.log(10))
    assert float(area.normalized) == pytest.approx(0.1)


def test_the_notebooks_definition_in_nats():
    # The released notebooks integrate both curves over ln n with numpy's trapezoid rule and subtract the areas.
    sizes = [20, 50, 100, 400, 1000]
    transfer = [0.42, 0.55, 0.61, 0.74, 0.80]
    scratch = [0.21, 0.38, 0.52, 0.73, 0.82]
    notebook = np.trapezoid(transfer, np.log(sizes)) - np.trapezoid(scratch, np.log(sizes))
    assert float(slc_auc(transfer, scratch, sizes).nats) == pytest.approx(notebook, abs=1e-12)
    # By hand: 0.19 ln 2.5 + 0.13 ln 2 + 0.05 ln 4 - 0.005 ln 2.5.
    assert notebook == pytest.approx(0.3289, abs=1e-4)


def test_one_area_per_seed():
    area = slc_auc([TRANSFER, SCRATCH], [SCRATCH, SCRATCH], SIZES)
    assert area.normalized.tolist() == pytest.approx([0.1, 0.0])


@given(st.lists(st.floats(0, 1), min_size=3, max_size=3), st.lists(st.floats(0, 1), min_size=3, max_size=3))
def test_swapping_the_curves_changes_the_sign(one, other):
    forward, backward = slc_auc(one, other, SIZES), slc_auc(other, one, SIZES)
    assert float(forward.normalized) == pytest.approx(-float(backward.normalized), abs=1e-12)
    assert -1 <= float(forward.normalized) <= 1


def test_a_constant_gap_is_the_normalized_area_whatever_the_grid():
    for sizes in ([1, 2], [10, 30, 100], [7, 8, 5000]):
        scratch = np.full(len(sizes), 0.25)
        assert float(slc_auc(scratch + 0.5, scratch, sizes).normalized) == pytest.approx(0.5)


@pytest.mark.parametrize("sizes", [[100, 10, 1000], [10, 10, 100], [10], [0, 10, 20]])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="strictly increasing"):
        check_sample_sizes(sizes)


def test_what_are_no_numbers():
    with pytest.raises(ValueError, match=r"sample_sizes are \['10', '100'\]; needed: numbers"):
        slc_auc([0.5, 0.6], [0.5, 0.6], ["10", "100"])
    for bad in ([10, 100, float("nan")], [10, float("inf")], [[10, 100], [10, 100]], 100):
        with pytest.raises(ValueError, match="needed: a list of finite numbers, the same sizes for all seeds"):
            check_sample_sizes(bad)
    for bad in ([0.5, None], [[0.5, 0.6], [0.5]]):
        with pytest.raises(ValueError, match="the curves are no numbers of one shape"):
            slc_auc(bad, bad, [10, 100])


def test_different_grids():
    with pytest.raises(ValueError, match="same grid"):
        slc_auc(TRANSFER, SCRATCH[:2], SIZES)
    with pytest.raises(ValueError, match="same seeds"):
        slc_auc([TRANSFER, TRANSFER], [SCRATCH], SIZES)


@pytest.mark.parametrize("bad", [float("nan"), 1.2, -0.1])
def test_accuracies_outside_the_unit_interval(bad):
    with pytest.raises(ValueError, match="fractions"):
        slc_auc([0.5, bad, 0.9], SCRATCH, SIZES)


def test_interval_by_hand():
    # Mean 2, standard deviation 1, n = 3: half width t(0.975, 2) / sqrt(3) = 4.3027 / 1.7321 = 2.4841.
    interval = confidence_interval([1.0, 2.0, 3.0])
    assert interval.mean == pytest.approx(2.0)
    assert interval.high - interval.mean == pytest.approx(2.4841, abs=1e-4)
    low, high = stats.t.interval(0.95, 2, loc=2.0, scale=stats.sem([1, 2, 3]))
    assert (interval.low, interval.high) == pytest.approx((low, high))


@pytest.mark.parametrize("level", [0, 1, 95])
def test_levels_of_confidence(level):
    with pytest.raises(ValueError, match=f"confidence is {level}; needed: a number between 0 and 1"):
        confidence_interval([1.0, 2.0], level)


def test_one_seed_has_no_interval():
    interval = confidence_interval(torch.tensor([0.3]))
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


def test_retained_transfer():
    assert retained_transfer(0.05, 0.2) == pytest.approx(0.25)
    assert retained_transfer(-0.1, 0.2) == pytest.approx(-0.5)
    assert math.isnan(retained_transfer(0.1, 0.0))
