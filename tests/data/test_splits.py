"""Splits and nested subsets: disjoint, stratified, nested, balanced, deterministic."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from hf_ntp.data import nested_subsets, split_owner_attacker, stratified_pieces

LABELS = st.lists(st.integers(0, 4), min_size=1, max_size=60)


@st.composite
def labels_and_sizes(draw):
    labels = draw(LABELS)
    sizes = draw(st.sets(st.integers(1, len(labels)), min_size=1, max_size=5))
    return labels, sorted(sizes), draw(st.integers(0, 2**32 - 1))


@settings(max_examples=60, deadline=None)
@given(labels_and_sizes())
def test_nested_subsets_properties(case):
    labels, sizes, seed = case
    subsets = nested_subsets(labels, sizes, seed)
    available = np.bincount(labels, minlength=5)
    previous: set[int] = set()
    for size in sizes:
        rows = subsets[size]
        assert len(set(rows.tolist())) == size
        assert previous <= set(rows.tolist())
        previous = set(rows.tolist())
        counts = np.bincount(np.asarray(labels)[rows], minlength=5)
        # A class may lag behind the largest by more than one row only once it has no rows left.
        assert ((counts >= counts.max() - 1) | (counts == available)).all()
        if size >= len(set(labels)):
            assert (counts > 0).sum() == len(set(labels))
    again = nested_subsets(np.array(labels), sizes, seed)
    assert all(np.array_equal(subsets[size], again[size]) for size in sizes)


def test_nested_subsets_of_balanced_classes():
    labels = np.repeat(np.arange(10), 30)
    subsets = nested_subsets(labels, [5, 10, 25, 300], seed=0)
    assert np.bincount(labels[subsets[10]]).tolist() == [1] * 10
    assert sorted(np.bincount(labels[subsets[25]]).tolist()) == [2] * 5 + [3] * 5
    assert sorted(subsets[300].tolist()) == list(range(300))
    assert not np.array_equal(subsets[25], nested_subsets(labels, [25], seed=1)[25])


@pytest.mark.parametrize("sizes", [[], [0, 2], [-1], [2, 2], [3, 2], [1.0, 2], [True, 2]])
def test_nested_subsets_rejects_bad_sizes(sizes):
    with pytest.raises(ValueError, match="strictly increasing positive integers"):
        nested_subsets([0, 1, 0, 1], sizes, seed=0)


def test_nested_subsets_rejects_sizes_beyond_the_data():
    with pytest.raises(ValueError, match="up to 5, but only 4 labelled rows"):
        nested_subsets([0, 1, 0, 1], [2, 5], seed=0)


@settings(max_examples=60, deadline=None)
@given(LABELS, st.floats(0, 0.6), st.floats(0, 0.4), st.integers(0, 99))
def test_stratified_pieces_are_disjoint_and_proportional(labels, first, second, seed):
    sizes = [int(first * len(labels)), int(second * len(labels))]
    pieces = stratified_pieces(labels, sizes, seed)
    assert [len(piece) for piece in pieces] == [*sizes, len(labels) - sum(sizes)]
    assert sorted(np.concatenate(pieces).tolist()) == list(range(len(labels)))
    total = np.bincount(labels, minlength=5)
    for piece in pieces:
        counts = np.bincount(np.asarray(labels)[piece], minlength=5)
        assert (np.abs(counts - total * len(piece) / len(labels)) <= 2.5).all()


def test_stratified_pieces_by_hand():
    labels = [0] * 40 + [1] * 20
    test, train = stratified_pieces(labels, [15])
    assert np.bincount(np.asarray(labels)[test]).tolist() == [10, 5]
    assert np.bincount(np.asarray(labels)[train]).tolist() == [30, 15]
    with pytest.raises(ValueError, match="sum to 60 at most"):
        stratified_pieces(labels, [61])


def numbered(labels: list[int]) -> datasets.Dataset:
    """Return a dataset in which image ``i`` is one pixel of value ``i``."""
    images = [Image.fromarray(np.full((1, 1), row, dtype=np.uint8)) for row in range(len(labels))]
    names = [str(label) for label in range(max(labels) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)


def test_owner_and_attacker_share_no_image():
    train = numbered([0, 1, 2] * 20)
    owner, attacker = split_owner_attacker(train, 0.25, seed=3)
    seen = [{image.getpixel((0, 0)) for image in part["image"]} for part in (owner, attacker)]
    assert not seen[0] & seen[1]
    assert seen[0] | seen[1] == set(range(60))
    assert np.bincount(owner["label"][:]).tolist() == [5, 5, 5]
    again = split_owner_attacker(train, 0.25, seed=3)[0]
    assert again["label"][:] == owner["label"][:]


def test_owner_and_attacker_both_need_every_class():
    with pytest.raises(ValueError, match=r"class 1 has 1 row\(s\) and is missing from"):
        split_owner_attacker(numbered([0, 0, 0, 0, 1]))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan")])
def test_owner_fraction_is_checked(fraction):
    with pytest.raises(ValueError, match="between 0 and 1"):
        split_owner_attacker(numbered([0, 0, 1, 1]), fraction)
