"""Pretraining without labels."""

import numpy as np
import pytest
import torch
from pytorch_metric_learning.losses import NTXentLoss, SelfSupervisedLoss
from torch.nn import functional as F
from transformers import ViTMAEForPreTraining, ViTModel

from hf_ntp.models import EncoderWithHead
from hf_ntp.training.self_supervised import Contrastive, pretrain, small_encoder

from ..conftest import Rows, tiny_resnet


class Unlabelled(Rows):
    """Smooth images, each of its own: a patch can be told from its neighbours, and an image from the others."""

    def __init__(self, size=48, seed=0):
        super().__init__(size)
        coarse = torch.randn(size, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
        self.images = F.interpolate(coarse, 8, mode="bilinear") + coarse.mean((2, 3), keepdim=True)

    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def contrastive_loss(model, first, second):
    """NT-Xent as Chen et al. (2020) write it, row by row."""
    with torch.no_grad():
        states = model.encoder.encoder(pixel_values=torch.cat([first, second])).last_hidden_state
        features = torch.cat([states[:, 0], states[:, 1:].mean(1)], 1)
        z = F.normalize(model.projection(features)).double().numpy()
    rows, total = len(first), 0.0
    similarity = np.exp(z @ z.T / 0.2)
    for i in range(2 * rows):
        partner = (i + rows) % (2 * rows)
        total -= np.log(similarity[i, partner] / (similarity[i].sum() - similarity[i, i]))
    return total / (2 * rows)


def test_the_loss_is_nt_xent():
    model = Contrastive(small_encoder("simclr", image_size=8)).eval()
    first, second = torch.randn(2, 5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    loss = model(first, second)["loss"].item()
    assert loss == pytest.approx(contrastive_loss(model, first, second), rel=1e-4)
    vectors = torch.randn(2, 6, 4)
    assert model.loss(*vectors) == pytest.approx(SelfSupervisedLoss(NTXentLoss(0.2))(*vectors).item(), rel=1e-5)


@pytest.mark.parametrize(("method", "kind"), [("mae", ViTMAEForPreTraining), ("simclr", ViTModel)])
def test_pretraining_learns_without_labels_and_repeats_itself(method, kind, tmp_path):
    encoders = [small_encoder(method, image_size=8) for _ in range(2)]
    logs = [
        pretrain(method, e, Unlabelled(64), str(tmp_path), 60, 3e-3, batch_size=32, use_cpu=True) for e in encoders
    ]
    assert type(encoders[0]) is kind
    assert all(torch.equal(a, b) for a, b in zip(*(e.parameters() for e in encoders), strict=True))
    losses = [entry["loss"] for entry in logs[0] if "loss" in entry]
    assert losses[-1] < 0.95 * losses[0]


def test_patches_of_a_masked_autoencoder_know_where_they_are():
    """transformers builds it with all positions at zero, which no training would change."""
    encoder = small_encoder("mae", image_size=8)
    for table in (encoder.vit.embeddings.position_embeddings, encoder.decoder.decoder_pos_embed):
        first, second = table[0, 1:3]
        assert not torch.allclose(first, second)
    torch.manual_seed(0)
    assert torch.equal(
        EncoderWithHead(encoder).fresh().encoder.vit.embeddings.position_embeddings,
        encoder.vit.embeddings.position_embeddings,
    )


def test_contrastive_on_a_convolutional_encoder(tmp_path):
    encoder = tiny_resnet().resnet
    before = encoder.embedder.embedder.convolution.weight.clone()
    pretrain("simclr", encoder, Unlabelled(), str(tmp_path), 2, use_cpu=True)
    assert not torch.equal(encoder.embedder.embedder.convolution.weight, before)
