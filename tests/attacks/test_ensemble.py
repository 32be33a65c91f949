"""Fits that are trained as one model end where single fits do."""

import copy

import pytest
import torch

from hf_ntp.attacks import FineTuneProtocol, FineTuning

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
    return single, predicts, joint, attack.fit_together(joint, loots, PROTOCOL, values, seeds)


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
        found, begin = other.state_dict(), starts[i].state_dict()
        moved = torch.cat([(v.float() - begin[n]).flatten() for n, v in one.state_dict().items() if "class" not in n])
        apart = torch.cat([(v.float() - found[n]).flatten() for n, v in one.state_dict().items()])
        assert moved.norm() > 1e-3
        # Adam makes rounding of vanishing gradients visible.
        assert apart.norm() < 0.02 * moved.norm(), i
        assert (predicts[i](images) == together[i](images)).float().mean() >= 0.95


def test_one_that_diverges_leaves_the_others_alone():
    starts = [MODELS["vit"]() for _ in range(3)]
    with torch.no_grad():
        starts[1].get_parameter("classifier.weight").fill_(float("nan"))
    single, _, joint, _ = both(FineTuning(keep_head=True), starts)
    broken = [any(weight.isnan().any() for weight in model.parameters()) for model in joint]
    assert broken == [False, True, False]
    assert torch.allclose(single[2].classifier.weight, joint[2].classifier.weight, atol=1e-4)


def test_an_ensemble_needs_batches_of_one_size():
    models, loots = [MODELS["vit"]() for _ in range(2)], [loot_of(3), loot_of(6)]
    with pytest.raises(RuntimeError, match="equal size"):
        FineTuning().fit_together(models, loots, PROTOCOL, [1e-3, 1e-3], [0, 0])
