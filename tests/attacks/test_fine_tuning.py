import copy

import pytest
import torch
from torch import nn
from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

from hf_ntp.attacks import ATTACKS, FineTuneProtocol, FineTuning, Loot, fine_tuning
from hf_ntp.attacks.changes import CHANGES
from hf_ntp.attacks.fine_tuning import batches_of, bias_parameters, zero_masks
from hf_ntp.attacks.peft_tuning import adaptable_modules
from hf_ntp.models import batch_norms, blocks_of, find_head, layers_with_weights, prunable_weights
from hf_ntp.models.changes import fresh_model

from ..conftest import tiny_resnet, tiny_vit
from .conftest import QUICK, accuracy, bars, changed, loot_of, pruned, state_of

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@torch.no_grad()
def shaken(model):
    """Move every weight, so that none has its initial value."""
    generator = torch.Generator().manual_seed(3)
    for weight in model.parameters():
        weight.add_(0.1 * torch.randn(weight.shape, generator=generator) + 0.01)
    return model


def norm_names(model):
    return {
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm | nn.BatchNorm2d)
        for key in module.state_dict()
    }


@pytest.mark.parametrize("keep_mask", [True, False])
def test_zeros_stay_only_when_the_mask_is_kept(model, keep_mask):
    attack = FineTuning(keep_mask=keep_mask)
    zeros = {name: weight == 0 for name, weight in prunable_weights(pruned(model)).items()}
    assert len(zero_masks(model)) == len(zeros)
    attack.fit(model, loot_of(), QUICK, 1e-2, 0)
    for name, weight in prunable_weights(model).items():
        assert bool((weight[zeros[name]] == 0).all()) == keep_mask


def test_the_mask_is_that_of_the_checkpoint_and_not_of_the_changes():
    model = pruned(tiny_vit())
    zeros = {name: weight == 0 for name, weight in prunable_weights(model).items()}
    FineTuning(keep_mask=True, changes=("regrow_zeros",)).fit(model, loot_of(), QUICK, 1e-3, 0)
    assert all((weight[zeros[name]] == 0).all() for name, weight in prunable_weights(model).items())


@pytest.mark.parametrize("keep_head", [True, False])
def test_the_head_is_fresh_unless_it_is_kept(model, keep_head):
    before = find_head(model)[1].weight.detach().clone()
    FineTuning(keep_head=keep_head).fit(model, loot_of(), QUICK, 1e-9, 0)
    assert torch.allclose(find_head(model)[1].weight, before, atol=1e-6) == keep_head


def test_only_biases_norms_and_the_head_are_trained(model):
    before, (head, _) = state_of(model), find_head(model)
    FineTuning(trained="bias").fit(model, loot_of(), QUICK, 1e-2, 0)
    allowed = {name for name, value in before.items() if value.dim() == 1 or name.endswith("bias")}
    allowed |= {name for name in before if name.endswith(STATISTICS)} | {f"{head}.weight"}
    found = changed(before, model)
    assert found <= allowed
    assert {f"{head}.weight", f"{head}.bias"} < found


def test_sgd_has_hotter_rates_and_another_result(model):
    assert FineTuning(optimizer="sgd").grid(QUICK) == pytest.approx([10 * rate for rate in QUICK.learning_rates])
    before = state_of(model)
    FineTuning(optimizer="sgd").fit(model, loot_of(), QUICK, 1e-2, 0)
    sgd = state_of(model)
    model.load_state_dict(before)
    FineTuning().fit(model, loot_of(), QUICK, 1e-2, 0)
    assert find_head(model)[0] + ".weight" in changed(sgd, model)


def test_longer_is_a_factor_on_the_steps(monkeypatch):
    asked = []
    real = fine_tuning.get_scheduler
    monkeypatch.setattr(
        fine_tuning, "get_scheduler", lambda name, _, *steps: (asked.append((name, *steps)), real(name, _, *steps))[1]
    )
    FineTuning(longer=3).fit(tiny_vit(), loot_of(), QUICK, 1e-3, 0)
    assert asked == [("cosine", 1, 15)]


@pytest.mark.parametrize(("optimizer", "shrinks"), [("adamw", 1.0), ("sgd", 1.9 * 0.1 / 10)])
def test_weight_decay_by_hand(optimizer, shrinks):
    """One step at the full rate, without gradient; Nesterov's first step counts a gradient 1.9 times."""
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    protocol = FineTuneProtocol(steps=1, warmup_steps=0, weight_decay=0.5)
    fine_tuning.train(model, model.parameters(), lambda: 0 * model.weight.sum(), protocol, 0.1, 0, optimizer=optimizer)
    assert model.weight.item() == pytest.approx(before * (1 - 0.1 * 0.5 * shrinks), rel=1e-5)


def test_the_seed_decides_what_is_dropped():
    found = []
    for seed in (0, 0, 1):
        model = tiny_vit(dropout=0.5)
        FineTuning(keep_head=True).fit(model, loot_of(), QUICK, 1e-2, seed)
        found.append(model.vit.layers[0].mlp.fc1.weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_unsuitable_checkpoints():
    assert FineTuning().unsuitable(tiny_vit(), 7) is None
    assert "3 classes" in FineTuning(keep_head=True).unsuitable(tiny_vit(), 4)
    assert "no zeros" in FineTuning(keep_mask=True).unsuitable(tiny_vit(), 3)
    assert FineTuning(keep_mask=True).unsuitable(pruned(tiny_vit()), 3) is None


@pytest.mark.parametrize(
    "options", [{"changes": ("polish",)}, {"trained": "most"}, {"optimizer": "lion"}, {"longer": 0}]
)
def test_unknown_names(options):
    with pytest.raises(ValueError, match="needed"):
        FineTuning(**options)


def test_batches_cover_every_image_once_a_pass():
    batches = batches_of(12, 4, seed=0)
    for _ in range(3):
        assert sorted(torch.cat([next(batches) for _ in range(3)]).tolist()) == list(range(12))
    assert len(next(batches_of(3, 8, seed=0))) == 3
    assert torch.equal(next(batches_of(12, 4, seed=1)), next(batches_of(12, 4, seed=1)))


def test_resetting_norms(model):
    shaken(model)
    before = state_of(model)
    CHANGES["reset_norms"](model, 0)
    names = norm_names(model)
    assert {name for name in names if not name.endswith(STATISTICS)} <= changed(before, model) <= names
    fresh = fresh_model(model, 0).state_dict()
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in names)


def test_renormalising_undoes_rescaling(model):
    """Stem and head included."""
    weights = {f"{name}.weight": layer.weight for name, layer in layers_with_weights(model).items()}
    directions = {name: weight.detach() / weight.detach().norm() for name, weight in weights.items()}
    with torch.no_grad():
        for weight in weights.values():
            weight.mul_(1000)
    before = state_of(model)
    CHANGES["renormalize"](model, 5)
    fresh = dict(fresh_model(model, 5).named_parameters())
    assert changed(before, model) == set(directions)
    for name, weight in weights.items():
        assert torch.allclose(weight.norm(), fresh[name].norm(), rtol=1e-4)
        assert torch.allclose(weight / weight.norm(), directions[name], atol=1e-5)


def test_shrinking_and_perturbing(model):
    before = {name: weight.detach().clone() for name, weight in shaken(model).named_parameters()}
    CHANGES["shrink_and_perturb"](model, 5)
    fresh = dict(fresh_model(model, 5).named_parameters())
    for name, weight in model.named_parameters():
        assert torch.allclose(weight, (before[name] + fresh[name]) / 2, atol=1e-6)


def test_regrowing_zeros(model):
    before = state_of(pruned(model))
    CHANGES["regrow_zeros"](model, 5)
    fresh = dict(fresh_model(model, 5).named_parameters())
    assert changed(before, model) == set(prunable_weights(model))
    for name, weight in prunable_weights(model).items():
        assert torch.equal(weight[:, ::2], fresh[name][:, ::2])
        assert torch.equal(weight[:, 1::2], before[name][:, 1::2])


@pytest.mark.parametrize("which", ["stem", "first_block", "last_block"])
def test_reinitialised_parts(model, which):
    before = state_of(shaken(model))
    CHANGES[f"reinit_{which}"](model, 5)
    first, *_, last = blocks_of(model)
    part = {"stem": f"{model.base_model_prefix}.embed", "first_block": f"{first}.", "last_block": f"{last}."}[which]
    expected = {name for name in before if name.startswith(part)}
    assert {name for name in expected if not name.endswith(STATISTICS)} <= changed(before, model) <= expected
    fresh = fresh_model(model, 5).state_dict()
    assert all(torch.equal(model.state_dict()[name], fresh[name]) for name in expected)


def test_bad_protocols():
    with pytest.raises(ValueError, match="warmup_steps < steps"):
        FineTuneProtocol(steps=5, warmup_steps=5)


def test_kept_statistics_get_around_units_that_die_on_a_batch():
    """Normalised by its own batch, the last stage of this model is silent on any image, and no gradient comes through;
    with the statistics it came with it is not. Who fine-tunes it has both ways."""
    model = tiny_resnet()
    last = batch_norms(model)[-1]
    with torch.no_grad():
        last.bias.fill_(-20)  # far below what a normalised batch can reach
        for norm in batch_norms(model):
            if norm.num_features == last.num_features:
                norm.bias.fill_(-20)
                norm.running_mean.fill_(-30)
    images, labels = bars(48, 0)
    found = {}
    for name in ("dense", "statistics_kept"):
        attacked = copy.deepcopy(model)
        predict = ATTACKS[name].fit(attacked, Loot(images, labels, 3), FineTuneProtocol(steps=60), 3e-3, 0)
        found[name] = accuracy(predict, *bars(90, 1))
        kept = [
            torch.equal(attacked.get_submodule(n).running_mean, norm.running_mean)
            for n, norm in model.named_modules()
            if isinstance(norm, nn.BatchNorm2d)
        ]
        assert all(kept) == (name == "statistics_kept")
    assert found["dense"] < 0.4
    assert found["statistics_kept"] > 0.9


def test_statistics_that_are_not_there():
    attack = ATTACKS["statistics_kept"]
    assert "no BatchNorm" in attack.unsuitable(tiny_vit(), 3)
    assert attack.unsuitable(tiny_resnet(), 3) is None


def test_biases_with_all_heads():
    """A second one would stay random, and its noise be in every prediction."""
    options = {"image_size": 8, "patch_size": 4, "hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = DeiTForImageClassificationWithTeacher(DeiTConfig(**options, num_labels=3))
    model.config.ntp = {"head_name": "cls_classifier"}
    chosen = {id(parameter) for parameter in bias_parameters(model)}
    assert {id(model.cls_classifier.weight), id(model.distillation_classifier.weight)} <= chosen
    assert "distillation_classifier" not in adaptable_modules(model)
