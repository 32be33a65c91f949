import copy

import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, FineTuning, distillation
from hf_ntp.attacks.distillation import Distillation
from hf_ntp.models import EncoderWithHead, find_head
from hf_ntp.models.changes import fresh_model

from ..conftest import Rows, tiny_vit
from .conftest import QUICK, changed, loot_of, state_of


def test_without_a_teacher_it_is_scratch_training(model):
    loot, images = loot_of(24), Rows(60, seed=1).images
    protocol = FineTuneProtocol(steps=20, batch_size=8, warmup_steps=2)
    scratch = fresh_model(model, 7)
    expected = FineTuning(keep_head=True).fit(scratch, loot, protocol, 1e-3, 7)(images)
    predict = Distillation(logit_weight=0, feature_weight=0).fit(model, loot, protocol, 1e-3, 7)
    assert torch.equal(predict(images), expected)


def test_the_students_head_learns_where_the_model_has_none(monkeypatch):
    """The stand-in for a head is fixed while an encoder is protected."""
    trained = []
    monkeypatch.setattr(distillation, "train", lambda model, parameters, *_: trained.append((model, list(parameters))))
    encoder = EncoderWithHead(tiny_vit().vit)
    Distillation().fit(encoder, loot_of(), QUICK, 1e-3, 0)
    ((student, parameters),) = trained
    _, head = find_head(student)
    assert head.weight.requires_grad
    assert any(parameter is head.weight for parameter in parameters)


def test_the_loss_is_the_weighted_sum_of_its_parts(model):
    loot = loot_of(6)
    student = fresh_model(model, 0)
    width = 16
    mapping = torch.nn.Linear(width, width)
    logits, features = torch.randn(6, 3), torch.randn(6, width)
    parts = [
        float(Distillation(4.0, *weights)._loss(student, mapping, loot, logits, features, 6, 0)().detach())
        for weights in ((0, 0), (1, 0), (0, 1), (2, 3))
    ]
    plain, with_logits, with_features, both = parts
    assert plain < with_logits
    assert plain < with_features
    assert both == pytest.approx(plain + 2 * (with_logits - plain) + 3 * (with_features - plain), rel=1e-4)


def test_the_teacher_is_the_fine_tuned_checkpoint(model):
    """The student learns from it but is another model."""
    loot = loot_of(24)
    checkpoint = copy.deepcopy(model)
    Distillation().fit(model, loot, QUICK, 1e-3, 0)
    FineTuning().fit(checkpoint, loot, QUICK, 1e-3, 0)
    assert not changed(state_of(checkpoint), model)


def test_the_scale_of_the_features_does_not_matter(monkeypatch):
    """A checkpoint that inflates its features must not drown the other terms of the loss."""
    images, found = Rows(60, seed=1).images, []
    real = distillation.features_and_logits
    for scale in (1, 1024):
        monkeypatch.setattr(
            distillation, "features_and_logits", lambda *args, s=scale: (s * real(*args)[0], real(*args)[1])
        )
        found.append(Distillation().fit(tiny_vit(), loot_of(24), QUICK, 1e-2, 0)(images))
    assert torch.equal(*found)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"logit_weight": -1}, {"feature_weight": -1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="needed"):
        Distillation(**options)
