import pytest
import torch

from hf_ntp.functional import (
    add_penalty_gradient_,
    dual_residual,
    hard_anchor,
    hard_dual,
    penalty,
    primal_residual,
    project_cardinality,
    soft_anchor,
    soft_dual,
    soft_threshold,
)


def test_penalty_by_hand():
    # W - Z + U = [1 - 2 + 3, 4 - 0 - 1] = [2, 3]; (rho / 2) (4 + 9) with rho = 0.5 is 3.25. Squared, not the norm.
    w, z, u = torch.tensor([1.0, 4.0]), torch.tensor([2.0, 0.0]), torch.tensor([3.0, -1.0])
    assert float(penalty(w, z - u, 0.5)) == pytest.approx(3.25)


def test_penalty_gradient_by_hand_and_against_autograd():
    w = torch.tensor([1.0, 4.0], requires_grad=True)
    anchor = torch.tensor([-1.0, 1.0])
    gradient = torch.tensor([10.0, 20.0])
    add_penalty_gradient_([gradient], [w.detach()], [anchor], 0.5)
    assert gradient.tolist() == [11.0, 21.5]
    (reference,) = torch.autograd.grad(penalty(w, anchor, 0.5), w)
    assert torch.allclose(gradient - torch.tensor([10.0, 20.0]), reference)


def test_moreau_splits_by_hand():
    x = torch.tensor([3.0, -1.0, 0.5])
    mask = torch.tensor([True, False, False])
    anchor = hard_anchor(x, x * mask)
    assert anchor.tolist() == [3.0, 1.0, -0.5]  # Z - U = [3, 0, 0] - [0, -1, 0.5]
    assert hard_dual(anchor, anchor * mask).tolist() == [0.0, -1.0, 0.5]
    assert soft_dual(x, 1.0).tolist() == [1.0, -1.0, 0.5]
    assert soft_anchor(x, 1.0).tolist() == [1.0, 1.0, -0.5]  # Z = [2, 0, 0], U = [1, -1, 0.5]
    assert torch.equal(soft_threshold(x, 1.0) + soft_dual(x, 1.0), x)


def test_residuals_by_hand():
    w, z, z_old = torch.tensor([3.0, 4.0]), torch.zeros(2), torch.tensor([0.0, 2.0])
    assert float(primal_residual(w, z).sqrt()) == 5.0
    assert float(dual_residual(z, z_old, 0.5).sqrt()) == 1.0


def test_admm_solves_a_problem_with_a_known_answer():
    # min 0.5 ||W - A||^2 subject to two non-zeros: the two largest entries of A. Exact W-steps, Z and U stored apart.
    a = torch.tensor([5.0, -4.0, 1.0, 0.5])
    rho, z, u = 1.0, torch.zeros(4), torch.zeros(4)
    for _ in range(60):
        w = (a + rho * (z - u)) / (1 + rho)
        z = project_cardinality(w + u, 0.5)
        u = u + w - z
    assert torch.allclose(z, torch.tensor([5.0, -4.0, 0.0, 0.0]), atol=1e-4)
