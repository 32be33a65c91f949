import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import ConvNextConfig, ConvNextForImageClassification

from hf_ntp.attacks import FineTuneProtocol, Loot
from hf_ntp.attacks.peft_tuning import PeftTuning, adaptable_modules
from hf_ntp.models import features_and_logits, find_head, prunable_weights

from ..conftest import tiny_resnet, tiny_vit
from .conftest import QUICK, accuracy, bars, loot_of

KINDS = ["lora", "dora", "ia3"]


def tiny_convnext():
    torch.manual_seed(0)
    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=3, patch_size=2)
    return ConvNextForImageClassification(config)


@pytest.mark.parametrize("kind", KINDS)
def test_only_adapters_and_the_head_move(model, kind):
    weights = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    modules, (head, _) = adaptable_modules(model), find_head(model)
    PeftTuning(kind, rank=2).fit(model, loot_of(), QUICK, 1e-2, 0)
    adapted = {name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    assert adapted == set(modules)
    after = {name.replace(".base_layer", ""): weight for name, weight in model.named_parameters()}
    for name, weight in weights.items():
        assert torch.equal(after[name], weight) != name.startswith(head), name


def test_the_number_of_trained_weights():
    """Of a ViT: patches of 48 values to 16, two blocks of four 16x16 matrices and an MLP 16-24-16; head 16 x 3 + 3."""
    shapes = [(48, 16)] + 2 * [(16, 16), (16, 16), (16, 16), (16, 16), (16, 24), (24, 16)]
    expected = {
        "lora": sum(4 * (rows + columns) for rows, columns in shapes),
        "dora": sum(4 * (rows + columns) + columns for rows, columns in shapes),
        "ia3": sum(columns for _, columns in shapes),
    }
    for kind, adapters in expected.items():
        model = tiny_vit()
        PeftTuning(kind, rank=4).fit(model, loot_of(), QUICK, 1e-3, 0)
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == adapters + 51


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_start_at_the_checkpoint(kind):
    """At a rate of almost nothing, the features are those of the model that was loaded."""
    model, images = tiny_vit(), loot_of().images
    before, _ = features_and_logits(model, images)
    PeftTuning(kind).fit(model, loot_of(), QUICK, 1e-9, 0)
    assert torch.allclose(features_and_logits(model, images)[0], before, atol=1e-5)
    PeftTuning(kind).fit(tuned := tiny_vit(), loot_of(), QUICK, 1e-1, 0)
    assert not torch.allclose(features_and_logits(tuned, images)[0], before, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_grouped_convolutions_are_left_alone(kind):
    model = tiny_convnext()
    assert PeftTuning(kind).unsuitable(model, 3) is None
    names = adaptable_modules(model)
    assert 0 < len(names) < len(prunable_weights(model))
    assert not any("dwconv" in name for name in names)
    PeftTuning(kind).fit(model, loot_of(), QUICK, 1e-2, 0)


def test_the_batch_statistics_follow_the_target():
    model = tiny_resnet()
    before = model.resnet.embedder.embedder.normalization.running_mean.clone()
    PeftTuning("lora").fit(model, loot_of(), QUICK, 1e-2, 0)
    assert not torch.equal(model.resnet.embedder.embedder.normalization.running_mean, before)


def test_the_grid_is_hotter():
    assert PeftTuning().grid(QUICK) == pytest.approx([3 * rate for rate in QUICK.learning_rates])


@pytest.mark.parametrize("options", [{"kind": "qlora"}, {"rank": 0}])
def test_bad_options(options):
    with pytest.raises(ValueError, match="needed"):
        PeftTuning(**options)


def with_dead_channels(model):
    with torch.no_grad():
        for weight in prunable_weights(model).values():
            weight[0] = 0
    return model


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_dora_learns_where_a_channel_is_pruned_altogether(make):
    """Its norm is 0, by which DoRA divides: every output was NaN, and the attack counted as one at chance."""
    if make is tiny_vit:  # BatchNorm follows the target in any case
        model = with_dead_channels(make())
        before, _ = features_and_logits(model, loot_of().images)
        PeftTuning("dora").fit(model, loot_of(), QUICK, 1e-9, 0)
        assert torch.allclose(features_and_logits(model, loot_of().images)[0], before, atol=1e-2)
    images, labels = bars(60, 0)
    protocol = FineTuneProtocol(steps=60, batch_size=16, warmup_steps=5)
    predict = PeftTuning("dora").fit(with_dead_channels(make()), Loot(images, labels, 3), protocol, 1e-2, 0)
    assert accuracy(predict, images, labels) > 0.8
