import math

import numpy as np
import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, FineTuning, Loot, shot
from hf_ntp.attacks.shot import Shot, information_loss, pseudo_labels
from hf_ntp.models import find_head

from ..conftest import tiny_vit
from ..evaluation.conftest import pixels
from .conftest import QUICK, accuracy, bars, changed, loot_of, state_of


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


def test_pseudo_labels_against_two_written_out_rounds():
    rng = np.random.default_rng(0)
    features, logits = rng.normal(size=(40, 5)), rng.normal(size=(40, 3))
    weights = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    rounds = []
    for _ in range(2):
        labels = []
        for point in features:
            cosines = []
            for k in range(3):
                units = features / np.linalg.norm(features, axis=1, keepdims=True)
                centroid = (weights[:, k, None] * units).sum(0) / weights[:, k].sum()
                cosines.append(point @ centroid / np.linalg.norm(point) / np.linalg.norm(centroid))
            labels.append(int(np.argmax(cosines)))
        weights = np.eye(3)[labels]
        rounds.append(labels)
    assert rounds[0] != rounds[1]
    assert pseudo_labels(torch.tensor(features), torch.tensor(logits)).tolist() == rounds[1]


def test_classes_that_nobody_is_predicted_as_get_no_label():
    """The last point lies opposite the only centroid; a centroid of zeros would be nearer."""
    features = torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    logits = torch.tensor([[0.0, -200.0, -200.0]]).repeat(3, 1)
    assert pseudo_labels(features, logits).tolist() == [0, 0, 0]


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
    """Bright and pale images, for a model that has only seen ordinary ones."""
    model, (images, _), test = tiny_vit(), bars(48, 1, 0.5, 1.0), bars(90, 2, 0.5, 1.0)
    predict = FineTuning().fit(model, Loot(*bars(48, 0), 3), FineTuneProtocol(steps=100), 3e-3, 0)
    assert accuracy(predict, *test) < 0.6
    no_labels = torch.full((48,), -1)
    predict = Shot().fit(model, Loot(images, no_labels, 3), FineTuneProtocol(steps=100), 1e-3, 0)
    assert accuracy(predict, *test) > 0.9


def test_unlabelled_images_of_the_pool_are_used(model, monkeypatch):
    """However few are labelled; no more than fit in memory, and others with another seed."""
    loot, used = loot_of(3)._replace(pool=pixels(20, 0)), []
    monkeypatch.setattr(shot, "train", lambda *args: None)
    monkeypatch.setattr(Shot, "_loss", lambda self, model, images, *rest: used.append(images))
    for attack, seed in ((Shot(), 0), (Shot(images=8), 0), (Shot(images=8), 1)):
        attack.fit(model, loot, QUICK, 1e-3, seed)
    assert [len(images) for images in used] == [20, 8, 8]
    assert used[1].equal(used[0][:8])
    assert not used[1].equal(used[2])
    everything, _ = loot.pool.tensors()
    assert sorted(used[0].flatten(1).sum(1).tolist()) == sorted(everything.flatten(1).sum(1).tolist())


def test_another_number_of_classes():
    assert "3 classes" in Shot().unsuitable(tiny_vit(), 4)
    assert Shot().unsuitable(tiny_vit(), 3) is None


def test_bad_values():
    with pytest.raises(ValueError, match="pseudo_weight >= 0"):
        Shot(-1)
    with pytest.raises(ValueError, match="images >= 1"):
        Shot(images=0)


def test_pseudo_labels_are_renewed_as_the_features_move(monkeypatch):
    calls, real = [], shot.pseudo_labels
    monkeypatch.setattr(shot, "pseudo_labels", lambda *given: calls.append(1) or real(*given))
    protocol = FineTuneProtocol(steps=30, batch_size=8, learning_rates=(1e-3,), warmup_steps=1)
    Shot().fit(tiny_vit(), loot_of(24), protocol, 1e-3, 0)
    assert len(calls) == 15
