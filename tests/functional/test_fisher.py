import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from benchmarks.cost import reference
from hf_ntp.functional import (
    between_class_scatter,
    class_means,
    trace_ratio,
    whitened_discriminant,
    within_class_scatter,
)

# Two classes on a line: {0, 2} and {10, 12}. Means 1 and 11, overall 6; S_W = 1, S_B = 25.
LINE = torch.tensor([[0.0], [2.0], [10.0], [12.0]])
LINE_LABELS = torch.tensor([0, 0, 1, 1])
CRITERIA = [trace_ratio, whitened_discriminant]


def cloud(seed=0, classes=4, size=40, dim=6):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(size) % classes
    centres = 2 * torch.randn(classes, dim, generator=generator)
    return centres[labels] + torch.randn(size, dim, generator=generator), labels


def test_by_hand():
    assert within_class_scatter(LINE, LINE_LABELS, 2).tolist() == [[1.0]]
    assert between_class_scatter(LINE, LINE_LABELS, 2).tolist() == [[25.0]]
    assert float(trace_ratio(LINE, LINE_LABELS, 2, shrinkage=0.0)) == pytest.approx(25.0)
    assert float(trace_ratio(LINE, LINE_LABELS, 2, shrinkage=0.1)) == pytest.approx(25 / (1 + 0.1 * 26))
    assert float(whitened_discriminant(LINE, LINE_LABELS, 2, shrinkage=0.0)) == pytest.approx(25.0, rel=1e-5)
    assert float(whitened_discriminant(LINE, LINE_LABELS, 2, shrinkage=0.5)) == pytest.approx(25 / (0.5 + 0.5 * 26))


def test_two_dimensions_by_hand():
    # Class 0: (0,0), (2,0); class 1: (0,4), (2,4). Means (1,0), (1,4). S_W = diag(1, 0), S_B = diag(0, 4).
    features = torch.tensor([[0.0, 0.0], [2.0, 0.0], [0.0, 4.0], [2.0, 4.0]])
    labels = torch.tensor([0, 0, 1, 1])
    assert torch.allclose(within_class_scatter(features, labels, 2), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert torch.allclose(between_class_scatter(features, labels, 2), torch.tensor([[0.0, 0.0], [0.0, 4.0]]))
    assert float(trace_ratio(features, labels, 2, shrinkage=0.0)) == pytest.approx(4.0)
    # Shrinkage 0.2: matrix 0.8 diag(1, 0) + 0.2 * 5/2 I = diag(1.3, 0.5); 4 / 0.5 = 8.
    assert float(whitened_discriminant(features, labels, 2, shrinkage=0.2)) == pytest.approx(8.0)


def test_scatter_against_an_independent_reference():
    features, labels = cloud()
    lda = LinearDiscriminantAnalysis(solver="eigen", store_covariance=True).fit(features.numpy(), labels.numpy())
    assert np.allclose(within_class_scatter(features, labels, 4).numpy(), lda.covariance_, atol=1e-4)
    total = np.cov(features.numpy().T, bias=True)
    both = within_class_scatter(features, labels, 4) + between_class_scatter(features, labels, 4)
    assert np.allclose(both.numpy(), total, atol=1e-4)


def test_whitened_form_against_numpy():
    features, labels = cloud(1)
    s_w = within_class_scatter(features, labels, 4).double().numpy()
    s_b = between_class_scatter(features, labels, 4).double().numpy()
    ridge = 0.3 * np.trace(s_w + s_b) / 6 * np.eye(6)
    expected = np.trace(np.linalg.inv(0.7 * s_w + ridge) @ s_b)
    assert float(whitened_discriminant(features, labels, 4, shrinkage=0.3)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("classes", "size", "dim"), [(4, 40, 6), (50, 40, 6), (4, 20, 50), (50, 20, 50)])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_values_and_gradients_against_loops_over_classes(criterion, classes, size, dim):
    """Few and many classes, narrow and wide features: each has its own way to be quick."""
    features, labels = cloud(2, 4, size, dim)  # with 50 classes, most are absent
    found, wanted = features.clone().requires_grad_(), features.double().requires_grad_()
    value = criterion(found, labels, classes, 0.1)
    expected = getattr(reference, criterion.__name__)(wanted, labels, classes, 0.1)
    assert value.item() == pytest.approx(float(expected), rel=1e-4)
    (gradient,), (other,) = torch.autograd.grad(value, found), torch.autograd.grad(expected, wanted)
    assert torch.allclose(gradient, other.float(), atol=1e-4 * float(other.abs().max()))


def test_means_by_hand_with_an_absent_class():
    means, counts = class_means(LINE, LINE_LABELS * 2, 4)
    assert means.flatten().tolist() == [1.0, 0.0, 11.0, 0.0]
    assert counts.tolist() == [2.0, 0.0, 2.0, 0.0]


@pytest.mark.parametrize("criterion", CRITERIA)
def test_absent_classes_take_no_part(criterion):
    features, labels = cloud()
    assert float(criterion(features, labels, 4)) == pytest.approx(
        float(criterion(features, labels * 7, 1000)), rel=1e-5
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_finite_value_and_gradient_on_one_sample_per_class(criterion):
    features = torch.randn(5, 3, requires_grad=True)
    value = criterion(features, torch.arange(5), 5)
    value.backward()
    assert 0 < value.item() < math.inf
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("classes", [1, 3])
def test_collapsed_features_are_a_minimum_not_a_nan(criterion, classes):
    features = torch.ones(6, 3, requires_grad=True)
    value = criterion(features, torch.arange(6) % classes, classes)
    value.backward()
    assert value.item() == 0.0
    assert torch.isfinite(features.grad).all()


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.floats(-50, 50), st.floats(0.05, 20))
def test_invariances(seed, shift, scale):
    features, labels = cloud(seed)
    generator = torch.Generator().manual_seed(seed)
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator))
    relabel = torch.randperm(4, generator=generator)
    order = torch.randperm(len(labels), generator=generator)
    moved = (scale * features @ rotation + shift)[order]
    for criterion in CRITERIA:
        before = float(criterion(features, labels, 4))
        assert float(criterion(moved, relabel[labels][order], 4)) == pytest.approx(before, rel=2e-2)


def test_unshrunk_whitened_form_is_invariant_under_any_invertible_map():
    features, labels = cloud(size=200)
    mixing = torch.randn(6, 6, generator=torch.Generator().manual_seed(3)) + 3 * torch.eye(6)
    before = float(whitened_discriminant(features, labels, 4, shrinkage=0.0))
    assert float(whitened_discriminant(features @ mixing, labels, 4, shrinkage=0.0)) == pytest.approx(before, rel=1e-3)
    assert float(trace_ratio(features @ mixing, labels, 4)) != pytest.approx(
        float(trace_ratio(features, labels, 4)), rel=1e-2
    )


@pytest.mark.parametrize("criterion", CRITERIA)
def test_gradients(criterion):
    features, labels = cloud(size=12, dim=3)
    features = features.double().requires_grad_()
    step = 1e-3
    criterion(features, labels, 4).backward()
    for i, j in [(0, 0), (5, 2), (11, 1)]:
        nudge = torch.zeros_like(features)
        nudge[i, j] = step
        with torch.no_grad():
            slope = (criterion(features + nudge, labels, 4) - criterion(features - nudge, labels, 4)) / (2 * step)
        assert float(features.grad[i, j]) == pytest.approx(float(slope), rel=0.05, abs=1e-3)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_a_batch_of_feature_sets_gives_each_ones_value(criterion):
    sets = [cloud(seed)[0] for seed in range(3)]
    labels = cloud()[1]
    together = criterion(torch.stack(sets), labels, 4)
    assert together.tolist() == pytest.approx([float(criterion(one, labels, 4)) for one in sets], rel=1e-5)


def test_bad_shapes():
    with pytest.raises(ValueError, match="Pool the features"):
        trace_ratio(torch.ones(2, 3, 4), torch.tensor([0, 1]), 2)
    with pytest.raises(ValueError, match="shrinkage is 2"):
        whitened_discriminant(LINE, LINE_LABELS, 2, shrinkage=2.0)
