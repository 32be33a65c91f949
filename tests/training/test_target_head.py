import torch
from torch.nn import functional as F

from hf_ntp.training.target_head import TargetHead


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(30) % 3
    return torch.randn(30, 5, generator=generator) + 2 * F.one_hot(labels, 5), labels


def test_refitting_is_adam_on_the_cross_entropy():
    """The written-out gradient against autograd and an ordinary optimizer."""
    features, labels = data()
    head = TargetHead(5, 3, 1e-2, seed=1)
    reference = TargetHead(5, 3, 1e-2, seed=1).linear
    optimizer = torch.optim.Adam(reference.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(reference(features), labels).backward()
        optimizer.step()
    head.refit(features, labels, 5)
    assert torch.allclose(head.linear.weight, reference.weight, atol=1e-5)
    assert torch.allclose(head.linear.bias, reference.bias, atol=1e-5)


def test_the_gradient_reaches_the_features_only():
    features, labels = data()
    features.requires_grad_()
    head = TargetHead(5, 3, 1e-2, seed=1)
    F.cross_entropy(head(features), labels).backward()
    assert features.grad.abs().sum() > 0
    assert head.linear.weight.grad is None


def test_it_follows_features_that_move():
    head = TargetHead(5, 3, 1e-1, seed=1)
    features, labels = data()
    for shift in range(4):
        moved = features.roll(shift, dims=1)
        head.refit(moved, labels, 200)
        assert (head(moved).argmax(1) == labels).float().mean() > 0.9


def test_state_round_trip():
    features, labels = data()
    first, second = TargetHead(5, 3, 1e-2, seed=1), TargetHead(5, 3, 1e-2, seed=2)
    first.refit(features, labels, 3)
    second.load({name: tensor.clone() for name, tensor in first.tensors().items()})
    for head in (first, second):
        head.refit(features, labels, 3)
    assert torch.equal(first.linear.weight, second.linear.weight)
