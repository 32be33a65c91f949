import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from hf_ntp.models import EncoderWithHead, batch_norms, find_head, prunable_weights
from hf_ntp.training import attackers
from hf_ntp.training.arguments import ProtectionArguments
from hf_ntp.training.attacker import INFORMED, Attacker, Plan
from hf_ntp.training.attackers import AttackerPool

from ..conftest import Rows, tiny_resnet, tiny_vit

ONE = {
    "attackers": 1,
    "attacker_informed": 0.0,
    "attacker_keeps_mask": 0.0,
    "attacker_keeps_head": 0.0,
    "attacker_keeps_statistics": 0.0,
    "attacker_patience": 0,
}


def pool_of(model, seed=0, **options):
    name, head = find_head(model)
    return AttackerPool(model, name, head, {"target": np.arange(9) % 3}, ProtectionArguments(**options), seed)


def batch(size=12, seed=0):
    data = Rows(size=size, seed=seed)
    return {"target": [(data.images, data.labels)]}


def no_masks():
    return {}


def pushes(pool):
    return dict(zip(pool.weights, pool.push, strict=True))


def test_the_first_step_by_hand(monkeypatch):
    """The defender's direction is minus the gradient, at length 1; the offset becomes one step of Adam: -rate * sign.

    The rate of an attacker's first step is a fifth of its own.
    """
    monkeypatch.setattr(attackers, "_MARGIN", 0.0)
    model = tiny_vit()
    pool = pool_of(model, attacker_learning_rates=[1e-3], **ONE)
    reference = copy.deepcopy(model)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    # Weights of the head drawn as the pool draws them.
    plan = Plan.draw(pool.options, 0, 0, 0)
    generator = torch.Generator().manual_seed(plan.seed)
    head = torch.randn(3, 16, generator=generator) * 0.02
    ((images, _),) = batch()["target"]
    logits = reference.vit(pixel_values=images).last_hidden_state[:, 0] @ head.T
    labels = logits.argmax(-1)  # better than chance, so that the defender reacts
    (step,) = pool.step({"target": [(images, labels)]}, no_masks)

    loss = F.cross_entropy(logits, labels)
    wanted = dict(
        zip(pool.weights, torch.autograd.grad(loss, [reference.get_parameter(n) for n in pool.weights]), strict=True)
    )
    norm = math.sqrt(sum(float(g.square().sum()) for g in wanted.values()))
    assert step.loss == pytest.approx(float(loss.detach()), abs=1e-6)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert float(step.loss) < math.log(3)
    for name, gradient in wanted.items():
        torch.testing.assert_close(pushes(pool)[name], -gradient / norm, atol=1e-6, rtol=1e-4)
        moved = gradient.abs() > 1e-5
        torch.testing.assert_close(
            pool.attackers[0].offsets[name][moved], -2e-4 * gradient[moved].sign(), atol=1e-5, rtol=0
        )

    pool.push_back(1e-2)  # Adam's first step: against the sign of its gradient, so that the attacker's loss rises
    for name, gradient in wanted.items():
        moved = gradient.abs() > 1e-4
        change = model.get_parameter(name) - before[name]
        torch.testing.assert_close(change[moved], 1e-2 * gradient[moved].sign(), atol=1e-4, rtol=0)
    assert torch.equal(model.classifier.weight, before["classifier.weight"])


def test_no_step_where_nobody_is_denied():
    model = tiny_vit()
    pool = pool_of(model, **{**ONE, "attacker_patience": 10})
    before = copy.deepcopy(model.state_dict())
    pool.step(batch(), no_masks)
    pool.push_back(1e-2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
@pytest.mark.parametrize("sgd", [0.0, 1.0])
def test_an_attacker_learns_and_leaves_the_model_alone(make, sgd):
    """Its loss falls at W + offset while weights, statistics and the global random state stay as they were."""
    model = make()
    pool = pool_of(model, attacker_learning_rates=[3e-3], attacker_horizon=[200, 200], attacker_sgd=sgd, **ONE)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    losses = [float(pool.step(batch(), no_masks)[0].loss) for _ in range(120)]
    assert losses[-1] < 0.5 * losses[0]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert any(push.abs().sum() > 0 for push in pool.push)


@pytest.mark.parametrize("sgd", [0.0, 1.0])
def test_an_attacker_that_diverges_harms_nobody(monkeypatch, sgd):
    """Its loss counts as chance, and the encoder moves as if it were not there."""
    monkeypatch.setattr(attackers, "_MARGIN", -10.0)  # everybody is denied
    options = {"attackers": 2, "attacker_horizon": [9, 9], "attacker_patience": 0, "attacker_informed": 0.0}
    pools = [pool_of(tiny_vit(), **options, attacker_sgd=sgd) for _ in range(2)]
    for pool in pools:
        pool.step(batch(), no_masks)
    alone, broken = pools
    # With nothing but zeros to classify by, an attacker passes no gradient on to the encoder.
    for tensor in alone.attackers[1].head.values():
        tensor.zero_()
    next(iter(broken.attackers[1].offsets.values())).fill_(1e38)
    steps = [pool.step(batch(), no_masks) for pool in pools]
    assert float(steps[1][1].loss) == pytest.approx(math.log(3))
    assert steps[1][0].loss == steps[0][0].loss
    assert all(torch.equal(a, b) for a, b in zip(alone.push, broken.push, strict=True))
    assert all(tensor.isfinite().all() for tensor in broken.tensors().values())


def test_attackers_who_would_never_have_enough_images():
    """Two attackers share three images out as two and one, of which BatchNorm has nothing to average."""
    pool = pool_of(tiny_resnet(), attackers=2)
    with pytest.raises(ValueError, match=r"2 attackers share out 3 images of each of 1 process.*needed: two at least"):
        pool.check_shares(3, 1)
    pool.check_shares(3, 2)
    pool.check_shares(4, 1)
    assert len(pool.step(batch(3), no_masks)) == 1
    pool_of(tiny_vit(), attackers=2).check_shares(3, 1)


def test_attackers_die_and_are_replaced():
    pool = pool_of(tiny_vit(), attackers=3, attacker_horizon=[2, 4], attacker_patience=0)
    last = [step.last for _ in range(8) for step in pool.step(batch(), no_masks)]
    assert sum(last) == sum(pool.lives) >= 6
    assert all(attacker is None or attacker.age < attacker.plan.lifetime for attacker in pool.attackers)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_attackers_share_the_batch_out(monkeypatch, processes):
    """In order, as even as can be, and whatever the number of processes that hold the 12 rows."""
    model = tiny_vit()
    name, head = find_head(model)
    pool = AttackerPool(model, name, head, {"a": np.arange(3), "b": np.arange(3)}, ProtectionArguments(attackers=9), 0)
    rows = torch.arange(12).chunk(processes)
    # Five attackers of the first domain, four of the second.
    for domain, wanted in ((0, [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11]]), (1, torch.arange(12).chunk(4))):
        for place, images in enumerate(wanted):
            found = []
            for rank, part in enumerate(rows):
                state = SimpleNamespace(num_processes=processes, process_index=rank)
                monkeypatch.setattr(attackers, "PartialState", lambda state=state: state)
                own, count = pool._rows(domain + 2 * place, len(part))
                found += part[own].tolist()
                assert count == len(images)
            assert found == list(images)


def test_micro_batches_count_as_one_batch():
    whole, split = (pool_of(tiny_vit(), **{**ONE, "attackers": 2}) for _ in range(2))
    ((images, labels),) = batch(size=12)["target"]
    whole.step({"target": [(images, labels)]}, no_masks)
    # Each attacker has a half of every micro-batch.
    parts = [torch.cat([images[i : i + 3], images[i + 6 : i + 9]]) for i in (0, 3)]
    labels = [torch.cat([labels[i : i + 3], labels[i + 6 : i + 9]]) for i in (0, 3)]
    split.step({"target": list(zip(parts, labels, strict=True))}, no_masks)
    for one, other in zip(whole.attackers, split.attackers, strict=True):
        for a, b in zip(one.trained(), other.trained(), strict=True):
            assert torch.equal(a, b)


def test_a_batch_too_small_for_all_is_for_some():
    pool = pool_of(tiny_vit(), attackers=4)
    ((images, labels),) = batch(size=2)["target"]
    assert len(pool.step({"target": [(images, labels)]}, no_masks)) == 2


def test_first_lives_are_staggered():
    options = ProtectionArguments(attackers=4, attacker_horizon=[100, 100])
    assert [Plan.draw(options, 0, slot, 0).lifetime for slot in range(4)] == [100, 100, 100, 100]
    options = ProtectionArguments(attackers=4, attacker_horizon=[10, 100])
    drawn = [[Plan.draw(options, seed, slot, 0).lifetime for slot in range(4)] for seed in range(50)]
    assert all(10 <= lifetime <= 100 for lives in drawn for lifetime in lives)
    means = [sum(column) / 50 for column in zip(*drawn, strict=True)]
    assert means == sorted(means)


def test_a_kept_mask_holds_weights_and_gradients():
    model = tiny_vit()
    masks = {name: torch.rand_like(weight) > 0.5 for name, weight in prunable_weights(model).items()}
    pool = pool_of(model, **{**ONE, "attacker_keeps_mask": 1.0, "attacker_horizon": [50, 50]})
    for _ in range(5):
        pool.step(batch(), lambda: masks)
    (attacker,) = pool.attackers
    for name, mask in masks.items():
        assert bool((attacker.offsets[name][~mask] == 0).all())
        assert bool((attacker.offsets[name][mask] != 0).any())
        assert bool((pushes(pool)[name][~mask] == 0).all())


def test_a_kept_head_is_the_models_and_denied_at_once():
    """Its first loss is the model's own cross-entropy, and the first push raises it, however patient the defender."""
    model = tiny_vit()
    pool = pool_of(model, **{**ONE, "attacker_keeps_head": 1.0, "attacker_patience": 10})
    ((images, _),) = batch()["target"]
    with torch.no_grad():
        logits = model(pixel_values=images).logits
    labels = logits.argmax(-1)
    pool.chance["target"] = math.inf
    (step,) = pool.step({"target": [(images, labels)]}, no_masks)
    assert step.loss == pytest.approx(float(F.cross_entropy(logits, labels)), abs=1e-6)
    # Its first step of Adam is a fifth of its rate, from the model's head.
    moved = (pool.attackers[0].head["weight"] - model.classifier.weight.detach()).abs()
    assert float(moved.max()) == pytest.approx(pool.attackers[0].plan.rate / 5, rel=1e-2)
    assert any(push.abs().sum() > 0 for push in pool.push)


def test_statistics_are_kept_with_the_weights_they_belong_to():
    options = ProtectionArguments(attacker_informed=0.8, attacker_keeps_statistics=1.0)
    plans = [Plan.draw(options, 0, 0, life) for life in range(200)]
    assert {plan.start for plan in plans if plan.keeps_statistics} == {"plain", "norms"}
    assert {plan.start for plan in plans if not plan.keeps_statistics} == set(INFORMED) - {"norms"}


@pytest.mark.parametrize("kept", [True, False])
def test_kept_statistics_are_those_of_the_model(kept):
    """The first loss is that of evaluation, or of a pass with the statistics of the batch; neither moves them."""
    model, share = tiny_resnet().train(), {"attacker_keeps_statistics": float(kept)}
    for norm in batch_norms(model):
        norm.running_mean.normal_()
    before = copy.deepcopy(model)
    pool = pool_of(model, **{**ONE, "attacker_keeps_head": 1.0, **share})
    ((images, labels),) = batch()["target"]
    (step,) = pool.step(batch(), no_masks)
    assert all(torch.equal(mine, old) for mine, old in zip(model.buffers(), before.buffers(), strict=True))
    with torch.no_grad():
        expected = F.cross_entropy(before.train(not kept)(images).logits, labels)
    assert step.loss == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(("make", "classes"), [(tiny_vit, 4), (lambda: EncoderWithHead(tiny_vit().vit), 3)])
def test_a_head_for_other_classes_and_a_stand_in_are_not_kept(make, classes):
    model = make()
    name, head = find_head(model)
    assert head.out_features == 3
    options = ProtectionArguments(**{**ONE, "attacker_keeps_head": 1.0, "attacker_patience": 1})
    pool = AttackerPool(model, name, head, {"target": np.arange(classes)}, options, 0)
    pool.chance["target"] = math.inf
    pool.step(batch(), no_masks)
    assert head.weight.std() > 0
    assert not torch.allclose(pool.attackers[0].head["weight"][:3], head.weight, atol=5e-3)
    assert all(push.abs().sum() == 0 for push in pool.push)


def test_informed_attackers_start_elsewhere_and_pass_no_gradient_there(monkeypatch):
    monkeypatch.setattr("hf_ntp.training.attacker.INFORMED", {"stem": INFORMED["stem"]})
    model = tiny_vit()
    pool = pool_of(model, **{**ONE, "attacker_informed": 1.0, "attacker_horizon": [50, 50]})
    for _ in range(30):
        pool.step(batch(), no_masks)
    stem = "vit.embeddings.patch_embeddings.projection.weight"
    assert pool.attackers[0].kept[stem] == 0.0
    assert pool.attackers[0].offsets[stem].abs().max() > 0.01
    assert pushes(pool)[stem].abs().sum() == 0
    assert pushes(pool)["vit.layers.1.mlp.fc1.weight"].abs().sum() > 0


def test_perturbed_attackers_follow_the_encoder_at_their_share(monkeypatch):
    """An attacker at W/2 + offset sees half of a move of W, and its gradient reaches W with the factor 1/2."""
    monkeypatch.setattr("hf_ntp.training.attacker.INFORMED", {"perturbed": INFORMED["perturbed"]})
    model = tiny_vit()
    pool = pool_of(model, **{**ONE, "attacker_informed": 1.0, "attacker_horizon": [50, 50]})
    pool.step(batch(), no_masks)
    (attacker,) = pool.attackers
    assert set(attacker.kept.values()) == {0.5}
    name = "vit.layers.0.mlp.fc1.weight"
    fresh = 2 * (attacker.offsets[name] + 0.0)
    assert (fresh.std() - model.get_parameter(name).std()).abs() < 0.01


def test_regrown_zeros_are_fresh_and_the_rest_stays(monkeypatch):
    monkeypatch.setattr("hf_ntp.training.attacker.INFORMED", {"zeros": INFORMED["zeros"]})
    model = tiny_vit()
    masks = {name: torch.rand_like(weight) > 0.5 for name, weight in prunable_weights(model).items()}
    pool = pool_of(model, attacker_learning_rates=[1e-9], **{**ONE, "attacker_informed": 1.0})
    pool.step(batch(), lambda: masks)
    for name, mask in masks.items():
        offset = pool.attackers[0].offsets[name]
        assert offset[mask].abs().max() < 1e-6
        assert offset[~mask].abs().mean() > 1e-3
    before = {name: tensor.clone() for name, tensor in pool._values(pool.attackers[0]).items()}
    with torch.no_grad():
        for weight in pool.weights.values():
            weight.add_(1.0)
    for name, mask in masks.items():  # it follows the encoder only where it has not regrown
        moved = pool._values(pool.attackers[0])[name] - before[name]
        assert torch.allclose(moved, mask.float(), atol=1e-5)
        pool.step(batch(), lambda: masks)
        assert bool((pushes(pool)[name][~mask] == 0).all())


def test_chance_is_the_entropy_of_the_labels():
    model = tiny_vit()
    name, head = find_head(model)
    labels = np.array([0, 0, 0, 2])
    pool = AttackerPool(model, name, head, {"target": labels}, ProtectionArguments(), 0)
    assert pool.chance["target"] == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert pool.num_classes["target"] == 3


@pytest.mark.parametrize("make", [tiny_vit, tiny_resnet])
def test_state_round_trip_continues_exactly(make):
    shares = {
        "attacker_informed": 0.5,
        "attacker_keeps_mask": 0.5,
        "attacker_keeps_head": 0.5,
        "attacker_keeps_statistics": 0.5,
    }
    options = {"attackers": 3, "attacker_horizon": [3, 6], **shares}
    model = make()
    masks = {name: torch.rand_like(weight) > 0.5 for name, weight in prunable_weights(model).items()}
    one = pool_of(model, **options)
    for _ in range(7):
        one.step(batch(), lambda: masks)
        one.push_back(1e-3)
    other_model = copy.deepcopy(model)
    other = pool_of(other_model, **options)
    other.load({name: tensor.clone() for name, tensor in one.tensors().items()}, copy.deepcopy(one.scalars()))
    for _ in range(7):
        mine, theirs = one.step(batch(), lambda: masks), other.step(batch(), lambda: masks)
        assert [float(s.loss) for s in mine] == [float(s.loss) for s in theirs]
        one.push_back(1e-3)
        other.push_back(1e-3)
    for parameter, same in zip(model.parameters(), other_model.parameters(), strict=True):
        assert torch.equal(parameter, same)


def test_slots_belong_to_domains_in_turn():
    model = tiny_vit()
    name, head = find_head(model)
    pool = AttackerPool(model, name, head, {"a": np.arange(3), "b": np.arange(5)}, ProtectionArguments(attackers=4), 0)
    assert [pool.domain(slot) for slot in range(4)] == ["a", "b", "a", "b"]
    data = Rows(size=10, classes=5)
    for _ in range(4):
        pool.step({"a": batch()["target"], "b": [(data.images, data.labels)]}, no_masks)
    assert [len(attacker.head["bias"]) for attacker in pool.attackers] == [3, 5, 3, 5]


def test_sgd_moves_at_ten_times_the_rate():
    gradient = [torch.ones(2, 2), torch.ones(3, 4), torch.ones(3)]
    plan = Plan.draw(ProtectionArguments(attacker_sgd=1.0, **ONE), 0, 0, 0)
    attacker = Attacker(plan, {"w": torch.zeros(2, 2)}, 3, 4)
    attacker.age = 100
    attacker.advance(gradient)
    assert torch.allclose(attacker.offsets["w"], torch.tensor(-10 * plan.rate))


def test_attackers_without_weight_are_none():
    options = ProtectionArguments(attacker_weight=0.0)
    assert (options.attackers, options.simulated_attackers) == (4, 0)
    assert ProtectionArguments().simulated_attackers == 4
