import pytest
import torch
from torch.nn import functional as F

from hf_ntp.attacks import FineTuneProtocol, Loot, fine_tuning, source_tuning
from hf_ntp.attacks.fine_tuning import predictor
from hf_ntp.attacks.perturbations import PERTURBATIONS, blur, brightness_contrast, occlusion, perturb
from hf_ntp.attacks.source_tuning import SourceTuning, TransNTL, part_of
from hf_ntp.models import find_head

from ..conftest import Rows, tiny_vit
from .conftest import QUICK, accuracy, changed, loot_of, state_of


@pytest.fixture
def source_stage(monkeypatch):
    """Stop after the source stage."""
    monkeypatch.setattr(source_tuning, "target_stage", lambda *args: None)


@pytest.mark.parametrize("head", ["kept", "new"])
@pytest.mark.parametrize("layers", ["all", "last"])
def test_what_the_source_stage_trains(source_stage, layers, head):
    model = tiny_vit()
    before, (name, _) = state_of(model), find_head(model)
    SourceTuning(layers, head).fit(model, loot_of(), QUICK, 1e-9, 0)
    assert torch.allclose(find_head(model)[1].weight, before[f"{name}.weight"], atol=1e-6) == (head == "kept")
    SourceTuning(layers, head).fit(model, loot_of(), QUICK, 1e-2, 0)
    body = {key for key in changed(before, model) if not key.startswith(name)}
    assert bool(body) == (layers == "all")
    assert all(weight.requires_grad for weight in model.parameters())


def test_the_source_stage_learns_the_source(source_stage):
    model, source = tiny_vit(), Rows(48, seed=100)
    loot = loot_of()._replace(source=(source.images, source.labels))
    for attack in (SourceTuning("all", "new"), TransNTL()):
        attack.fit(model, loot, FineTuneProtocol(steps=180, warmup_steps=6), 3e-3, 0)
        assert accuracy(predictor(model), source.images, source.labels) > 0.8


@pytest.mark.parametrize("attack", [SourceTuning(), TransNTL()])
@pytest.mark.parametrize("classes", [3, 4])
def test_the_target_stage_keeps_a_head_that_fits(monkeypatch, attack, classes):
    kept = []
    real = source_tuning.FineTuning
    monkeypatch.setattr(
        source_tuning, "FineTuning", lambda keep_head: (kept.append(keep_head), real(keep_head=keep_head))[1]
    )
    attack.fit(tiny_vit(), loot_of(8, classes), QUICK, 1e-3, 0)
    assert kept == [classes == 3]


@pytest.mark.parametrize("steps", [2, 3, 4, 5, 10, 100, 599, 600])
def test_the_source_stage_is_valid_and_a_third(steps):
    for warmup in {0, 1, steps - 1}:
        part = part_of(FineTuneProtocol(steps=steps, warmup_steps=warmup), 1 / 3)
        assert part.steps == max(round(steps / 3), 1)


@pytest.mark.parametrize("attack", [SourceTuning(), SourceTuning("last"), TransNTL()])
def test_the_target_stage_has_the_whole_budget(attack, monkeypatch):
    taken = []
    real = fine_tuning.get_scheduler
    monkeypatch.setattr(fine_tuning, "get_scheduler", lambda *args: (taken.append(args[3]), real(*args))[1])
    attack.fit(tiny_vit(), loot_of(), FineTuneProtocol(steps=9, warmup_steps=1), 1e-3, 0)
    assert taken == [3, 9]


def test_source_data_are_needed():
    for attack in (SourceTuning(), TransNTL()):
        assert attack.needs_source
        with pytest.raises(ValueError, match="Pass `source`"):
            attack.fit(tiny_vit(), loot_of()._replace(source=None), QUICK, 1e-3, 0)


def test_a_head_that_does_not_fit_is_worth_nothing():
    assert "3 classes" in SourceTuning("last").unsuitable(tiny_vit(), 4)
    assert SourceTuning("all").unsuitable(tiny_vit(), 4) is None
    assert TransNTL().unsuitable(tiny_vit(), 4) is None


def test_bad_options():
    with pytest.raises(ValueError, match="layers 'all' or 'last'"):
        SourceTuning("first")
    with pytest.raises(ValueError, match="head 'kept' or 'new'"):
        SourceTuning(head="old")
    with pytest.raises(ValueError, match=">= 0"):
        TransNTL(-1)


def test_the_repair_loss_by_hand():
    """KL(perturbed || clean), summed over classes, with no gradient through the clean prediction."""
    model, data = tiny_vit(), Rows(6)
    loss = TransNTL(2.0)._repair_loss(model, data.images, data.labels, 6, 0)()
    order = next(source_tuning.batches_of(6, 6, 0))
    images, labels = data.images[order], data.labels[order]
    clean = model(pixel_values=images).logits
    shifted = model(pixel_values=perturb(images, torch.Generator().manual_seed(0))).logits.softmax(-1)
    divergence = (shifted * (shifted / clean.detach().softmax(-1)).log()).sum(-1).mean()
    expected = F.cross_entropy(clean, labels) + 2 * divergence
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    weights = list(model.parameters())
    for found, wanted in zip(*(torch.autograd.grad(x, weights) for x in (loss, expected)), strict=True):
        assert torch.allclose(found, wanted, atol=1e-6)


@pytest.mark.parametrize("function", [*PERTURBATIONS, perturb])
def test_perturbations(function):
    images = Rows(6).images
    copy = images.clone()
    first, second, other = (function(images, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert first.shape == images.shape
    assert first.dtype == images.dtype
    assert torch.isfinite(first).all()
    assert torch.equal(first, second)
    assert not torch.equal(first, other)
    assert not torch.equal(first, images)
    assert torch.equal(images, copy)


def test_occlusion_covers_a_quarter_with_the_mean():
    images = torch.rand(5, 3, 8, 8)
    result = occlusion(images, torch.Generator().manual_seed(0))
    covered = result != images
    assert (covered.sum((2, 3)) == 16).all()
    assert torch.allclose(result[covered], images.mean())


def test_blur_and_brightness_of_a_flat_image():
    flat = torch.full((2, 3, 8, 8), 0.7)
    assert torch.allclose(blur(flat, torch.Generator()), flat)
    assert torch.allclose(brightness_contrast(flat, torch.Generator()), flat)  # no spread, no shift


def test_source_may_have_another_size_than_the_target():
    source = Rows(30)
    loot = Loot(*loot_of(4)[:3], (source.images, source.labels))
    assert TransNTL().fit(tiny_vit(), loot, QUICK, 1e-3, 0)(source.images).shape == (30,)
