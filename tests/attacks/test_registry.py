"""What holds for every attack."""

import hashlib
import json
import pickle
from dataclasses import asdict, replace

import pytest
import torch
from transformers import AutoModelForImageClassification

from hf_ntp.attacks import ATTACKS, DECISIVE, FineTuneProtocol, Loot

from ..conftest import Rows, tiny_vit
from .conftest import MODELS, QUICK, accuracy, bars, loot_of, pruned, state_of


@pytest.fixture(scope="module", params=list(MODELS))
def checkpoint(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pruned(MODELS[request.param]()).save_pretrained(folder)
    return folder


def run(checkpoint, attack, seed=0):
    """Return predictions for 12 images and the attacked model's weights."""
    model = AutoModelForImageClassification.from_pretrained(checkpoint, dtype=torch.float32)
    assert attack.unsuitable(model, 3) is None
    predict = attack.fit(model, loot_of(), QUICK, attack.grid(QUICK)[-1], seed)
    images = Rows(12, seed=1).images
    predicted = predict(images)
    assert torch.equal(predicted, predict(images)), "prediction has a state"
    return predicted, state_of(model)


@pytest.mark.parametrize("name", ATTACKS)
def test_contract(name, checkpoint):
    attack, file = ATTACKS[name], checkpoint / "model.safetensors"
    if reason := attack.unsuitable(AutoModelForImageClassification.from_pretrained(checkpoint), 3):
        pytest.skip(reason)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    predicted, weights = run(checkpoint, attack)
    assert predicted.dtype == torch.int64
    assert predicted.shape == (12,)
    assert 0 <= predicted.min() <= predicted.max() < 3
    again, same_weights = run(checkpoint, pickle.loads(pickle.dumps(attack)))
    assert torch.equal(predicted, again)
    assert all(torch.equal(value, same_weights[key]) for key, value in weights.items())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("name", ATTACKS)
def test_settings_are_json_and_hashable(name):
    attack = ATTACKS[name]
    json.dumps(asdict(attack), allow_nan=False)
    assert hash(attack) == hash(replace(attack))
    grid = attack.grid(FineTuneProtocol())
    assert list(grid) == sorted(set(grid))


def test_every_attack_is_a_different_one():
    assert len(set(ATTACKS.values())) == len(ATTACKS)
    assert set(DECISIVE) <= ATTACKS.keys()


@pytest.mark.parametrize("name", ATTACKS)
def test_other_numbers_of_classes(name):
    """Either it runs, or it says why it makes no sense."""
    attack, model = ATTACKS[name], pruned(tiny_vit(num_labels=3))
    reason = attack.unsuitable(model, 4)
    if reason is not None:
        assert "3 classes" in reason or "no BatchNorm" in reason
        return
    predict = attack.fit(model, loot_of(8, classes=4), QUICK, attack.grid(QUICK)[0], 0)
    assert predict(Rows(8, 4).images).max() < 4


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in ("shot", "as_published")])
def test_labels_are_learnt(name):
    """Clearly better than chance, a third (0.5 is four standard deviations above it), from a random encoder."""
    attack, protocol = ATTACKS[name], FineTuneProtocol(steps=80, batch_size=24, learning_rates=(3e-3,))
    grid = attack.grid(protocol)
    loot = Loot(*bars(90, 0), 3, bars(30, 1, shift=0.5))
    predict = attack.fit(tiny_vit(), loot, protocol, grid[len(grid) // 2], 0)
    assert accuracy(predict, *bars(120, 2)) > 0.5
