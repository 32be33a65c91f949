"""Encoders without a head, and sources without labels."""

import datasets
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ViTImageProcessorPil,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)

from hf_ntp import PixelDataset
from hf_ntp.functional import feature_distance
from hf_ntp.models import EncoderWithHead, mask_noise, untrained

from ..conftest import Rows, tiny_vit
from ..evaluation.conftest import pixels
from .test_trainer import NO_TARGET, trainer


class Unlabelled(Rows):
    def __getitem__(self, index):
        return {"pixel_values": self.images[index]}


def tiny_encoder(**options):
    return tiny_vit(**options).vit


def same(model, other):
    return all(torch.equal(value, other.state_dict()[key]) for key, value in model.state_dict().items())


def test_labels_of_the_source_change_nothing(tmp_path):
    first, second = tiny_encoder(), tiny_encoder()
    trainer(tmp_path / "a", first).train()
    ours = trainer(tmp_path / "b", second, source=Unlabelled())
    ours.train()
    assert same(first, second)
    assert isinstance(ours.model, EncoderWithHead)
    assert ours.model.encoder is second
    assert second.config.ntp["sparsity"] == pytest.approx(0.6, abs=1e-3)
    logged = [row for row in ours.state.log_history if "loss" in row]
    assert all({"source_loss", "source_excess", "attacker_loss"} <= row.keys() for row in logged)
    assert not any("distillation_loss" in row for row in logged)


def test_features_are_kept(tmp_path):
    """Pruned while its features are matched, an encoder stays closer to the original than pruned alone."""
    options = {"max_steps": 80, "learning_rate": 3e-3, **NO_TARGET}
    images = Rows(seed=9).images
    errors = []
    for name, rate in (("matched", 3e-3), ("pruned", 1e-12)):
        ours = trainer(tmp_path / name, tiny_encoder(), source=Unlabelled(), **{**options, "learning_rate": rate})
        ours.train()
        with torch.no_grad():
            states = [m.eval()(images).last_hidden_state[:, 0] for m in (ours.model.encoder, tiny_encoder())]
        errors.append(float(feature_distance(*states).relative_error))
    assert errors[0] < 0.5 * errors[1]


def test_the_loss_is_the_distance_of_features(tmp_path):
    ours = trainer(tmp_path, tiny_encoder(), source=Unlabelled(), **NO_TARGET)
    ours.train()
    batch = next(iter(ours.get_train_dataloader()))
    assert "labels" not in batch
    loss = ours.compute_loss(ours.model.eval(), batch)
    states = [m.eval()(batch["pixel_values"]).last_hidden_state for m in (ours.model.encoder, tiny_encoder())]
    features = [torch.cat([state[:, 0], state[:, 1:].mean(1)], 1) for state in states]
    assert loss.item() == pytest.approx(sum(feature_distance(*features)).item(), rel=1e-4)


def test_evaluation_needs_no_labels(tmp_path):
    ours = trainer(tmp_path, tiny_encoder(), source=Unlabelled())
    assert ours.evaluate(Unlabelled(size=10, seed=5))["eval_loss"] == pytest.approx(0, abs=1e-5)
    ours.train()
    metrics = ours.evaluate(Rows(size=10, seed=5))
    assert metrics["eval_loss"] > 0
    assert "eval_accuracy" not in metrics


def test_a_folder_without_head_resumes(tmp_path):
    """A ViT saved without pooler gets a random one whenever it is loaded; that is none of the run's business."""
    ViTModel(tiny_vit().config, add_pooling_layer=False).save_pretrained(tmp_path / "base")
    options = {"save_strategy": "steps", "save_steps": 6, "source": Unlabelled()}
    whole = trainer(tmp_path / "run", str(tmp_path / "base"), **options)
    whole.train()
    again = trainer(tmp_path / "run", str(tmp_path / "base"), **options)
    again.train(str(tmp_path / "run" / "checkpoint-6"))
    assert type(whole.model.encoder) is ViTModel
    assert same(whole.model, again.model)
    plain = ViTModel.from_pretrained(tmp_path / "run" / "checkpoint-12")
    assert same(plain, again.model.encoder)


def test_an_encoder_built_without_pooler_resumes(tmp_path):
    """Its class has one by default, and so has what is read of a checkpoint."""

    def ours():
        encoder = ViTModel(tiny_vit().config, add_pooling_layer=False)
        return trainer(tmp_path, encoder, save_strategy="steps", save_steps=6, source=Unlabelled())

    torch.manual_seed(0)
    whole = ours()
    whole.train()
    torch.manual_seed(0)
    again = ours()
    again.train(str(tmp_path / "checkpoint-6"))
    assert same(whole.model, again.model)


def test_a_model_with_head_may_keep_its_features(tmp_path):
    model = tiny_vit()
    before = model.classifier.weight.clone()
    ours = trainer(tmp_path, model, source=Unlabelled(), source_loss="features")
    ours.train()
    assert torch.equal(model.classifier.weight, before)  # it has no part in the features
    assert not torch.equal(model.vit.layers[0].mlp.fc1.weight, tiny_vit().vit.layers[0].mlp.fc1.weight)
    metrics = ours.evaluate(Rows(size=10, seed=5))
    logits = model.eval()(Rows(size=10, seed=5).images).logits
    assert metrics["eval_loss"] == pytest.approx(float(F.cross_entropy(logits, Rows(size=10).labels)), rel=1e-4)
    assert "eval_accuracy" in metrics


def test_labels_without_a_head_are_refused(tmp_path):
    with pytest.raises(ValueError, match="source_loss is 'labels' but the model has no classification head"):
        trainer(tmp_path, tiny_encoder(), source_loss="labels")


def test_a_head_needs_labels(tmp_path):
    with pytest.raises(ValueError, match="needed: 'pixel_values' and 'labels'"):
        trainer(tmp_path, source=Unlabelled())
    with pytest.raises(ValueError, match="source_loss is 'all'"):
        trainer(tmp_path, source_loss="all")
    with pytest.raises(ValueError, match="feature_tolerance is"):
        trainer(tmp_path, feature_tolerance=[1.0])


def test_images_of_the_source_are_checked(tmp_path):
    class Wrong(Rows):
        def __getitem__(self, index):
            return {"image": self.images[index]}

    with pytest.raises(ValueError, match=r"rows have the keys \['image'\]; needed: rows with 'pixel_values'"):
        trainer(tmp_path, tiny_encoder(), source=Wrong())
    with pytest.raises(ValueError, match="there are no rows"):
        trainer(tmp_path, tiny_encoder(), source=Unlabelled(size=0))


def test_images_without_a_label_column(tmp_path):
    labelled = pixels(12, 0)
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    rows = [{"image": image} for image in _images(12)]
    data = datasets.Dataset.from_list(rows, features=datasets.Features({"image": datasets.Image()}))
    unlabelled = PixelDataset.from_dataset(data, processor, labelled=False)
    assert not unlabelled.labelled
    assert labelled.labelled
    assert set(unlabelled[0]) == {"pixel_values"}
    assert unlabelled[3]["pixel_values"].shape == (3, 8, 8)
    with pytest.raises(ValueError, match="label column"):
        PixelDataset.from_dataset(data, processor)
    with pytest.raises(ValueError, match="needed: 'pixel_values' and 'labels'"):
        trainer(tmp_path, source=unlabelled)
    trainer(tmp_path, tiny_encoder(), source=unlabelled, max_steps=2).train()


def tiny_autoencoder(**options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ViTMAEConfig(
        image_size=8, patch_size=2, mask_ratio=0.5, decoder_num_attention_heads=2, decoder_hidden_size=8,
        decoder_num_hidden_layers=1, decoder_intermediate_size=8, **sizes, **options,
    )  # fmt: skip
    return untrained(ViTMAEForPreTraining, config)


def test_a_masked_autoencoder_may_keep_what_it_reconstructs(tmp_path):
    """Half of the patches are hidden, alike for the original; the decoder stays; a resumed run hides the same."""
    tiny_autoencoder().save_pretrained(tmp_path / "base")
    options = {"source": Unlabelled(), "source_loss": "reconstruction", "save_strategy": "steps", "save_steps": 6}
    ours = trainer(tmp_path / "run", str(tmp_path / "base"), **options)
    ours.train()
    batch = next(iter(ours.get_train_dataloader()))["pixel_values"]
    seed = ours._guard.mask_seed(ours.state.global_step)
    noise = mask_noise(ours.model.encoder, batch, seed)
    original = ViTMAEForPreTraining.from_pretrained(tmp_path / "base")
    before, after = (model(pixel_values=batch, noise=noise) for model in (original, ours.model.encoder))
    assert before.mask.sum(1).tolist() == [8] * len(batch)
    ratio = ours._guard.reconstruct(ours.model, batch, seed)
    assert ratio.item() == pytest.approx((after.loss / before.loss).item(), rel=1e-5)
    new = trainer(tmp_path / "new", tiny_autoencoder(), **options)
    assert seed != new._guard.mask_seed(new.state.global_step)

    ours.save_model(str(tmp_path / "saved"))
    saved, info = ViTMAEForPreTraining.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"]
    assert same(saved.decoder, original.decoder)
    assert not same(saved.vit, original.vit)
    again = trainer(tmp_path / "run", str(tmp_path / "base"), **options)
    again.train(str(tmp_path / "run" / "checkpoint-6"))
    assert same(ours.model, again.model)


def test_reconstruction_needs_a_decoder(tmp_path):
    with pytest.raises(ValueError, match="source_loss is 'reconstruction' and the model is ViTModel"):
        trainer(tmp_path, tiny_encoder(), source=Unlabelled(), source_loss="reconstruction")


def _images(size):
    return [Image.new("RGB", (8, 8), (20 * i, 0, 0)) for i in range(size)]


def test_an_unchanged_encoder_is_at_no_distance_though_it_has_dropout(tmp_path):
    """And one that shifts positions at random in training."""
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    moving = DINOv3ViTModel(DINOv3ViTConfig(num_hidden_layers=2, **sizes))
    with torch.no_grad():
        for weight in moving.parameters():
            weight.mul_(8)  # or positions play no part
    still = {"learning_rate": 0.0, "sparsity": 0.0, "max_steps": 3, "logging_steps": 1, **NO_TARGET}
    for name, encoder, options in (
        ("dropout", tiny_encoder(dropout=0.3), {"gradient_checkpointing": True}),
        ("positions", moving, {}),
        ("reconstruction", tiny_autoencoder(hidden_dropout_prob=0.3), {"source_loss": "reconstruction"}),
    ):
        ours = trainer(tmp_path / name, encoder, source=Unlabelled(), **still, **options)
        ours.train()
        losses = [row["source_loss"] for row in ours.state.log_history if "loss" in row]
        nothing = 1.0 if name == "reconstruction" else 0.0  # as good as the original
        assert losses == pytest.approx([nothing] * 3, abs=1e-4), name
        assert all(module.training for module in ours.model.modules())


def test_labels_of_an_encoders_images_are_for_the_metrics(tmp_path):
    seen = []

    def metrics(prediction):
        seen.append(prediction.label_ids)
        return {}

    ours = trainer(tmp_path, tiny_encoder(), source=Unlabelled())
    ours.compute_metrics = metrics
    for data in (Rows(10, seed=5), Unlabelled(10, seed=5), Rows(10, seed=5)):
        assert ours.evaluate(data)["eval_loss"] >= 0
    labels = Rows(10).labels.tolist()
    assert [list(found) for found in seen] == [labels, [], labels]


def test_classes_that_a_head_whose_features_are_kept_does_not_have(tmp_path):
    """They could be trained with, and the first evaluation would end the run."""
    with pytest.raises(ValueError, match="eval_dataset: row 3 has label 3"):
        trainer(tmp_path, tiny_vit(), source=Rows(classes=5), evaluation=pixels(10, 0, 5), source_loss="features")
