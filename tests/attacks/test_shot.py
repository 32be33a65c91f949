import math

import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, FineTuning
from hf_ntp.attacks.shot import Shot, information_loss, pseudo_labels
from hf_ntp.models import find_head

from ..conftest import Rows, tiny_vit
from .conftest import QUICK, changed, loot_of, state_of


def test_information_by_hand():
    certain = 50.0 * torch.eye(3)
    assert information_loss(certain) == pytest.approx(-math.log(3), rel=1e-5)  # certain and balanced
    assert information_loss(certain[:1].repeat(3, 1)) == pytest.approx(0, abs=1e-5)  # certain, one class only
    assert information_loss(torch.zeros(4, 3)) == pytest.approx(0, abs=1e-5)  # balanced, but uncertain
    # Probabilities (.75, .25) and (.25, .75): entropy of each minus log 2.
    odds = torch.tensor([[math.log(3), 0.0], [0.0, math.log(3)]])
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25) - math.log(2)
    assert information_loss(odds) == pytest.approx(expected, rel=1e-4)


def test_pseudo_labels_follow_the_clusters():
    """Two clusters; one of the first is predicted wrongly, and its neighbours put that right."""
    features = torch.tensor([[1.0, 0.1], [1.0, 0.2], [1.0, 0.3], [0.1, 1.0], [0.2, 1.0], [0.3, 1.0]])
    logits = 5.0 * torch.tensor([[1.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0], [0, 1, 0]])
    assert pseudo_labels(features, logits).tolist() == [0, 0, 0, 1, 1, 1]


def test_classes_that_nobody_is_nearest_to_get_no_label():
    features = -torch.ones(4, 2)  # a centroid of zeros would be nearer than one on the other side
    logits = torch.tensor([[9.0, 0, -200], [9, 0, -200], [9, 0, -200], [9, 0, -200]])
    assert 2 not in pseudo_labels(features, logits)


def test_labels_are_not_used_and_the_head_stays(model):
    loot = loot_of(12)
    before, (head, _) = state_of(model), find_head(model)
    Shot().fit(model, loot, QUICK, 1e-3, 0)
    assert changed(before, model)
    assert not any(name.startswith(f"{head}.") for name in changed(before, model))
    adapted = state_of(model)
    model.load_state_dict(before)
    Shot().fit(model, loot._replace(labels=loot.labels.flip(0)), QUICK, 1e-3, 0)
    assert not changed(adapted, model)


def test_it_adapts_to_a_shifted_domain():
    model, source = tiny_vit(), loot_of(48)
    FineTuning().fit(model, source, FineTuneProtocol(steps=150), 3e-3, 0)
    target, test = ((data.images + 0.5, data.labels) for data in (Rows(48, seed=2), Rows(60, seed=3)))

    def accuracy():
        return float((model.eval()(pixel_values=test[0]).logits.argmax(-1) == test[1]).float().mean())

    before = accuracy()
    Shot().fit(model, source._replace(images=target[0], labels=target[1]), FineTuneProtocol(steps=100), 1e-3, 0)
    assert before < 0.9 < accuracy()


def test_another_number_of_classes():
    assert "3 classes" in Shot().unsuitable(tiny_vit(), 4)
    assert Shot().unsuitable(tiny_vit(), 3) is None


def test_bad_weight():
    with pytest.raises(ValueError, match=">= 0"):
        Shot(-1)
