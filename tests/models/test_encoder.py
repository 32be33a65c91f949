import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    Aimv2VisionConfig,
    Aimv2VisionModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from hf_ntp.models import (
    EncoderWithHead,
    batch_norms,
    blocks_of,
    check_precision,
    find_head,
    fixed_batch_norms,
    frozen_batch_norm_statistics,
    has_batch_norm,
    heads_of,
    interleaved,
    live_weights,
    parts_of,
    prunable_weights,
    recorded_features,
    replace_head,
    scale_free_weights,
    separate_batch_norms,
    stage_tokens,
    with_head,
    zero_fraction,
)
from hf_ntp.models.changes import fresh_model, reinit_stem, renormalize, reset_norms

from ..architectures import SIZE, build
from ..conftest import tiny_resnet, tiny_vit


def test_heads():
    assert find_head(tiny_vit())[0] == "classifier"
    assert find_head(tiny_resnet())[0] == "classifier.1"


def test_head_by_name():
    model = tiny_vit()
    assert find_head(model, "classifier")[1] is model.classifier
    with pytest.raises(ValueError, match="head_name is 'nowhere'"):
        find_head(model, "nowhere")


def test_a_model_without_a_head():
    with pytest.raises(ValueError, match="has 0 linear layers with num_labels=3"):
        find_head(tiny_vit().vit)


def test_prunable_weights_leave_biases_norms_embeddings_and_head():
    names = set(prunable_weights(tiny_vit()))
    assert len(names) == 2 * 6
    assert all(name.endswith(".weight") for name in names)
    assert not any(word in name for name in names for word in ("embed", "norm", "classifier", "bias"))


def test_prunable_weights_of_a_convnet_leave_the_stem():
    names = set(prunable_weights(tiny_resnet()))
    assert names
    assert all("convolution.weight" in name and "embedder" not in name for name in names)


def test_include_and_exclude():
    model = tiny_vit()
    assert "classifier.weight" in prunable_weights(model, include=["^classifier.weight$"])
    assert not any("layers.0" in name for name in prunable_weights(model, exclude=[r"layers\.0\."]))
    with pytest.raises(ValueError, match="no prunable weight left"):
        prunable_weights(model, exclude=["."])


def test_replace_head():
    model = tiny_vit()
    replace_head(model, ["a", "b", "c", "d", "e"], torch.Generator().manual_seed(0))
    assert model(torch.zeros(2, 3, 8, 8)).logits.shape == (2, 5)
    assert model.config.num_labels == 5
    assert model.config.label2id["e"] == 4
    other = tiny_vit(seed=9)
    replace_head(other, 5, torch.Generator().manual_seed(0))
    assert torch.equal(model.classifier.weight, other.classifier.weight)


def test_zero_fraction_by_hand():
    assert zero_fraction([torch.tensor([0.0, 1.0]), torch.tensor([[0.0, 0.0]])]) == 0.75


@pytest.mark.parametrize(("make", "width"), [(tiny_vit, 16), (tiny_resnet, 16)])
def test_features_of_head_and_stages(make, width):
    model = make()
    with recorded_features(find_head(model)[1]) as recorded:
        outputs = model(torch.randn(5, 3, 8, 8), output_hidden_states=True)
    model(torch.randn(5, 3, 8, 8))
    (features,) = recorded
    assert features.shape == (5, width)
    assert torch.allclose(F.linear(features, *find_head(model)[1].parameters()), outputs.logits)
    assert stage_tokens(outputs.hidden_states)[-1].mean(1).shape == (5, width)


def test_half_precision_weights_are_refused():
    check_precision(tiny_vit())
    with pytest.raises(ValueError, match=r"torch.bfloat16; needed: float32"):
        check_precision(tiny_vit().to(torch.bfloat16))


def test_a_head_named_in_the_config_is_found_again():
    model = tiny_vit(num_labels=16)
    model.config.ntp = {"head_name": "classifier"}
    assert find_head(model)[0] == "classifier"


def test_scale_free_weights_may_be_rescaled():
    model = tiny_resnet().train()
    images = torch.randn(6, 3, 8, 8)
    before = model(images).logits
    weights = scale_free_weights(model)
    assert len(weights) == 6
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(3)
    torch.testing.assert_close(model(images).logits, before, atol=1e-3, rtol=1e-3)
    assert scale_free_weights(tiny_vit()) == {}


def test_the_first_stage_counts_where_there_is_nothing_before_it():
    states = [torch.zeros(2, 3, 4)] * 3
    assert (len(stage_tokens(states, 3)), len(stage_tokens(states, 2)), len(stage_tokens(states))) == (3, 2, 2)


def test_lists_without_weights_are_no_blocks():
    model = tiny_vit()
    model.after = torch.nn.ModuleList([torch.nn.Flatten(), torch.nn.Flatten(), torch.nn.Flatten()])
    assert blocks_of(model) == blocks_of(tiny_vit())


def test_two_heads():
    model = DeiTForImageClassificationWithTeacher(
        DeiTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, num_labels=3)
    )
    weights = prunable_weights(model)
    assert weights
    assert not any("classifier" in name for name in weights)
    assert list(heads_of(model)) == ["cls_classifier", "distillation_classifier"]
    replace_head(model, 5)
    assert model(pixel_values=torch.zeros(2, 3, 8, 8)).logits.shape == (2, 5)


def test_batch_norm_of_tokens_in_the_place_of_images():
    norm = torch.nn.BatchNorm1d(2)
    tokens = torch.randn(24, 2) + torch.arange(24)[:, None]
    with separate_batch_norms([norm], 3, 2):  # four tokens each
        apart = norm(tokens).view(3, 2, 4, 2)
    for part, mine in zip(tokens.view(3, 2, 4, 2).unbind(1), apart.unbind(1), strict=True):
        torch.testing.assert_close(mine.flatten(0, 1), torch.nn.BatchNorm1d(2)(part.flatten(0, 1)))


def test_stage_tokens_of_a_model_that_gives_none():
    with pytest.raises(ValueError, match="fisher_level='pooled'"):
        stage_tokens(None)


def test_batch_norm_statistics_stay_while_batches_are_normalised():
    model = tiny_resnet().train()
    assert has_batch_norm(model)
    assert not has_batch_norm(tiny_vit())
    images = 5 + torch.randn(8, 3, 8, 8)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with frozen_batch_norm_statistics(model):
        frozen = model(images).logits
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    assert torch.equal(frozen, model(images).logits)
    assert not all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_fixed_batch_norms_are_those_of_evaluation():
    model, images = tiny_resnet().train(), 5 + torch.randn(8, 3, 8, 8)
    for norm in batch_norms(model):
        norm.running_mean.normal_()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    batch_norms(model)[0].eval()  # as somebody may have frozen it
    with fixed_batch_norms(model):
        fixed = model(images).logits
    assert [norm.training for norm in batch_norms(model)] == [False, *[True] * (len(batch_norms(model)) - 1)]
    assert model.training
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(fixed, model.eval()(images).logits)


@pytest.mark.parametrize("kind", ["one call", "part by part", "fixed"])
def test_a_batch_of_parts_is_normalised_part_by_part(kind):
    """As passes of their own would do, of which the first alone moves the running statistics."""
    one, apart = tiny_resnet().train(), tiny_resnet().train()
    apart.load_state_dict(one.state_dict())
    for norm in (*batch_norms(one), *batch_norms(apart)):
        norm.momentum = None if kind == "part by part" else 0.1  # None: a cumulative average
        norm.train(kind != "fixed")
    parts = [torch.randn(4, 3, 8, 8), 5 + torch.randn(4, 3, 8, 8), 3 * torch.randn(4, 3, 8, 8)]
    with separate_batch_norms(batch_norms(one), 4, 3):
        together = one(interleaved(parts)).logits
    logits = [apart(parts[0]).logits]
    with frozen_batch_norm_statistics(apart):
        logits += [apart(part).logits for part in parts[1:]]
    torch.testing.assert_close(parts_of(together, 3), tuple(logits))
    for (name, mine), (_, theirs) in zip(one.named_buffers(), apart.named_buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, msg=name)
    together.square().sum().backward()
    torch.cat(logits).square().sum().backward()
    for (name, mine), (_, theirs) in zip(one.named_parameters(), apart.named_parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-4, msg=name)
    assert not any("forward" in vars(module) for module in one.modules())


def test_a_hook_on_a_norm_is_called_and_stays():
    calls, norm = [], torch.nn.BatchNorm2d(3)
    vars(norm)["forward"] = lambda batch: calls.append(len(batch)) or torch.nn.BatchNorm2d.forward(norm, batch)
    with separate_batch_norms([norm], 4, 2):
        norm(torch.randn(8, 3, 2, 2))
    norm(torch.randn(8, 3, 2, 2))
    assert calls == [4, 4, 8]


def test_batch_norm_without_scale_and_shift_and_in_another_layout():
    norm = torch.nn.BatchNorm2d(3, affine=False)
    parts = [torch.randn(4, 3, 2, 2), 5 + torch.randn(4, 3, 2, 2)]
    expected = tuple(map(torch.nn.BatchNorm2d(3, affine=False), parts))
    with separate_batch_norms([norm], 4, 2):
        for layout in (torch.contiguous_format, torch.channels_last):
            found = norm(interleaved(parts).to(memory_format=layout))
            torch.testing.assert_close(parts_of(found, 2), expected)


def test_what_levit_keeps_in_evaluation():
    """Its position biases, with their graph: for the next backward pass, and for who copies the model."""
    model, images = build("LeViT").eval(), torch.zeros(2, 3, SIZE, SIZE)
    live_weights(model, prunable_weights(model), 2 * [{"pixel_values": images}])
    encoder = build("LeViT").levit.eval()
    copy.deepcopy(EncoderWithHead(encoder))
    assert not encoder.training


def test_live_weights_by_hand():
    # The second input is always 0: its column of the first layer gets no gradient.
    class Toy(nn.Module):
        device = torch.device("cpu")

        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(2, 2, bias=False), nn.Linear(2, 2)

        def forward(self, pixel_values):
            return type("Output", (), {"logits": self.head(self.body(pixel_values))})

    model = Toy()
    with torch.no_grad():
        model.body.weight.copy_(torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    batch = {"pixel_values": torch.tensor([[1.0, 0.0], [2.0, 0.0]]), "labels": torch.tensor([0, 1])}
    live = live_weights(model, {"body.weight": model.body.weight}, [batch])
    assert live.fraction == 0.5
    assert live.sparsity == 0.5
    assert model.body.weight.grad is None


def test_projections_that_an_attention_holds_itself():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = SiglipVisionModel(SiglipVisionConfig(**sizes, intermediate_size=24))
    name = next(name for name, _ in model.named_parameters() if name.endswith("in_proj_weight"))
    assert f"encoder.{name}" in prunable_weights(with_head(model))
    fresh = fresh_model(model, 0).get_parameter(name)
    with torch.no_grad():
        model.get_parameter(name).mul_(1000)
    assert renormalize(model, 0)[name] < 0.01
    assert model.get_parameter(name).norm().item() == pytest.approx(fresh.norm().item(), rel=1e-4)


def test_the_stem_is_not_that_of_later_stages():
    model = build("PVT")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    reinit_stem(model, 5)
    after = model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any("patch_embeddings.0." in name for name in changed)
    assert not any(f"patch_embeddings.{i}." in name for name in changed for i in (1, 2, 3))


def test_norms_that_cannot_reset_themselves():
    torch.manual_seed(0)
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = Aimv2VisionModel(Aimv2VisionConfig(**sizes, intermediate_size=24))
    norms = [module for module in model.modules() if "norm" in type(module).__name__.lower()]
    with torch.no_grad():
        for norm in norms:
            norm.weight.fill_(1000.0)
    assert len(reset_norms(model, 0)) == len(norms) > 0
    assert all((norm.weight == 1).all() for norm in norms)


def test_a_square_layer_beside_the_head_is_no_second_head():
    model = tiny_vit(num_labels=16)
    model.projection = torch.nn.Linear(16, 16)
    with pytest.raises(ValueError, match="has 2 linear layers with num_labels=16"):
        find_head(model)
