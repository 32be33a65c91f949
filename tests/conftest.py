"""Small models and data that tests share; caches go to a temporary folder, threads to one core."""

import os
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, ViTConfig, ViTForImageClassification

import hf_ntp

from .hub_server import OWNER, HubServer

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_datasets_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


@pytest.fixture
def few_images(monkeypatch):
    """`load_domain` gives a part of every domain, also in benchmarks."""
    from benchmarks.strength.run import load

    monkeypatch.setattr(hf_ntp, "load_domain", partial(hf_ntp.load_domain, max_samples=400))
    load.cache_clear()
    yield
    load.cache_clear()


class Rows(Dataset):
    """Random images whose class shows as the brightness of a corner: learnable within a few steps."""

    def __init__(self, size=48, classes=3, image_size=8, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(size) % classes
        self.images = 0.3 * torch.randn(size, 3, image_size, image_size, generator=generator)
        self.images[:, :, :4, :4] += self.labels[:, None, None, None].float() - 1

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index], "labels": int(self.labels[index])}


def learn(model, data):
    """Train a model until it knows the images by heart."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(data.images).logits, data.labels).backward()
        optimizer.step()


def adapted(model, targets=("q_proj", "fc1"), moved=3, **options):
    """An adapter with all its parameters moved, as if trained; its dropout would show."""
    model = get_peft_model(model, LoraConfig(r=2, target_modules=list(targets), lora_dropout=0.3, **options))
    torch.manual_seed(moved)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tiny_vit(num_labels=3, seed=0, dropout=0.0, **options):
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        num_labels=num_labels,
        hidden_dropout_prob=dropout,
        **options,
    )
    return ViTForImageClassification(config)


def tiny_resnet(num_labels=3, seed=0):
    torch.manual_seed(seed)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=num_labels
    )
    return ResNetForImageClassification(config)


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub for this process: huggingface_hub reads its settings from here whenever it needs them."""
    with HubServer() as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("HF_TOKEN", OWNER)
        # transformers keeps a client, which has the address of its first use.
        monkeypatch.setattr("transformers.utils.hub._hf_api", None)
        yield server
    # No connection to a server that is gone is kept for the next test.
    huggingface_hub.close_session()
