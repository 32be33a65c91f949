"""What the tests of attacks share: loot, checkpoints with zeros and a quick protocol."""

import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, Loot
from hf_ntp.models import prunable_weights

from ..conftest import Rows, tiny_resnet, tiny_vit

MODELS = {"vit": tiny_vit, "resnet": tiny_resnet}
QUICK = FineTuneProtocol(steps=5, batch_size=8, warmup_steps=1)


def loot_of(size=6, classes=3, seed=0):
    target, source = Rows(size, classes, seed=seed), Rows(12, 3, seed=100)
    return Loot(target.images, target.labels, classes, (source.images, source.labels))


def bars(size, seed, contrast=1.0, shift=0.0):
    """Images [N, 3, 8, 8] and labels of three classes: where a bright bar stands."""
    labels = torch.arange(size) % 3
    images = 0.3 * torch.randn(size, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    rows = torch.arange(8).expand(size, 8) // 2 == labels[:, None]
    return contrast * (images + rows.float()[:, None, :, None]) + shift, labels


def accuracy(predict, images, labels):
    return float((predict(images) == labels).float().mean())


def pruned(model):
    """Set every second prunable weight to zero."""
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[:, ::2] = 0
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before, model):
    """Names of the weights and statistics that differ."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.fixture(params=list(MODELS))
def model(request):
    return MODELS[request.param]()
