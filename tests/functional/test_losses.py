import math

import pytest
import torch

from hf_ntp.functional import clamped_ascent, softened_divergence, uniform_cross_entropy


def test_clamped_ascent_by_hand():
    loss = torch.tensor([1.5, 3.0], requires_grad=True)
    assert [float(clamped_ascent(part, 2.0)) for part in loss] == [-1.5, -2.0]
    sum(clamped_ascent(part, 2.0) for part in loss).backward()
    assert loss.grad.tolist() == [-1.0, 0.0]


def test_clamped_ascent_rejects_a_bound_that_is_not_positive():
    with pytest.raises(ValueError, match="bound is 0"):
        clamped_ascent(torch.tensor(1.0), 0.0)


def test_uniform_cross_entropy_by_hand():
    # Softmax of [log 3, 0] is (3/4, 1/4): KL(uniform || p) = log(1/2) - (log 3/4 + log 1/4) / 2 = 0.1438.
    logits = torch.tensor([[math.log(3.0), 0.0]])
    expected = math.log(0.5) - (math.log(0.75) + math.log(0.25)) / 2
    assert float(uniform_cross_entropy(logits)) == pytest.approx(expected, rel=1e-5)


def test_uniform_cross_entropy_has_no_dead_zone():
    for scale in (0.1, 1.0, 10.0):
        logits = (scale * torch.tensor([[1.0, -2.0, 0.5]])).requires_grad_()
        uniform_cross_entropy(logits).backward()
        assert logits.grad.abs().sum() > 1e-3
    level = torch.full((4, 3), 7.0, requires_grad=True)
    uniform_cross_entropy(level).backward()
    assert float(uniform_cross_entropy(level)) == pytest.approx(0.0, abs=1e-6)
    assert level.grad.abs().max() < 1e-6


def test_softened_divergence_by_hand():
    """T = 2 turns logits log 9 and 0 into odds of 3: 4 (.75 log(.75 / .5) + .25 log(.25 / .5))."""
    teacher, student = torch.tensor([[math.log(9), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_divergence(teacher, student, 2.0) == pytest.approx(expected, rel=1e-5)
    assert softened_divergence(teacher, teacher, 2.0) == pytest.approx(0, abs=1e-6)
