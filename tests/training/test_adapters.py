"""Models that carry a LoRA adapter."""

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch.nn import functional as F
from transformers import ViTForImageClassification

from hf_ntp import NTPConfig, merge_lora
from hf_ntp.models import prunable_weights, recorded_features, zero_fraction
from hf_ntp.publishing.from_trainer import write_folder
from hf_ntp.training.attacker import INFORMED
from hf_ntp.training.attackers import AttackerPool

from ..conftest import Rows, adapted, tiny_resnet, tiny_vit
from .test_headless import Unlabelled, same, tiny_encoder
from .test_trainer import NO_TARGET, trainer

IMAGES = Rows(size=6, seed=9).images


def parts(model):
    """Values of the adapter and of the base model."""
    values = {name: value.clone() for name, value in model.state_dict().items()}
    own = {name: value for name, value in values.items() if "lora_" in name or "modules_to_save" in name}
    return own, {name: value for name, value in values.items() if name not in own}


def outputs(model):
    with torch.no_grad():
        return model.eval()(IMAGES)[0]


CASES = {
    "classifier": (tiny_vit, ("q_proj", "fc1"), {}),
    "modules of its own": (tiny_vit, ("q_proj", "fc1"), {"modules_to_save": ["classifier", "fc2"]}),
    "convolutions": (tiny_resnet, ("convolution",), {}),
    "norms of its own": (tiny_resnet, ("convolution",), {"modules_to_save": ["classifier", "normalization"]}),
    "encoder": (tiny_encoder, ("q_proj", "fc1"), {"use_rslora": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_base_is_protected_and_the_adapter_stays(tmp_path, case):
    make, targets, options = CASES[case]
    model = adapted(make(), targets, **options)
    before, (adapter, base) = outputs(model), parts(model)
    source = Unlabelled() if case == "encoder" else Rows()
    # Short lives: many attackers begin, most of them with something changed.
    ours = trainer(
        tmp_path / "run", model, source=source, adapter="keep", attacker_horizon=[3, 4], attacker_informed=0.8
    )
    plain = getattr(ours.model, "encoder", ours.model)
    assert torch.equal(outputs(plain), before)
    assert torch.equal(outputs(getattr(ours._guard.original, "encoder", ours._guard.original)), before)
    ours.train()
    after = outputs(model)
    assert torch.equal(outputs(plain), after)
    assert not torch.equal(after, before)
    assert all(torch.equal(value, adapter[name]) for name, value in parts(model)[0].items())
    changed = [name for name, value in parts(model)[1].items() if not torch.equal(value, base[name])]
    assert any("base_layer.weight" in name for name in changed)
    assert not any(parameter.requires_grad for name, parameter in model.named_parameters() if name in adapter)
    assert not any(name.endswith(("original_module.weight", "original_module.bias")) for name in changed)

    ours.save_model(str(tmp_path / "base"))
    model.save_pretrained(tmp_path / "adapter")
    saved, info = type(make()).from_pretrained(tmp_path / "base", output_loading_info=True)
    assert info["unexpected_keys"] == set()
    assert {name.split(".")[0] for name in info["missing_keys"]} <= {"pooler"}  # the trainer's encoder has none either
    names = [name.removeprefix("encoder.") for name in ours.prunable]
    assert all(name in dict(make().named_parameters()) for name in names)
    assert zero_fraction([saved.get_parameter(name) for name in names]) == saved.config.ntp["sparsity"] > 0.59
    assert torch.equal(outputs(PeftModel.from_pretrained(saved, tmp_path / "adapter")), after)
    merged = merge_lora(model)
    zeros = [torch.equal(merged.get_parameter(n) == 0, saved.get_parameter(n) == 0) for n in names]
    assert all(zeros)


def test_attackers_begin_at_base_and_adapter(tmp_path):
    model = adapted(tiny_vit())
    ours = trainer(tmp_path, model, adapter="keep", attackers=1, attacker_informed=0.0)
    labels = {"target": torch.arange(len(IMAGES)).numpy() % 3}
    pool = AttackerPool(ours.model, ours._head_name, ours._head, labels, ours.args, seed=0)
    assert not any("lora" in name for name in pool.weights)
    attacker = pool._new(0)
    (step,) = pool.step({"target": [(IMAGES, torch.from_numpy(labels["target"]))]}, dict)
    with torch.no_grad(), recorded_features(model.get_base_model().classifier) as features:
        outputs(model)
    expected = F.cross_entropy(F.linear(features[-1], **attacker.head), torch.from_numpy(labels["target"]))
    assert step.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("start", INFORMED)
def test_what_an_informed_attacker_changes_is_the_base(tmp_path, start):
    model = adapted(tiny_vit())
    ours = trainer(tmp_path, model, adapter="keep", **NO_TARGET)
    with torch.no_grad():
        for weight in ours.model.parameters():
            weight.add_(0.1)
    adapter, base = parts(model)
    for change in INFORMED[start].changes:
        assert change(ours.model, 5).keys() <= dict(ours.model.named_parameters()).keys()
    now, changed = parts(model)
    assert all(torch.equal(value, adapter[name]) for name, value in now.items())
    assert bool(INFORMED[start].changes) != all(torch.equal(value, base[name]) for name, value in changed.items())


def test_a_kept_adapter_resumes(tmp_path):
    options = {"adapter": "keep", "save_strategy": "steps", "save_steps": 6}
    first, second = adapted(tiny_vit(dropout=0.1)), adapted(tiny_vit(dropout=0.1))
    trainer(tmp_path / "run", first, **options).train()
    other = trainer(tmp_path / "run", adapted(tiny_vit(dropout=0.1), moved=4), **options)
    with pytest.raises(ValueError, match="original_weights: "):
        other.train(str(tmp_path / "run" / "checkpoint-6"))
    trainer(tmp_path / "run", second, **options).train(str(tmp_path / "run" / "checkpoint-6"))
    assert same(first, second)


def test_a_folder_to_publish(tmp_path):
    ours = trainer(tmp_path / "run", adapted(tiny_vit()), adapter="keep", max_steps=4, **NO_TARGET)
    ours.train()
    write_folder(ours, tmp_path / "folder")
    assert '"adapter": "keep"' in (tmp_path / "folder" / "authorization.json").read_text()
    assert "beside a LoRA adapter, which is **not** in this folder" in (tmp_path / "folder" / "README.md").read_text()
    assert same(ViTForImageClassification.from_pretrained(tmp_path / "folder"), ours.model)


def test_merged_is_as_merged_by_hand(tmp_path):
    ours = trainer(tmp_path / "a", adapted(tiny_vit(), modules_to_save=["classifier"]), adapter="merge", max_steps=6)
    ours.train()
    by_hand = adapted(tiny_vit(), modules_to_save=["classifier"]).merge_and_unload().requires_grad_(True)
    trainer(tmp_path / "b", by_hand, max_steps=6).train()
    assert type(ours.model) is ViTForImageClassification
    assert same(ours.model, by_hand)
    ours.save_model(str(tmp_path / "saved"))
    saved = ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert zero_fraction(list(prunable_weights(saved).values())) == saved.config.ntp["sparsity"] > 0.59


def two_adapters():
    model = adapted(tiny_vit())
    model.add_adapter("second", LoraConfig(target_modules=["q_proj"]))
    return model


def test_one_of_several_adapters(tmp_path):
    model = two_adapters()
    before = outputs(model)
    assert torch.equal(outputs(trainer(tmp_path, model, adapter="keep").model), before)


def switched(model, *calls):
    for call, *args in calls:
        getattr(model.base_model, call)(*args)
    return model


def inside():
    model = tiny_vit()
    model.add_adapter(LoraConfig(target_modules=["q_proj"]))
    return model


def half_an_adapter():
    model = adapted(tiny_vit())
    for module in model.modules():
        if hasattr(module, "lora_A"):
            module.lora_A.bfloat16()
    return model


REFUSED = {
    "no choice": (lambda: adapted(tiny_vit()), None, "adapter='merge' .* adapter='keep'"),
    "no adapter": (tiny_vit, "merge", "the model, ViTForImageClassification, carries no adapter"),
    "no PeftModel": (inside, "keep", "the model is ViTForImageClassification; needed: a peft.PeftModel"),
    "no transformers model": (
        lambda: torch.nn.Linear(2, 2),
        None,
        "the model is Linear; needed",
    ),
    "no LoRA": (
        lambda: get_peft_model(tiny_vit(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])),
        "merge",
        "IA3; needed: LoRA",
    ),
    "merged": (lambda: switched(adapted(tiny_vit()), ("merge_adapter",)), "keep", "merged already"),
    "two": (
        lambda: switched(two_adapters(), ("set_adapter", ["default", "second"])),
        "merge",
        r"the active adapters are \['default', 'second'\]",
    ),
    "off": (lambda: switched(adapted(tiny_vit()), ("disable_adapter_layers",)), "keep", "switched off; needed"),
    "DoRA": (lambda: adapted(tiny_vit(), use_dora=True), "keep", "a variant of LoRA"),
    "biases": (lambda: adapted(tiny_vit(), bias="lora_only"), "keep", "bias='lora_only'"),
    "changed base": (lambda: adapted(tiny_vit(), init_lora_weights="pissa"), "keep", "init_lora_weights='pissa'"),
    "other layers": (
        lambda: get_peft_model(
            tiny_vit(), LoraConfig(target_modules=[], target_parameters=["attention.k_proj.weight"])
        ),
        "keep",
        "lora.layer.ParamWrapper",
    ),
    "half": (lambda: adapted(tiny_vit()).bfloat16(), "keep", "bfloat16; needed: float32"),
    "half an adapter": (half_an_adapter, "keep", "bfloat16; needed: float32"),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, case):
    make, choice, message = REFUSED[case]
    with pytest.raises((ValueError, TypeError), match=message):
        trainer(tmp_path, make(), adapter=choice)


def test_another_word():
    with pytest.raises(ValueError, match="adapter is 'drop'; needed: 'merge' or 'keep'"):
        NTPConfig(output_dir="x", report_to="none", adapter="drop")
