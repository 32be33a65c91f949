import pytest
import torch
from torch import nn

from hf_ntp.functional import penalty, project_cardinality, soft_threshold
from hf_ntp.training.pruning import ADMMPruner, check_pattern, mask_rule

# Rounds 1 to 6: sparsity .2106, .3519, .4375, .4815, .4977, .5.
ZEROS = [(7, 10), (11, 17), (14, 21), (15, 24), (16, 24), (16, 24)]


def weights(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "a": nn.Parameter(torch.randn(4, 8, generator=generator)),
        "b": nn.Parameter(torch.randn(3, 16, generator=generator)),
    }


def gradients_are(pruner, value):
    for weight in pruner.weights.values():
        weight.grad = torch.full_like(weight, value)


@pytest.mark.parametrize("pattern", ["layer", "l1"])
def test_against_plain_admm_with_z_and_u_stored_apart(pattern):
    """The one-tensor bookkeeping must be the textbook iteration, step by step."""
    rho, mu, sparsity = 0.7, 0.2, 0.5
    pruner = ADMMPruner(weights(), sparsity, pattern, rho=rho, l1_weight=mu)
    reference = {name: weight.detach().clone() for name, weight in weights().items()}
    # Both start with a Z-step at U = 0; for the hard pattern at sparsity 0, where it changes nothing.
    z = {name: soft_threshold(w, mu / rho) if pattern == "l1" else w.clone() for name, w in reference.items()}
    u = {name: w - z[name] for name, w in reference.items()}
    # 0.5 * (1 - (1 - k/6)^3) of 32 and of 48 weights, by hand; the two sum to that of 80, rounded.
    zeros = [dict(zip("ab", pair, strict=True)) for pair in ZEROS]
    generator = torch.Generator().manual_seed(1)
    for round_ in range(6):
        for _ in range(3):
            gradients_are(pruner, 0.0)
            pruner.add_penalty_gradient()
            for name, w in reference.items():
                noise = 0.05 * torch.randn(w.shape, generator=generator)
                gradient = rho * (w - z[name] + u[name])
                assert torch.allclose(pruner.weights[name].grad, gradient, atol=1e-5)
                w -= 0.1 * gradient + noise
                with torch.no_grad():
                    pruner.weights[name].copy_(w)
        progress = (round_ + 1) / 6
        found = pruner.update(progress)
        z_old = {name: value.clone() for name, value in z.items()}
        for name, w in reference.items():
            x = w + u[name]
            if pattern == "l1":
                z[name] = soft_threshold(x, mu / rho)
            else:
                smallest = x.abs().flatten().argsort()[: zeros[round_][name]]
                z[name] = x.flatten().index_fill(0, smallest, 0.0).view_as(x)
            u[name] = x - z[name]
        assert float(found.admm_penalty) == pytest.approx(
            sum(float(penalty(reference[name], z[name] - u[name], rho)) for name in z), rel=1e-4
        )
        zero_count = sum(int((value == 0).sum()) for value in z.values())
        assert float(found.sparsity) == pytest.approx(zero_count / 80)
        primal = sum((reference[name] - z[name]).square().sum() for name in z).sqrt()
        dual = rho * sum((z[name] - z_old[name]).square().sum() for name in z).sqrt()
        assert float(found.primal_residual) == pytest.approx(float(primal), rel=1e-4)
        assert float(found.dual_residual) == pytest.approx(float(dual), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("pattern", ["layer", "global", "l1"])
@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.5, 0.9, 0.999])
def test_requested_sparsity_is_hit_exactly(pattern, sparsity):
    pruner = ADMMPruner(weights(), sparsity, pattern)
    pruner.update(0.5)
    pruner.finish()
    zeros = sum(int((weight == 0).sum()) for weight in pruner.weights.values())
    assert zeros == int(sparsity * 80 + 0.5)


def test_layer_pattern_prunes_every_layer_alike():
    pruner = ADMMPruner(weights(), 0.5)
    pruner.finish()
    assert [int((weight == 0).sum()) for weight in pruner.weights.values()] == [16, 24]


def test_n_m_pattern_arrives_at_the_pattern_by_degrees():
    pruner = ADMMPruner(weights(), 0.5, "2:4")
    first = pruner.weights["a"]
    kept = [
        mask_rule(lambda: [first], [first.numel()], "2:4", s)(0, first).view(-1, 4).sum(1) for s in (0.0, 0.25, 0.5)
    ]
    assert [set(part.tolist()) for part in kept] == [{4}, {3}, {2}]
    pruner.finish()
    for weight in pruner.weights.values():
        assert ((weight != 0).view(-1, 4).sum(1) == 2).all()


def test_the_hard_prune_takes_the_sparse_copy():
    pruner = ADMMPruner(weights(), 0.5)
    before = {name: weight.detach().clone() for name, weight in pruner.weights.items()}
    pruner.finish()
    for name, weight in pruner.weights.items():
        assert torch.equal(weight, project_cardinality(before[name], 0.5))


def test_the_mask_holds_whatever_the_optimizer_does():
    pruner = ADMMPruner(weights(), 0.5)
    pruner.finish()
    masks = {name: weight.detach() != 0 for name, weight in pruner.weights.items()}
    optimizer = torch.optim.Adam(pruner.weights.values(), lr=0.1)
    for _ in range(3):
        gradients_are(pruner, 1.0)
        pruner.add_penalty_gradient()
        assert all((weight.grad == 1).all() for weight in pruner.weights.values())
        optimizer.step()
        pruner.enforce_mask()
    for name, weight in pruner.weights.items():
        assert torch.equal(weight != 0, masks[name])


@pytest.mark.parametrize("pattern", ["layer", "global", "l1", "2:4"])
def test_a_z_step_makes_no_copy_of_all_weights(pattern):
    """Peak of the allocations on the way, measured: a few copies of one layer, whatever the number of layers."""
    layers = {f"w{i}": nn.Parameter(torch.randn(64, 256)) for i in range(64)}
    bytes_of_one = 64 * 256 * 4
    pruner = ADMMPruner(layers, 0.5, pattern)
    pruner.update(0.5)
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        pruner.update(0.9)
    level = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        level += event.nbytes()
        peak = max(peak, level)
    assert 0 < peak < 32 * bytes_of_one < len(layers) * bytes_of_one


def test_patterns_that_do_not_fit():
    check_pattern({"a": torch.zeros(4, 8)}, "2:4")
    check_pattern({"a": torch.zeros(3)}, "global")
    with pytest.raises(ValueError, match=r"'2:5' does not fit 1 weights, such as a of shape \(4, 8\)"):
        check_pattern({"a": torch.zeros(4, 8)}, "2:5")


def test_one_tensor_per_weight_and_nothing_else():
    for pattern in ("layer", "global", "l1", "2:4"):
        pruner = ADMMPruner(weights(), 0.5, pattern)
        pruner.update(0.9)
        held = [value for value in vars(pruner).values() if isinstance(value, (torch.Tensor, dict, list))]
        tensors = [t for group in held for t in group.values() if isinstance(t, torch.Tensor)]
        extra = sum(t.numel() * t.element_size() for t in tensors if not isinstance(t, nn.Parameter))
        assert extra == sum(w.numel() * w.element_size() for w in pruner.weights.values())


def test_finishing_twice_is_an_error():
    pruner = ADMMPruner(weights(), 0.5)
    pruner.finish()
    with pytest.raises(RuntimeError, match=r"finish\(\) was called after finish\(\)"):
        pruner.finish()
    with pytest.raises(RuntimeError, match="the mask is fixed"):
        pruner.update(1.0)


@pytest.mark.parametrize("finished", [False, True])
def test_state_round_trip(finished):
    first, second = ADMMPruner(weights(), 0.5), ADMMPruner(weights(), 0.5)
    first.update(0.4)
    if finished:
        first.finish()
    second.load({name: t.clone() for name, t in first.tensors().items()}, first.scalars())
    assert second.finished == finished
    for name, weight in second.weights.items():
        with torch.no_grad():
            weight.copy_(first.weights[name])
    if not finished:
        assert [float(r) for r in first.update(0.8)] == [float(r) for r in second.update(0.8)]
    assert all(torch.equal(first.stored[name], second.stored[name]) for name in first.stored)


def test_state_of_other_weights():
    with pytest.raises(ValueError, match="for other weights"):
        ADMMPruner(weights(), 0.5).load({"a": torch.zeros(4, 8)}, {"sparsity": 0.0, "finished": False})


def test_weights_without_a_gradient_are_left_alone():
    pruner = ADMMPruner(weights(), 0.5)
    pruner.weights["a"].grad = torch.zeros(4, 8)
    pruner.add_penalty_gradient()
    assert pruner.weights["b"].grad is None


def test_the_soft_threshold_masks_nothing_before_its_first_step():
    pruner = ADMMPruner(weights(), 0.5, "l1", rho=0.02, l1_weight=0.02)
    assert all(mask.all() for mask in pruner.masks().values())
    pruner.update(0.5)
    assert not all(mask.all() for mask in pruner.masks().values())
