import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import ViTImageProcessorPil

from hf_ntp import AttackData, PixelDataset
from hf_ntp.models import prunable_weights

from ..conftest import tiny_vit


def pixels(size, seed, classes=3):
    """Bright bars whose position is the class, as a real image dataset."""
    rng = np.random.default_rng(seed)
    labels = np.arange(size) % classes
    images = []
    for label in labels:
        array = rng.integers(0, 60, (8, 8, 3), dtype=np.uint8)
        array[:, 2 * label : 2 * label + 2] = 230
        images.append(Image.fromarray(array))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=classes)})
    data = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return PixelDataset.from_dataset(data, processor)


def attack_data():
    return AttackData(pixels(24, 0), pixels(12, 1), pixels(12, 2))


@pytest.fixture
def attack():
    return attack_data()


@pytest.fixture
def checkpoints(tmp_path):
    """Folders of an unprotected model and of one with half of its weights at zero."""
    model = tiny_vit()
    model.save_pretrained(tmp_path / "unprotected")
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[:, ::2] = 0
    model.save_pretrained(tmp_path / "protected")
    return str(tmp_path / "unprotected"), str(tmp_path / "protected")
