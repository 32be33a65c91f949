import math

import pytest
import torch

from hf_ntp.functional import relative_collapse, token_spread


def test_spread_by_hand():
    """Two images, one token [1, -1] and its negative: already normalised, mean 0, every square 1."""
    tokens = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
    assert token_spread(tokens) == pytest.approx(1.0, abs=1e-4)
    assert token_spread(tokens[:1].repeat(5, 1, 1)) == pytest.approx(0.0, abs=1e-6)


def test_spread_ignores_scale_and_shift_of_tokens():
    tokens = torch.randn(6, 4, 8)
    assert token_spread(100 * tokens + 3) == pytest.approx(float(token_spread(tokens)), rel=1e-3)


def test_relative_collapse_by_hand():
    tokens = torch.tensor([[[1.0, -1.0]], [[-1.0, 1.0]]])
    same = tokens[:1].repeat(2, 1, 1)
    assert relative_collapse(tokens, tokens, floor=0.5) == pytest.approx(math.log(1.5), abs=1e-4)
    assert relative_collapse(same, tokens, floor=1e-3) == pytest.approx(math.log(1e-3))


def test_no_gradient_reaches_the_source():
    target, source = torch.randn(5, 3, 4, requires_grad=True), torch.randn(5, 3, 4, requires_grad=True)
    relative_collapse(target, source).backward()
    assert target.grad.abs().sum() > 0
    assert source.grad is None
