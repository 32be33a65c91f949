import json

import pytest
import torch
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel, ViTModel

from hf_ntp.models import (
    EncoderWithHead,
    blocks_of,
    find_head,
    has_head,
    load_model,
    plain_model,
    pooled_features,
    prunable_weights,
    recorded_features,
    replace_head,
    with_head,
)
from hf_ntp.models.changes import fresh_model

from ..architectures import CLASSIFIERS, ENCODERS, SIZE, build
from ..conftest import Rows, tiny_vit

IMAGES = Rows(4, image_size=SIZE).images


def features_of(model, images=IMAGES):
    with torch.no_grad(), recorded_features(find_head(model)[1]) as recorded:
        model.eval()(pixel_values=images)
    return recorded[0]


def test_pooling_by_hand():
    tokens = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]]])
    outputs = {"last_hidden_state": tokens, "pooler_output": torch.tensor([[[[7.0]], [[9.0]]]])}
    assert pooled_features(outputs).tolist() == [[7, 9]]
    assert pooled_features({**outputs, "image_embeds": torch.ones(1, 1)}).tolist() == [[1]]
    assert pooled_features(outputs, pooler=False).tolist() == [[3, 5]]
    assert pooled_features(outputs, pooler=False, class_token=True).tolist() == [[1, 2, 4, 6.5]]
    positions = {"last_hidden_state": tokens.mT.unflatten(2, (3, 1)), "pooler_output": None}
    assert pooled_features(positions).tolist() == [[3, 5]]
    with pytest.raises(KeyError):
        pooled_features({"pooler_output": torch.ones(1, 2)}, pooler=False)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("DINOv3-ViT", lambda o: o.pooler_output),
        ("DINOv3-ConvNeXt", lambda o: o.pooler_output),
        ("CLIP-vision", lambda o: o.pooler_output),
        ("SigLIP-vision", lambda o: o.pooler_output),
        ("ResNet-encoder", lambda o: o.pooler_output[:, :, 0, 0]),
        ("I-JEPA-encoder", lambda o: o.last_hidden_state.mean(1)),
        # The dense pooler of a ViT is missing in many checkpoints.
        ("ViT-encoder", lambda o: torch.cat([o.last_hidden_state[:, 0], o.last_hidden_state[:, 1:].mean(1)], 1)),
    ],
)
def test_the_rule_on_real_encoders(name, expected):
    model = build(name).eval()
    with torch.no_grad():
        wanted = expected(model(pixel_values=IMAGES))
    torch.testing.assert_close(features_of(with_head(model)), wanted)


@pytest.mark.parametrize("name", ["ViTMAE-encoder", "ViTMAE-pretraining"])
def test_a_masked_autoencoder_sees_every_patch(name):
    model = build(name)
    ours = with_head(model)
    torch.manual_seed(1)
    features = features_of(ours)
    torch.manual_seed(2)
    assert torch.equal(features, features_of(ours))
    assert not torch.equal(features, features_of(ours, IMAGES.flip(-1)))
    assert model.config.mask_ratio == 0.75
    corner = IMAGES.clone()
    corner[..., -1, -1] += 1
    assert all((features != features_of(ours, corner)).any(1))


def test_what_has_no_part_in_the_features_is_frozen():
    frozen = {n for n, p in with_head(build("ViTMAE-pretraining")).encoder.named_parameters() if not p.requires_grad}
    assert all(name.startswith("decoder.") or name.endswith("position_embeddings") for name in frozen)
    assert any(name.startswith("decoder.") for name in frozen)
    assert not any("decoder" in name for name in prunable_weights(with_head(build("ViTMAE-pretraining"))))
    assert not any("pooler" in name for name in prunable_weights(with_head(build("ViT-encoder"))))


def test_heads():
    assert all(has_head(build(name)) for name in CLASSIFIERS)
    assert not any(has_head(build(name)) for name in ENCODERS)
    classifier = tiny_vit()
    assert with_head(classifier) is classifier
    assert plain_model(classifier) is classifier
    ours = with_head(classifier.vit)
    assert with_head(ours) is ours
    assert not has_head(ours)
    assert plain_model(ours) is classifier.vit
    replace_head(ours, 5)
    assert ours(IMAGES[..., :8, :8]).logits.shape == (4, 5)


@pytest.mark.parametrize("name", ["DINOv3-ViT", "ViTMAE-pretraining", "ResNet-encoder"])
def test_saved_and_loaded(name, tmp_path):
    model = with_head(build(name))
    model.save_pretrained(tmp_path)
    plain = type(build(name)).from_pretrained(tmp_path)
    assert plain.state_dict().keys() == build(name).state_dict().keys()
    loaded = load_model(str(tmp_path))
    assert type(loaded.encoder) is type(plain)
    assert torch.equal(features_of(loaded), features_of(model))
    model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    assert torch.equal(features_of(load_model(str(tmp_path / "given"))), features_of(model))
    torch.manual_seed(5)
    fresh = features_of(load_model(str(tmp_path), random_init=True))
    assert torch.equal(fresh, features_of(fresh_model(loaded, 5)))
    assert not torch.equal(fresh, features_of(model))


def test_a_classifier_is_loaded_as_one(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    assert type(load_model(str(tmp_path))) is type(tiny_vit())


def test_what_only_the_type_of_a_model_makes_a_classifier(tmp_path):
    """Without the name of its class, a head that the checkpoint lacks would be drawn at random."""
    for name, model in (("with", tiny_vit()), ("without", tiny_vit().vit)):
        model.save_pretrained(tmp_path / name)
        config = json.loads((tmp_path / name / "config.json").read_text())
        del config["architectures"]
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    assert type(load_model(str(tmp_path / "with"))) is type(tiny_vit())
    assert isinstance(load_model(str(tmp_path / "without")), EncoderWithHead)


def test_weights_that_cannot_be_read_are_named(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ValueError, match=rf"weights of {tmp_path} cannot be read .*Git LFS"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["vision_model", None])
def test_the_encoder_can_be_named(name):
    ours = with_head(CLIPModel(build("CLIP").config), encoder_name=name)
    assert ours.head.in_features == 16
    assert all("vision_model" in name for name in blocks_of(ours))
    assert all("vision_model" in name for name in prunable_weights(ours))


def test_a_name_of_no_module():
    with pytest.raises(ValueError, match="encoder_name is 'eyes'"):
        with_head(build("ViT-encoder"), encoder_name="eyes")


class Odd(PreTrainedModel):
    """Gives neither tokens nor pooled features under a usual name."""

    config_class = PreTrainedConfig

    def __init__(self, config):
        super().__init__(config)
        self.layer = torch.nn.Linear(3, 3)
        self.post_init()

    def forward(self, pixel_values, output_hidden_states=False):
        return {"what": self.layer(pixel_values.mean((2, 3)))}


def test_an_unknown_architecture():
    with pytest.raises(ValueError, match=r"Odd has no classification head.*Name it with encoder_name"):
        with_head(Odd(PreTrainedConfig()))


def test_a_vit_without_a_pooler():
    model = ViTModel(build("ViT-encoder").config, add_pooling_layer=False)
    assert features_of(with_head(model)).shape == (4, 32)
