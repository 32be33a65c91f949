"""What the protection knows of the target: labelled images, unlabelled ones, or nothing."""

import json

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from hf_ntp.data import Neighbourhood
from hf_ntp.models import find_head
from hf_ntp.training.pseudo_labels import Relabelled, with_clusters

from ..conftest import Rows, tiny_resnet, tiny_vit
from .test_headless import Unlabelled, tiny_encoder
from .test_trainer import NOTHING, Stop, trainer

UNLABELLED = {"target_access": "unlabelled", "pseudo_classes": 4}


class Shades(Dataset):
    """Flat images of well separated brightness, in an order of their own, and no labels."""

    def __init__(self, shades):
        self.shades = shades

    def __len__(self):
        return len(self.shades)

    def __getitem__(self, index):
        return {"pixel_values": torch.full((3, 8, 8), float(self.shades[index]))}


def clusters(data, model=None, **options):
    model = tiny_vit() if model is None else model
    settings = {"num_clusters": 3, "seed": 0, "device": torch.device("cpu"), **options}
    return with_clusters(data, model, find_head(model)[1], **settings)


def test_clusters_are_what_the_features_tell_apart():
    kinds = np.array([0, 2, 1, 1, 0, 2, 2, 0, 1, 0])
    found = clusters(Shades(kinds * 3.0 - 3.0)).labels
    assert len(set(zip(kinds, found, strict=True))) == 3  # a renaming of the kinds
    assert found.dtype == np.int64


def test_clusters_are_the_same_every_time_and_leave_the_model_alone():
    model = tiny_resnet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = clusters(Rows(), model), clusters(Unlabelled(), tiny_resnet())
    assert np.array_equal(first.labels, second.labels)
    assert first.fingerprint == second.fingerprint != clusters(Rows(seed=1), model).fingerprint
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_more_clusters_than_images():
    with pytest.raises(ValueError, match="pseudo_classes is 20 for 10 unlabelled images"):
        clusters(Unlabelled(size=10), num_clusters=20)


def test_other_labels_come_with_the_same_images():
    data = Relabelled(Rows(), np.arange(48))
    rows = data.__getitems__([5, 7])
    assert [row["labels"] for row in rows] == [5, 7]
    assert torch.equal(rows[1]["pixel_values"], Rows().images[7])


def test_true_labels_change_nothing_without_access_to_them(tmp_path):
    models = [tiny_vit(), tiny_vit()]
    for name, model, target in zip("ab", models, (Rows(20, 4, seed=1), Unlabelled(20, 4, seed=1)), strict=True):
        ours = trainer(tmp_path / name, model, target=target, **UNLABELLED)
        ours.train()
    assert all(torch.equal(value, models[1].state_dict()[name]) for name, value in models[0].state_dict().items())
    assert ours.heads["target"].linear.out_features == 4
    last = [row for row in ours.state.log_history if "loss" in row][-1]
    assert {"fisher_loss", "collapse_loss", "attacker_loss"} <= last.keys()


@pytest.mark.parametrize("access", ["unlabelled", "none"])
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, access):
    options = {"target_access": access, "pseudo_classes": 4, "save_strategy": "steps", "save_steps": 6}
    target = Unlabelled(20, 4, seed=1) if access == "unlabelled" else NOTHING
    whole = trainer(tmp_path / "whole", target=target, **options)
    whole.train()
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "cut", target=target, callbacks=[Stop(7)], **options).train()
    resumed = trainer(tmp_path / "cut", target=target, **options)
    resumed.train(resume_from_checkpoint=True)
    for (name, a), (_, b) in zip(whole.model.state_dict().items(), resumed.model.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    settings = json.loads((tmp_path / "cut" / "checkpoint-6" / "ntp_state.json").read_text())["settings"]
    assert settings["target_access"] == access
    known = {"unlabelled": "20 rows, labels ", "none": "neighbourhood of 48 rows"}[access]
    assert all(value.startswith(known) for _, value in settings["data"]["targets"])


def test_without_any_target_data(tmp_path):
    ours = trainer(tmp_path, target=NOTHING, target_access="none")
    assert list(ours.heads) == ["neighbourhood"]
    assert isinstance(ours.train_dataset.targets["neighbourhood"], Neighbourhood)
    assert np.array_equal(ours.target_labels["neighbourhood"], Rows().labels)
    ours.train()
    assert ours.model.config.ntp["sparsity"] == pytest.approx(0.6, abs=1e-3)


def test_without_target_data_and_without_any_labels(tmp_path):
    ours = trainer(
        tmp_path, tiny_encoder(), source=Unlabelled(), target=NOTHING, target_access="none", pseudo_classes=5
    )
    assert set(ours.target_labels["neighbourhood"]) == set(range(5))
    ours.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_access": "none"}, "target_dataset is Rows and target_access is 'none'"),
        ({"target": NOTHING}, "target_dataset is None and target_access is 'labelled'"),
        ({"target": NOTHING, "target_access": "unlabelled"}, "target_dataset is None and target_access is 'unl"),
        ({"target_access": "some"}, "target_access is 'some'; needed: one of 'labelled', 'unlabelled', 'none'"),
        ({"target_access": "unlabelled", "pseudo_classes": 1}, "pseudo_classes is 1"),
        ({"target_access": "unlabelled", "target": Unlabelled(size=0)}, "target 'target': there are no rows"),
    ],
)
def test_access_and_data_must_fit(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **options)
