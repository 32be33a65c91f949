import pytest

from hf_ntp.training.pretraining import train_classifier

from ..conftest import Rows, tiny_vit


def test_weights_that_are_not_finite_are_no_result(tmp_path):
    """They would be saved as the unprotected model, and every later run of that folder would begin with them."""
    with pytest.raises(FloatingPointError, match=r"weights are not finite after 5 steps.*learning_rate, 1e\+30"):
        train_classifier(tiny_vit(), Rows(), str(tmp_path), steps=5, learning_rate=1e30, use_cpu=True)
