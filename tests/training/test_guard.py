import math

import pytest
import torch
from torch.nn import functional as F

from hf_ntp.functional import feature_distance
from hf_ntp.models import find_head, recorded_features
from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.guard import FeatureGuard, SourceGuard

from ..conftest import Rows, tiny_resnet, tiny_vit


def guard(**options):
    return SourceGuard(tiny_vit(), ProtectionArguments(**options), torch.device("cpu"))


def test_the_share_falls_beyond_the_tolerance():
    """Full up to the tolerance, nothing from twice the tolerance on; the tolerance falls geometrically."""
    ours = guard(source_tolerance=[0.4, 0.1])
    found = []
    for progress, excess in ((0, -1.0), (0, 0.4), (0, 0.6), (0, 0.9), (0.5, 0.3), (1, 0.15)):
        ours.excess = torch.tensor(excess)
        found.append(float(ours.share(progress)))
    assert found == pytest.approx([1.0, 1.0, 0.5, 0.0, 0.5, 0.5])


def test_excess_and_divergence_by_hand():
    ours, data = guard(), Rows(size=6)
    logits = tiny_vit().eval()(data.images).logits.detach()
    assert ours.compare(data.images, logits, data.labels) == pytest.approx(0.0, abs=1e-6)
    assert float(ours.excess) == pytest.approx(0.0, abs=1e-6)
    uniform = torch.zeros(6, 3, requires_grad=True)
    divergence = ours.compare(data.images, uniform, data.labels)
    teacher = logits.softmax(-1)
    assert divergence.item() == pytest.approx(
        float((teacher * (teacher.log() + math.log(3))).sum(-1).mean()), rel=1e-4
    )
    assert float(ours.excess) == pytest.approx(
        0.1 * (math.log(3) - float(F.cross_entropy(logits, data.labels))), rel=1e-4
    )
    divergence.backward()
    assert uniform.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.original.parameters())


def test_nothing_is_copied_when_nothing_needs_it():
    ours = guard(source_distillation=0.0, source_tolerance=[])
    assert ours.original is None
    assert ours.share(0.5) == 1.0
    assert ours.compare(torch.zeros(1), torch.zeros(1), torch.zeros(1)) is None


def features(model, images):
    with recorded_features(find_head(model)[1]) as recorded:
        model(images)
    return recorded[0]


def test_matching_features_by_hand():
    ours, data = FeatureGuard(tiny_vit(), ProtectionArguments(), torch.device("cpu")), Rows(size=6)
    original = features(tiny_vit().eval(), data.images).detach()
    assert ours.match(data.images, original) == pytest.approx(0.0, abs=1e-6)
    assert float(ours.excess) == pytest.approx(0.0, abs=1e-6)
    moved = (original + torch.randn(6, 16, generator=torch.Generator().manual_seed(0))).requires_grad_()
    cosine, error = feature_distance(moved, original)
    loss = ours.match(data.images, moved)
    assert loss.item() == pytest.approx((cosine + error).item(), rel=1e-5)
    assert float(ours.excess) == pytest.approx(0.1 * error.item(), rel=1e-4)
    loss.backward()
    assert moved.grad.abs().sum() > 0
    assert not any(parameter.requires_grad for parameter in ours.original.parameters())


def test_batch_norm_is_the_same_on_both_sides():
    """While training, with the batch; in evaluation, with running statistics, which stay as they are."""
    model, data = tiny_resnet().train(), Rows(size=12)
    ours = FeatureGuard(model, ProtectionArguments(), torch.device("cpu"))
    before = {name: buffer.clone() for name, buffer in ours.original.named_buffers()}
    assert ours.match(data.images, features(model, data.images)).item() == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(buffer, before[name]) for name, buffer in ours.original.named_buffers())
    distance = ours.distance(data.images, features(tiny_resnet().eval(), data.images))
    assert distance.cosine.item() == pytest.approx(0, abs=1e-5)


def test_the_limit_of_features_is_their_own():
    ours = FeatureGuard(tiny_vit(), ProtectionArguments(feature_tolerance=[0.4, 0.1]), torch.device("cpu"))
    ours.excess = torch.tensor(0.6)
    assert ours.share(0) == pytest.approx(0.5)
    free = FeatureGuard(tiny_vit(), ProtectionArguments(feature_tolerance=[]), torch.device("cpu"))
    assert free.share(0) == 1.0
