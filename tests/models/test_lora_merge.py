import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

from hf_ntp import merge_lora
from hf_ntp.models import noted_prunable_weights, prunable_weights, replace_head, zero_fraction

from ..conftest import Rows, adapted, tiny_resnet, tiny_vit


def protected(make=tiny_vit, share=0.9, include=()):
    model = make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in prunable_weights(model, include).values():
            weight.mul_(torch.rand(weight.shape, generator=generator) >= share)
    model.config.ntp = {"method": "non-transferable-pruning", "sparsity": share, "prune_include": list(include)}
    return model


def values(model):
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


TARGETS = [(tiny_vit, ["q_proj", "fc1"]), (tiny_resnet, ["convolution"])]


@pytest.mark.parametrize(("make", "targets"), TARGETS)
def test_zeros_stay_and_the_rest_is_the_plain_merge(make, targets):
    before = values(protected(make))
    reference = values(adapted(protected(make), targets).merge_and_unload())
    merged = merge_lora(adapted(protected(make), targets))
    assert type(merged) is type(make())
    prunable = noted_prunable_weights(merged)
    assert prunable.keys() == prunable_weights(make()).keys()
    changed = 0
    for name, tensor in values(merged).items():
        expected = reference[name].masked_fill(before[name] == 0, 0) if name in prunable else reference[name]
        assert torch.equal(tensor, expected), name
        changed += name in prunable and not torch.equal(tensor, before[name])
        if name in prunable:
            assert torch.equal(tensor == 0, before[name] == 0)
    assert changed


def test_by_hand():
    model = protected()
    layer = next(name for name in prunable_weights(model) if "fc1" in name).removesuffix(".weight")
    with torch.no_grad():
        model.get_parameter(f"{layer}.weight").fill_(1)
        model.get_parameter(f"{layer}.weight")[:, 1:] = 0
    adapter = get_peft_model(model, LoraConfig(r=1, lora_alpha=2, target_modules=[layer]))
    lora = model.get_submodule(layer)
    nn.init.constant_(lora.lora_A["default"].weight, 3)
    nn.init.constant_(lora.lora_B["default"].weight, 5)
    merged = merge_lora(adapter).get_parameter(f"{layer}.weight")
    assert (merged[:, 0] == 1 + 2 * 3 * 5).all()
    assert (merged[:, 1:] == 0).all()


def test_a_head_trained_in_full_survives():
    model = protected()
    replace_head(model, 5, torch.Generator().manual_seed(0))
    adapter = adapted(model, ["q_proj"], modules_to_save=["classifier"])
    head = model.classifier.modules_to_save["default"].weight.detach().clone()
    merged = merge_lora(adapter)
    assert type(merged.classifier) is nn.Linear
    assert torch.equal(merged.classifier.weight, head)
    assert merged.config.num_labels == 5


def test_a_pruned_module_trained_in_full_keeps_its_zeros():
    model = protected(include=["^classifier.weight$"])
    zeros = model.classifier.weight == 0
    merged = merge_lora(adapted(model, ["q_proj"], modules_to_save=["classifier"]))
    assert torch.equal(merged.classifier.weight == 0, zeros)
    assert not torch.equal(merged.classifier.bias, protected().classifier.bias)


def test_what_comes_out_is_an_ordinary_model(tmp_path):
    adapted(protected(), ["q_proj"]).save_pretrained(tmp_path / "adapter")
    merged = merge_lora(PeftModel.from_pretrained(protected(), tmp_path / "adapter"))
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not any("lora" in name or "base_layer" in name for name in merged.state_dict())
    merged.save_pretrained(tmp_path / "merged")
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "merged")
    sparsity = zero_fraction(list(noted_prunable_weights(protected()).values()))
    assert zero_fraction(list(noted_prunable_weights(loaded).values())) == sparsity
    rows = Rows(4)
    pixels = torch.stack([rows[i]["pixel_values"] for i in range(4)])
    assert torch.equal(loaded(pixels).logits, merged.eval()(pixels).logits)


def test_other_models_and_adapters():
    with pytest.raises(TypeError, match="the model is ViTForImageClassification; needed"):
        merge_lora(protected())
    with pytest.raises(ValueError, match="config has no ntp"):
        merge_lora(adapted(tiny_vit(), ["q_proj"]))
    with pytest.raises(ValueError, match="IA3; needed: LoRA"):
        merge_lora(get_peft_model(protected(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])))
    with pytest.raises(ValueError, match="none of the base model's prunable weights is zero"):
        merge_lora(adapted(protected(share=0.0), ["q_proj"]))
    merged = adapted(protected(), ["q_proj"])
    merged.merge_adapter()
    with pytest.raises(ValueError, match="merged already"):
        merge_lora(merged)


def test_a_plain_torch_model_in_an_adapter():
    network = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="around a transformers model"):
        merge_lora(get_peft_model(network, LoraConfig(target_modules=["0"])))
