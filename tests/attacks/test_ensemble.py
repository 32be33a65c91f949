"""Fits that are trained as one model end where single fits do."""

import copy

import pytest
import torch

from hf_ntp.attacks import ATTACKS as ATTACKS_OF_ALL_KINDS
from hf_ntp.attacks import FineTuneProtocol, FineTuning
from hf_ntp.models import prunable_weights

from .conftest import MODELS, loot_of, pruned

PROTOCOL = FineTuneProtocol(steps=12, batch_size=4, warmup_steps=2)
ATTACKS = {
    "dense": FineTuning(),
    "mask kept": FineTuning(keep_mask=True),
    "head kept": FineTuning(keep_head=True),
    "statistics kept": FineTuning(changes=("keep_statistics",)),
    "biases": FineTuning(trained="bias"),
    "sgd, longer": FineTuning(optimizer="sgd", longer=2),
    "changed": FineTuning(changes=("renormalize", "reinit_first_block")),
}


def both(attack, starts):
    """Models and predictions of single fits and of a joint one, with rates, seeds and images of their own."""
    shared = loot_of(9, seed=0)
    loots = [shared, shared, loot_of(6, seed=1)]
    values, seeds = [rate * (10 if attack.optimizer == "sgd" else 1) for rate in (1e-4, 3e-3, 1e-3)], [0, 1, 2]
    single, joint = ([copy.deepcopy(start) for start in starts] for _ in range(2))
    fits = zip(single, loots, values, seeds, strict=True)
    predicts = [attack.fit(model, loot, PROTOCOL, value, seed) for model, loot, value, seed in fits]
    return single, predicts, joint, FineTuning.fit_together([attack] * 3, joint, loots, PROTOCOL, values, seeds)


def end_alike(start, one, other):
    begin, found = start.state_dict(), other.state_dict()
    moved = torch.cat([(v.float() - begin[n]).flatten() for n, v in one.state_dict().items() if "class" not in n])
    apart = torch.cat([(v.float() - found[n]).flatten() for n, v in one.state_dict().items()])
    assert moved.norm() > 1e-3
    # Adam makes rounding of vanishing gradients visible.
    assert apart.norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("name", ATTACKS)
def test_the_same_as_one_after_another(model, name):
    torch.manual_seed(1)
    starts = [pruned(copy.deepcopy(model)) for _ in range(3)]
    with torch.no_grad():
        for start in starts[1:]:  # every one has a start of its own
            for weight in start.parameters():
                weight.mul_(1 + 0.1 * torch.randn_like(weight))
    images = torch.randn(40, 3, 8, 8)
    single, predicts, joint, together = both(ATTACKS[name], starts)
    for i, (one, other) in enumerate(zip(single, joint, strict=True)):
        end_alike(starts[i], one, other)
        assert (predicts[i](images) == together[i](images)).float().mean() >= 0.95


def test_one_that_diverges_leaves_the_others_alone():
    starts = [MODELS["vit"]() for _ in range(3)]
    with torch.no_grad():
        starts[1].get_parameter("classifier.weight").fill_(float("nan"))
    single, _, joint, _ = both(FineTuning(keep_head=True), starts)
    broken = [any(weight.isnan().any() for weight in model.parameters()) for model in joint]
    assert broken == [False, True, False]
    assert torch.allclose(single[2].classifier.weight, joint[2].classifier.weight, atol=1e-4)


def test_batch_norm_needs_batches_of_one_size():
    models, loots = [MODELS["resnet"]() for _ in range(2)], [loot_of(3), loot_of(6)]
    with pytest.raises(RuntimeError, match="needed: batches of one size"):
        FineTuning.fit_together([FineTuning()] * 2, models, loots, PROTOCOL, [1e-3, 1e-3], [0, 0])


def test_other_attacks_on_batches_of_other_sizes():
    """With the mask and without, the head and without, two images and six, equal rates apart from each other."""
    options = ({}, {"keep_mask": True}, {"keep_head": True}, {"changes": ("reset_norms",)})
    attacks = [FineTuning(**each) for each in options]
    loots, values = [loot_of(2), loot_of(3, seed=1), *2 * [loot_of(6, seed=2)]], [3e-3, 1e-3, 3e-3, 1e-2]
    torch.manual_seed(0)
    starts = [pruned(MODELS["vit"]()) for _ in attacks]
    single, joint = copy.deepcopy(starts), copy.deepcopy(starts)
    for attack, model, loot, value, seed in zip(attacks, single, loots, values, range(4), strict=True):
        attack.fit(model, loot, PROTOCOL, value, seed)
    FineTuning.fit_together(attacks, joint, loots, PROTOCOL, values, range(4))
    for start, one, other in zip(starts, single, joint, strict=True):
        end_alike(start, one, other)
    zeros = {name: weight == 0 for name, weight in prunable_weights(starts[1]).items()}
    assert all((joint[1].get_parameter(name)[mask] == 0).all() for name, mask in zeros.items())


def test_what_can_be_trained_as_one():
    keys = [FineTuning(**options).joint_key() for options in ({"keep_mask": True}, {"changes": ("reset_norms",)})]
    assert keys == [FineTuning().joint_key()] * 2
    for options in ({"optimizer": "sgd"}, {"longer": 2}, {"trained": "bias"}, {"changes": ("keep_statistics",)}):
        assert FineTuning(**options).joint_key() != FineTuning().joint_key()
    assert ATTACKS_OF_ALL_KINDS["lora"].joint_key() is None
