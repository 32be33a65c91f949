import math

import pytest
import torch
from torch.nn import functional as F

from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.guard import SourceGuard

from ..conftest import Rows, tiny_vit


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
