import math
from types import SimpleNamespace

import pytest
import torch
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher, Trainer, TrainingArguments

from hf_ntp.training.pretraining import _cross_entropy, train_classifier

from ..conftest import Rows, tiny_vit


def test_weights_that_are_not_finite_are_no_result(tmp_path):
    """They would be saved as the unprotected model, and every later run of that folder would begin with them."""
    with pytest.raises(FloatingPointError, match=r"weights are not finite after 5 steps.*learning_rate, 1e\+30"):
        train_classifier(tiny_vit(), Rows(), str(tmp_path), steps=5, learning_rate=1e30, use_cpu=True)


def test_a_step_has_as_many_images_on_any_number_of_processes(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(TrainingArguments, "world_size", property(lambda args: 4))
    monkeypatch.setattr(Trainer, "train", lambda trainer: sizes.append(trainer.args.per_device_train_batch_size))
    monkeypatch.setattr(Trainer, "state", SimpleNamespace(log_history=[]), raising=False)
    train_classifier(tiny_vit(), Rows(), str(tmp_path), steps=1, batch_size=32, use_cpu=True)
    assert sizes == [8]


def test_a_model_that_takes_no_labels(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(image_size=8, patch_size=4, num_labels=3, **sizes))
    train_classifier(model, Rows(), str(tmp_path), steps=40, learning_rate=1e-2, use_cpu=True)
    half = SimpleNamespace(logits=torch.zeros(4, 3))
    assert float(_cross_entropy(half, torch.zeros(4, dtype=torch.long), 8)) == pytest.approx(math.log(3) / 2)
    assert (model.eval()(Rows().images).logits.argmax(-1) == Rows().labels).float().mean() > 0.9
