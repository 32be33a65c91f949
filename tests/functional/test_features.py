import pytest
import torch

from hf_ntp.functional import feature_distance

# Centre (1, 1); squared distances from it 1 each, so the variance is 4 / 3.
REFERENCE = torch.tensor([[0.0, 1.0], [2.0, 1.0], [1.0, 0.0], [1.0, 2.0]])


def test_equal_features_are_at_no_distance():
    assert [float(value) for value in feature_distance(REFERENCE, REFERENCE)] == pytest.approx([0, 0], abs=1e-6)


def test_values_by_hand():
    """Twice as far from the centre: same directions, squared error 1. Opposite: cosine -1, squared error 4."""
    twice = feature_distance(2 * REFERENCE - 1, REFERENCE)
    assert float(twice.cosine) == pytest.approx(0, abs=1e-6)
    assert float(twice.relative_error) == pytest.approx(1 / (4 / 3), rel=1e-4)
    opposite = feature_distance(2 - REFERENCE, REFERENCE)
    assert float(opposite.cosine) == pytest.approx(2)
    assert float(opposite.relative_error) == pytest.approx(4 / (4 / 3), rel=1e-4)


def test_the_mean_in_place_of_every_row_has_about_an_error_of_one():
    reference = torch.randn(200, 5, generator=torch.Generator().manual_seed(0))
    distance = feature_distance(reference.mean(0).expand(200, 5), reference)
    assert float(distance.cosine) == pytest.approx(1)
    assert float(distance.relative_error) == pytest.approx(1, rel=0.01)


def test_neither_shift_nor_scale_of_both_matters():
    reference, features = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    expected = feature_distance(features, reference)
    moved = feature_distance(100 * features + 7, 100 * reference + 7)
    assert [float(value) for value in moved] == pytest.approx([float(value) for value in expected], rel=1e-3)


def test_a_single_row_is_measured_against_its_length():
    """(3, 4) is 5 long; (3, 0) is 4 away, at a cosine of 3 / 5."""
    distance = feature_distance(torch.tensor([[3.0, 0.0]]), torch.tensor([[3.0, 4.0]]))
    assert float(distance.cosine) == pytest.approx(1 - 3 / 5)
    assert float(distance.relative_error) == pytest.approx(16 / 25, rel=1e-4)


@pytest.mark.parametrize("reference", [torch.zeros(3, 2), torch.ones(3, 2), torch.zeros(1, 2)])
def test_features_without_any_spread_give_finite_gradients(reference):
    features = reference.clone().requires_grad_()
    distance = feature_distance(features, reference)
    (distance.cosine + distance.relative_error).backward()
    assert torch.isfinite(features.grad).all()
