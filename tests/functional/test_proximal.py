import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_ntp.functional import (
    apportion_zeros,
    cardinality_mask,
    cubic_sparsity,
    global_cardinality_mask,
    n_m_mask,
    num_zeros,
    project_cardinality,
    project_global_cardinality,
    project_n_m,
    soft_threshold,
)

X = torch.tensor([[3.0, -1.0], [0.5, -2.0]])


def test_soft_threshold_by_hand():
    expected = torch.tensor([[2.0, 0.0], [0.0, -1.0]])
    assert torch.equal(soft_threshold(X, 1.0), expected)
    assert torch.equal(soft_threshold(X, 0.0), X)


def test_soft_threshold_minimises_its_objective():
    # Independent reference: brute force over a fine grid of z.
    x, t = 0.73, 0.4
    grid = np.linspace(-2, 2, 400001)
    best = grid[np.argmin(t * np.abs(grid) + 0.5 * (grid - x) ** 2)]
    assert float(soft_threshold(torch.tensor(x), t)) == pytest.approx(best, abs=1e-5)


def test_soft_threshold_rejects_negative():
    with pytest.raises(ValueError, match="threshold is -1"):
        soft_threshold(X, -1.0)


def test_project_cardinality_by_hand():
    assert torch.equal(project_cardinality(X, 0.5), torch.tensor([[3.0, 0.0], [0.0, -2.0]]))
    assert torch.equal(project_cardinality(X, 0.75), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    assert torch.equal(project_cardinality(X, 0.0), X)


def test_global_projection_by_hand():
    tensors = [torch.tensor([1.0, -5.0]), torch.tensor([[2.0], [0.1]])]
    kept, emptied = project_global_cardinality(tensors, 0.75)
    assert kept.tolist() == [0.0, -5.0]
    assert emptied.tolist() == [[0.0], [0.0]]


def test_n_m_by_hand():
    weight = torch.tensor([[1.0, -4.0, 2.0, 3.0, 9.0, 8.0, -7.0, 6.0]])
    assert project_n_m(weight, 2, 4).tolist() == [[0.0, -4.0, 0.0, 3.0, 9.0, 8.0, 0.0, 0.0]]


def test_n_m_groups_follow_the_row_of_a_kernel():
    weight = torch.arange(1.0, 9.0).reshape(2, 1, 2, 2)
    assert n_m_mask(weight, 1, 4).flatten().tolist() == [False] * 3 + [True] + [False] * 3 + [True]


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (1, 3)])
def test_n_m_rejects_what_does_not_fit(n, m):
    with pytest.raises(ValueError, match=f"{n}:{m}"):
        n_m_mask(torch.ones(2, 8), n, m)


def test_ties_are_broken_first_come_first_kept():
    assert cardinality_mask(torch.ones(5), 2).tolist() == [True, True, True, False, False]
    assert cardinality_mask(torch.tensor([1.0, 2.0, 1.0, 1.0]), 2).tolist() == [True, True, False, False]


@pytest.mark.parametrize("zeros", [-1, 5])
def test_cardinality_mask_rejects_impossible_counts(zeros):
    with pytest.raises(ValueError, match=f"zeros is {zeros}"):
        cardinality_mask(X, zeros)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, float("nan")])
def test_sparsity_outside_range(sparsity):
    with pytest.raises(ValueError, match="sparsity is"):
        num_zeros(10, sparsity)


values = st.lists(st.floats(-4, 4, width=16), min_size=1, max_size=60)


@settings(deadline=None)
@given(values, st.floats(0, 0.999))
def test_masks_are_exact_and_keep_the_largest(numbers, sparsity):
    x = torch.tensor(numbers)
    mask = cardinality_mask(x, num_zeros(len(x), sparsity))
    assert int((~mask).sum()) == num_zeros(len(x), sparsity)
    if mask.any() and not mask.all():
        assert x[mask].abs().min() >= x[~mask].abs().max()


@settings(deadline=None)
@given(values, st.floats(0, 0.999))
def test_no_other_support_is_closer(numbers, sparsity):
    # Independent reference: numpy's sort gives the smallest possible squared distance.
    x = torch.tensor(numbers, dtype=torch.float64)
    zeros = num_zeros(len(x), sparsity)
    smallest = float((np.sort(np.abs(numbers))[:zeros] ** 2).sum())
    assert float((x - project_cardinality(x, sparsity)).square().sum()) == pytest.approx(smallest)


@settings(deadline=None)
@given(values, st.floats(0, 0.999))
def test_projecting_twice_changes_nothing(numbers, sparsity):
    x = torch.tensor(numbers)
    once = project_cardinality(x, sparsity)
    assert torch.equal(once, project_cardinality(once, sparsity))


@settings(deadline=None)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=20), st.floats(0, 0.999))
def test_apportioned_zeros_sum_exactly(sizes, sparsity):
    counts = apportion_zeros(sizes, sparsity)
    assert sum(counts) == num_zeros(sum(sizes), sparsity)
    assert all(0 <= count <= size for count, size in zip(counts, sizes, strict=True))


def test_global_masks_hold_the_exact_total():
    tensors = [torch.randn(3, 5), torch.randn(7), torch.randn(2, 2, 2)]
    masks = global_cardinality_mask(tensors, 0.6)
    assert sum(int((~mask).sum()) for mask in masks) == 18
    assert [mask.shape for mask in masks] == [tensor.shape for tensor in tensors]


def test_cubic_schedule_by_hand():
    assert [cubic_sparsity(t, 0.8) for t in (-1.0, 0.0, 1.0, 2.0)] == [0.0, 0.0, 0.8, 0.8]
    assert cubic_sparsity(0.5, 0.8) == pytest.approx(0.8 * (1 - 0.125))


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=5), st.floats(0, 0.999))
def test_global_masks_are_those_of_all_entries_side_by_side(lists, sparsity):
    """The counting passes against one sort of everything, ties included."""
    tensors = [torch.tensor(numbers) for numbers in lists]
    flat = torch.cat(tensors)
    expected = cardinality_mask(flat, num_zeros(len(flat), sparsity))
    assert torch.equal(torch.cat(global_cardinality_mask(tensors, sparsity)), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_masks_are_the_same_on_a_gpu():
    """Also among equal magnitudes, of which there are many."""
    x = torch.randint(-1000, 1000, (100, 96), generator=torch.Generator().manual_seed(0)).float()
    for sparsity in (0.0, 0.3, 0.999):
        zeros = num_zeros(x.numel(), sparsity)
        assert torch.equal(cardinality_mask(x.cuda(), zeros).cpu(), cardinality_mask(x, zeros))
        for found, wanted in zip(*(global_cardinality_mask([y, 2 * y], sparsity) for y in (x.cuda(), x)), strict=True):
            assert torch.equal(found.cpu(), wanted)
    assert torch.equal(n_m_mask(x.cuda(), 2, 4).cpu(), n_m_mask(x, 2, 4))
