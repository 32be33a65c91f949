import math

import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, FineTuning
from hf_ntp.attacks.distillation import Distillation, softened_divergence
from hf_ntp.models.changes import fresh_model

from ..conftest import Rows
from .conftest import QUICK, loot_of


def test_divergence_by_hand():
    """T = 2 turns logits log 9 and 0 into odds of 3: 4 (.75 log(.75 / .5) + .25 log(.25 / .5))."""
    teacher, student = torch.tensor([[math.log(9), 0.0]]), torch.zeros(1, 2)
    expected = 4 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert softened_divergence(teacher, student, 2.0) == pytest.approx(expected, rel=1e-5)
    assert softened_divergence(teacher, teacher, 2.0) == pytest.approx(0, abs=1e-6)


def test_without_a_teacher_it_is_scratch_training(model):
    loot, images = loot_of(24), Rows(60, seed=1).images
    protocol = FineTuneProtocol(steps=20, batch_size=8, warmup_steps=2)
    scratch = fresh_model(model, 7)
    expected = FineTuning(keep_head=True).fit(scratch, loot, protocol, 1e-3, 7)(images)
    predict = Distillation(logit_weight=0, feature_weight=0).fit(model, loot, protocol, 1e-3, 7)
    assert torch.equal(predict(images), expected)


def test_the_teacher_and_its_features_matter(model):
    """At first, the student's loss has the parts that it should have."""
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


def test_the_students_weights_are_not_the_teachers(model):
    loot = loot_of(24)
    Distillation().fit(model, loot, QUICK, 1e-3, 0)
    teacher = model.eval()(pixel_values=loot.images).logits
    again = FineTuning().fit(model, loot, QUICK, 1e-9, 0)
    assert torch.isfinite(teacher).all()
    assert again(loot.images).shape == (24,)


@pytest.mark.parametrize("options", [{"temperature": 0}, {"logit_weight": -1}, {"feature_weight": -1}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="needed"):
        Distillation(**options)
