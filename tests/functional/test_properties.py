"""What holds for any input, on inputs drawn at random, and finite values at the extremes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from hf_ntp import functional as fn

FAST = settings(deadline=None, max_examples=25)
seeds = st.integers(0, 2**31 - 1)
sparsities = st.floats(0, 0.999)
positive = st.floats(1e-3, 1e3)


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@FAST
@given(seeds, sparsities)
def test_one_tensor_holds_both_sides_of_a_hard_projection(seed, sparsity):
    """Z, U and the mask come back from the anchor V = Z - U alone."""
    x = draw(seed, 7, 11)
    mask = fn.cardinality_mask(x, fn.num_zeros(x.numel(), sparsity))
    z = x * mask
    anchor = fn.hard_anchor(x, z)
    again = fn.cardinality_mask(anchor, fn.num_zeros(x.numel(), sparsity))
    assert torch.equal(again, mask)
    assert torch.equal(anchor * again, z)
    dual = fn.hard_dual(anchor, anchor * again)
    assert torch.equal(z - dual, anchor)
    assert torch.equal(z + dual, x)


@FAST
@given(seeds, positive)
def test_soft_threshold_splits_as_moreau_says(seed, threshold):
    x = draw(seed, 40) * 3 * threshold
    z, dual = fn.soft_threshold(x, threshold), fn.soft_dual(x, threshold)
    torch.testing.assert_close(z + dual, x)
    torch.testing.assert_close(z - dual, fn.soft_anchor(x, threshold))
    assert float(dual.abs().max()) <= threshold * (1 + 1e-6)
    y = x + draw(seed + 1, 40)
    further = (fn.soft_threshold(y, threshold) - z).norm()
    assert further <= (y - x).norm() * (1 + 1e-6), "a proximal operator moves no two points apart"


@FAST
@given(seeds, st.floats(1e-4, 10))
def test_the_penalty_gradient_is_that_of_autograd(seed, rho):
    weight, anchor, before = draw(seed, 5, 3).requires_grad_(), draw(seed + 1, 5, 3), draw(seed + 2, 5, 3)
    fn.penalty(weight, anchor, rho).backward()
    gradients = [before.clone()]
    fn.add_penalty_gradient_(gradients, [weight.detach()], [anchor], rho)
    torch.testing.assert_close(gradients[0], before + weight.grad, rtol=1e-4, atol=1e-5)
    assert float(fn.primal_residual(weight.detach(), anchor)) == pytest.approx(
        float(2 / rho * fn.penalty(weight.detach(), anchor, rho)), rel=1e-4
    )


@FAST
@given(seeds, st.integers(1, 8), st.integers(1, 8), st.integers(1, 5))
def test_n_m_keeps_the_largest_of_every_group(seed, n, m, groups):
    n = min(n, m)
    x = draw(seed, 3, groups * m)
    mask = fn.n_m_mask(x, n, m).view(-1, m)
    assert (mask.sum(1) == n).all()
    magnitudes = x.abs().view(-1, m)
    kept, gone = magnitudes.masked_fill(~mask, math.inf), magnitudes.masked_fill(mask, -math.inf)
    assert (kept.amin(1) >= gone.amax(1)).all()
    once = fn.project_n_m(x, n, m)
    assert torch.equal(fn.project_n_m(once, n, m), once)


@FAST
@given(st.floats(-1, 2), st.floats(-1, 2), sparsities)
def test_the_schedule_never_falls_and_stays_in_its_range(a, b, sparsity):
    low, high = (fn.cubic_sparsity(t, sparsity) for t in sorted((a, b)))
    assert 0 <= low <= high <= sparsity


@FAST
@given(seeds, st.floats(-20, 20), st.integers(2, 40))
def test_uniform_cross_entropy_is_the_divergence_from_uniform(seed, shift, classes):
    logits = 5 * draw(seed, 6, classes)
    value = float(fn.uniform_cross_entropy(logits))
    expected = -math.log(classes) - float(F.log_softmax(logits.double(), -1).mean())
    assert value == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert value >= -1e-6
    assert float(fn.uniform_cross_entropy(logits + shift)) == pytest.approx(value, rel=1e-3, abs=1e-4)
    assert float(fn.uniform_cross_entropy(torch.full_like(logits, shift))) == pytest.approx(0, abs=1e-5)


@FAST
@given(st.floats(0, 50), st.floats(0.01, 20))
def test_clamped_ascent_is_bounded_with_a_dead_zone(loss, bound):
    value = torch.tensor(loss, requires_grad=True)
    fn.clamped_ascent(value, bound).backward()
    assert float(fn.clamped_ascent(value.detach(), bound)) >= -bound * (1 + 1e-6)
    assert float(value.grad) == (0.0 if loss > bound * (1 + 1e-6) else -1.0) or loss == pytest.approx(bound)


@FAST
@given(seeds, st.floats(0.3, 1e3), st.floats(-100, 100))
def test_token_spread_is_one_at_most_and_ignores_scale(seed, scale, shift):
    tokens = draw(seed, 5, 3, 16)
    spread = float(fn.token_spread(tokens))
    assert 0 <= spread <= 1 + 1e-5, "what is normalised has mean square 1"
    moved = (scale * tokens + shift * scale)[torch.randperm(5)]
    assert float(fn.token_spread(moved)) == pytest.approx(spread, rel=2e-2)


@FAST
@given(seeds, st.floats(0.1, 10))
def test_feature_distance_is_zero_only_where_equal_and_ignores_rotation(seed, scale):
    reference, features = draw(seed, 12, 6), draw(seed + 1, 12, 6)
    distance = fn.feature_distance(features, reference)
    assert 0 < float(distance.cosine) <= 2
    assert float(distance.relative_error) > 0
    assert float(fn.feature_distance(reference, reference).sum()) == pytest.approx(0, abs=1e-5)
    rotation, _ = torch.linalg.qr(draw(seed + 2, 6, 6))
    turned = fn.feature_distance(scale * features @ rotation, scale * reference @ rotation)
    assert [float(v) for v in turned] == pytest.approx([float(v) for v in distance], rel=1e-3)


SHAPES = {
    "one class": (12, 4, 1),
    "1,000 classes": (1200, 4, 1000),
    "one sample per class": (7, 4, 7),
    "one sample": (1, 4, 3),
    "width 4,096": (9, 4096, 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_extremes_have_finite_values_and_gradients(shape, dtype):
    rows, width, classes = SHAPES[shape]
    scale = 100.0 if width > 1000 else 1.0  # squares of these overflow in half precision
    features = (scale * draw(0, rows, width)).to(dtype).requires_grad_()
    reference = (scale * draw(1, rows, width)).to(dtype)
    labels = torch.arange(rows) % classes
    values = {
        "trace_ratio": fn.trace_ratio(features, labels, classes),
        # Seconds of it at this width: see the next test.
        "whitened": features.sum() if width > 1000 else fn.whitened_discriminant(features, labels, classes),
        "collapse": fn.relative_collapse(features[:, None], reference[:, None]),
        "distance": fn.feature_distance(features, reference).sum(),
        "uniform": fn.uniform_cross_entropy(features),
    }
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value, features, retain_graph=True)
        assert math.isfinite(float(value)), name
        assert torch.isfinite(gradient).all(), name


@pytest.mark.slow
def test_the_whitened_form_at_width_4096():
    features = draw(0, 9, 4096).requires_grad_()
    value = fn.whitened_discriminant(features, torch.arange(9) % 3, 3)
    value.backward()
    assert math.isfinite(float(value))
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.999])
def test_masks_are_exact_in_any_precision(dtype, sparsity):
    """Half precision has many ties."""
    x = draw(0, 50, 50).to(dtype)
    assert int((fn.project_cardinality(x, sparsity) == 0).sum()) == fn.num_zeros(2500, sparsity)
    masks = fn.global_cardinality_mask([x, x[:7]], sparsity)
    assert sum(int((~mask).sum()) for mask in masks) == fn.num_zeros(2850, sparsity)
